//! amiquip made dependable: the one crate that speaks AMQP, and the one that may name amiquip.
//!
//! amiquip is the fastest synchronous AMQP client for Rust, and nobody maintains it. What it leaves out,
//! and which module covers it:
//!
//! - [`Uri`], [`Secret`]: it takes a URL apart loosely, and prints the password in errors
//! - [`Error`]: its errors name no operation, and lose the broker's own words
//! - [`Connection`]: addresses of a cluster in turn, the login, declarations; each with a deadline
//! - [`Deliveries`]: an end of the deliveries tells no reason; its buffer has no bounds
//! - [`Publishing`]: confirmations, returned messages and alarms come in three places; here in the order
//!   in which they count
//! - `link`, `deadline`: none of its calls has a deadline, and a dropped connection may wait for ever
//! - `panics`: it panics where it should return errors
//! - `transport`: it leaves Nagle's algorithm on, reads 4 KiB at a time, and believes what it reads;
//! - [`Coalescer`]: fewer wake-ups under load, for its I/O thread and for programs
//!
//! ```no_run
//! # fn main() -> Result<(), amqp::Error> {
//! use amqp::{Connection, Durability, Queue, Uri};
//!
//! let uri = Uri::parse("amqp://localhost").expect("a URI");
//! let mut connection = Connection::open(&[uri], "example")?;
//! connection.declare_fanout("logs", Durability::Transient)?;
//! let queue = connection.declare_queue(&Queue::exclusive())?;
//! connection.bind(&queue.name, "logs")?;
//! connection.set_prefetch(100)?;
//! let mut deliveries = connection.consume(&queue.name, None)?;
//! while let Some(delivery) = deliveries.try_next()? {
//!     deliveries.acknowledge(delivery);
//! }
//! # Ok(())
//! # }
//! ```

mod connection;
mod consuming;
mod deadline;
mod error;
mod link;
mod panics;
mod publishing;
mod secret;
mod transport;
mod uri;

pub use amiquip::Return;
pub use amiquip::{
    AmqpProperties as Properties, AmqpValue as Value, Delivery, FieldTable as Table,
};

pub use connection::{Connection, Durability, Queue, QueueState};
pub use consuming::Deliveries;
pub use error::{Error, ErrorKind};
pub use panics::is_expected_panic;
pub use publishing::{Event, Lost, Publishing, Route};
pub use secret::Secret;
pub use transport::Coalescer;
pub use uri::{Mechanism, Uri, check_length};
