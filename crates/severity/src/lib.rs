//! The severity of a log line: [`Severity`] has its names, [`find`] searches it in a line.
//!
//! - `severity`: the table of words, letters and numbers that formats use
//! - `gap`: the bytes between two words, without colours
//! - `place`: the places where common formats have the severity
//! - `find`: the search, word by word
//!
//! ```
//! use logs_severity::{Severity, find};
//!
//! let line = b"Jan 31 12:00:00 web1 sshd[123]: error: connection closed";
//! assert_eq!(find(line), Some((32..37, Severity::Error)));
//! assert!(Severity::Error >= Severity::Warning);
//! assert_eq!(find(b"there was no error"), None);
//! ```

mod find;
mod gap;
mod place;
mod severity;

pub use find::{BEGINNING, SEARCHED, find};
pub use severity::Severity;
