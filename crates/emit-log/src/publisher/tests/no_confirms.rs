//! `--no-confirm`.

use super::*;

#[test]
fn all_records_are_in_doubt_when_the_connection_is_lost() {
    for end in ENDS {
        let Here { session, mut publisher, .. } = send_here(QUICK, &["--no-confirm"], 3);
        end(session);
        let lost = publisher.wait(None, Some(&DEADLINE), None);
        let text = text_of(&mut publisher, lost.unwrap_err());
        assert!(text.starts_with("3 sent without confirmation, 3 in doubt: "), "{text}");
    }
}

#[test]
fn an_error_is_reported_at_the_end() {
    let Here { session, publisher, .. } = send_here(QUICK, &["--no-confirm"], 1);
    session.go_silent();
    let run = Run::finish(publisher);
    session.close_channel(404, NO_EXCHANGE, PUBLISH);
    run.fails_with(&format!(
        "1 sent without confirmation, 1 in doubt: publish to exchange 'logs': {NO_EXCHANGE}"
    ));
}

#[test]
fn an_alarm_is_reported_at_the_end() {
    let Here { session, publisher, .. } = send_here(QUICK, &["--no-confirm"], 1);
    let counts = publisher.counts();
    session.go_silent();
    let run = Run::finish(publisher);
    session.block("low on memory");
    wait_until("the alarm shows", || counts.status().contains("(blocked: low on memory)"));
    session.cut();
    let text = run.outcome().unwrap_err();
    assert!(text.starts_with("1 sent without confirmation, 1 in doubt: "), "{text}");
}

#[test]
fn a_broker_that_does_not_answer_ends_the_publisher() {
    let options = ["--no-confirm", "--retry", "0s"];
    let Here { session, publisher, .. } = send_here(QUICK, &options, 1);
    session.go_silent();
    let text = Run::finish(publisher).outcome().unwrap_err();
    assert!(text.contains("1 in doubt: "), "{text}");
    assert!(text.contains("has not read all messages within 5s"), "{text}");
}

#[test]
fn an_answer_right_before_the_end_of_the_connection_counts() {
    let broker = ScriptedBroker::start();
    let mut publisher = lines_publisher(QUICK, &broker, &["--no-confirm"]);
    publisher.publish([single(1, "1")]).expect("publish");
    let session = broker.accept();
    session.expect_question();
    expect(&session, &["1"]);
    let mut run = None;
    session.in_one_piece(|session| {
        run = Some(Run::finish(publisher));
        session.expect_question();
        session.close(320, "CONNECTION_FORCED - for a test");
    });
    run.unwrap().succeeds_with("1 sent without confirmation, 0 in doubt");
}

#[test]
fn messages_sent_while_blocked_are_not_done() {
    let Here { session, mut publisher, .. } = send_here(QUICK, &["--no-confirm"], 1);
    session.block("low on memory");
    act_until(&mut publisher, is_blocked);
    publisher.publish([single(2, "2")]).expect("publish");
    expect(&session, &["2"]);
    assert_eq!(publisher.counts().to_string(), "2 sent without confirmation, 2 in doubt");
    assert_eq!(publisher.counts().done(), 1);
    let run = Run::finish(publisher);
    session.unblock();
    session.expect_question();
    run.succeeds_with("2 sent without confirmation, 0 in doubt");
}

#[test]
fn a_channel_closed_while_no_message_is_sent_ends_the_publisher() {
    for options in [&["--no-confirm"][..], &["--no-confirm", "--mandatory"]] {
        let Here { session, publisher, .. } = send_here(QUICK, options, 1);
        session.close_channel(404, NO_EXCHANGE, PUBLISH);
        assert_eq!(
            act_until_end(publisher),
            format!(
                "1 sent without confirmation, 1 in doubt: publish to exchange 'logs': {NO_EXCHANGE}"
            )
        );
    }
}
