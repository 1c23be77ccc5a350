//! A blocking connection to an AMQP 0-9-1 broker, on one thread, in the style of pika's `BlockingConnection`.
//!
//! amiquip logs in; then the program's thread owns the socket. Bottom up:
//!
//! - [`Uri`], [`Secret`], [`Error`]: the address of a broker, passwords that are never printed, and errors that name
//!   the operation, its object, the broker's own words and a remedy
//! - `dial`, `tls`, `socket`: a connected socket, within a deadline
//! - `login`: the socket is lent to amiquip for the login
//! - `frame`, `method`, `properties`, `content`, `message`: bytes become checked frames, methods and messages
//! - [`Connection`]: requests and answers (`requests`), heartbeats, the end and its reason (`ending`)
//! - [`Lookup`]: a part of a stream, before that
//! - [`Deliveries`], [`Publishing`]: what a connection becomes
//! - [`keep_alive`]: heartbeats while the program is busy
//! - [`retry`]: delays between attempts to connect
//! - [`Mailbox`], [`wait_for`]: a program waits for the broker and for its other threads at once
//!
//! A `timeout` limits a single call; a `deadline` is handed down through all steps of an end.
//!
//! ```no_run
//! # fn main() -> Result<(), amqp::Error> {
//! use amqp::{Connection, Durability, Exchange, ExchangeKind, NO_KEY, Queue, Uri};
//!
//! let uri = Uri::parse("amqp://localhost").expect("a URI");
//! let mut connection = Connection::open(&[uri], "example", |_| "")?;
//! let (name, kind) = ("logs".to_string(), ExchangeKind::Fanout);
//! let logs = Exchange { name, kind, durability: Durability::Transient };
//! connection.declare_exchange(&logs);
//! let queue = connection.declare_queue(&Queue::exclusive())?;
//! connection.bind(&queue.name, &logs.name, NO_KEY);
//! connection.set_prefetch(100);
//! let mut deliveries = connection.consume(&queue.name, None)?;
//! loop {
//!     while let Some(delivery) = deliveries.try_next()? {
//!         deliveries.acknowledge(delivery.tag);
//!     }
//!     deliveries.wait(&[], None);
//! }
//! # }
//! ```

mod connection;
mod consuming;
mod content;
mod declare;
mod dial;
mod ending;
mod error;
mod frame;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod heartbeats;
mod lock;
mod login;
mod lookup;
mod mailbox;
mod message;
mod method;
mod poll;
mod properties;
mod publishing;
mod requests;
pub mod retry;
mod secret;
mod shared;
mod socket;
mod start_ok;
mod tls;
mod uri;
mod within;

pub use amiquip::{AmqpProperties as Properties, AmqpValue as Value, FieldTable as Table};

pub use connection::{Connection, Lost};
pub use consuming::{Deliveries, Waiting};
pub use declare::{
    Durability, Exchange, ExchangeKind, NO_KEY, Queue, QueueState, StreamOffset, stream_offset,
};
pub use error::{Error, ErrorKind, Hint};
pub use login::is_expected_panic;
pub use lookup::Lookup;
pub use mailbox::{Mailbox, Sender};
pub use message::{Delivery, Event, Return};
pub use poll::{Woken, wait_for};
pub use publishing::{Publishing, Route, Start};
pub use secret::Secret;
pub use shared::{KEEP_ALIVE, keep_alive};
pub use tls::TlsSettings;
pub use uri::{Uri, check_length};
