//! Which messages are acknowledged, and when.

use std::time::{Duration, Instant};

use logs_tests::{
    CANCEL, Message, QUEUE_DECLARE, QueueCounts, ScriptedBroker, ScriptedSession, TempFile,
};

use super::harness::{DURABLE, Run, assert_content, batch, wait_for_content};
use crate::receiver::Stop;

#[test]
fn an_exclusive_queue_is_written_and_never_acknowledged() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    session.deliver(&Message::new("a"));
    session.deliver(&batch("b\nc"));
    wait_for_content(file.path(), "a\nb\nc\n");
    run.stop();
    session.expect_close();
    run.ends_with(Ok(Stop::Signal));
    assert_eq!(run.alerts(), [""; 0]);
}

#[test]
fn under_load_a_thousand_messages_are_acknowledged_together() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    let deliver = |session: &ScriptedSession, count| {
        session.in_one_piece(|session| {
            for _ in 0..count {
                session.deliver(&Message::new("a"));
            }
        });
    };
    deliver(&session, 1500);
    assert_eq!(session.expect_ack(), 1000);
    deliver(&session, 500);
    assert_eq!(session.expect_ack(), 2000);
    run.stops();
    assert_eq!(session.acks_to_the_end(), [0; 0]);
    assert_content(file.path(), &"a\n".repeat(2000));
}

#[test]
fn a_few_messages_are_acknowledged_within_a_second() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    let start = Instant::now();
    session.deliver(&Message::new("a"));
    session.deliver(&Message::new("b"));
    assert_eq!(session.expect_ack(), 2);
    assert!(start.elapsed() >= Duration::from_millis(990), "they wait for later messages");
    run.stops();
}

#[test]
fn messages_sent_before_a_cancellation_are_acknowledged() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    broker.withhold(CANCEL);
    session.deliver(&Message::new("a"));
    wait_for_content(file.path(), "a\n");
    run.stop();
    assert_eq!(session.expect_ack(), 1);
    session.expect_cancel();
    session.deliver(&Message::new("b"));
    session.deliver(&Message::new("c"));
    session.confirm_cancel();
    assert_eq!(session.expect_ack(), 3);
    session.expect_question();
    session.expect_close();
    run.ends_with(Ok(Stop::Signal));
    assert_content(file.path(), "a\nb\nc\n");
    assert_eq!(run.alerts(), [""; 0]);
}

#[test]
fn a_quorum_queue_must_remove_the_consumer_before_the_end() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--queue", "q"], file.path());
    let counts = |consumers| QueueCounts { exists: true, messages: 0, consumers };
    broker.set_queue(counts(1));
    broker.withhold(CANCEL);
    run.stop();
    session.expect_cancel();
    session.deliver(&Message::new("a"));
    session.confirm_cancel();
    assert_eq!(session.expect_ack(), 1);
    let asked = broker.count_requests(QUEUE_DECLARE);
    broker.wait_for_requests(QUEUE_DECLARE, asked + 3);
    assert!(run.outcome.try_recv().is_err(), "the queue still has the consumer");
    broker.set_queue(counts(0));
    session.expect_close();
    run.ends_with(Ok(Stop::Signal));
    assert_content(file.path(), "a\n");
}

#[test]
fn an_unconfirmed_cancellation_ends_at_the_deadline() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    broker.withhold(CANCEL);
    session.deliver(&Message::new("a"));
    wait_for_content(file.path(), "a\n");
    let start = Instant::now();
    run.stops();
    assert!(start.elapsed() < Duration::from_millis(1900), "{:?}", start.elapsed());
    assert_eq!(session.acks_to_the_end(), [1]);
}
