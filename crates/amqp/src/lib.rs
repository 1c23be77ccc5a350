//! amiquip made dependable: the one crate that speaks AMQP, and that may name amiquip.
//!
//! amiquip is the fastest synchronous AMQP client for Rust, and has no maintainer. It logs in, makes requests and
//! sends heartbeats here; messages and confirmations go past it, as it hands each of them from thread to thread
//! (`transport::wire`). Its other gaps, and the module that covers each:
//!
//! - [`Uri`], [`Secret`]: amiquip takes a URL apart loosely, and prints the password in errors
//! - [`Error`]: its errors name no operation, and lose the broker's own words
//! - [`Connection`]: addresses of a cluster in turn, the login, declarations; each with a deadline
//! - [`Deliveries`]: their end tells no reason; their buffer has no bounds
//! - [`Publishing`]: confirmations, returned messages and alarms come in three places; here as [`Event`]s in
//!   the order of the broker
//! - `link`, `deadline`: none of its calls has a deadline, and a dropped connection may wait for ever
//! - [`retry`]: a lost connection stays lost
//! - `panics`: amiquip panics where an error should be returned
//! - `transport`: amiquip leaves Nagle's algorithm on, reads 4 KiB at a time, and believes all it reads
//! - [`Mailbox`]: a program waits for the broker and for its other threads at once
//!
//! A `timeout` limits a single call; a `deadline` is handed down through all steps of an end.
//!
//! ```no_run
//! # fn main() -> Result<(), amqp::Error> {
//! use amqp::{Connection, Durability, Queue, Uri};
//!
//! let uri = Uri::parse("amqp://localhost").expect("a URI");
//! let mut connection = Connection::open(&[uri], "example", |_| "")?;
//! connection.declare_fanout("logs", Durability::Transient);
//! let queue = connection.declare_queue(&Queue::exclusive())?;
//! connection.bind(&queue.name, "logs");
//! connection.set_prefetch(100);
//! let mut deliveries = connection.consume(&queue.name, None)?;
//! loop {
//!     while let Some(delivery) = deliveries.try_next()? {
//!         deliveries.acknowledge(&delivery);
//!     }
//!     deliveries.wait(&[], None);
//! }
//! # }
//! ```

mod connection;
mod consuming;
mod deadline;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod link;
mod mailbox;
mod panics;
mod publishing;
pub mod retry;
mod secret;
mod transport;
mod uri;

pub use amiquip::{AmqpProperties as Properties, AmqpValue as Value, FieldTable as Table};

pub use connection::{Connection, Durability, Queue, QueueState, StreamOffset, stream_offset};
pub use consuming::{Deliveries, Delivery, Waiting};
pub use error::{Error, ErrorKind, Hint};
pub use link::Lost;
pub use mailbox::{Letterbox, Mailbox};
pub use panics::is_expected_panic;
pub use publishing::{Event, Publishing, Return, Route, Start};
pub use secret::Secret;
pub use transport::tls::TlsSettings;
pub use transport::wire::{Woken, wait_for};
pub use uri::{Uri, check_length};
