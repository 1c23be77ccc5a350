//! Deliveries, their end, and the counting of consumers.

use std::io::{ErrorKind as Io, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use amqp::{Connection, Deliveries, Delivery, Error, ErrorKind, NO_KEY, Queue, Uri};
use logs_tests::raw::{RawBroker, short_string};
use logs_tests::{PATIENCE, wait_until};

use crate::{Peer, fails, logs, open};

const DECLARE: (u16, u16) = (50, 10);

fn declared(consumers: u8) -> Vec<u8> {
    [&short_string(b"q")[..], &[0, 0, 0, 0, 0, 0, 0, consumers]].concat()
}

/// A peer with a consumer on an exclusive queue, and its deliveries.
fn consuming(script: impl FnOnce(RawBroker) + Send + 'static) -> (Peer, Deliveries) {
    consuming_within(PATIENCE, script)
}

fn consuming_within(
    timeout: Duration,
    script: impl FnOnce(RawBroker) + Send + 'static,
) -> (Peer, Deliveries) {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.answer(1, (60, 20), &short_string(b"tag"));
        script(broker);
    });
    let deliveries = open(&[peer.uri(timeout)]).unwrap().consume("q", None).unwrap();
    (peer, deliveries)
}

/// A peer with a consumer on a queue that others may consume.
fn sharing(script: impl FnOnce(RawBroker) + Send + 'static) -> (Peer, Deliveries) {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.answer(1, DECLARE, &declared(0));
        broker.expect((20, 10));
        broker.send(2, (20, 11), &[0; 4]);
        broker.answer(1, (60, 20), &short_string(b"tag"));
        script(broker);
    });
    let mut connection = peer.connect();
    connection.declare_queue(&Queue::existing("q")).unwrap();
    let deliveries = connection.consume("q", Some(PATIENCE)).unwrap();
    (peer, deliveries)
}

fn wait(deliveries: &Deliveries) {
    deliveries.wait(&[], Some(Instant::now() + PATIENCE));
}

fn next(deliveries: &mut Deliveries) -> Result<Delivery, Error> {
    loop {
        match deliveries.try_next()? {
            Some(delivery) => return Ok(*delivery),
            None => wait(deliveries),
        }
    }
}

#[test]
fn a_subscription_from_the_first_declaration_to_the_end() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.expect((40, 10));
        broker.answer(1, DECLARE, &declared(0));
        broker.expect((50, 20));
        broker.answer(1, (60, 10), b"");
        broker.answer(1, (60, 20), &short_string(b"tag"));
        broker.deliver(1, b"one");
        broker.deliver(2, &vec![b'2'; 300_000]);
        assert_eq!(broker.expect((60, 80)), [0, 0, 0, 0, 0, 0, 0, 2, 1], "2, and all before");
        // The barrier, and then the question how many consumers there are.
        broker.answer(1, (60, 10), b"");
        broker.answer(1, DECLARE, &declared(3));
        let bind = broker.expect((50, 20));
        assert!(bind.windows(5).any(|bytes| bytes == b"\x04logs"), "{bind:?}");
        // A delivery that is under way while the consumer is cancelled.
        broker.deliver(3, b"three");
        broker.answer(1, (60, 30), &short_string(b"tag"));
        broker.answer(0, (10, 50), b"");
        broker.wait_for_end();
    });
    let mut connection = peer.connect();
    connection.declare_exchange(&logs());
    let queue = connection.declare_queue(&Queue::exclusive()).unwrap().name;
    connection.bind(&queue, "logs", NO_KEY);
    connection.set_prefetch(10);
    let mut deliveries = connection.consume(&queue, None).unwrap();
    let before = deliveries.last_received();
    assert_eq!(next(&mut deliveries).unwrap().body, b"one");
    let second = next(&mut deliveries).unwrap();
    assert_eq!(second.body.len(), 300_000);
    assert!(deliveries.last_received() >= before);
    assert!(deliveries.is_counting(), "nobody is asked about an exclusive queue");
    assert_eq!(deliveries.consumers_since(before), None);

    let deadline = Instant::now() + PATIENCE;
    deliveries.acknowledge(second.tag);
    deliveries.barrier(deadline, "acknowledge").unwrap();
    assert_eq!(deliveries.count_consumers(deadline).unwrap(), 3);
    deliveries.bind_again("logs", NO_KEY);
    deliveries.cancel(deadline).unwrap();
    assert_eq!(deliveries.try_next().unwrap().unwrap().body, b"three");
    assert!(deliveries.try_next().unwrap().is_none());
    assert_eq!(deliveries.timeout(), PATIENCE);
    deliveries.close(deadline);
    peer.ends();
}

#[test]
fn consumers_are_counted_without_waiting() {
    let (answer, answers) = mpsc::channel();
    let (refuse, refused) = mpsc::channel();
    let (peer, mut deliveries) = sharing(move |mut broker| {
        for consumers in answers {
            broker.expect(DECLARE);
            match consumers {
                Some(consumers) => broker.send(2, (50, 11), &declared(consumers)),
                None => {
                    broker.send(2, (20, 40), &[1, 148, 0, 0, 0, 0, 0]);
                    refuse.send(()).unwrap();
                }
            }
        }
        broker.wait_for_end();
    });
    let since = Instant::now();
    assert!(!deliveries.is_counting());
    assert_eq!(deliveries.consumers_since(since), None);
    assert!(deliveries.is_counting());
    assert_eq!(deliveries.consumers_since(since), None, "the broker is not asked twice");
    answer.send(Some(2)).unwrap();
    wait(&deliveries);
    assert_eq!(deliveries.consumers_since(since), Some(2));
    assert!(!deliveries.is_counting());
    assert_eq!(deliveries.consumers_since(Instant::now()), None, "that was before");
    answer.send(Some(1)).unwrap();
    wait(&deliveries);
    assert_eq!(deliveries.consumers_since(since), Some(1));
    // After a refusal, no other request is sent.
    answer.send(None).unwrap();
    drop(answer);
    assert_eq!(deliveries.consumers_since(Instant::now()), None);
    refused.recv_timeout(PATIENCE).unwrap();
    assert_eq!(deliveries.consumers_since(since), Some(1));
    assert!(deliveries.is_counting());
    drop(deliveries);
    peer.ends();
}

#[test]
fn a_cancelled_consumer_tells_whether_its_queue_is_there() {
    for (is_there, text) in [(false, "the queue was deleted"), (true, "and keeps the queue")] {
        let (peer, mut deliveries) = consuming(move |mut broker| {
            broker.deliver(1, b"last");
            broker.send(1, (60, 30), &[&short_string(b"tag")[..], &[1]].concat());
            match is_there {
                true => broker.answer(1, DECLARE, &declared(0)),
                false => {
                    broker.expect(DECLARE);
                    broker.close(20, 404, "NOT_FOUND - no queue 'q'");
                }
            }
            broker.wait_for_end();
        });
        assert_eq!(next(&mut deliveries).unwrap().body, b"last");
        let operation = format!("receive from {}", peer.address);
        fails(next(&mut deliveries), ErrorKind::Unavailable, &[&operation, text]);
        drop(deliveries);
        peer.ends();
    }
}

#[test]
fn the_end_of_deliveries_has_the_reason() {
    /// Runs the rest of the script; returns whether the client ends the connection.
    type Ending = fn(&mut RawBroker) -> bool;
    let channel_closed: Ending = |broker| {
        broker.close(20, 404, "NOT_FOUND - no exchange 'logs'");
        true
    };
    let connection_closed: Ending = |broker| {
        broker.close(10, 320, "CONNECTION_FORCED - restart");
        true
    };
    let broken: Ending = |broker| {
        broker.write(b"\x09\0\0\0\0\0\0\xce");
        true
    };
    let cut: Ending = |_| false;
    let close_ok: Ending = |broker| {
        broker.send(0, (10, 51), b"");
        true
    };
    for (ending, kind, text) in [
        (channel_closed, ErrorKind::NotFound, "NOT_FOUND - no exchange 'logs' (hint: not found)"),
        (connection_closed, ErrorKind::Unavailable, "CONNECTION_FORCED - restart"),
        (broken, ErrorKind::Unavailable, "violates AMQP (frame type 9)"),
        (cut, ErrorKind::Unavailable, "connection lost"),
        (close_ok, ErrorKind::Unavailable, "connection lost"),
    ] {
        let (peer, mut deliveries) = consuming(move |mut broker| {
            broker.deliver(1, b"last");
            broker.expect((60, 80));
            if ending(&mut broker) {
                broker.wait_for_end();
            }
        });
        let last = next(&mut deliveries).unwrap();
        assert_eq!(last.body, b"last");
        deliveries.acknowledge(last.tag);
        let error = next(&mut deliveries).err().unwrap();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
        // More requests are in vain, but do no harm.
        deliveries.bind_again("logs", NO_KEY);
        deliveries.close(Instant::now() + PATIENCE);
        peer.ends();
    }
}

#[test]
fn each_step_of_the_end_has_a_deadline() {
    type Step = fn(&mut Deliveries, Instant) -> Result<(), Error>;
    let steps: [(&str, Step); 3] = [
        ("cancel the consumer", |deliveries, deadline| deliveries.cancel(deadline)),
        ("count the consumers of queue 'q'", |deliveries, deadline| {
            deliveries.count_consumers(deadline).map(drop)
        }),
        ("say goodbye", |deliveries, deadline| deliveries.barrier(deadline, "say goodbye")),
    ];
    for (operation, step) in steps {
        let (peer, mut deliveries) = consuming(|mut broker| broker.wait_for_end());
        let deadline = Instant::now() + Duration::from_millis(50);
        fails(step(&mut deliveries, deadline), ErrorKind::Unavailable, &[operation, "no answer"]);
        assert!(Instant::now() >= deadline);
        // The connection is cut, so that no later step waits.
        peer.ends();
        deliveries.close(Instant::now() + PATIENCE);
    }
    let (peer, deliveries) = consuming(|mut broker| broker.wait_for_end());
    let deadline = Instant::now() + Duration::from_millis(50);
    deliveries.close(deadline);
    assert!(Instant::now() >= deadline);
    peer.ends();
}

#[test]
fn a_consumer_may_be_refused_or_unanswered() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.expect((60, 20));
        broker.close(20, 404, "NOT_FOUND - no queue 'q'");
        broker.wait_for_end();
    });
    let outcome = peer.connect().consume("q", None);
    let text = "consume queue 'q': NOT_FOUND - no queue 'q' (hint: not found)";
    assert_eq!(fails(outcome, ErrorKind::NotFound, &[]), text);
    peer.ends();
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.wait_for_end();
    });
    let connection: Connection = peer.connect();
    let outcome = connection.consume("q", Some(Duration::from_millis(50)));
    fails(outcome, ErrorKind::Unavailable, &["consume queue 'q'", "no answer within 50ms"]);
    peer.ends();
}

#[test]
fn a_refused_consumer_does_not_wait_for_the_second_channel() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.answer(1, DECLARE, &declared(0));
        broker.expect((20, 10));
        broker.send(2, (20, 11), &[0; 4]);
        broker.expect((60, 20));
        broker.close(20, 403, "ACCESS_REFUSED - queue 'q' in exclusive use");
        // Nothing more is answered.
        broker.wait_for_end();
    });
    let mut connection = peer.connect();
    connection.declare_queue(&Queue::existing("q")).unwrap();
    let (sender, outcome) = mpsc::channel();
    thread::spawn(move || sender.send(connection.consume("q", None).err().unwrap().to_string()));
    let text = outcome.recv_timeout(PATIENCE / 2).expect("an error in time");
    assert!(text.contains("in exclusive use"), "{text}");
    peer.ends();
}

/// The socket is left unread while a program that is busy has more than 64 MiB to take.
#[test]
fn deliveries_that_nobody_takes_are_not_read_without_bounds() {
    const MESSAGES: usize = 100;
    let (sender, receiver) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let (peer, mut deliveries) = consuming(move |mut broker| {
        broker.deliver(1, b"first");
        may_go_on.recv().unwrap();
        let mut bytes = Vec::new();
        for tag in 2..=MESSAGES as u64 {
            let mut memory = RawBroker::new(std::io::Cursor::new(Vec::new()));
            memory.deliver(tag, &vec![0; 1024 * 1024]);
            bytes.append(memory.socket().get_mut());
        }
        broker.socket().set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match broker.socket().write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == Io::WouldBlock => sender.send(rest.len()).unwrap(),
                Err(error) => panic!("{error}"),
            }
        }
        broker.wait_for_end();
    });
    assert_eq!(next(&mut deliveries).unwrap().body, b"first");
    go_on.send(()).unwrap();
    let unread = receiver.recv_timeout(PATIENCE).expect("the socket is not read any more");
    assert!(unread > 20 << 20, "{unread} bytes are left");
    let mut taken = 1;
    while taken < MESSAGES {
        next(&mut deliveries).unwrap();
        taken += 1;
    }
    drop(deliveries);
    peer.ends();
}

/// What has no room is delivered again by the queue, as it is not acknowledged.
#[test]
fn a_flood_before_the_cancellation_is_dropped_from_a_message_on() {
    const MESSAGES: u64 = 100;
    let (peer, mut deliveries) = consuming(|mut broker| {
        broker.expect((60, 30));
        (1..=MESSAGES).for_each(|tag| broker.deliver(tag, &vec![0; 1024 * 1024]));
        broker.send(1, (60, 31), &short_string(b"tag"));
        broker.wait_for_end();
    });
    deliveries.cancel(Instant::now() + PATIENCE).unwrap();
    let mut taken = 0;
    while let Some(delivery) = deliveries.try_next().unwrap() {
        taken += 1;
        assert_eq!(delivery.tag, taken);
    }
    assert!((50..60).contains(&taken), "{taken}");
    drop(deliveries);
    peer.ends();
}

/// A peer with a heartbeat interval of one second, and a consumer of a program with an interval of `asked` seconds.
fn consuming_with_heartbeats(
    asked: u16,
    script: impl FnOnce(RawBroker) + Send + 'static,
) -> (Peer, Deliveries) {
    let peer = Peer::start(|mut broker| {
        broker.log_in_until(1);
        // 2047 channels, frames of 128 KiB, a heartbeat each second.
        broker.send(0, (10, 30), &[7, 0xff, 0, 2, 0, 0, 0, 1]);
        broker.answer(0, (10, 40), &[0]);
        broker.answer(1, (20, 10), &[0; 4]);
        broker.answer(1, (60, 20), &short_string(b"tag"));
        script(broker);
    });
    let uri = Uri::parse(&format!("amqp://{}?heartbeat={asked}", peer.address)).unwrap();
    let deliveries = open(&[uri]).unwrap().consume("q", None).unwrap();
    (peer, deliveries)
}

/// A broker that sends messages all the time sends no heartbeats.
#[test]
fn messages_replace_heartbeats_at_a_shorter_broker_interval() {
    const MESSAGES: u64 = 30;
    let (peer, mut deliveries) = consuming_with_heartbeats(60, |mut broker| {
        for tag in 1..=MESSAGES {
            broker.deliver(tag, b"one");
            thread::sleep(Duration::from_millis(100));
        }
        broker.wait_for_end();
    });
    for tag in 1..=MESSAGES {
        assert_eq!(next(&mut deliveries).unwrap().tag, tag);
    }
    drop(deliveries);
    peer.ends();
}

/// The bound holds also while the program takes its time over deliveries that were read before.
#[test]
fn deliveries_taken_one_by_one_are_read_within_limits() {
    const MEBIBYTE: usize = 1024 * 1024;
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    let (peer, mut deliveries) = consuming_with_heartbeats(1, move |mut broker| {
        let mut memory = RawBroker::new(std::io::Cursor::new(Vec::new()));
        memory.deliver(1, &vec![0; MEBIBYTE]);
        let delivery = memory.socket().get_ref().clone();
        let mut rest = &delivery[..];
        broker.socket().set_write_timeout(Some(Duration::from_secs(3))).unwrap();
        while let Ok(written) = broker.socket().write(rest) {
            counted.fetch_add(written, Ordering::SeqCst);
            rest = &rest[written..];
            if rest.is_empty() {
                rest = &delivery;
            }
        }
    });
    next(&mut deliveries).unwrap();
    let near_bound = || {
        amqp::keep_alive();
        sent.load(Ordering::SeqCst) > 56 * MEBIBYTE
    };
    wait_until("the bound is near", near_bound);
    let before = sent.load(Ordering::SeqCst);
    next(&mut deliveries).unwrap();
    let end = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < end {
        amqp::keep_alive();
        thread::sleep(Duration::from_millis(50));
    }
    let more = sent.load(Ordering::SeqCst) - before;
    assert!(more < 20 * MEBIBYTE, "{more} bytes more");
    drop(deliveries);
    peer.ends();
}
