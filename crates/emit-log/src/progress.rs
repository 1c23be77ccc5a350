//! The progress line on a terminal, and the summary at the end.

use std::collections::VecDeque;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use logs_common::broker::without_broker;
use logs_process::live_line::LiveLine;
use logs_process::notes::note;
use logs_process::time::whole_seconds;

use crate::cli::Cli;
use crate::counts::{Counts, Outage};

/// The rate is that of the last ticks, of this number: 5 s.
const TICKS_OF_RATE: usize = 25;

/// The length of the bar in characters.
const BAR: u64 = 25;

/// The progress of `--lines`. It is not shown with `--quiet`, if stderr is not a terminal, or if the user types the
/// input on the terminal.
pub struct Progress {
    line: Option<Line>,
    counts: Arc<Counts>,
    started: Instant,
}

/// The line on the terminal, and the bytes of the input that it shows.
struct Line {
    bytes: Arc<AtomicU64>,
    _line: LiveLine,
}

impl Progress {
    /// Starts to draw the line.
    ///
    /// # Errors
    ///
    /// When the system has no thread for the line.
    pub fn start(cli: &Cli, counts: Arc<Counts>) -> io::Result<Progress> {
        let is_shown =
            LiveLine::is_possible() && !io::stdin().is_terminal() && !cli.verbosity.quiet;
        let line = match is_shown {
            true => Some(Line::start(Arc::clone(&counts))?),
            false => None,
        };
        Ok(Progress { line, counts, started: Instant::now() })
    }

    /// Counts bytes of the input.
    pub fn add(&self, bytes: usize) {
        if let Some(line) = &self.line {
            line.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// Replaces the line with a summary.
    pub fn finish(mut self) {
        if let Some(line) = self.line.take() {
            let bytes = line.bytes.load(Ordering::Relaxed);
            let text = summary(&self.counts, bytes, self.started.elapsed());
            drop(line);
            note(text);
        }
    }
}

impl Line {
    fn start(counts: Arc<Counts>) -> io::Result<Line> {
        let bytes = Arc::new(AtomicU64::new(0));
        let mut drawing = Drawing {
            samples: Samples::new(Instant::now(), counts.done()),
            counts,
            bytes: Arc::clone(&bytes),
            size_of_input: size_of_input(),
        };
        let line = LiveLine::start(move || drawing.next_text(Instant::now()))?;
        Ok(Line { bytes, _line: line })
    }
}

/// The content of the line.
struct Drawing {
    counts: Arc<Counts>,
    bytes: Arc<AtomicU64>,
    size_of_input: Option<u64>,
    samples: Samples,
}

impl Drawing {
    /// The text of the tick at `now`.
    fn next_text(&mut self, now: Instant) -> String {
        let rate = self.samples.add(now, self.counts.done());
        let bytes = self.bytes.load(Ordering::Relaxed);
        describe(&self.counts, bytes, self.size_of_input, rate, now)
    }
}

/// The times of the last ticks, and the records that were done by then.
struct Samples(VecDeque<(Instant, u64)>);

impl Samples {
    fn new(now: Instant, records: u64) -> Samples {
        Samples(VecDeque::from([(now, records)]))
    }

    /// Adds a tick. Returns the records per second since the first tick in the list.
    fn add(&mut self, now: Instant, records: u64) -> f64 {
        self.0.push_back((now, records));
        if self.0.len() > TICKS_OF_RATE {
            self.0.pop_front();
        }
        let (since, before) = self.0[0];
        (records - before) as f64 / (now - since).as_secs_f64().max(0.001)
    }
}

/// `Sent 3000 messages (300 kB) in 1.0 s, 3 000/s, all confirmed`
fn summary(counts: &Counts, bytes: u64, elapsed: Duration) -> String {
    let (records, verdict) = (counts.done(), counts.verdict());
    let (size, seconds) = (size(bytes), elapsed.as_secs_f64());
    let rate = digits(records as f64 / seconds.max(0.001));
    format!("Sent {records} messages ({size}) in {seconds:.1} s, {rate}/s, all {verdict}")
}

/// The text of the line; `rate` is in records per second.
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
    let in_doubt = match counts.spooled() {
        0 => in_doubt.to_string(),
        spooled => format!("{spooled} in the spool, {in_doubt}"),
    };
    if let Some(Outage { since, until }) = counts.outage() {
        return text + &format!("{in_doubt} in doubt, {}", without_broker(since, until, now));
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

/// The size of standard input in bytes, if it is a file.
fn size_of_input() -> Option<u64> {
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned().ok()?);
    let metadata = stdin.metadata().ok()?;
    metadata.is_file().then_some(metadata.len())
}

fn size(bytes: u64) -> impl Display {
    ByteSize::b(bytes).display().si()
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
    use logs_process::live_line::TICK;

    use super::*;

    #[test]
    fn each_drawing_has_the_counts_of_its_time() {
        let (counts, start) = (Arc::new(Counts::new(true)), Instant::now());
        let samples = Samples::new(start, 0);
        let bytes = Arc::new(AtomicU64::new(50));
        let mut drawing =
            Drawing { counts: Arc::clone(&counts), bytes, size_of_input: None, samples };
        let text = drawing.next_text(start + TICK);
        assert_eq!(text, "0 messages (50 B), 0/s, 0 unconfirmed");
        counts.add_sent(5);
        counts.add_done(2);
        let text = drawing.next_text(start + 2 * TICK);
        assert_eq!(text, "2 messages (50 B), 5/s, 3 unconfirmed");
    }

    #[test]
    fn digits_are_grouped() {
        for (number, text) in [(7.0, "7"), (59_500.4, "59 500"), (1_234_567.0, "1 234 567")] {
            assert_eq!(digits(number), text);
        }
    }

    #[test]
    fn the_rate_is_that_of_the_last_five_seconds() {
        let start = Instant::now();
        let mut samples = Samples::new(start, 1_000);
        let mut rate_after = |ticks: u32, records| samples.add(start + ticks * TICK, records);
        assert_eq!(rate_after(5, 3_000).round(), 2_000.0);
        // The first records count until their tick leaves the list.
        for ticks in 6..28 {
            assert!(rate_after(ticks, 3_000) > 0.0);
        }
        for ticks in 28..30 {
            rate_after(ticks, 3_000);
        }
        assert_eq!(rate_after(30, 3_000), 0.0);
    }

    #[test]
    fn the_summary_has_the_average_rate() {
        let counts = Counts::new(true);
        counts.add_sent(119_000);
        counts.add_done(119_000);
        assert_eq!(
            summary(&counts, 11_900_000, Duration::from_secs(2)),
            "Sent 119000 messages (11.9 MB) in 2.0 s, 59 500/s, all confirmed"
        );
    }

    #[test]
    fn the_line_has_the_counts_and_the_rate() {
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
    fn without_a_broker_the_line_has_the_time_of_the_outage() {
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
