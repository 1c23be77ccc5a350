//! Queues that nack messages.

use std::io;

use super::*;

#[test]
fn a_nacked_message_is_sent_again_at_any_place() {
    for refused in 1..=3 {
        let (_broker, session, run) = send(&[], numbered(1..=3));
        session.nack(refused, false);
        for tag in (1..=3).filter(|tag| *tag != refused) {
            session.ack(tag, false);
        }
        run.reaches("2 confirmed, 1 in doubt");
        expect(&session, &[&refused.to_string()]);
        session.ack(4, false);
        session.expect_close();
        run.succeeds_with("3 confirmed, 0 in doubt");
    }
}

#[test]
fn nacked_messages_are_sent_again_in_their_order() {
    let Here { session, mut publisher, .. } =
        send_here(Timings { first_delay: HOUR, longest_delay: HOUR, ..QUICK }, &[], 4);
    session.nack(3, false);
    session.nack(2, true);
    session.ack(4, false);
    act_until(&mut publisher, |publisher| publisher.counts().done() == 1);
    end_hold(&mut publisher);
    let run = Run::finish(publisher);
    expect(&session, &["1", "2", "3"]);
    session.ack(7, true);
    run.succeeds_with("4 confirmed, 0 in doubt");
}

/// Ends the time of a [`State::Holding`].
fn end_hold(publisher: &mut Publisher) {
    let State::Holding { until, .. } = &mut publisher.state else { panic!("no hold") };
    *until = Instant::now();
}

#[test]
fn no_message_is_sent_while_nacked_ones_wait() {
    let pausing = Timings { first_delay: HOUR, longest_delay: HOUR, ..QUICK };
    let Here { session, mut publisher, .. } = send_here(pausing, &["--retry", "forever"], 2);
    session.nack(1, false);
    act_until(&mut publisher, |publisher| !publisher.is_ready());
    assert!(hold(&publisher).is_some_and(|until| until > Instant::now() + HOUR / 4));
    let (input, _writer) = io::pipe().unwrap();
    session.ack(2, false);
    publisher.wait(Some(input.as_fd()), Some(&DEADLINE), None).expect("a confirm");
    assert_eq!(publisher.counts().to_string(), "1 confirmed, 1 in doubt");
    end_hold(&mut publisher);
    publisher.publish([single(3, "3")]).expect("publish");
    expect(&session, &["1", "3"]);
}

#[test]
fn a_queue_that_nacks_for_too_long_ends_the_publisher() {
    let (_broker, session, run) = send(&["--retry", "50ms"], numbered(1..=3));
    session.ack(1, false);
    session.nack(2, false);
    session.ack(3, false);
    for (_, tag) in session.publishes().zip(4..) {
        session.nack(tag, false);
    }
    run.fails_with(
        "2 confirmed, 1 in doubt: record 2: publish to exchange 'logs': nacked by a queue",
    );
}

#[test]
fn nacks_end_when_all_repeated_messages_are_confirmed() {
    let Here { session, mut publisher, .. } = send_here(QUICK, &[], 2);
    session.nack(2, true);
    act_until(&mut publisher, |publisher| publisher.outbox.window().last_tag() == 4);
    expect(&session, &["1", "2"]);
    session.ack(3, false);
    act_until(&mut publisher, |publisher| publisher.counts().done() == 1);
    assert!(health(&publisher).nacking.is_some());
    session.nack(4, false);
    act_until(&mut publisher, |publisher| publisher.outbox.window().last_tag() == 5);
    session.ack(5, false);
    act_until(&mut publisher, |publisher| health(publisher).nacking.is_none());
}

/// A queue with room for one message after each pause.
#[test]
fn a_queue_that_accepts_some_messages_has_more_time() {
    const MESSAGES: u64 = 40;
    let pausing = Timings { longest_delay: Duration::from_millis(20), ..QUICK };
    let broker = ScriptedBroker::start();
    let options = &["--retry", "100ms"];
    let run = Run::start_with(pausing, &broker, options, numbered(1..=MESSAGES));
    let session = broker.accept();
    let mut tag = 0;
    for left in (1..=MESSAGES).rev() {
        session.expect_publishes(left as usize);
        session.ack(tag + 1, false);
        (2..=left).for_each(|place| session.nack(tag + place, false));
        tag += left;
    }
    run.succeeds_with("40 confirmed, 0 in doubt");
}

#[test]
fn pauses_grow_while_nothing_is_confirmed() {
    let (_broker, session, run) = send(&["--retry", "1s"], numbered(1..=1));
    let sent = session.publishes().zip(2..).map(|(_, tag)| session.nack(tag, false));
    session.nack(1, false);
    // The pauses double, from 2 ms to 50 ms.
    let sent = sent.count();
    assert!((5..=40).contains(&sent), "{sent}");
    run.fails_with(
        "0 confirmed, 1 in doubt: record 1: publish to exchange 'logs': nacked by a queue",
    );
}

#[test]
fn nacks_after_a_loss_do_not_extend_the_time() {
    let (broker, session, run) = send(&["--retry", "100ms"], numbered(1..=2));
    session.nack(1, false);
    session.cut();
    let session = broker.accept();
    for (_, tag) in session.publishes().zip(1..) {
        session.nack(tag, false);
    }
    run.fails_with(
        "0 confirmed, 2 in doubt: record 1: publish to exchange 'logs': nacked by a queue",
    );
}

#[test]
fn a_nacked_message_that_is_returned_counts_as_returned() {
    let (_broker, session, run) = send(&["--mandatory"], numbered(1..=2));
    session.nack(2, false);
    let again = expect(&session, &["2"]);
    session.give_back(&again[0]);
    session.ack(3, false);
    session.ack(1, false);
    run.succeeds_with("2 confirmed, 0 in doubt, 1 unroutable");
}

#[test]
fn a_message_nacked_before_a_loss_keeps_its_place() {
    let pausing = Timings { first_delay: HOUR, longest_delay: HOUR, ..QUICK };
    let Here { broker, session, mut publisher } = send_here(pausing, &["--retry", "forever"], 3);
    session.nack(1, false);
    session.ack(2, false);
    act_until(&mut publisher, |publisher| publisher.counts().done() == 1);
    assert!(hold(&publisher).is_some());
    // From here on, the pauses are short.
    publisher.timings = QUICK;
    session.cut();
    let run = Run::finish(publisher);
    let session = accept(&broker, &["1", "3"]);
    run.reaches("1 confirmed, 2 in doubt");
    session.ack(2, true);
    run.succeeds_with("3 confirmed, 0 in doubt");
}

#[test]
fn a_message_nacked_after_a_loss_is_sent_again() {
    let (broker, session, run) = send(&[], numbered(1..=2));
    session.cut();
    let session = accept(&broker, &["1", "2"]);
    session.nack(2, false);
    session.ack(1, false);
    expect(&session, &["2"]);
    run.reaches("1 confirmed, 1 in doubt");
    session.ack(3, false);
    run.succeeds_with("2 confirmed, 0 in doubt");
}
