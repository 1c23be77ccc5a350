//! What `emit-log` and `receive-logs` put on top of crate `amqp`, both of them: options, the fanout
//! exchange, retrying, what they say to each other, and the way a program ends.
//!
//! In the order in which a program needs them:
//!
//! - [`cli`]: the options that both tools have
//! - [`notes`]: lines on stderr that hold nobody up
//! - [`logging`]: which of them there are, and what must never be in them
//! - [`retry`]: whether to try again, and when
//! - [`exchange`]: the fanout exchange
//! - [`wire`]: what the two tools say to each other in the properties of a message
//! - [`escape`]: message bytes made fit for a terminal
//! - [`signals`]: being told to stop
//! - [`stdio`]: whether standard input and output were closed at the start
//! - [`exit`]: errors, and the exit status each leads to

pub mod cli;
pub mod escape;
pub mod exchange;
pub mod exit;
pub mod logging;

pub mod notes;

pub mod retry;
pub mod signals;
pub mod stdio;
pub mod wire;

pub use cli::{ConnectionArgs, ExchangeArgs};
pub use exit::{Failure, Status};
