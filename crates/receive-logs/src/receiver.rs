//! The loop between a subscription and the output, one subscription after another, and what ends
//! it.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::Coalescer;
use amqp::Delivery;
use anyhow::Error;
use crossbeam_channel::{Receiver as Channel, Select};
use logs_common::logging::alert;
use logs_common::retry::{Attempts, Backoff, RetryFor};

use crate::cli::Cli;
use crate::loss_report::{GAP_DELAY, LossReport, Owner};
use crate::output::Output;
use crate::readiness::Readiness;
use crate::subscription::{Kept, Sharing, Subscription, SubscriptionConfig};

/// How long after a signal the last step of stopping may end. Less than the 2 s that are promised,
/// and than the time after which the signal ends the process.
const STOPPING: Duration = Duration::from_millis(1600);

/// How long the broker may take to let a queue be consumed that takes the place of a lost one. No
/// signal is listened to meanwhile.
const CONSUME: Duration = Duration::from_secs(1);

/// A subscription that lasts no longer than this counts as a failure like those before it.
const SHORT_LIVED: Duration = Duration::from_secs(2);

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

/// What a receiver listens to besides the broker.
pub struct Events {
    /// A signal that asks it to stop.
    pub stop: Channel<i32>,
    /// A signal that asks it to open its output anew.
    pub reopen: Channel<()>,
    /// Nobody reads the output any more.
    pub reader_gone: Channel<()>,
}

/// What keeps a receiver from going on.
enum Interruption {
    Output(io::Error),
    Lost(amqp::Error),
}

impl From<io::Error> for Interruption {
    fn from(error: io::Error) -> Interruption {
        Interruption::Output(error)
    }
}

/// Writes what is delivered.
pub struct Receiver {
    config: Arc<SubscriptionConfig>,
    /// Where they go.
    pub output: Output,
    events: Events,
    readiness: Readiness,
    retry_for: RetryFor,
    /// When subscriptions began to get lost again and again.
    failing_since: Instant,
    wanted: Option<u64>,
    idle_timeout: Option<Duration>,
    end: Option<Instant>,
    /// When it was seen that no message is there, unless one has come since.
    idle_since: Option<Instant>,
    coalescer: Coalescer,
    /// What became of the messages.
    pub loss_report: LossReport,
}

impl Receiver {
    /// Writes to `output` within the limits on the command line, whose time starts now.
    pub fn new(
        cli: &Cli,
        config: Arc<SubscriptionConfig>,
        output: Output,
        events: Events,
        readiness: Readiness,
    ) -> Receiver {
        Receiver {
            config,
            output,
            events,
            readiness,
            retry_for: cli.connection.retry.unwrap_or(RetryFor::Ever),
            failing_since: Instant::now(),
            wanted: cli.count,
            idle_timeout: cli.idle_timeout,
            end: cli.total_timeout.and_then(|limit| Instant::now().checked_add(limit)),
            idle_since: None,
            coalescer: Coalescer::new(),
            loss_report: LossReport::new(match cli.queue.name {
                None => Owner::Us,
                Some(_) => Owner::Anybody,
            }),
        }
    }

    /// Writes messages until something stops it; by then all that was received is written. In
    /// place of a subscription that is lost it makes a new one.
    ///
    /// # Errors
    ///
    /// When the output cannot be written, or no new subscription can be made.
    pub fn run(&mut self, mut subscription: Subscription) -> Result<Stop, Error> {
        loop {
            let cause = match self.copy(&mut subscription) {
                Ok(stop) => return self.finish(subscription, Ok(stop)),
                Err(Interruption::Output(error)) => {
                    return self.finish(subscription, Err(error));
                }
                Err(Interruption::Lost(cause)) => cause,
            };
            // What cannot be acknowledged any more is written all the same.
            if let Err(error) = self.output.flush() {
                return self.finish(subscription, Err(error));
            }
            self.loss_report.report_redelivered();
            // What a queue has kept may fill the gaps yet.
            match subscription.kept {
                None => self.loss_report.report_all_gaps(),
                Some(_) if subscription.is_shared() => self.loss_report.excuse_gaps(),
                Some(_) => {}
            }
            let next = self.subscribe_again(cause, subscription);
            if !matches!(next, Ok(Ok(_))) {
                self.loss_report.report_all_gaps();
            }
            match next? {
                Ok(next) => subscription = next,
                Err(stop) => return Ok(stop),
            }
            self.loss_report.restart();
        }
    }

    /// Ends a subscription, after a stop or a failed write, so that what is written is acknowledged.
    fn finish(
        &mut self,
        mut subscription: Subscription,
        copied: io::Result<Stop>,
    ) -> Result<Stop, Error> {
        let deadline = Instant::now()
            + match self.events.stop.is_empty() {
                true => subscription.timeout(),
                false => STOPPING,
            };
        let stopped = copied.and_then(|stop| self.drain(&mut subscription, stop, deadline));
        let flushed = stopped.and_then(|stop| self.output.flush().map(|written| (stop, written)));
        let (outcome, written) = match flushed {
            Ok((stop, written)) => (Ok(stop), Some(written)),
            // What stands in the pipe was not read.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => (Ok(Stop::ReaderGone), None),
            Err(error) => {
                (Err(self.output.failure(&error).into()), Some(self.output.take_written()))
            }
        };
        if let Some(written) = written {
            subscription.settle(written);
        }
        if let Err(failure) = subscription.acknowledge_all(deadline) {
            log::debug!("{failure}");
        }
        if self.loss_report.has_gaps() && subscription.has_other_consumers(deadline) {
            self.loss_report.excuse_gaps();
        }
        self.loss_report.report_all_gaps();
        self.loss_report.report_redelivered();
        subscription.close(deadline);
        outcome
    }

    /// Writes what is delivered until something keeps it from going on.
    fn copy(&mut self, subscription: &mut Subscription) -> Result<Stop, Interruption> {
        loop {
            // Looked at for each message, as under load there is always another one.
            if !self.events.stop.is_empty() || self.end.is_some_and(is_past) {
                return Ok(self.why());
            }
            if !self.events.reopen.is_empty() {
                self.reopen()?;
            }
            if self.loss_report.report_time().is_some_and(is_past) {
                subscription.settle(self.output.flush()?);
                self.loss_report.report_redelivered();
            }
            if let Some(time) = self.loss_report.gap_time() {
                self.look_at_gaps(subscription, time)?;
            }
            match subscription.try_next() {
                Ok(Some(delivery)) => {
                    self.idle_since = None;
                    self.write(subscription, delivery)?;
                    if self.has_enough() {
                        return Ok(Stop::Count);
                    }
                    if subscription.wants_acknowledgement() {
                        subscription.settle(self.output.flush()?);
                        subscription.acknowledge();
                        subscription.run_timers();
                    }
                }
                Err(cause) => return Err(Interruption::Lost(cause)),
                Ok(None) => {
                    subscription.settle(self.output.flush()?);
                    if self.idle_since.is_none() {
                        self.idle_since = Some(Instant::now());
                        if self.coalescer.pause() {
                            continue;
                        }
                    }
                    if let Some(stop) = self.stop_of_idle() {
                        return Ok(stop);
                    }
                    subscription.run_timers();
                    let mut select = Select::new();
                    subscription.select(&mut select);
                    let gap_time =
                        self.loss_report.gap_time().filter(|_| !subscription.is_asking());
                    self.wait(
                        select,
                        gap_time.into_iter().chain([subscription.next_timer()]).min(),
                    );
                }
            }
        }
    }

    /// Why to stop while there is no message.
    fn stop_of_idle(&self) -> Option<Stop> {
        if !self.events.reader_gone.is_empty() {
            return Some(Stop::ReaderGone);
        }
        if !self.events.stop.is_empty() {
            return Some(Stop::Signal);
        }
        let is_late = self.idle_end().is_some_and(is_past) || self.end.is_some_and(is_past);
        is_late.then_some(Stop::TimeLimit)
    }

    fn idle_end(&self) -> Option<Instant> {
        self.idle_since?.checked_add(self.idle_timeout?)
    }

    /// Waits until one of `select` or one of the events is there, at the latest until `time`, the
    /// time of a report or a time limit. Which of them it was shows when they are looked at again.
    fn wait<'s>(&'s self, mut select: Select<'s>, time: Option<Instant>) {
        select.recv(&self.events.stop);
        select.recv(&self.events.reopen);
        select.recv(&self.events.reader_gone);
        let times = [time, self.loss_report.report_time(), self.idle_end(), self.end];
        match times.into_iter().flatten().min() {
            Some(time) => drop(select.ready_deadline(time)),
            None => drop(select.ready()),
        }
    }

    /// Writes what is received already, if a signal or a time limit stops it. That is no more than
    /// the broker sends without an acknowledgement.
    fn drain(
        &mut self,
        subscription: &mut Subscription,
        stop: Stop,
        deadline: Instant,
    ) -> io::Result<Stop> {
        if !matches!(stop, Stop::Signal | Stop::TimeLimit) {
            return Ok(stop);
        }
        if subscription.kept.is_some() {
            subscription.settle(self.output.flush()?);
            subscription.acknowledge();
            // What is under way would come again, to the next receiver of the queue; what cannot
            // be acknowledged any more does.
            if let Err(failure) = subscription.cancel(deadline) {
                log::debug!("{failure}");
                return Ok(stop);
            }
        }
        while !self.has_enough()
            && let Ok(Some(delivery)) = subscription.try_next()
        {
            self.write(subscription, delivery)?;
        }
        Ok(if self.has_enough() { Stop::Count } else { stop })
    }

    /// What stops it, a signal or the time limit.
    fn why(&self) -> Stop {
        match self.events.stop.is_empty() {
            true => Stop::TimeLimit,
            false => Stop::Signal,
        }
    }

    fn write(&mut self, subscription: &Subscription, delivery: Delivery) -> io::Result<()> {
        let records = self.loss_report.observe(&delivery);
        let limit = match subscription.kept {
            // A batch is acknowledged as a whole, so it is written as a whole.
            Some(_) => records,
            None => self.wanted.map_or(records, |wanted| wanted - self.output.written),
        };
        self.output.write(delivery, limit.min(records))
    }

    /// Reports the gaps that have not closed by `time`. If the queue is not ours alone, the broker is
    /// asked twice who else reads from it, before the gaps may close and after that.
    fn look_at_gaps(&mut self, subscription: &mut Subscription, time: Instant) -> io::Result<()> {
        let is_due = is_past(time);
        let asked_after = if is_due { time } else { time.checked_sub(GAP_DELAY).unwrap_or(time) };
        match subscription.sharing(asked_after) {
            Sharing::Alone if is_due => {
                subscription.settle(self.output.flush()?);
                self.loss_report.report_gaps();
            }
            // Not at each gap, as there may be one between any two messages.
            Sharing::Shared if is_due => self.loss_report.excuse_gaps(),
            _ => {}
        }
        Ok(())
    }

    fn has_enough(&self) -> bool {
        self.wanted.is_some_and(|wanted| self.output.written >= wanted)
    }

    fn reopen(&mut self) -> io::Result<()> {
        // Taken before, so that a signal that comes meanwhile opens it once more.
        let _ = self.events.reopen.try_recv();
        self.output.reopen()?;
        self.readiness.reload();
        Ok(())
    }

    /// Makes a new subscription in place of a lost one, unless something stops it meanwhile.
    fn subscribe_again(
        &mut self,
        cause: amqp::Error,
        lost: Subscription,
    ) -> Result<Result<Subscription, Stop>, Error> {
        let cause = cause.after_success();
        if !cause.is_transient() || self.retry_for == RetryFor::NO_TIME {
            return Err(cause.into());
        }
        if lost.begun.elapsed() > SHORT_LIVED {
            self.failing_since = Instant::now();
        }
        let lost_at = lost.last_received();
        let was_behind = self.idle_since.is_none();
        drop(lost);
        let reason = cause.to_string();
        alert(format!("{reason}; subscribing again"));
        self.readiness.interrupt(&reason);

        let config = Arc::clone(&self.config);
        let prepare = move || config.prepare_again();
        let backoff = Backoff::new(self.retry_for).with_delays_since(self.failing_since);
        let mut attempts = Attempts::new(cause, backoff, prepare)?;
        self.idle_since.get_or_insert_with(Instant::now);
        let subscription = loop {
            if let Ok(prepared) = attempts.outcomes().try_recv() {
                let subscribed = prepared.and_then(|prepared| prepared.consume(Some(CONSUME)));
                match subscribed.map_err(amqp::Error::after_success) {
                    Ok(subscription) => break subscription,
                    Err(failure) => attempts.fail(failure)?,
                }
            } else if attempts.next().is_some_and(is_past) {
                attempts.begin()?;
            }
            match self.stop_of_idle() {
                Some(Stop::TimeLimit) if self.wanted.is_none() => {
                    let text = format!("{reason}; not back within the time limit");
                    return Err(amqp::Error::unavailable(text).into());
                }
                Some(stop) => return Ok(Err(stop)),
                None => {}
            }
            if !self.events.reopen.is_empty() {
                self.reopen().map_err(|error| self.output.failure(&error))?;
            }
            let mut select = Select::new();
            select.recv(attempts.outcomes());
            self.wait(select, attempts.next());
        };
        let seconds = lost_at.elapsed().as_secs_f64();
        let missing = what_is_missing(&subscription, was_behind);
        alert(format!("Subscribed again after {seconds:.1} s; {missing}"));
        self.readiness.resume();
        Ok(Ok(subscription))
    }
}

/// What may not come any more, where a subscription takes the place of a lost one: the queue is
/// another one, or has been kept.
fn what_is_missing(subscription: &Subscription, was_behind: bool) -> String {
    let queue = &subscription.queue;
    match &subscription.kept {
        None if was_behind => {
            "messages sent in between were not received, nor those that still waited".into()
        }
        None => "messages sent in between were not received".into(),
        Some(Kept { is_new: true, .. }) => format!(
            "queue '{queue}' was gone and is made anew: what waited in it and messages sent in \
             between were not received"
        ),
        Some(Kept { queued, .. }) if subscription.is_bound_for_good() => {
            format!("{queued} messages wait in queue '{queue}'")
        }
        Some(Kept { queued, .. }) => format!(
            "{queued} messages wait in queue '{queue}', others sent in between may be missing \
             (--durable keeps the exchange when the broker restarts)"
        ),
    }
}

fn is_past(time: Instant) -> bool {
    Instant::now() >= time
}
