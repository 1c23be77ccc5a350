//! Reading a stream.
//!
//! - [`config`]: which stream, and its declaration
//! - [`place`]: where to begin, or to go on
//! - [`search`]: finding a place in a stream, and its end
//! - [`cursor`]: the reading over one connection

pub mod config;
pub mod cursor;
pub mod place;
pub mod search;
#[cfg(test)]
mod tests;
