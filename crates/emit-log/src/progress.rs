//! What a person sees of long input: a line that tells how it goes, and at the end how it went.

use std::fmt::{self, Display};
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use crate::cli::Cli;
use crate::tally::Tally;

const OF_A_FILE: &str = "{bar:25} {percent}%, {records}, {window}, {eta} left";
const OF_A_STREAM: &str = "{spinner} {records}, {window}";

/// How often the line is drawn anew.
const TICK: Duration = Duration::from_millis(200);

/// A line on the terminal, if stderr is one and nobody wants it quiet.
pub struct Progress {
    bar: Option<ProgressBar>,
    tally: Arc<Tally>,
    started: Instant,
}

impl Progress {
    /// Shows the line.
    pub fn start(cli: &Cli, tally: Arc<Tally>) -> Progress {
        let is_shown = io::stderr().is_terminal() && !cli.verbosity.quiet;
        Progress { bar: is_shown.then(|| bar(Arc::clone(&tally))), tally, started: Instant::now() }
    }

    /// Notes that so many bytes of input are read.
    pub fn add(&self, bytes: usize) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes as u64);
        }
    }

    /// Tells how it went, in place of the line.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            let elapsed = self.started.elapsed();
            let records = self.tally.confirmed();
            let size = size(bar.position());
            let seconds = elapsed.as_secs_f64();
            let rate = rate(records, elapsed);
            // Nobody is left to tell if stderr cannot be written.
            let _ = writeln!(
                io::stderr(),
                "Sent {records} messages ({size}) in {seconds:.1} s, {rate}, all {}",
                self.tally.verdict()
            );
        }
    }
}

impl Drop for Progress {
    /// Leaves the terminal to the error that is coming.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(tally: Arc<Tally>) -> ProgressBar {
    let bar = match size_of_input() {
        Some(size) => ProgressBar::new(size).with_style(style(OF_A_FILE, tally)),
        None => ProgressBar::no_length().with_style(style(OF_A_STREAM, tally)),
    };
    bar.enable_steady_tick(TICK);
    bar
}

/// The size of standard input, where that is a file.
fn size_of_input() -> Option<u64> {
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned().ok()?);
    let metadata = stdin.metadata().ok()?;
    metadata.is_file().then_some(metadata.len())
}

fn style(template: &str, tally: Arc<Tally>) -> ProgressStyle {
    let window = Arc::clone(&tally);
    ProgressStyle::with_template(template)
        .expect("a constant that a test has tried")
        .with_key("records", move |state: &ProgressState, out: &mut dyn fmt::Write| {
            let records = tally.confirmed();
            let (size, rate) = (size(state.pos()), rate(records, state.elapsed()));
            // The bar has room for any text.
            let _ = write!(out, "{records} messages ({size}), {rate}");
        })
        .with_key("window", move |_: &ProgressState, out: &mut dyn fmt::Write| {
            let _ = write!(out, "{} unconfirmed", window.in_doubt());
        })
}

fn size(bytes: u64) -> impl Display {
    ByteSize::b(bytes).display().si()
}

/// `59 500/s`
fn rate(records: u64, elapsed: Duration) -> String {
    let rate = records as f64 / elapsed.as_secs_f64().max(0.001);
    let digits = format!("{rate:.0}");
    let mut text = String::new();
    for (index, digit) in digits.char_indices() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(' ');
        }
        text.push(digit);
    }
    text + "/s"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_grouped() {
        assert_eq!(rate(7, Duration::from_secs(1)), "7/s");
        assert_eq!(rate(119_000, Duration::from_secs(2)), "59 500/s");
        assert_eq!(rate(1_234_567, Duration::from_secs(1)), "1 234 567/s");
    }

    #[test]
    fn the_templates_are_valid() {
        style(OF_A_FILE, Arc::new(Tally::new(true)));
        style(OF_A_STREAM, Arc::new(Tally::new(true)));
    }
}
