//! A line on the terminal that is drawn again and again, such as a progress line. [Notes](crate::notes) are written above
//! it.

use std::io::{self, IsTerminal};
use std::time::Duration;

use rustix::termios::tcgetwinsize;

use crate::background::{Ticks, every};
use crate::notes::{clear_status, show_status};

/// The interval at which the line is drawn.
pub const TICK: Duration = Duration::from_millis(200);

/// The line. Dropping it clears it.
pub struct LiveLine(Ticks);

impl LiveLine {
    /// Draws the text that `describe` returns, at each tick from the next one on.
    ///
    /// # Errors
    ///
    /// When the system has no thread left.
    pub fn start(mut describe: impl FnMut() -> String + Send + 'static) -> io::Result<LiveLine> {
        let draw = move || show_status(describe().chars().take(columns()).collect::<String>());
        every(TICK, draw).map(LiveLine)
    }

    /// Whether stderr can show such a line.
    pub fn is_possible() -> bool {
        io::stderr().is_terminal()
    }
}

impl Drop for LiveLine {
    fn drop(&mut self) {
        self.0.stop();
        clear_status();
    }
}

/// The number of characters that fit on a line of the terminal.
fn columns() -> usize {
    match tcgetwinsize(io::stderr()) {
        Ok(size) if size.ws_col > 1 => usize::from(size.ws_col) - 1,
        _ => 79,
    }
}
