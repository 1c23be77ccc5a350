//! Reading a stream.
//!
//! - [`config`]: the stream, and its declaration
//! - [`place`]: where to begin or to continue
//! - [`search`]: finds a place in a stream, and its end
//! - [`cursor`]: reads a stream over one connection

pub mod config;
pub mod cursor;
pub mod place;
pub mod search;
#[cfg(test)]
mod tests;
