//! Reports of missed and repeated messages.

use std::time::{Duration, Instant};

use logs_tests::{
    Message, PATIENCE, QUEUE_DECLARE, QueueCounts, ScriptedBroker, TempFile, wait_until,
};

use super::harness::{
    AGAIN, AGAIN_DURABLE, DURABLE, FORCED, LOST, Run, again, batch, numbered, wait_for_content,
    wait_for_status,
};
use crate::receiver::Stop;

/// A message of another run than those of [`numbered`].
fn of_another_run(number: u64) -> Message {
    let message_id = Some(format!("emit-log/{:016x}/{number}", 2));
    Message { message_id, ..numbered(number) }
}

#[test]
fn a_missing_start_of_a_run_counts_after_an_outage() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    session.deliver(&numbered(700));
    wait_for_content(file.path(), "700\n");
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    next.deliver(&numbered(701));
    next.deliver(&of_another_run(801));
    wait_for_content(file.path(), "700\n701\n801\n");
    let missed = "missed up to 800 messages from run 0000000000000002 (1 to 800), sent while disconnected \
                  or before this receiver started";
    wait_until("the loss is reported", || run.alerts() == [LOST, AGAIN, missed]);
    wait_for_status(&run, "broker BROKER, written 3, missed 800, reconnections 1");
    run.stops();
}

#[test]
fn a_queue_that_stays_bound_misses_no_start_of_a_run() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[DURABLE, &["--durable"]].concat(), file.path());
    broker.set_queue(QueueCounts { exists: true, ..QueueCounts::default() });
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    next.deliver(&of_another_run(801));
    wait_for_content(file.path(), "801\n");
    run.stops();
    assert_eq!(run.alerts(), [LOST, "Subscribed again after N s; 0 messages wait in queue 'q'"]);
}

#[test]
fn with_a_durable_exchange_a_durable_queue_misses_nothing() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let options = [DURABLE, &["--durable", "--max-backlog", "1MB"]].concat();
    let (run, session) = Run::start(&broker, &options, file.path());
    broker.set_queue(QueueCounts { exists: true, messages: 7, consumers: 0 });
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    run.stops();
    assert_eq!(run.alerts(), [LOST, "Subscribed again after N s; 7 messages wait in queue 'q'"]);
    assert_eq!(broker.declarations(), [true, true]);
}

#[test]
fn redelivered_messages_are_reported_soon() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    session.deliver(&again(Message::new("a")));
    session.deliver(&again(batch("b\nc")));
    let repeated = "3 messages may be repeated: delivered before, and not acknowledged";
    wait_until("the alert", || run.alerts() == [repeated]);
    run.stops();
    assert_eq!(run.alerts(), [repeated]);
}

#[test]
fn losses_are_reported_across_a_reconnect() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    session.deliver(&numbered(1));
    wait_for_content(file.path(), "1\n");
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    next.deliver(&numbered(1));
    next.deliver(&numbered(5));
    wait_until("the gap is reported", || run.alerts().len() == 3);
    next.deliver(&numbered(3));
    next.deliver(&numbered(3));
    next.deliver(&numbered(6));
    wait_for_content(file.path(), "1\n5\n3\n6\n");
    run.stop();
    let (ended, losses) = run.outcome.recv_timeout(PATIENCE).unwrap();
    assert_eq!((ended, &*losses), (Ok(Stop::Signal), "2 missed, 2 repeated and left out"));
    let missed = "missed 3 messages from run 0000000000000001 (2 to 4)";
    let late = "1 message reported as missed arrived late";
    assert_eq!(run.alerts(), [LOST, AGAIN, missed, late]);
}

#[test]
fn a_gap_that_redelivery_fills_is_not_reported() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    session.deliver(&numbered(1));
    session.deliver(&numbered(3));
    wait_for_content(file.path(), "1\n3\n");
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    for message in [again(numbered(3)), again(numbered(1)), numbered(2), numbered(4)] {
        next.deliver(&message);
    }
    wait_for_content(file.path(), "1\n3\n2\n4\n");
    run.stop();
    assert_eq!(next.expect_ack(), 4);
    run.ends_with(Ok(Stop::Signal));
    assert_eq!(run.alerts(), [LOST, AGAIN_DURABLE]);
}

#[test]
fn a_gap_is_reported_at_the_end_if_the_queue_is_not_shared() {
    let missed = "missed 1 message from run 0000000000000001 (2), unless another receiver of the \
                  queue has written them";
    for (others, expected) in [(0, vec![missed]), (1, vec![])] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let (run, session) = Run::start(&broker, DURABLE, file.path());
        session.deliver(&numbered(1));
        wait_for_content(file.path(), "1\n");
        broker.set_queue(QueueCounts { exists: true, messages: 0, consumers: others });
        session.deliver(&numbered(3));
        wait_for_content(file.path(), "1\n3\n");
        run.stop();
        run.ends_with(Ok(Stop::Signal));
        assert_eq!(run.alerts(), expected, "{others}");
        assert_eq!(session.acks_to_the_end(), [2]);
    }
}

#[test]
fn a_gap_is_reported_at_a_stop_without_a_broker() {
    let missed = "missed 1 message from run 0000000000000001 (2), unless another receiver of the \
                  queue has written them";
    for (others, expected) in [(0, vec![LOST, missed]), (1, vec![LOST])] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        broker.set_queue(QueueCounts { exists: true, messages: 7, consumers: others });
        let (run, session) = Run::start(&broker, DURABLE, file.path());
        session.deliver(&numbered(1));
        session.deliver(&numbered(3));
        wait_for_content(file.path(), "1\n3\n");
        broker.go_down();
        session.close(320, FORCED);
        broker.wait_for_attempts(1);
        run.stops();
        assert_eq!(run.alerts(), expected, "{others}");
    }
}

#[test]
fn an_unanswered_count_of_consumers_does_not_delay_the_end() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, DURABLE, file.path());
    let asked = broker.count_requests(QUEUE_DECLARE);
    broker.withhold(QUEUE_DECLARE);
    session.deliver(&numbered(1));
    session.deliver(&numbered(3));
    broker.wait_for_requests(QUEUE_DECLARE, asked + 1);
    session.deliver(&numbered(4));
    wait_for_content(file.path(), "1\n3\n4\n");
    let start = Instant::now();
    run.stops();
    assert!(start.elapsed() < Duration::from_millis(1900), "{:?}", start.elapsed());
    assert_eq!(session.acks_to_the_end(), [3]);
    let [alert] = &run.alerts()[..] else { panic!("{:?}", run.alerts()) };
    assert!(alert.starts_with("missed 1 message"), "{alert}");
}
