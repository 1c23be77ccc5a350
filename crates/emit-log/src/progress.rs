//! What a person sees of long input: a line that tells how it goes, and at the end how it went.

use std::collections::VecDeque;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use logs_common::notes::{clear_status, note, show_status};
use rustix::termios::tcgetwinsize;

use crate::cli::Cli;
use crate::counts::{Counts, Outage};

/// How often the line is drawn anew.
const TICK: Duration = Duration::from_millis(200);

/// The rate shown is that of so many ticks: 5 s.
const TICKS_OF_RATE: usize = 25;

/// Characters of the bar.
const BAR: u64 = 25;

/// A line on the terminal, unless stderr is none, somebody wants it quiet, or types the input.
pub struct Progress {
    line: Option<Line>,
    counts: Arc<Counts>,
    started: Instant,
}

/// Drawn by a thread, which ends with it.
struct Line {
    bytes: Arc<AtomicU64>,
    end: Sender<()>,
}

impl Progress {
    /// Shows the line.
    ///
    /// # Errors
    ///
    /// When the system has no thread for it.
    pub fn start(cli: &Cli, counts: Arc<Counts>) -> io::Result<Progress> {
        let is_shown =
            io::stderr().is_terminal() && !io::stdin().is_terminal() && !cli.verbosity.quiet;
        let line = match is_shown {
            true => Some(Line::start(Arc::clone(&counts))?),
            false => None,
        };
        Ok(Progress { line, counts, started: Instant::now() })
    }

    /// Notes that so many bytes of input are read.
    pub fn add(&self, bytes: usize) {
        if let Some(line) = &self.line {
            line.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// Tells how it went, in place of the line.
    pub fn finish(mut self) {
        if let Some(line) = self.line.take() {
            let elapsed = self.started.elapsed();
            let records = self.counts.done();
            let size = size(line.bytes.load(Ordering::Relaxed));
            let (seconds, rate) = (elapsed.as_secs_f64(), rate(records, elapsed));
            let verdict = self.counts.verdict();
            drop(line);
            note(format_args!(
                "Sent {records} messages ({size}) in {seconds:.1} s, {rate}, all {verdict}"
            ));
        }
    }
}

impl Line {
    fn start(counts: Arc<Counts>) -> io::Result<Line> {
        let (end, is_ended) = bounded(0);
        let bytes = Arc::new(AtomicU64::new(0));
        let shown = Arc::clone(&bytes);
        thread::Builder::new().spawn(move || draw(&counts, &shown, &is_ended))?;
        Ok(Line { bytes, end })
    }
}

impl Drop for Line {
    /// Leaves the terminal to what comes next. The thread draws no more: it takes this as it waits.
    fn drop(&mut self) {
        // It cannot have ended before.
        let _ = self.end.send(());
        clear_status();
    }
}

fn draw(counts: &Counts, bytes: &AtomicU64, is_ended: &Receiver<()>) {
    let size = size_of_input();
    let mut samples = VecDeque::from([(Instant::now(), counts.done())]);
    while is_ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
        let now = Instant::now();
        samples.push_back((now, counts.done()));
        if samples.len() > TICKS_OF_RATE {
            samples.pop_front();
        }
        let (since, before) = samples[0];
        let rate = (counts.done() - before) as f64 / (now - since).as_secs_f64().max(0.001);
        let text = describe(counts, bytes.load(Ordering::Relaxed), size, rate, now);
        show_status(text.chars().take(columns()).collect::<String>());
    }
}

/// What the line says; `rate` is in records a second.
fn describe(
    counts: &Counts,
    bytes: u64,
    size_of_input: Option<u64>,
    rate: f64,
    now: Instant,
) -> String {
    let (records, in_doubt) = (counts.done(), counts.in_doubt());
    let mut text = String::new();
    if let Some(all) = size_of_input {
        let done = (BAR * bytes / all.max(1)).min(BAR);
        let (full, rest) = ("=".repeat(done as usize), " ".repeat((BAR - done) as usize));
        text += &format!("[{full}{rest}] {}%, ", (100 * bytes / all.max(1)).min(100));
    }
    text += &format!("{} messages ({}), ", digits(records as f64), size(bytes));
    if let Some(Outage { since, until }) = counts.outage() {
        let elapsed = whole_seconds(now.saturating_duration_since(since));
        text += &format!("{in_doubt} in doubt, no broker for {elapsed}, ");
        text += &match until {
            None => "trying until there is one".to_string(),
            Some(until) => {
                let left = whole_seconds(until.saturating_duration_since(now));
                format!("trying for {left} more")
            }
        };
        return text;
    }
    text += &format!("{}/s, {in_doubt} unconfirmed", digits(rate));
    if let Some(all) = size_of_input
        && rate > 0.0
        && bytes > 0
    {
        let records_left = records as f64 * all.saturating_sub(bytes) as f64 / bytes as f64;
        let left = Duration::try_from_secs_f64(records_left / rate).unwrap_or(Duration::MAX);
        text += &format!(", {} left", whole_seconds(left));
    }
    text
}

/// The size of standard input, where that is a file.
fn size_of_input() -> Option<u64> {
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned().ok()?);
    let metadata = stdin.metadata().ok()?;
    metadata.is_file().then_some(metadata.len())
}

/// How much fits on a line without going on on the next one.
fn columns() -> usize {
    match tcgetwinsize(io::stderr()) {
        Ok(size) if size.ws_col > 1 => usize::from(size.ws_col) - 1,
        _ => 79,
    }
}

fn whole_seconds(duration: Duration) -> impl Display {
    humantime::format_duration(Duration::from_secs(duration.as_secs()))
}

fn size(bytes: u64) -> impl Display {
    ByteSize::b(bytes).display().si()
}

/// `59 500/s`
fn rate(records: u64, elapsed: Duration) -> String {
    digits(records as f64 / elapsed.as_secs_f64().max(0.001)) + "/s"
}

/// `59 500`
fn digits(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.char_indices() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(' ');
        }
        text.push(digit);
    }
    text
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
    fn the_line_tells_how_it_goes() {
        let (counts, now) = (Counts::new(true), Instant::now());
        counts.add_sent(1520);
        counts.add_done(1500);
        let line = describe(&counts, 3000, None, 100.0, now);
        assert_eq!(line, "1 500 messages (3.0 kB), 100/s, 20 unconfirmed");
        let line = describe(&counts, 3000, Some(12_000), 100.0, now);
        let rest = "25%, 1 500 messages (3.0 kB), 100/s, 20 unconfirmed, 45s left";
        assert_eq!(line, format!("[======                   ] {rest}"));
    }

    #[test]
    fn without_a_broker_the_line_tells_since_when_and_how_long_it_is_looked_for() {
        let (counts, now) = (Counts::new(true), Instant::now());
        let since = now.checked_sub(Duration::from_secs(12)).unwrap();
        counts.set_outage(Outage { since, until: Some(since + Duration::from_secs(60)) });
        let line = describe(&counts, 0, None, 100.0, now);
        let rest = "0 in doubt, no broker for 12s, trying for 48s more";
        assert_eq!(line, format!("0 messages (0 B), {rest}"));
        counts.set_outage(Outage { since, until: None });
        assert!(describe(&counts, 0, None, 0.0, now).ends_with("trying until there is one"));
    }
}
