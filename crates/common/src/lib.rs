//! The common ground of `emit-log` and `receive-logs`, on top of crate `amqp`: options, the fanout
//! exchange, the conventions of their messages, and the way a program ends.
//!
//! In the order in which a program needs them:
//!
//! - [`cli`]: the options that both tools have
//! - [`password`]: the brokers to try, with the password of a file
//! - [`notes`]: lines on stderr that hold nobody up
//! - [`logging`]: the level of notes, and the passwords that stay out of them
//! - [`exchange`]: the fanout exchange
//! - [`wire`]: batches of records, and the numbers by which receivers see gaps
//! - [`escape`]: message bytes made fit for a terminal
//! - [`signals`]: being told to stop
//! - [`status`]: being asked how it goes
//! - [`time`]: times for people
//! - [`stdio`]: whether standard input and output were closed at the start
//! - [`lock`]: files that one process uses at a time
//! - [`exit`]: errors, and the exit status each leads to
//! - [`hints`]: the options that are the remedy for an error of the broker

pub mod cli;
pub mod escape;
pub mod exchange;
pub mod exit;
pub mod hints;
pub mod lock;
pub mod logging;
pub mod notes;
pub mod password;
pub mod signals;
pub mod status;
pub mod stdio;
pub mod time;
pub mod wire;

pub use cli::{ConnectionArgs, ExchangeArgs};
pub use exit::{Failure, Status};
