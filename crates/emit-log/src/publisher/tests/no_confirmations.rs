//! `--no-confirm`.

use super::*;

#[test]
fn all_records_are_in_doubt_when_the_connection_is_lost() {
    for end in ENDS {
        let Here { session, mut publisher, .. } = send_here(QUICK, &["--no-confirm"], 3);
        end(session);
        let lost = publisher.wait(None, Some(&DEADLINE), None);
        let text = format!("{:#}", lost.unwrap_err());
        assert!(text.starts_with("3 sent without confirmation, 3 in doubt: "), "{text}");
    }
}

#[test]
fn a_refusal_shows_when_the_broker_is_asked() {
    let Here { session, publisher, .. } = send_here(QUICK, &["--no-confirm"], 1);
    session.go_silent();
    let run = Run::finish(publisher);
    session.close_channel(404, NO_EXCHANGE, PUBLISH);
    run.fails_with(&format!(
        "1 sent without confirmation, 1 in doubt: publish to exchange 'logs': {NO_EXCHANGE}"
    ));
}

#[test]
fn messages_sent_while_blocked_are_not_done() {
    let Here { session, mut publisher, .. } = send_here(QUICK, &["--no-confirm"], 1);
    session.block("low on memory");
    act_until(&mut publisher, is_blocked);
    publisher.publish(single(2, "2")).expect("publish");
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
