//! Publishing, and the order of events.

use std::io::Read;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use amqp::{
    Durability, Error, ErrorKind, Event, Lost, NO_KEY, Properties, Publishing, Route, Start, Uri,
};
use logs_tests::{
    EXCHANGE_DECLARE, PATIENCE, PUBLISH, ScriptedBroker, ScriptedSession, wait_until,
};

use crate::{Peer, fails, logs, open};

fn route() -> Route {
    Route { exchange: logs(), declare: true, mandatory: true, confirms: true, start: Start::AtOnce }
}

fn start(broker: &ScriptedBroker, route: Route) -> Result<Publishing, Error> {
    open(&[Uri::parse(&broker.url()).unwrap()])?.publish(route)
}

/// A publisher at a broker, and the broker's end.
fn publishing(route: Route) -> (ScriptedBroker, ScriptedSession, Publishing) {
    let broker = ScriptedBroker::start();
    let publishing = start(&broker, route).unwrap();
    let session = broker.accept();
    (broker, session, publishing)
}

fn publish(publishing: &mut Publishing, bodies: &[&str]) {
    for body in bodies {
        publishing.publish(NO_KEY, body.as_bytes(), &Properties::default());
    }
    publishing.flush();
}

/// The next event, in short.
fn next(publishing: &mut Publishing) -> Result<String, Lost> {
    loop {
        let event = publishing.try_event()?;
        return Ok(match event {
            Some(Event::Confirmed { tag, multiple }) => format!("confirmed {tag} {multiple}"),
            Some(Event::Nacked { tag, multiple }) => format!("refused {tag} {multiple}"),
            Some(Event::Returned(message)) => {
                format!("returned {}", String::from_utf8_lossy(&message.content))
            }
            Some(Event::Blocked(reason)) => format!("blocked {reason}"),
            Some(Event::Unblocked) => "unblocked".into(),
            None => {
                publishing.wait(&[], Some(Instant::now() + PATIENCE));
                continue;
            }
        });
    }
}

#[test]
fn events_come_in_the_order_in_which_they_count() {
    let (_broker, session, mut publishing) = publishing(route());
    let durability = publishing.declared().map(|exchange| exchange.durability);
    assert_eq!(durability, Some(Durability::Transient));
    publish(&mut publishing, &["1", "2", "3", "4"]);
    let published = session.expect_publishes(4);
    assert!(published.iter().all(|message| message.mandatory && message.exchange == "logs"));
    session.ack(1, false);
    assert_eq!(next(&mut publishing).unwrap(), "confirmed 1 false");
    session.give_back(&published[1]);
    session.ack(3, true);
    assert_eq!(next(&mut publishing).unwrap(), "returned 2");
    assert_eq!(next(&mut publishing).unwrap(), "confirmed 3 true");
    session.nack(4, false);
    assert_eq!(next(&mut publishing).unwrap(), "refused 4 false");
    session.block("low on memory");
    assert_eq!(next(&mut publishing).unwrap(), "blocked low on memory");
    session.unblock();
    assert_eq!(next(&mut publishing).unwrap(), "unblocked");
    assert!(matches!(publishing.try_event(), Ok(None)));
    publishing.close();
    session.expect_close();
}

#[test]
fn a_large_message_goes_out_whole() {
    let (_broker, session, mut publishing) = publishing(route());
    let body = "x".repeat(3 << 20);
    publish(&mut publishing, &[&body]);
    assert_eq!(session.expect_publishes(1)[0].body.len(), body.len());
}

#[test]
fn a_publisher_that_waits_for_room_in_the_socket_is_woken_by_it() {
    for has_more in [false, true] {
        wait_for_room(has_more);
    }
}

fn wait_for_room(has_more: bool) {
    let (go_on, may_go_on) = mpsc::channel();
    let (sender, has_read) = mpsc::channel();
    let peer = Peer::start(move |mut broker| {
        broker.log_in();
        may_go_on.recv().unwrap();
        // All that is on its way, so that the rest fits into the send buffer.
        broker.socket().set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut buffer = vec![0; 1 << 20];
        while broker.socket().read(&mut buffer).is_ok_and(|length| length > 0) {}
        sender.send(()).unwrap();
        broker.socket().set_read_timeout(Some(PATIENCE)).unwrap();
        while broker.socket().read(&mut buffer).is_ok_and(|length| length > 0) {}
    });
    let mut publishing = peer.connect().publish(Route { declare: false, ..route() }).unwrap();
    while !publishing.is_congested() {
        publishing.publish(NO_KEY, &[0; 64 << 10], &Properties::default());
        publishing.flush();
    }
    go_on.send(()).unwrap();
    has_read.recv_timeout(PATIENCE).unwrap();
    if has_more {
        publishing.publish(NO_KEY, b"more", &Properties::default());
    }
    let start = Instant::now();
    publishing.wait(&[], Some(start + PATIENCE));
    assert!(start.elapsed() < PATIENCE / 2 && !publishing.is_congested());
    drop(publishing);
    peer.ends();
}

#[test]
fn a_lost_connection_shows_after_all_that_came_before() {
    let (_broker, session, mut publishing) = publishing(route());
    publish(&mut publishing, &["1", "2"]);
    session.expect_publishes(2);
    session.ack(1, false);
    session.close(320, "CONNECTION_FORCED - by operator");
    assert_eq!(next(&mut publishing).unwrap(), "confirmed 1 false");
    next(&mut publishing).unwrap_err();
    let text = "CONNECTION_FORCED - by operator";
    fails::<()>(Err(publishing.end()), ErrorKind::Unavailable, &[text]);
    fails::<()>(Err(publishing.end()), ErrorKind::Unavailable, &[publishing.peer(), text]);
}

#[test]
fn a_refusal_that_closes_the_channel_names_the_request() {
    let not_found = "NOT_FOUND - no exchange 'logs' in vhost '/'";
    let durable = "PRECONDITION_FAILED - inequivalent arg 'durable' for exchange 'logs'";
    let passive = Route { declare: false, ..route() };
    for (route, code, text, request, kind, expected) in [
        (
            route(),
            404,
            not_found,
            PUBLISH,
            ErrorKind::Unavailable,
            format!("publish to exchange 'logs': {not_found}"),
        ),
        (
            passive,
            404,
            not_found,
            PUBLISH,
            ErrorKind::NotFound,
            format!("publish to exchange 'logs': {not_found} (hint: not found)"),
        ),
        (
            route(),
            406,
            durable,
            EXCHANGE_DECLARE,
            ErrorKind::OtherDurability,
            format!("declare exchange 'logs': {durable} (hint: other durability)"),
        ),
    ] {
        let (_broker, session, mut publishing) = publishing(route);
        session.close_channel(code, text, request);
        next(&mut publishing).unwrap_err();
        assert_eq!(fails::<()>(Err(publishing.end()), kind, &[]), expected);
    }
}

#[test]
fn without_confirmations_a_refused_declaration_shows_at_once() {
    let broker = ScriptedBroker::start();
    broker.set_exchange(true);
    let outcome = start(&broker, Route { confirms: false, ..route() });
    let parts = ["declare exchange 'logs': PRECONDITION_FAILED", "(hint: other durability)"];
    fails(outcome, ErrorKind::OtherDurability, &parts);
}

#[test]
fn without_confirmations_the_broker_is_asked_for_all_at_the_end() {
    let (_broker, session, mut publishing) = publishing(Route { confirms: false, ..route() });
    session.expect_question();
    publish(&mut publishing, &["1"]);
    publishing.ask();
    wait_until("it is answered", || {
        publishing.wait(&[], None);
        publishing.has_answered()
    });
    session.expect_publishes(1);
    session.expect_question();

    session.go_silent();
    publishing.ask();
    session.block("low on memory");
    wait_until("the alarm has come", || {
        publishing.wait(&[], None);
        matches!(publishing.try_event(), Ok(Some(Event::Blocked(_))))
    });
    let soon = Instant::now() + Duration::from_millis(50);
    while Instant::now() < soon {
        publishing.wait(&[], Some(soon));
    }
    assert!(!publishing.has_answered());
    publishing.close();
}
