//! What `emit-log` and `receive-logs` share: everything up to an open connection with the
//! fanout exchange declared on it, and the way a program ends.
//!
//! In the order in which a program needs them:
//!
//! - [`cli`]: the options that both tools have
//! - [`notes`]: lines on stderr that hold nobody up
//! - [`logging`]: which of them there are, and what must never be in them
//! - [`uri`]: an AMQP URI, and the password that cannot be printed
//! - [`connection`]: connect, log in, open, close; each with a deadline
//! - [`watchdog`]: the deadlines
//! - [`stream`]: the bytes between amiquip and the broker
//! - [`backlog`]: how much is received and not taken
//! - [`pace`]: fewer wake-ups under load
//! - [`tls`]: the same, encrypted
//! - [`guard`]: checks those bytes before amiquip believes them
//! - [`retry`]: whether to try again, and when
//! - [`exchange`]: the fanout exchange
//! - [`packing`]: several records in one message
//! - [`message_id`]: the numbers by which receivers see what is missing
//! - [`text`]: message bytes made fit for a terminal
//! - [`signals`]: being told to stop
//! - [`stdio`]: whether standard input and output were closed at the start
//! - [`exit`]: errors, and the exit status each leads to

pub mod backlog;
pub mod cli;
pub mod connection;
pub mod exchange;
pub mod exit;
pub mod guard;
pub mod logging;
pub mod message_id;
pub mod notes;
pub mod pace;
pub mod packing;
pub mod retry;
pub mod signals;
pub mod stdio;
pub mod stream;
pub mod text;
pub mod tls;
pub mod uri;
pub mod watchdog;

pub use cli::{ConnectionArgs, ExchangeArgs};
pub use connection::Connection;
pub use exit::{Failure, Status};
