//! `--spool`: which messages are written to disk and when, and how they are sent later.

use logs_process::exit;
use tempfile::TempDir;

use super::*;

/// A publisher with a spool in the thread of the test, which is connected.
fn connected(broker: &ScriptedBroker, dir: &TempDir, options: &[&str]) -> Publisher {
    let mut publisher = spooling(broker, dir, options);
    act_until(&mut publisher, Publisher::is_ready);
    publisher
}

/// A publisher with a spool in the thread of the test.
fn spooling(broker: &ScriptedBroker, dir: &TempDir, options: &[&str]) -> Publisher {
    let dir = dir.path().to_str().expect("UTF-8");
    lines_publisher(QUICK, broker, &[&["--spool", dir], options].concat())
}

/// Whether a message is only in memory.
fn is_in_memory(publisher: &Publisher) -> bool {
    publisher.outbox.window().unspooled_since().is_some()
}

fn dir() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

/// Publishes messages that were read just now.
fn publish(publisher: &mut Publisher, numbers: RangeInclusive<u64>) {
    publisher.publish(numbered(numbers)).expect("no end");
}

/// Publishes messages, and waits until they are sent. On a slow machine, they may be in the spool before.
fn send(publisher: &mut Publisher, numbers: RangeInclusive<u64>) {
    let sent = publisher.counts().sent() + numbers.end() + 1 - numbers.start();
    publish(publisher, numbers);
    act_until(publisher, |publisher| publisher.counts().sent() == sent);
}

fn bodies(numbers: RangeInclusive<u64>) -> Vec<String> {
    numbers.map(|number| number.to_string()).collect()
}

fn reaches(publisher: &mut Publisher, done: u64, spooled: u64) {
    act_until(publisher, |publisher| {
        let counts = publisher.counts();
        (counts.done(), counts.spooled()) == (done, spooled)
    });
}

/// Finishes a publisher, without a way to stop it.
fn finish(mut publisher: Publisher) -> Result<String, String> {
    let counts = publisher.counts();
    match publisher.finish(Ok(()), None) {
        Ok(()) => Ok(counts.to_string()),
        Err(error) => Err(format!("{}: {error:#}", exit::status_of(&error) as u8)),
    }
}

#[test]
fn an_unconfirmed_message_is_on_disk_after_a_delay() {
    let (broker, dir) = (ScriptedBroker::start(), dir());
    let mut publisher = connected(&broker, &dir, &[]);
    let start = Instant::now();
    send(&mut publisher, 1..=3);
    let session = accept(&broker, &["1", "2", "3"]);
    session.ack(2, false);
    reaches(&mut publisher, 1, 2);
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_millis(50), "{elapsed:?}");
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
    session.ack(3, true);
    reaches(&mut publisher, 3, 0);
    act_until(&mut publisher, |publisher| publisher.outbox.next_time(BrokerState::Ready).is_none());
}

#[test]
fn an_empty_spool_syncs_when_nothing_is_only_in_memory() {
    let (broker, dir) = (ScriptedBroker::start(), dir());
    let mut publisher = connected(&broker, &dir, &[]);
    assert!(
        publisher.outbox.sync_time(false).is_some() && publisher.outbox.sync_time(true).is_none()
    );
    send(&mut publisher, 1..=1);
    let session = accept(&broker, &["1"]);
    assert_eq!(publisher.outbox.sync_time(false).is_none(), is_in_memory(&publisher));
    reaches(&mut publisher, 0, 1);
    assert!(publisher.outbox.sync_time(true).is_some());
    session.ack(1, false);
    reaches(&mut publisher, 1, 0);
    act_until(&mut publisher, |publisher| publisher.outbox.sync_time(true).is_none());
    assert!(publisher.outbox.sync_time(false).is_some());
    publisher.outbox.sync().expect("no damage");
    assert!(publisher.outbox.sync_time(false).is_none());
}

#[test]
fn a_lost_broker_leaves_all_unconfirmed_on_disk_at_once() {
    let (broker, dir) = (ScriptedBroker::start(), dir());
    let mut publisher = connected(&broker, &dir, &[]);
    send(&mut publisher, 1..=3);
    let session = accept(&broker, &["1", "2", "3"]);
    session.ack(1, false);
    act_until(&mut publisher, |publisher| publisher.counts().done() == 1);
    broker.go_down();
    session.cut();
    reaches(&mut publisher, 1, 2);
    publish(&mut publisher, 4..=100);
    assert_eq!(publisher.counts().spooled(), 99, "nothing has waited");
    broker.come_back();
    let ended = thread::spawn(|| finish(publisher));
    let session = accept(&broker, &bodies(2..=100));
    session.ack(99, true);
    session.expect_close();
    assert_eq!(ended.join().unwrap(), Ok("100 confirmed, 0 in doubt".into()));
}

#[test]
fn a_later_run_sends_the_rest_under_its_old_numbers() {
    // The first runs have another broker, so that none of their attempts to connect reaches the second one.
    let (away, broker, dir) = (ScriptedBroker::start(), ScriptedBroker::start(), dir());
    away.go_down();
    let of_run = |run, numbers| numbered(numbers).into_iter().map(move |m| Message { run, ..m });
    for (run, numbers) in [(7, 1..=3), (8, 1..=2)] {
        let mut publisher = spooling(&away, &dir, &[]);
        publisher.publish(of_run(run, numbers)).expect("no end");
        publisher.outbox.close().expect("no damage");
    }
    let mut publisher = spooling(&broker, &dir, &[]);
    publisher.publish(of_run(9, 1..=1)).expect("no end");
    let ended = thread::spawn(|| finish(publisher));
    let session = broker.accept();
    for (run, count) in [(7, 3), (8, 2), (9, 1)] {
        for (message, number) in std::iter::zip(session.expect_publishes(count), 1..) {
            let id = MessageId { run, number };
            assert_eq!(message.message_id.as_deref(), Some(String::from(id).as_str()));
        }
    }
    session.ack(6, true);
    session.expect_close();
    assert_eq!(ended.join().unwrap(), Ok("6 confirmed, 0 in doubt".into()));
}

#[test]
fn an_alarm_stops_sending_and_not_spooling() {
    let (broker, dir) = (ScriptedBroker::start(), dir());
    let mut publisher = connected(&broker, &dir, &[]);
    send(&mut publisher, 1..=1);
    let session = accept(&broker, &["1"]);
    session.block("low on memory");
    act_until(&mut publisher, is_blocked);
    publish(&mut publisher, 2..=50);
    assert_eq!(publisher.counts().spooled(), 50);
    session.ack(1, false);
    reaches(&mut publisher, 1, 49);
    session.unblock();
    let ended = thread::spawn(|| finish(publisher));
    expect(&session, &bodies(2..=50));
    session.ack(50, true);
    assert_eq!(ended.join().unwrap(), Ok("50 confirmed, 0 in doubt".into()));
}

#[test]
fn a_nacked_message_is_on_disk_while_it_waits() {
    let (broker, dir) = (ScriptedBroker::start(), dir());
    let mut publisher = connected(&broker, &dir, &[]);
    send(&mut publisher, 1..=3);
    let session = accept(&broker, &["1", "2", "3"]);
    session.in_one_piece(|session| {
        session.ack(3, false);
        session.nack(2, true);
    });
    reaches(&mut publisher, 1, 2);
    let ended = thread::spawn(|| finish(publisher));
    expect(&session, &["1", "2"]);
    session.ack(5, true);
    assert_eq!(ended.join().unwrap(), Ok("3 confirmed, 0 in doubt".into()));
}

#[test]
fn a_too_large_record_is_dropped_and_others_are_sent() {
    let (broker, dir) = (ScriptedBroker::start(), dir());
    let mut publisher = connected(&broker, &dir, &[]);
    let messages = [single(1, "a"), batch(2, "b\nlarge\nc"), single(5, "d")];
    publisher.publish(messages).expect("no end");
    act_until(&mut publisher, |publisher| publisher.counts().sent() == 5);
    let session = accept(&broker, &["a", "b\nlarge\nc", "d"]);
    too_large(&session, 9, 4);
    act_until(&mut publisher, |publisher| max_body(publisher) == 4);
    let messages = [batch(6, "e\nf\ng"), single(9, "large"), single(10, "h")];
    publisher.publish(messages).expect("no end");
    publisher.counts().add_read(10);
    let ended = thread::spawn(|| finish(publisher));
    let session = accept(&broker, &["a", "b", "c", "d", "e\nf", "g", "h"]);
    session.ack(7, true);
    session.expect_close();
    let text =
        "65: 8 confirmed, 0 in doubt, 2 dropped (10 B): records are larger than the broker accepts";
    assert_eq!(ended.join().unwrap(), Err(text.into()));
}

#[test]
fn a_stop_leaves_unconfirmed_messages_on_disk() {
    let (broker, dir) = (ScriptedBroker::start(), dir());
    let mut publisher = connected(&broker, &dir, &["--retry", "forever"]);
    send(&mut publisher, 1..=3);
    let session = accept(&broker, &["1", "2", "3"]);
    session.ack(1, false);
    let (sender, stop) = Mailbox::open().unwrap();
    sender.send(15);
    publisher.counts().add_read(3);
    publisher.finish(Ok(()), Some(&stop)).expect("no failure");
    let left = format!("1 confirmed, 0 in doubt, 2 left in the spool {}", dir.path().display());
    assert_eq!(publisher.counts().to_string(), left);
    drop(publisher);
    let ended = spooling(&broker, &dir, &[]);
    assert_eq!(ended.counts().spooled(), 2);
}

#[test]
fn retry_counts_from_the_end_of_the_input() {
    let (broker, dir) = (ScriptedBroker::start(), dir());
    broker.go_down();
    let mut publisher = spooling(&broker, &dir, &["--retry", "50ms"]);
    publish(&mut publisher, 1..=3);
    // Before the end of the input, an outage does not end the publisher.
    act_until(&mut publisher, |publisher| health(publisher).failing_since.is_some());
    let text = finish(publisher).unwrap_err();
    let start =
        format!("69: 0 confirmed, 0 in doubt, 3 left in the spool {}: ", dir.path().display());
    assert!(text.starts_with(&start), "{text}");
    assert!(text.contains("no broker for 50ms after the end of the input"), "{text}");
}
