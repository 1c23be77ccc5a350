//! Lost subscriptions, and those that replace them.

use std::path::Path;
use std::time::{Duration, Instant};

use logs_tests::{
    CANCEL, CONSUME, Message, QUEUE_DECLARE, QueueCounts, ScriptedBroker, ScriptedSession,
    TempFile, wait_until_full,
};

use super::harness::{
    AGAIN, AGAIN_DURABLE, DURABLE, FORCED, LOST, PROMPT, Run, WERE_WAITING, again, assert_content,
    batch, large_batch, numbered, pipe, read_exactly, wait_for_content,
};
use crate::receiver::Stop;

#[test]
fn a_cancelled_consumer_is_replaced() {
    for (exists, reason) in [
        (false, "the queue was deleted"),
        (true, "the broker cancelled the consumer, and keeps the queue"),
    ] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let (run, session) = Run::start(&broker, &[], file.path());
        broker.set_queue(QueueCounts { exists, ..QueueCounts::default() });
        session.in_one_piece(|session| {
            session.deliver(&Message::new("a"));
            session.deliver(&Message::new("b"));
            session.cancel_consumer();
        });
        let next = broker.accept();
        next.expect_consume();
        next.deliver(&Message::new("c"));
        wait_for_content(file.path(), "a\nb\nc\n");
        run.stops();
        let lost = format!("receive from BROKER: {reason}; subscribing again");
        assert_eq!(run.alerts(), [&*lost, AGAIN]);
    }
}

#[test]
fn a_deleted_durable_queue_is_created_again() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    broker.set_queue(QueueCounts::default());
    session.cancel_consumer();
    let _without_queue = broker.accept();
    let next = broker.accept();
    next.expect_consume();
    run.stops();
    assert_eq!(
        run.alerts(),
        [
            "receive from BROKER: the queue was deleted; subscribing again",
            "Subscribed again after N s; queue 'q' was deleted and is created again: the messages in it and \
             messages sent in between are missing unless sent again",
        ]
    );
}

#[test]
fn a_partly_received_batch_is_written_when_redelivered() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    let message = batch("b\nc\nd");
    session.in_one_piece(|session| {
        session.deliver(&Message::new("a"));
        session.deliver_part(&message, 3);
        session.close(320, FORCED);
    });
    let next = broker.accept();
    next.expect_consume();
    assert_eq!(session.acks_to_the_end(), [0; 0]);
    assert_content(file.path(), "a\n");
    next.deliver(&again(Message::new("a")));
    next.deliver(&again(message));
    wait_for_content(file.path(), "a\na\nb\nc\nd\n");
    run.stop();
    assert_eq!(next.expect_ack(), 2);
    run.ends_with(Ok(Stop::Signal));
    let repeated = "4 messages may be repeated: delivered before, and not acknowledged";
    assert_eq!(run.alerts(), [LOST, AGAIN_DURABLE, repeated]);
}

#[test]
fn a_partly_written_batch_is_completed_after_a_loss() {
    const TIMED_OUT: &str = "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out";
    type Loss = fn(ScriptedSession);
    let losses: [(Loss, &str); 3] = [
        (|session| session.close(320, FORCED), "receive from BROKER: CONNECTION_FORCED"),
        (
            |session| session.close_channel(406, TIMED_OUT, (0, 0)),
            "receive from BROKER: PRECONDITION_FAILED",
        ),
        (ScriptedSession::cut, "connection to BROKER: connection lost ("),
    ];
    for (lose, reason) in losses {
        let broker = ScriptedBroker::start();
        let (mut reader, _writer, path) = pipe();
        let (run, session) = Run::start(&broker, DURABLE, Path::new(&path));
        session.deliver(&large_batch());
        wait_until_full(&reader);
        lose(session);
        let text = String::from_utf8(large_batch().body).unwrap() + "\n";
        assert_eq!(read_exactly(&mut reader, text.len()), text);
        let next = broker.accept();
        next.expect_consume();
        next.deliver(&Message::new("after"));
        assert_eq!(read_exactly(&mut reader, 6), "after\n");
        run.stop();
        assert_eq!(next.expect_ack(), 1);
        run.ends_with(Ok(Stop::Signal));
        let alerts = run.alerts();
        assert!(alerts[0].starts_with(reason), "{alerts:?}");
        assert_eq!(alerts[1..], [AGAIN_DURABLE]);
    }
}

#[test]
fn a_loss_reports_whether_messages_were_waiting() {
    let last_alert = |run: &Run| run.recorded.all().pop().unwrap();
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    session.deliver(&Message::new("a"));
    wait_for_content(file.path(), "a\n");
    // The receiver detects the loss only after it has looked for another message.
    run.reopen();
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    run.stops();
    assert!(!last_alert(&run).contains(WERE_WAITING), "{}", last_alert(&run));

    let broker = ScriptedBroker::start();
    let (mut reader, _writer, path) = pipe();
    let (run, session) = Run::start(&broker, &[], Path::new(&path));
    session.deliver(&large_batch());
    wait_until_full(&reader);
    session.close(320, FORCED);
    read_exactly(&mut reader, large_batch().body.len() + 1);
    let next = broker.accept();
    next.expect_consume();
    run.stops();
    assert!(last_alert(&run).contains(WERE_WAITING), "{}", last_alert(&run));
}

#[test]
fn a_permanent_error_ends_the_receiver_after_the_write() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    session.in_one_piece(|session| {
        session.deliver(&numbered(1));
        session.deliver(&numbered(3));
        session.close_channel(406, "PRECONDITION_FAILED - unknown delivery tag 7", CONSUME);
    });
    run.ends_with(Err("receive from BROKER: PRECONDITION_FAILED - unknown delivery tag 7"));
    assert_content(file.path(), "1\n3\n");
    assert_eq!(run.alerts(), ["missed 1 message from run 0000000000000001 (2)"]);
}

#[test]
fn without_time_to_retry_a_loss_ends_the_receiver() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--retry", "0s"], file.path());
    session.close(320, FORCED);
    run.ends_with(Err(&format!("receive from BROKER: {FORCED}")));
    assert_eq!(run.alerts(), [""; 0]);
}

#[test]
fn a_stop_takes_effect_before_the_first_attempt() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let run = Run::start_and_lose(&broker, file.path());
    let start = Instant::now();
    run.stops();
    assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
    assert_content(file.path(), "a\n");
}

#[test]
fn a_stop_takes_effect_during_an_outage() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    broker.go_down();
    session.close(320, FORCED);
    broker.wait_for_attempts(2);
    let start = Instant::now();
    run.stops();
    assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
    assert_eq!(run.alerts(), [LOST]);
}

#[test]
fn a_stop_takes_effect_while_an_attempt_waits() {
    // The receiver does not react to signals for a second while it consumes the new queue.
    for (request, limit) in [(QUEUE_DECLARE, PROMPT), (CONSUME, Duration::from_millis(1500))] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let (run, session) = Run::start(&broker, &[], file.path());
        let before = broker.count_requests(request);
        broker.withhold(request);
        session.close(320, FORCED);
        broker.wait_for_requests(request, before + 1);
        let start = Instant::now();
        run.stops();
        assert!(start.elapsed() < limit, "{request:?}: {:?}", start.elapsed());
        assert_eq!(run.alerts(), [LOST], "{request:?}");
    }
}

#[test]
fn a_stop_after_a_reconnect_closes_the_new_subscription() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    broker.withhold(CONSUME);
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    run.stop();
    broker.withhold(CANCEL);
    next.confirm_consume();
    next.expect_cancel();
    next.deliver(&Message::new("a"));
    next.confirm_cancel();
    assert_eq!(next.expect_ack(), 1);
    run.ends_with(Ok(Stop::Signal));
    assert_content(file.path(), "a\n");
    assert_eq!(run.alerts(), [LOST, AGAIN_DURABLE]);
}

#[test]
fn a_refused_consumer_is_retried() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--retry", "forever"], file.path());
    broker.withhold(CONSUME);
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    broker.withhold_nothing();
    next.close_channel(403, "ACCESS_REFUSED", CONSUME);
    let again = broker.accept();
    again.expect_consume();
    run.stops();
    assert_eq!(run.alerts(), [LOST, AGAIN]);
}

#[test]
fn a_refused_consumer_ends_the_receiver_after_retry() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--retry", "200ms"], file.path());
    broker.refuse(CONSUME, 403, "ACCESS_REFUSED");
    session.close(320, FORCED);
    run.ends_with(Err("consume queue 'amq.gen-scripted': ACCESS_REFUSED (give the user the \
                       permission: rabbitmqctl set_permissions)"));
    assert_eq!(run.alerts(), [LOST]);
}

#[test]
fn a_queue_deleted_before_it_is_consumed_is_retried() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    broker.withhold(CONSUME);
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    broker.withhold_nothing();
    next.close_channel(404, "NOT_FOUND - no queue", CONSUME);
    let last = broker.accept();
    last.expect_consume();
    run.stops();
    assert_eq!(run.alerts(), [LOST, AGAIN]);
}

#[test]
fn a_second_loss_after_the_first_is_reported() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    session.deliver(&numbered(1));
    wait_for_content(file.path(), "1\n");
    session.close(320, FORCED);
    let second = broker.accept();
    second.expect_consume();
    second.in_one_piece(|second| {
        second.deliver(&again(numbered(1)));
        second.deliver(&numbered(2));
        second.close(320, FORCED);
    });
    let third = broker.accept();
    third.expect_consume();
    for message in [again(numbered(1)), again(numbered(2)), numbered(3)] {
        third.deliver(&message);
    }
    wait_for_content(file.path(), "1\n2\n3\n");
    run.stop();
    assert_eq!(third.expect_ack(), 3);
    run.ends_with(Ok(Stop::Signal));
    assert_eq!(run.alerts(), [LOST, AGAIN_DURABLE, LOST, AGAIN_DURABLE]);
}

#[test]
fn two_reasons_of_the_broker_are_both_reported() {
    type Script = fn(&ScriptedSession);
    let cancel: Script = ScriptedSession::cancel_consumer;
    let close: Script = |session| session.close(320, FORCED);
    let close_channel: Script = |session| session.close_channel(541, "INTERNAL_ERROR", (0, 0));
    let cancelled = "receive from BROKER: the broker cancelled the consumer, and keeps the queue; subscribing again";
    let broken = "receive from BROKER: INTERNAL_ERROR; subscribing again";
    for (first, second, reason) in [
        (cancel, close, cancelled),
        (close, cancel, LOST),
        (cancel, close_channel, cancelled),
        (close_channel, cancel, broken),
        (close_channel, close, broken),
        (close, close_channel, LOST),
    ] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let (run, session) = Run::start(&broker, DURABLE, file.path());
        session.in_one_piece(|session| {
            session.deliver(&Message::new("a"));
            first(session);
            second(session);
        });
        let next = broker.accept();
        next.expect_consume();
        next.deliver(&Message::new("b"));
        wait_for_content(file.path(), "a\nb\n");
        run.stop();
        assert_eq!(next.expect_ack(), 1);
        run.ends_with(Ok(Stop::Signal));
        assert_eq!(run.alerts(), [reason, AGAIN_DURABLE]);
    }
}

#[test]
fn a_delivery_after_the_end_of_its_channel_is_not_written() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    session.in_one_piece(|session| {
        session.close(320, FORCED);
        session.deliver(&Message::new("a"));
    });
    let next = broker.accept();
    next.expect_consume();
    next.deliver(&again(Message::new("a")));
    wait_for_content(file.path(), "a\n");
    run.stops();
    let repeated = "1 message may be repeated: delivered before, and not acknowledged";
    assert_eq!(run.alerts(), [LOST, AGAIN_DURABLE, repeated]);
}
