//! How `emit-log` and `receive-logs` behave as Unix programs.
//!
//! In the order in which a program needs them:
//!
//! - [`stdio`]: whether standard input and output were closed at the start
//! - [`args`]: the command line, with tips in errors and without passwords
//! - [`manual`]: man page and completions, generated from the options
//! - [`verbosity`]: the options for the text on stderr
//! - [`notes`]: lines on stderr that never block the program for long
//! - [`live_line`]: a line on the terminal that is drawn again and again
//! - [`logging`]: the `log` macros, printed as notes without passwords
//! - [`background`]: the background thread
//! - [`signals`]: SIGHUP, SIGINT and SIGTERM, and the signals that no longer end the process
//! - [`status`]: the status line
//! - [`metrics`]: counts for Prometheus, in a file
//! - [`lock`]: files that one process uses at a time
//! - [`replace`]: a file that is replaced in one step
//! - [`state_file`]: a file with the state of a program, with both
//! - [`time`]: times and durations as text
//! - [`escape`]: message bytes escaped for a terminal
//! - [`exit`]: errors and their exit statuses

pub mod args;
pub mod background;
pub mod escape;
pub mod exit;
pub mod live_line;
pub mod lock;
pub mod logging;
pub mod manual;
pub mod metrics;
pub mod notes;
pub mod replace;
pub mod signals;
pub mod state_file;
pub mod status;
pub mod stdio;
pub mod time;
pub mod verbosity;

pub use exit::{Failure, Status};
