//! The public interface of the crate, against scripted peers in the process of the test.

mod calls;
mod consuming;
mod login;
mod lookups;
mod publishing;
mod tls;

use std::net::{SocketAddr, TcpListener};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use amqp::{Connection, Durability, Error, ErrorKind, Exchange, ExchangeKind, Uri};
use logs_tests::PATIENCE;
use logs_tests::raw::RawBroker;

/// A peer that serves one client by a script.
struct Peer {
    address: SocketAddr,
    thread: JoinHandle<()>,
}

impl Peer {
    fn start(script: impl FnOnce(RawBroker) + Send + 'static) -> Peer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            script(RawBroker::new(socket));
        });
        Peer { address, thread }
    }

    /// Its address, for a client with this timeout. The peer sends no heartbeats.
    fn uri(&self, timeout: Duration) -> Uri {
        let milliseconds = timeout.as_millis();
        let (address, parameters) = (self.address, "heartbeat=0&connection_timeout=");
        Uri::parse(&format!("amqp://{address}?{parameters}{milliseconds}")).unwrap()
    }

    fn connect(&self) -> Connection {
        open(&[self.uri(PATIENCE)]).unwrap()
    }

    /// Waits for the end of the script, which must not have failed.
    fn ends(self) {
        self.thread.join().expect("the peer gets what it expects");
    }
}

/// The exchange of the publish/subscribe example.
fn logs() -> Exchange {
    let (name, kind) = ("logs".into(), ExchangeKind::Fanout);
    Exchange { name, kind, durability: Durability::Transient }
}

/// Connects; the hint of each error is its kind.
fn open(uris: &[Uri]) -> Result<Connection, Error> {
    Connection::open(uris, "test", hint)
}

fn hint(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Unreachable => " (hint: unreachable)",
        ErrorKind::NotFound => " (hint: not found)",
        ErrorKind::OtherDurability => " (hint: other durability)",
        ErrorKind::OtherQueue => " (hint: other queue)",
        _ => "",
    }
}

/// The error, which has to be of this kind and to have these parts.
#[track_caller]
fn fails<T>(outcome: Result<T, Error>, kind: ErrorKind, parts: &[&str]) -> String {
    let error = outcome.err().expect("an error");
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    text
}
