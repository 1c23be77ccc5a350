//! Everything that may arrive while a request waits for its answer.

use std::time::{Duration, Instant};

use amqp::{Deliveries, Error, ErrorKind, Event, Lost, Queue, Route, Start};
use logs_tests::PATIENCE;
use logs_tests::raw::{RawBroker, short_string};

use crate::{Peer, logs, open};

/// How long an answer may take that does not arrive.
const SHORT: Duration = Duration::from_millis(1000);

/// A request whose answer the program waits for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Pending {
    Login,
    Declare,
    Consume,
    Count,
    Barrier,
    Cancel,
    Question,
}

const PENDING: [Pending; 7] = [
    Pending::Login,
    Pending::Declare,
    Pending::Consume,
    Pending::Count,
    Pending::Barrier,
    Pending::Cancel,
    Pending::Question,
];

/// What arrives before the answer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Arrival {
    Delivery,
    Confirm,
    Return,
    Blocked,
    Cancel,
    Flow,
    Heartbeat,
    OtherAnswer,
    ChannelClose,
    ConnectionClose,
    EndOfFile,
    HalfAFrame,
}

const ARRIVALS: [Arrival; 12] = [
    Arrival::Delivery,
    Arrival::Confirm,
    Arrival::Return,
    Arrival::Blocked,
    Arrival::Cancel,
    Arrival::Flow,
    Arrival::Heartbeat,
    Arrival::OtherAnswer,
    Arrival::ChannelClose,
    Arrival::ConnectionClose,
    Arrival::EndOfFile,
    Arrival::HalfAFrame,
];

impl Pending {
    /// Plays the broker until the request is there; returns how to answer it.
    fn play(self, broker: &mut RawBroker) -> (u16, (u16, u16), Vec<u8>) {
        let declared = [&short_string(b"q")[..], &[0; 8]].concat();
        if self == Pending::Login {
            broker.log_in_until(2);
            return (0, (10, 41), vec![0]);
        }
        broker.log_in();
        if matches!(self, Pending::Count | Pending::Barrier | Pending::Cancel) {
            broker.answer(1, (60, 20), &short_string(b"tag"));
        }
        let (class, method, arguments) = match self {
            Pending::Login | Pending::Declare | Pending::Count => (50, 10, declared),
            Pending::Consume => (60, 20, short_string(b"tag")),
            Pending::Barrier | Pending::Question => (60, 10, vec![]),
            Pending::Cancel => (60, 30, short_string(b"tag")),
        };
        broker.expect((class, method));
        (1, (class, method + 1), arguments)
    }

    /// Plays the program up to the answer. Returns the deliveries, if it consumes by then.
    fn call(self, peer: &Peer, timeout: Duration) -> Result<Option<Deliveries>, Error> {
        let mut connection = open(&[peer.uri(timeout)])?;
        let route = || Route {
            exchange: logs(),
            declare: false,
            start: if self == Pending::Login { Start::LoggedIn } else { Start::AtOnce },
            mandatory: false,
            confirms: true,
        };
        match self {
            Pending::Login => connection.publish(route()).map(|_| None),
            Pending::Declare => connection.declare_queue(&Queue::exclusive()).map(|_| None),
            Pending::Consume => connection.consume("q", None).map(Some),
            Pending::Question => {
                let mut publishing = connection.publish(route())?;
                publishing.ask();
                let end = Instant::now() + timeout;
                while !publishing.has_answered() {
                    publishing.wait(&[], Some(end));
                    match publishing.try_event() {
                        Err(Lost) => return Err(publishing.end()),
                        Ok(Some(Event::Blocked(_) | Event::Confirmed { .. })) => {}
                        Ok(_) if end <= Instant::now() => {
                            return Err(Error::unavailable("no answer"));
                        }
                        Ok(_) => {}
                    }
                }
                Ok(None)
            }
            Pending::Count | Pending::Barrier | Pending::Cancel => {
                let deliveries = connection.consume("q", None)?;
                let deadline = Instant::now() + timeout;
                match self {
                    Pending::Count => drop(deliveries.count_consumers(deadline)?),
                    Pending::Barrier => deliveries.barrier(deadline, "acknowledge")?,
                    _ => deliveries.cancel(deadline)?,
                }
                Ok(Some(deliveries))
            }
        }
    }
}

impl Arrival {
    /// Sends it; returns whether the broker continues.
    fn send(self, broker: &mut RawBroker) -> bool {
        match self {
            Arrival::Delivery => broker.deliver(1, b"meanwhile"),
            Arrival::Confirm => broker.send(1, (60, 80), &[0, 0, 0, 0, 0, 0, 0, 1, 0]),
            Arrival::Return => {
                let texts = [short_string(b"NO_ROUTE"), short_string(b"logs"), short_string(b"")];
                broker.send(1, (60, 50), &[&[1, 56][..], &texts.concat()].concat());
                broker.write(b"\x02\0\x01\0\0\0\x0e\0\x3c\0\0\0\0\0\0\0\0\0\x01\0\0\xce");
                broker.write(b"\x03\0\x01\0\0\0\x01x\xce");
            }
            Arrival::Blocked => broker.send(0, (10, 60), &short_string(b"low on memory")),
            Arrival::Cancel => {
                broker.send(1, (60, 30), &[&short_string(b"tag")[..], &[1]].concat())
            }
            Arrival::Flow => {
                broker.send(1, (20, 20), &[0]);
                broker.expect((20, 21));
            }
            Arrival::Heartbeat => broker.write(b"\x08\0\0\0\0\0\0\xce"),
            Arrival::OtherAnswer => broker.send(2, (50, 11), &[1, b'q', 0, 0, 0, 0, 0, 0, 0, 9]),
            Arrival::ChannelClose => broker.close(20, 404, "NOT_FOUND - gone"),
            Arrival::ConnectionClose => broker.close(10, 320, "CONNECTION_FORCED - gone"),
            Arrival::EndOfFile => {}
            Arrival::HalfAFrame => broker.write(b"\x01\0\x01\0\0\0\x14\0\x3c"),
        }
        !matches!(
            self,
            Arrival::ChannelClose
                | Arrival::ConnectionClose
                | Arrival::EndOfFile
                | Arrival::HalfAFrame
        )
    }

    /// The kind and a part of the text of the error, where the call fails.
    fn error(self) -> Option<(ErrorKind, &'static str)> {
        match self {
            Arrival::ChannelClose => Some((ErrorKind::NotFound, "NOT_FOUND - gone")),
            Arrival::ConnectionClose => Some((ErrorKind::Unavailable, "CONNECTION_FORCED - gone")),
            Arrival::EndOfFile => Some((ErrorKind::Unavailable, "connection lost")),
            Arrival::HalfAFrame => Some((ErrorKind::Unavailable, "no answer")),
            _ => None,
        }
    }
}

/// The outcome of a call during which something arrives.
fn outcome(pending: Pending, arrival: Arrival) -> Result<Option<Deliveries>, Error> {
    let peer = Peer::start(move |mut broker| {
        let (channel, method, arguments) = pending.play(&mut broker);
        if arrival.send(&mut broker) {
            broker.send(channel, method, &arguments);
            if pending == Pending::Login {
                broker.send(1, (20, 11), &[0; 4]);
            }
        }
        if arrival != Arrival::EndOfFile {
            broker.wait_for_end();
        }
    });
    let timeout = if arrival == Arrival::HalfAFrame { SHORT } else { PATIENCE };
    let outcome = pending.call(&peer, timeout);
    if let Ok(Some(mut deliveries)) = outcome {
        check_deliveries(pending, arrival, &mut deliveries);
        drop(deliveries);
        peer.ends();
        return Ok(None);
    }
    peer.ends();
    outcome
}

/// What has arrived during the call is there after it.
fn check_deliveries(pending: Pending, arrival: Arrival, deliveries: &mut Deliveries) {
    let next = deliveries.try_next();
    match arrival {
        Arrival::Delivery => assert_eq!(next.unwrap().unwrap().body, b"meanwhile", "{pending:?}"),
        // The reason is asked for, and the peer does not answer.
        Arrival::Cancel => assert!(next.is_err(), "{pending:?}"),
        _ => assert!(next.unwrap().is_none(), "{pending:?}, {arrival:?}"),
    }
}

#[test]
fn a_call_gets_its_answer_whatever_arrives_before_it() {
    for pending in PENDING {
        for arrival in ARRIVALS.into_iter().filter(|arrival| arrival.error().is_none()) {
            let outcome = outcome(pending, arrival);
            assert!(outcome.is_ok(), "{pending:?}, {arrival:?}: {:?}", outcome.err());
        }
    }
}

#[test]
fn a_call_that_gets_no_answer_fails_with_the_reason() {
    for pending in PENDING {
        for arrival in ARRIVALS {
            let Some((kind, text)) = arrival.error() else { continue };
            let error = outcome(pending, arrival).err().expect("an error");
            assert!(error.to_string().contains(text), "{pending:?}, {arrival:?}: {error}");
            // A login that is not answered may have reached another program.
            let kind = match (pending, arrival) {
                (Pending::Login, Arrival::HalfAFrame) => ErrorKind::Unreachable,
                // The exchange of a publisher may come back.
                _ => kind,
            };
            assert_eq!(error.kind(), kind, "{pending:?}, {arrival:?}: {error}");
        }
    }
}
