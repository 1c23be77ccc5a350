//! The loop between a subscription and the output, and what ends it.

use std::io::{self, ErrorKind, Write};
use std::time::{Duration, Instant};

use amiquip::{ConsumerMessage, Delivery};
use crossbeam_channel::{Receiver as Channel, Select, TryRecvError};
use logs_common::Failure;

use crate::cli::Cli;
use crate::output::Output;
use crate::subscription::Subscription;

/// How long after the last message it is acknowledged.
const ACK_AFTER: Duration = Duration::from_secs(1);

/// Why a receiver stopped although nothing was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// As many messages as asked for are written.
    Count,
    /// A signal asked for it.
    Signal,
    /// Nobody reads the output any more.
    ReaderGone,
    /// No message, or no end, for too long.
    TimeLimit,
}

/// What keeps a receiver from going on.
enum Trouble {
    Output(io::Error),
    Lost(Failure),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Trouble {
        Trouble::Output(error)
    }
}

/// Writes what is delivered.
pub struct Receiver<W> {
    output: Output<W>,
    signal: Channel<i32>,
    reader_gone: Channel<()>,
    wanted: Option<u64>,
    idle_timeout: Option<Duration>,
    end: Option<Instant>,
    /// Records written.
    pub written: u64,
}

impl<W: Write> Receiver<W> {
    /// Writes to `output` within the limits on the command line, whose time starts now, and until
    /// `signal` or `reader_gone` says something.
    pub fn new(
        cli: &Cli,
        output: Output<W>,
        signal: Channel<i32>,
        reader_gone: Channel<()>,
    ) -> Receiver<W> {
        Receiver {
            output,
            signal,
            reader_gone,
            wanted: cli.count,
            idle_timeout: cli.idle_timeout,
            end: cli.total_timeout.and_then(|limit| Instant::now().checked_add(limit)),
            written: 0,
        }
    }

    /// Writes messages until something stops it; by then all that was received is written.
    ///
    /// # Errors
    ///
    /// When the output cannot be written, or the subscription ends.
    pub fn run(&mut self, mut subscription: Subscription) -> Result<Stop, Failure> {
        let stopped = self.copy(&mut subscription);
        let flushed = self.output.flush();
        match flushed.map_err(Trouble::Output).and(stopped) {
            Ok(stop) => {
                subscription.close();
                Ok(stop)
            }
            Err(Trouble::Output(error)) if error.kind() == ErrorKind::BrokenPipe => {
                subscription.close();
                Ok(Stop::ReaderGone)
            }
            Err(Trouble::Output(error)) => Err(Failure::io("write to stdout", &error)),
            Err(Trouble::Lost(failure)) => Err(failure),
        }
    }

    fn copy(&mut self, subscription: &mut Subscription) -> Result<Stop, Trouble> {
        let mut idle_since = None;
        loop {
            // Looked at for each message, as under load there is always another one.
            if !self.signal.is_empty() || self.end.is_some_and(is_past) {
                return self.drain(subscription);
            }
            match subscription.try_next() {
                Ok(ConsumerMessage::Delivery(delivery)) => {
                    idle_since = None;
                    self.write(subscription, delivery)?;
                    if self.has_enough() {
                        return Ok(Stop::Count);
                    }
                    if subscription.wants_acknowledgement() {
                        self.output.flush()?;
                        subscription.acknowledge();
                    }
                }
                Ok(end) => return Err(Trouble::Lost(subscription.end(Some(end)))),
                Err(TryRecvError::Disconnected) => {
                    return Err(Trouble::Lost(subscription.end(None)));
                }
                Err(TryRecvError::Empty) => {
                    self.output.flush()?;
                    if !self.reader_gone.is_empty() {
                        return Ok(Stop::ReaderGone);
                    }
                    let idle_since = *idle_since.get_or_insert_with(Instant::now);
                    let idle_end =
                        self.idle_timeout.and_then(|limit| idle_since.checked_add(limit));
                    if idle_end.is_some_and(is_past) {
                        return Ok(Stop::TimeLimit);
                    }
                    if subscription.has_unacknowledged() && is_past(idle_since + ACK_AFTER) {
                        subscription.acknowledge();
                    }
                    let ack = subscription.has_unacknowledged().then(|| idle_since + ACK_AFTER);
                    self.wait(subscription, [self.end, idle_end, ack]);
                }
            }
        }
    }

    /// Waits until there is something to do, at the latest until the first of `times`.
    fn wait(&self, subscription: &Subscription, times: [Option<Instant>; 3]) {
        let mut select = Select::new();
        subscription.select(&mut select);
        select.recv(&self.signal);
        select.recv(&self.reader_gone);
        match times.into_iter().flatten().min() {
            // Which of them it was shows when they are looked at again.
            Some(time) => drop(select.ready_deadline(time)),
            None => drop(select.ready()),
        }
    }

    /// Writes what is received already. That is no more than the broker sends without an
    /// acknowledgement.
    fn drain(&mut self, subscription: &mut Subscription) -> Result<Stop, Trouble> {
        while !self.has_enough() {
            match subscription.try_next() {
                Ok(ConsumerMessage::Delivery(delivery)) => {
                    self.write(subscription, delivery)?;
                }
                _ => break,
            }
        }
        Ok(match (self.has_enough(), self.signal.is_empty()) {
            (true, _) => Stop::Count,
            (_, false) => Stop::Signal,
            (_, true) => Stop::TimeLimit,
        })
    }

    fn write(&mut self, subscription: &mut Subscription, delivery: Delivery) -> io::Result<()> {
        let limit = self.wanted.map_or(u64::MAX, |wanted| wanted - self.written);
        self.written += self.output.write(&delivery, limit)?;
        subscription.settle(delivery);
        Ok(())
    }

    fn has_enough(&self) -> bool {
        self.wanted.is_some_and(|wanted| self.written >= wanted)
    }
}

fn is_past(time: Instant) -> bool {
    Instant::now() >= time
}
