//! Connecting, logging in, and calls before anything is consumed or published.

use std::io::Write;
use std::net::TcpListener;
use std::slice;
use std::time::{Duration, Instant};

use amqp::{Error, ErrorKind, Queue, Uri, Value};
use logs_tests::raw::{RawBroker, frame, short_string};
use logs_tests::{PATIENCE, free_port};

use crate::{Peer, fails, logs, open};

const BRIEFLY: Duration = Duration::from_millis(200);

fn closed(port: u16) -> Uri {
    Uri::parse(&format!("amqp://127.0.0.1:{port}?connection_timeout=5000")).unwrap()
}

/// Connects, and waits for a first answer: a refusal may come in its place.
fn let_in(uri: &Uri) -> Result<(), Error> {
    open(slice::from_ref(uri))?.declare_queue(&Queue::exclusive()).map(drop)
}

#[test]
fn a_peer_may_close_at_each_step_of_the_login() {
    for step in 0..RawBroker::<std::net::TcpStream>::LOGIN_STEPS {
        let peer = Peer::start(move |mut broker| broker.log_in_until(step));
        let operation = format!("log in to {} as 'guest', vhost '/': ", peer.address);
        let (kind, text) = match step {
            0 => (ErrorKind::Unreachable, "closed without an answer"),
            1 => (ErrorKind::Unavailable, "closed without a word"),
            _ => (ErrorKind::Unavailable, "connection lost"),
        };
        fails(let_in(&peer.uri(PATIENCE)), kind, &[&operation, text]);
        peer.ends();
    }
}

#[test]
fn a_peer_may_fall_silent_at_each_step_of_the_login() {
    for step in 0..RawBroker::<std::net::TcpStream>::LOGIN_STEPS {
        let peer = Peer::start(move |mut broker| {
            broker.log_in_until(step);
            broker.wait_for_end();
        });
        let start = Instant::now();
        let outcome = let_in(&peer.uri(BRIEFLY));
        let parts = ["no answer within the connection timeout", "(hint: unreachable)"];
        fails(outcome, ErrorKind::Unreachable, &parts);
        assert!(start.elapsed() >= BRIEFLY, "{:?}", start.elapsed());
        // On a busy machine the time may be up before the peer has come to that step.
        drop(peer);
    }
}

#[test]
fn a_refused_login_comes_with_the_words_of_the_broker() {
    for (step, code, text, kind) in [
        (1, 403, "ACCESS_REFUSED - Login was refused", ErrorKind::Permission),
        (2, 530, "NOT_ALLOWED - vhost v not found", ErrorKind::NoVhost),
        (
            2,
            530,
            "NOT_ALLOWED - connection refused: node connection limit (1) is reached",
            ErrorKind::Unavailable,
        ),
        (3, 320, "CONNECTION_FORCED - shutdown", ErrorKind::Unavailable),
    ] {
        let peer = Peer::start(move |mut broker| {
            broker.log_in_until(step);
            broker.close(10, code, text);
            broker.wait_for_end();
        });
        let text = fails(let_in(&peer.uri(PATIENCE)), kind, &["log in to ", text]);
        assert!(!text.contains("hint"), "a broker was reached: {text}");
        peer.ends();
    }
}

#[test]
fn a_peer_that_breaks_the_rules_is_no_broker() {
    for (bytes, text) in [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "an HTTP server answers"),
        (b"?".to_vec(), "something else answers"),
        (frame(1, 0, &[0, 10, 0, 30]), "another method before connection.start"),
        (frame(1, 0, &[0, 10, 0, 10, 0, 9, 0, 0, 0, 9]), "method 10.10"),
    ] {
        let peer = Peer::start(move |mut broker| {
            broker.log_in_until(0);
            broker.write(&bytes);
        });
        fails(open(&[peer.uri(PATIENCE)]), ErrorKind::Protocol, &[text]);
        peer.ends();
    }
}

#[test]
fn the_nodes_of_a_cluster_are_tried_in_turn() {
    let (first, second) = (free_port(), free_port());
    // The URIs are tried from a random one on, and listed in their order.
    for _ in 0..8 {
        let outcome = open(&[closed(first), closed(second)]);
        let text = fails(outcome, ErrorKind::Unreachable, &["refused", "hint"]);
        let places = [first, second].map(|port| text.find(&format!(":{port}: ")).unwrap());
        assert!(places.is_sorted(), "{text}");
    }
    for _ in 0..4 {
        let peer = Peer::start(|mut broker| {
            broker.log_in();
            broker.wait_for_end();
        });
        open(&[closed(first), peer.uri(PATIENCE)]).unwrap();
        peer.ends();
    }
}

#[test]
fn a_permanent_error_counts_if_all_nodes_have_one() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = closed(listener.local_addr().unwrap().port());
    std::thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let _ = socket.write_all(b"SSH-2.0-x\r\n");
        }
    });
    fails(open(&[uri.clone(), uri.clone()]), ErrorKind::Protocol, &["an SSH server"]);
    let outcome = open(&[uri, closed(free_port())]);
    fails(outcome, ErrorKind::Unreachable, &["an SSH server", "refused"]);
    fails(open(&[]), ErrorKind::Unreachable, &[]);
}

#[test]
fn a_host_is_looked_up() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.wait_for_end();
    });
    let uri = Uri::parse(&format!("amqp://localhost:{}", peer.address.port())).unwrap();
    drop(open(&[uri]).unwrap());
    peer.ends();
    let uri = Uri::parse("amqp://no-such-host.invalid?connection_timeout=2000").unwrap();
    fails(open(&[uri]), ErrorKind::Unreachable, &["look up no-such-host.invalid:5672: "]);
}

#[test]
fn a_certificate_may_stand_for_user_and_password() {
    let peer = Peer::start(|mut broker| {
        broker.log_in_until(0);
        broker.send(0, (10, 10), b"\0\x09\0\0\0\0\0\0\0\x08EXTERNAL\0\0\0\x05en_US");
        let start_ok = broker.expect((10, 11));
        assert!(start_ok.windows(9).any(|bytes| bytes == b"\x08EXTERNAL"), "{start_ok:?}");
        broker.close(10, 403, "ACCESS_REFUSED - Login was refused");
        broker.wait_for_end();
    });
    let uri = format!("amqp://{}?auth_mechanism=external", peer.address);
    let outcome = open(&[Uri::parse(&uri).unwrap()]);
    let text = fails(outcome, ErrorKind::Permission, &["Login was refused"]);
    assert!(text.starts_with(&format!("log in to {}, vhost '/': ", peer.address)), "{text}");
    peer.ends();
}

#[test]
fn a_mechanism_that_the_broker_does_not_have() {
    let peer = Peer::start(|mut broker| {
        broker.log_in_until(0);
        broker.send(0, (10, 10), b"\0\x09\0\0\0\0\0\0\0\x08AMQPLAIN\0\0\0\x05en_US");
        broker.wait_for_end();
    });
    fails(open(&[peer.uri(PATIENCE)]), ErrorKind::Permission, &["AMQPLAIN", "PLAIN"]);
    peer.ends();
}

#[test]
fn a_refused_declaration_closes_the_channel_with_a_reason() {
    let text = "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/'";
    let peer = Peer::start(move |mut broker| {
        broker.log_in();
        let declare = broker.expect((50, 10));
        assert_eq!(declare[3..6], *b"q\x02\0", "the name, and durable alone");
        assert!(declare.ends_with(b"\x0cx-queue-typeS\0\0\0\x06quorum"), "{declare:?}");
        broker.close(20, 406, text);
        broker.wait_for_end();
    });
    let queue = Queue::durable("q").argument("x-queue-type", Value::LongString("quorum".into()));
    let outcome = peer.connect().declare_queue(&queue);
    let text = format!("declare queue 'q': {text} (hint: other queue)");
    assert_eq!(fails(outcome, ErrorKind::OtherQueue, &[]), text);
    peer.ends();
}

#[test]
fn a_connection_may_be_closed_while_a_call_waits() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.expect((50, 10));
        broker.close(10, 320, "CONNECTION_FORCED - by operator");
        broker.wait_for_end();
    });
    let outcome = peer.connect().declare_queue(&Queue::exclusive());
    fails(outcome, ErrorKind::Unavailable, &["CONNECTION_FORCED - by operator"]);
    peer.ends();
}

#[test]
fn a_connection_may_be_cut_while_a_call_waits() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.expect((50, 10));
    });
    let outcome = peer.connect().declare_queue(&Queue::exclusive());
    fails(outcome, ErrorKind::Unavailable, &[&format!("connection to {}", peer.address)]);
    peer.ends();
}

#[test]
fn a_call_without_an_answer_cuts_the_connection() {
    let peer = Peer::start(|mut broker| {
        broker.log_in();
        broker.expect((40, 10));
        broker.expect((50, 10));
        broker.wait_for_end();
    });
    // As long as the login may take, on a busy machine.
    let timeout = Duration::from_secs(2);
    let mut connection = open(&[peer.uri(timeout)]).unwrap();
    connection.declare_exchange(&logs());
    let start = Instant::now();
    let outcome = connection.declare_queue(&Queue::durable("q"));
    let text = format!("declare queue 'q' at {}: no answer within 2s", peer.address);
    assert_eq!(fails(outcome, ErrorKind::Unavailable, &[]), text);
    assert!(start.elapsed() >= timeout);
    peer.ends();
}

#[test]
fn a_queue_is_declared_as_it_is_asked_for() {
    let answer = [&short_string(b"amq.gen-1")[..], &[0, 0, 0, 7, 0, 0, 0, 2]].concat();
    let peer = Peer::start(move |mut broker| {
        broker.log_in();
        let declare = broker.expect((50, 10));
        assert_eq!(declare, [0, 0, 0, 4, 0, 0, 0, 0], "no name, exclusive alone, no arguments");
        broker.send(1, (50, 11), &answer);
        broker.wait_for_end();
    });
    let state = peer.connect().declare_queue(&Queue::exclusive()).unwrap();
    assert_eq!((&*state.name, state.messages, state.consumers), ("amq.gen-1", 7, 2));
    peer.ends();
}
