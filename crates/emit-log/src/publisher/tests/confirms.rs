//! Confirms, returned messages, and a slow broker.

use std::io::Write;

use super::*;

#[test]
fn messages_carry_their_exchange_numbers_and_packing() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["-e", "x", "-m"], vec![single(1, "a"), batch(2, "b\nc")]);
    let session = broker.accept();
    let published = expect(&session, &["a", "b\nc"]);
    let [first, second] = &published[..] else { panic!("{published:?}") };
    assert_eq!((&*first.exchange, first.mandatory), ("x", true));
    let number = |message: &Published| MessageId::parse(message.message_id.as_ref()?);
    assert_eq!(number(first).map(|id| id.number), Some(1));
    assert_eq!(number(second).map(|id| id.number), Some(2));
    assert_eq!((&first.message_type, second.message_type.as_deref()), (&None, Some("lines")));
    session.ack(2, true);
    run.succeeds_with("3 confirmed, 0 in doubt");
}

#[test]
fn confirms_count_one_by_one_and_many_at_a_time() {
    let (_broker, session, run) = send(&[], numbered(1..=5));
    run.reaches("0 confirmed, 5 in doubt");
    session.ack(1, false);
    run.reaches("1 confirmed, 4 in doubt");
    session.ack(4, true);
    run.reaches("4 confirmed, 1 in doubt");
    session.ack(5, false);
    session.expect_close();
    run.succeeds_with("5 confirmed, 0 in doubt");
}

#[test]
fn confirms_wait_briefly_for_the_next_line() {
    let start = Instant::now();
    let Here { session, mut publisher, .. } = send_here(QUICK, &[], 1);
    let (input, mut writer) = std::io::pipe().unwrap();
    session.ack(1, false);
    let wait = |publisher: &mut Publisher| {
        publisher.wait(Some(input.as_fd()), Some(&DEADLINE), None).expect("no end")
    };
    assert!(!wait(&mut publisher), "the confirm has ended the wait");
    assert!(start.elapsed() >= CONFIRM_DELAY);
    assert_eq!(publisher.counts().done(), 1);
    writer.write_all(b"line").unwrap();
    assert!(wait(&mut publisher));
}

#[test]
fn a_message_confirmed_before_an_earlier_one_is_not_in_doubt() {
    let (_broker, session, run) = send(&[], numbered(1..=4));
    session.ack(3, false);
    session.ack(2, false);
    run.reaches("2 confirmed, 2 in doubt");
    session.ack(4, true);
    run.succeeds_with("4 confirmed, 0 in doubt");
}

#[test]
fn confirms_of_messages_that_were_not_sent_change_nothing() {
    let (_broker, session, run) = send(&[], numbered(1..=2));
    for tag in [0, 3, u64::MAX] {
        session.ack(tag, false);
        session.nack(tag, false);
    }
    session.ack(1, false);
    run.reaches("1 confirmed, 1 in doubt");
    session.ack(1, true);
    session.ack(2, false);
    session.expect_close();
    run.succeeds_with("2 confirmed, 0 in doubt");
}

#[test]
fn the_window_bounds_the_messages_in_flight() {
    const ALL: u64 = 2500;
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], numbered(1..=ALL));
    let session = broker.accept();
    session.expect_publishes(2000);
    run.reaches("0 confirmed, 2000 in doubt, 500 read and not sent");
    session.ack(1000, true);
    session.expect_publishes(500);
    session.ack(ALL, true);
    run.succeeds_with("2500 confirmed, 0 in doubt");
}

#[test]
fn a_returned_message_counts_when_it_is_confirmed() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["--mandatory"], numbered(1..=4));
    let session = broker.accept();
    let published = expect(&session, &["1", "2", "3", "4"]);
    session.give_back(&published[1]);
    session.give_back(&published[3]);
    session.ack(4, false);
    session.ack(3, true);
    session.expect_close();
    run.succeeds_with("4 confirmed, 0 in doubt, 2 unroutable");
}

#[test]
fn a_batch_that_is_returned_counts_with_all_its_records() {
    for (options, counts) in [
        (&["-m"][..], "3 confirmed, 0 in doubt, 3 unroutable"),
        (&["-m", "--no-confirm"], "3 sent without confirmation, 0 in doubt, 3 unroutable"),
    ] {
        let Here { session, mut publisher, .. } = send_here(QUICK, options, 0);
        publisher.publish([batch(1, "a\nb\nc")]).expect("publish");
        let published = expect(&session, &["a\nb\nc"]);
        session.give_back(&published[0]);
        session.ack(1, false);
        Run::finish(publisher).succeeds_with(counts);
    }
}

#[test]
fn a_return_does_not_count_for_the_repeated_message() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["--mandatory"], numbered(1..=2));
    let session = broker.accept();
    let published = expect(&session, &["1", "2"]);
    session.give_back(&published[0]);
    session.give_back(&published[1]);
    session.ack(1, false);
    run.reaches("1 confirmed, 1 in doubt, 1 unroutable");
    session.cut();
    let session = accept(&broker, &["2"]);
    session.ack(1, false);
    run.succeeds_with("2 confirmed, 0 in doubt, 1 unroutable");
}

#[test]
fn a_blocked_connection_continues_where_it_was() {
    let Here { session, mut publisher, .. } = send_here(QUICK, &[], 2);
    session.block("low on memory");
    act_until(&mut publisher, is_blocked);
    assert_eq!(publisher.counts().to_string(), "0 confirmed, 2 in doubt");
    session.ack(1, false);
    session.unblock();
    act_until(&mut publisher, |publisher| !is_blocked(publisher));
    assert_eq!(publisher.counts().to_string(), "1 confirmed, 1 in doubt");
    session.ack(2, false);
    Run::finish(publisher).succeeds_with("2 confirmed, 0 in doubt");
}

#[test]
fn a_lost_connection_is_not_blocked_any_more() {
    let Here { broker, session, mut publisher } = send_here(QUICK, &[], 1);
    session.block("low on disk");
    act_until(&mut publisher, is_blocked);
    session.cut();
    act_until(&mut publisher, |publisher| !is_blocked(publisher));
    let run = Run::finish(publisher);
    let session = accept(&broker, &["1"]);
    session.ack(1, false);
    run.succeeds_with("1 confirmed, 0 in doubt");
}

/// Sets the last answer of the broker to an hour ago.
fn age(publisher: &mut Publisher) {
    let session = publisher.session_mut().expect("a session");
    session.last_answer = Instant::now().checked_sub(HOUR).expect("an earlier time");
    session.sent_at = session.last_answer;
}

#[test]
fn a_broker_that_confirms_nothing_in_time_ends_the_publisher() {
    for (reason, why) in
        [(None, ""), (Some("low on memory"), "; it blocks publishers: low on memory")]
    {
        let Here { session, mut publisher, .. } = send_here(QUICK, &["--retry", "1m"], 2);
        session.ack(1, false);
        act_until(&mut publisher, |publisher| publisher.counts().done() == 1);
        if let Some(reason) = reason {
            session.block(reason);
            act_until(&mut publisher, is_blocked);
        }
        let peer = publisher.session().expect("a session").publishing.peer().to_string();
        age(&mut publisher);
        assert_eq!(
            act_until_end(publisher),
            format!(
                "1 confirmed, 1 in doubt: publish to exchange 'logs': {peer} has confirmed nothing \
                 for 60s{why} (--retry sets how long to wait)"
            )
        );
    }
}

#[test]
fn a_confirm_that_waits_in_the_socket_is_in_time() {
    let Here { session, mut publisher, .. } = send_here(QUICK, &[], 1);
    age(&mut publisher);
    session.ack(1, false);
    publisher.check_deadline().expect("a confirm");
    assert_eq!(publisher.counts().to_string(), "1 confirmed, 0 in doubt");
}

#[test]
fn a_broker_that_confirms_nothing_gets_another_connection() {
    let Here { broker, session, mut publisher } = send_here(QUICK, &["--retry", "forever"], 2);
    session.ack(1, false);
    act_until(&mut publisher, |publisher| publisher.counts().done() == 1);
    age(&mut publisher);
    assert_eq!(publisher.deadline(), None);
    publisher.check_deadline().expect("no end");
    assert!(publisher.session().is_none());
    act_until(&mut publisher, |publisher| publisher.session().is_some());
    act_until(&mut publisher, |publisher| hold(publisher).is_none());
    let session = accept(&broker, &["2"]);
    // The other queues get the message each time, so the next attempt comes after as long again.
    assert!(publisher.stall_time() > Instant::now().checked_add(HOUR / 2));
    session.ack(1, false);
    Run::finish(publisher).succeeds_with("2 confirmed, 0 in doubt");
}

#[test]
fn a_message_that_is_still_being_sent_needs_no_other_connection() {
    let broker = ScriptedBroker::start();
    let mut publisher = lines_publisher(QUICK, &broker, &["--retry", "forever"]);
    let session = broker.accept();
    session.stop_reading();
    let body = "x".repeat(64 << 20);
    publisher.publish([single(1, &body)]).expect("publish");
    age(&mut publisher);
    publisher.check_deadline().expect("no end");
    session.continue_reading();
    act_until(&mut publisher, |publisher| {
        !publisher.session().expect("it").publishing.is_sending()
    });
    publisher.check_deadline().expect("no end");
    assert_eq!(text(&session.expect_publishes(1)[0].body), body);
    session.ack(1, false);
    Run::finish(publisher).succeeds_with("1 confirmed, 0 in doubt");
}

#[test]
fn an_alarm_is_waited_for_on_the_same_connection() {
    let Here { session, mut publisher, .. } = send_here(QUICK, &["--retry", "forever"], 1);
    session.block("low on memory");
    act_until(&mut publisher, is_blocked);
    age(&mut publisher);
    publisher.check_deadline().expect("no end");
    session.ack(1, false);
    Run::finish(publisher).succeeds_with("1 confirmed, 0 in doubt");
}
