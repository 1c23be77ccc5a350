//! The options, the exchange and the message format that `emit-log` and `receive-logs` have in common.
//!
//! - [`cli`]: the options that name a broker and an exchange
//! - [`password`]: the brokers to try, with the password of a file
//! - [`hints`]: options to suggest after an error of the broker
//! - [`exchange`]: the declaration of the exchange
//! - [`wire`]: batches of records, and the message ids by which receivers see gaps
//! - [`broker`]: the state of the connection, as a status line shows it

pub mod broker;
pub mod cli;
pub mod exchange;
pub mod hints;
pub mod password;
pub mod wire;

pub use cli::{ConnectionArgs, ExchangeArgs};
pub use exchange::ExchangeConfig;
