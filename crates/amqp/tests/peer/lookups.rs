//! Reading a part of a stream, on the second channel.

use std::time::{Duration, Instant};

use amqp::{ErrorKind, StreamOffset};
use logs_tests::PATIENCE;
use logs_tests::raw::{RawBroker, block, short_string};

use crate::{Peer, fails};

/// Lets the client open channel 2 and consume on it.
fn begin(broker: &mut RawBroker) {
    broker.expect((20, 10));
    broker.send(2, (20, 11), &block(b""));
    broker.answer(2, (60, 10), b"");
    broker.answer(2, (60, 20), &short_string(b"tag"));
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

#[test]
fn deliveries_of_a_lookup_end_with_it() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        begin(&mut broker);
        broker.deliver_on(2, 1, b"one");
        assert_eq!(broker.expect((60, 80)), [0, 0, 0, 0, 0, 0, 0, 1, 1]);
        broker.expect((20, 40));
        broker.deliver_on(2, 2, b"late");
        broker.send(2, (20, 41), b"");
        begin(&mut broker);
        broker.deliver_on(2, 1, b"two");
        broker.answer(2, (20, 40), b"");
        broker.answer(1, (60, 20), &short_string(b"tag"));
        broker.deliver(1, b"three");
        broker.wait_for_end();
    });
    let mut connection = peer.connect();
    let mut first = connection.look_up("s", 1, StreamOffset::At(7)).unwrap();
    let delivery = first.next(soon()).unwrap().unwrap();
    assert_eq!(delivery.body, b"one");
    first.acknowledge(delivery.tag);
    drop(first);
    let mut second = connection.look_up("s", 1, StreamOffset::First).unwrap();
    assert_eq!(second.next(soon()).unwrap().unwrap().body, b"two");
    drop(second);
    let mut deliveries = connection.consume("s", None).unwrap();
    deliveries.wait(&[], Some(soon()));
    assert_eq!(deliveries.try_next().unwrap().unwrap().body, b"three");
    drop(deliveries);
    peer.ends();
}

#[test]
fn what_was_sent_ends_at_the_answer() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        begin(&mut broker);
        broker.deliver_on(2, 1, b"one");
        broker.expect((60, 10));
        broker.deliver_on(2, 2, b"two");
        broker.send(2, (60, 11), b"");
        broker.answer(2, (20, 40), b"");
        broker.wait_for_end();
    });
    let mut connection = peer.connect();
    let mut lookup = connection.look_up("s", 9, StreamOffset::LastChunk).unwrap();
    for body in [b"one", b"two"] {
        assert_eq!(lookup.next_sent(soon()).unwrap().unwrap().body, body);
    }
    assert!(lookup.next_sent(soon()).unwrap().is_none());
    drop(lookup);
    drop(connection);
    peer.ends();
}

#[test]
fn a_refused_lookup_leaves_the_channel_of_messages_open() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.expect((60, 20));
        let close = [&[0x01, 0x94][..], &short_string(b"NOT_FOUND - no"), &[0, 60, 0, 20]].concat();
        broker.send(2, (20, 40), &close);
        broker.expect((20, 41));
        // The next one is closed after its first message.
        begin(&mut broker);
        broker.deliver_on(2, 1, b"one");
        broker.send(2, (20, 40), &close);
        broker.answer(1, (60, 20), &short_string(b"tag"));
        broker.wait_for_end();
    });
    let mut connection = peer.connect();
    let refused = connection.look_up("s", 1, StreamOffset::Next);
    fails(refused, ErrorKind::NotFound, &["consume queue 's': NOT_FOUND - no"]);
    let mut lookup = connection.look_up("s", 1, StreamOffset::Next).unwrap();
    assert_eq!(lookup.next(soon()).unwrap().unwrap().body, b"one");
    fails(lookup.next(soon()), ErrorKind::NotFound, &["read stream 's': NOT_FOUND - no"]);
    drop(lookup);
    drop(connection.consume("q", None).unwrap());
    peer.ends();
}

#[test]
fn a_broker_that_does_not_close_the_channel_is_cut() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        begin(&mut broker);
        broker.expect((20, 40));
        broker.wait_for_end();
    });
    let mut connection = crate::open(&[peer.uri(Duration::from_millis(300))]).unwrap();
    let mut lookup = connection.look_up("s", 1, StreamOffset::Next).unwrap();
    assert!(lookup.next(Instant::now()).unwrap().is_none());
    drop(lookup);
    let lost = connection.consume("s", None);
    fails(lost, ErrorKind::Unavailable, &["no answer in time"]);
    peer.ends();
}
