//! The loop between a subscription and the output, and its end.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::{Delivery, Mailbox, wait_for};
use anyhow::Error;
use logs_process::Failure;

use crate::limits::{Limits, is_past};
use crate::loss_report::{GAP_DELAY, LossReport};
use crate::message::Message;
use crate::output::Output;
use crate::queue::Source;
use crate::readiness::Readiness;
use crate::reconnect::{Lag, Reconnector};
use crate::resume::{ResumeFile, Runs};
use crate::status::StatusLine;
use crate::stream::cursor::Cursor;
use crate::stream::place::Place;
use crate::subscription::{Sharing, Subscription};

/// The time limit for all steps after a signal. It is less than the 2 s that the documentation promises, and less
/// than the time after which the signal itself ends the process.
const STOPPING: Duration = Duration::from_millis(1600);

/// How long a receiver continues to read after a stop. The broker may send 2000 messages ahead, and large ones
/// would not arrive in time.
const READING: Duration = Duration::from_millis(600);

/// The part of [`STOPPING`] that is reserved to acknowledge the written messages and to close the connection.
const CLOSING: Duration = Duration::from_millis(400);

/// Why a receiver stopped without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `--count` is reached.
    Count,
    /// SIGINT or SIGTERM.
    Signal,
    /// The end of `--no-follow` is reached.
    End,
    /// The reader of the output has exited.
    ReaderGone,
    /// `--timeout` or `--idle-timeout` has passed.
    TimeLimit,
}

/// The events besides those of the broker.
pub struct Events {
    /// SIGINT or SIGTERM.
    pub stop: Mailbox<i32>,
    /// SIGHUP, which reopens the output.
    pub reopen: Option<Mailbox<()>>,
    /// The reader of the output has exited.
    pub reader_gone: Option<Mailbox<()>>,
}

impl Events {
    /// The file descriptors that become readable at an event.
    fn watched(&self) -> Vec<BorrowedFd<'_>> {
        let notices = [&self.reopen, &self.reader_gone].into_iter().flatten().map(AsFd::as_fd);
        notices.chain([self.stop.as_fd()]).collect()
    }
}

/// An error that ends [`Receiver::copy`].
enum Interruption {
    Output(io::Error),
    Lost(amqp::Error),
}

impl From<io::Error> for Interruption {
    fn from(error: io::Error) -> Interruption {
        Interruption::Output(error)
    }
}

/// The result of replacing a lost subscription.
enum Reconnected {
    Subscribed(Box<Subscription>),
    Stopped(Stop),
}

/// Writes the messages of a series of subscriptions.
pub struct Receiver {
    /// The destination of the messages.
    pub output: Output,
    /// The missed and repeated messages.
    pub loss_report: LossReport,
    pub(crate) events: Events,
    pub(crate) readiness: Readiness,
    pub(crate) resume: Option<ResumeFile>,
    pub(crate) status: Arc<StatusLine>,
    pub(crate) reconnector: Reconnector,
    pub(crate) limits: Limits,
}

impl Receiver {
    /// Writes messages until a [`Stop`], and replaces lost subscriptions. At the return, all received messages are
    /// written.
    ///
    /// # Errors
    ///
    /// When the output cannot be written, or a lost subscription cannot be replaced.
    pub fn run(&mut self, subscription: Subscription) -> Result<Stop, Error> {
        self.record_position(&subscription);
        let stop = self.receive(subscription)?;
        self.complete_position()?;
        Ok(stop)
    }

    fn complete_position(&mut self) -> Result<(), Failure> {
        match &mut self.resume {
            Some(resume) => resume.complete(&self.output),
            None => Ok(()),
        }
    }

    fn receive(&mut self, mut subscription: Subscription) -> Result<Stop, Error> {
        loop {
            self.status.broker.set_open(subscription.peer(), "");
            self.status.set_waiting(subscription.waiting());
            match self.copy(&mut subscription) {
                Ok(stop) => return self.finish(subscription, Ok(stop)),
                Err(Interruption::Output(error)) => return self.finish(subscription, Err(error)),
                Err(Interruption::Lost(cause)) => match self.replace(subscription, cause) {
                    Ok(Reconnected::Subscribed(next)) => subscription = *next,
                    Ok(Reconnected::Stopped(stop)) => return Ok(stop),
                    Err(error) => {
                        // All received messages are written, so the position is complete. A second error would hide
                        // the first.
                        let _ = self.complete_position();
                        return Err(error);
                    }
                },
            }
        }
    }

    /// Writes and acknowledges deliveries.
    fn copy(&mut self, subscription: &mut Subscription) -> Result<Stop, Interruption> {
        loop {
            // Checked for each message, because the queue is never empty under load.
            if let Some(stop) = self.stop_at_once() {
                return Ok(stop);
            }
            if subscription.queue.cursor().is_some_and(Cursor::is_at_end) {
                return Ok(Stop::End);
            }
            if self.reopen_if_requested()? || self.is_position_due() {
                self.flush(subscription)?;
                self.record_position(subscription);
            }
            self.run_reports(subscription)?;
            match subscription.try_next() {
                Ok(Some(delivery)) => {
                    if let Some(stop) = self.write_and_watch(subscription, delivery)? {
                        return Ok(stop);
                    }
                    if self.has_enough() {
                        return Ok(Stop::Count);
                    }
                    if subscription.wants_acknowledgement() {
                        self.flush(subscription)?;
                        subscription.send_acknowledgement();
                        subscription.run_timers();
                    }
                }
                Ok(None) => {
                    self.flush(subscription)?;
                    if let Some(stop) = self.wait_for_delivery(subscription) {
                        return Ok(stop);
                    }
                }
                Err(cause) => {
                    // These messages can no longer be acknowledged, but they must be written.
                    self.flush(subscription)?;
                    self.record_position(subscription);
                    return Err(Interruption::Lost(cause));
                }
            }
        }
    }

    /// Writes a message. If the filter selects nothing of it, the time without a message continues, and may end the
    /// receiver.
    fn write_and_watch(
        &mut self,
        subscription: &mut Subscription,
        delivery: Box<Delivery>,
    ) -> io::Result<Option<Stop>> {
        let before = self.output.written();
        self.write(subscription, delivery)?;
        if self.output.has_filter() && self.output.written() == before {
            self.limits.idle_since.get_or_insert_with(Instant::now);
            return Ok(self.stop_when_idle());
        }
        self.limits.idle_since = None;
        Ok(None)
    }

    fn write(
        &mut self,
        subscription: &mut Subscription,
        delivery: Box<Delivery>,
    ) -> io::Result<()> {
        if let Some(resume) = &self.resume
            && let Some(place) = subscription.queue.place()
            && resume.is_first(place)
        {
            self.record_position(subscription);
        }
        let mut message = Message::new(delivery);
        self.select(subscription, &mut message);
        let outcome = self.output.write(&message);
        self.update_status();
        outcome
    }

    /// Selects the records to write.
    fn select(&mut self, subscription: &mut Subscription, message: &mut Message) {
        let cursor = subscription.queue.cursor();
        let is_too_old = cursor.is_some_and(|cursor| cursor.is_too_old(&message.delivery));
        if is_too_old || !self.loss_report.observe(message) {
            message.skip_all();
        }
        if let Some(cursor) = subscription.queue.cursor_mut() {
            cursor.select(message);
        }
    }

    /// Writes the buffer. The messages in it may be acknowledged then.
    fn flush(&mut self, subscription: &mut Subscription) -> io::Result<()> {
        subscription.acknowledge(self.output.flush()?);
        self.update_status();
        if let Some(offset) = subscription.queue.place().and_then(Place::last_offset) {
            self.status.set_offset(offset);
        }
        Ok(())
    }

    /// Updates the counts that the status thread prints.
    fn update_status(&self) {
        let (written, flushed) = (self.output.written(), self.output.flushed());
        self.status.set_counts(flushed, written - flushed, self.loss_report.missed());
        self.status.set_filtered(self.output.filtered());
    }

    fn is_position_due(&self) -> bool {
        self.resume.as_ref().is_some_and(|resume| resume.is_due(self.output.written()))
    }

    /// Records how much of a stream is written, for the next receiver. All received messages must be written.
    fn record_position(&mut self, subscription: &Subscription) {
        self.record_position_with(self.loss_report.latest_runs(), subscription);
    }

    fn record_position_with(&mut self, runs: Runs, subscription: &Subscription) {
        if let (Some(resume), Some(cursor)) = (&mut self.resume, subscription.queue.cursor()) {
            resume.record(cursor.origin.clone(), cursor.place(), runs, &self.output);
        }
    }

    fn has_enough(&self) -> bool {
        self.limits.is_reached_by(self.output.written())
    }

    /// Returns whether the output was opened again.
    fn reopen_if_requested(&mut self) -> io::Result<bool> {
        let reopen = self.events.reopen.as_ref().filter(|reopen| !reopen.is_empty());
        let Some(reopen) = reopen else {
            return Ok(false);
        };
        // The signal is taken before the file is opened, so that a signal that arrives meanwhile reopens it again.
        while reopen.try_recv().is_some() {}
        self.output.reopen()?;
        self.readiness.reload();
        Ok(true)
    }

    /// Reports missed and repeated messages when it is time.
    fn run_reports(&mut self, subscription: &mut Subscription) -> io::Result<()> {
        if self.loss_report.report_time().is_some_and(is_past) {
            self.flush(subscription)?;
            self.loss_report.report_redelivered();
        }
        if let Some(time) = self.loss_report.gap_time() {
            self.check_gaps(subscription, time)?;
        }
        Ok(())
    }

    /// Reports the gaps that are still open at `time`. The broker is asked twice whether a durable queue has other
    /// consumers: before the gaps can have closed, and after `time`.
    fn check_gaps(&mut self, subscription: &mut Subscription, time: Instant) -> io::Result<()> {
        let is_due = is_past(time);
        let asked_after = if is_due { time } else { time.checked_sub(GAP_DELAY).unwrap_or(time) };
        match subscription.sharing(asked_after) {
            Sharing::Alone if is_due => {
                self.flush(subscription)?;
                self.loss_report.report_gaps();
            }
            // Not earlier, because a shared queue may have a gap between any two messages.
            Sharing::Shared if is_due => self.loss_report.discard_gaps(),
            _ => {}
        }
        Ok(())
    }

    /// Waits for a delivery, an event or a timer. Returns without waiting if there is a reason to stop.
    fn wait_for_delivery(&mut self, subscription: &mut Subscription) -> Option<Stop> {
        self.limits.idle_since.get_or_insert_with(Instant::now);
        let stop = self.stop_when_idle();
        if stop.is_none() {
            subscription.run_timers();
            let gap_time = self.loss_report.gap_time().filter(|_| !subscription.is_asking());
            let record_time = match (&self.resume, subscription.queue.place()) {
                (Some(resume), Some(place)) => resume.next_time(place),
                _ => None,
            };
            let timers = [gap_time, record_time, Some(subscription.next_timer())];
            let until = self.next_time(timers.into_iter().flatten().min());
            subscription.wait(&self.events.watched(), until);
        }
        stop
    }

    /// The first of `timer` and the time limits.
    fn next_time(&self, timer: Option<Instant>) -> Option<Instant> {
        let timers = [timer, self.loss_report.report_time(), self.limits.next_time()];
        timers.into_iter().flatten().min()
    }

    /// The reason to stop even if more messages are waiting.
    fn stop_at_once(&self) -> Option<Stop> {
        if !self.events.stop.is_empty() {
            return Some(Stop::Signal);
        }
        self.limits.is_past_end().then_some(Stop::TimeLimit)
    }

    /// The reason to stop when no message is waiting.
    fn stop_when_idle(&self) -> Option<Stop> {
        if self.events.reader_gone.as_ref().is_some_and(|gone| !gone.is_empty()) {
            return Some(Stop::ReaderGone);
        }
        self.stop_at_once().or(self.limits.is_past_idle_end().then_some(Stop::TimeLimit))
    }

    /// Replaces a lost subscription, and decides which gaps are reported.
    fn replace(&mut self, lost: Subscription, cause: amqp::Error) -> Result<Reconnected, Error> {
        self.loss_report.report_redelivered();
        match lost.queue.durable() {
            None => self.loss_report.report_all_gaps(),
            Some(queue) if queue.is_shared() => self.loss_report.discard_gaps(),
            Some(_) => {}
        }
        let outcome = self.subscribe_again(lost, cause);
        match outcome {
            Ok(Reconnected::Subscribed(ref subscription)) => {
                if subscription.queue.may_have_missed() {
                    self.loss_report.expect_beginnings();
                }
                // A durable queue delivers the unacknowledged messages again, which may close gaps.
                self.loss_report.restart();
            }
            _ => self.loss_report.report_all_gaps(),
        }
        self.update_status();
        outcome
    }

    fn subscribe_again(
        &mut self,
        lost: Subscription,
        cause: amqp::Error,
    ) -> Result<Reconnected, Error> {
        let lag = match self.limits.idle_since {
            Some(_) => Lag::CaughtUp,
            None => Lag::Behind,
        };
        let mut reconnection = self.reconnector.begin(lost, lag, cause)?;
        self.status.broker.set_lost(reconnection.lost_at(), reconnection.end());
        self.update_status();
        self.readiness.interrupt(reconnection.reason(), &self.status);
        self.limits.idle_since.get_or_insert_with(Instant::now);
        loop {
            match self.stop_when_idle() {
                Some(Stop::TimeLimit) if self.limits.count.is_none() => {
                    return Err(reconnection.out_of_time().into());
                }
                Some(stop) => return Ok(Reconnected::Stopped(stop)),
                None => {}
            }
            if self.reopen_if_requested().map_err(|error| self.output.failure(&error))?
                && let Some(resume) = &mut self.resume
            {
                resume.record_again(&self.output);
            }
            if let Some(subscription) = reconnection.poll()? {
                self.readiness.resume();
                return Ok(Reconnected::Subscribed(Box::new(subscription)));
            }
            let until = self.next_time(reconnection.next_timer());
            wait_for(&self.events.watched(), until);
        }
    }

    /// Ends a subscription after a stop or a failed write. It writes the remaining messages, acknowledges the written
    /// ones, reports gaps, and closes the connection. All steps share one deadline.
    fn finish(
        &mut self,
        mut subscription: Subscription,
        copied: io::Result<Stop>,
    ) -> Result<Stop, Error> {
        let limit = match self.events.stop.is_empty() {
            true => subscription.timeout(),
            false => STOPPING,
        };
        let deadline = Instant::now() + limit;
        let drained = copied.and_then(|stop| self.drain(&mut subscription, stop, deadline));
        let runs = match &drained {
            Ok(_) => self.loss_report.latest_runs(),
            // The last messages were received, but are not written.
            Err(_) => self.resume.as_ref().map_or(&[][..], ResumeFile::runs).to_vec(),
        };
        let outcome = match drained {
            Ok(stop) => Ok(stop),
            // The reader has not read the messages in the pipe, so they are not acknowledged.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Stop::ReaderGone),
            Err(error) => {
                subscription.acknowledge(self.output.take_written());
                Err(self.output.failure(&error).into())
            }
        };
        self.record_position_with(runs, &subscription);
        if let Err(failure) = subscription.acknowledge_all(deadline) {
            log::debug!("{failure}");
        }
        if self.loss_report.has_gaps() && subscription.has_other_consumers(deadline) {
            self.loss_report.discard_gaps();
        }
        self.loss_report.report_all_gaps();
        self.loss_report.report_redelivered();
        subscription.close(deadline);
        self.status.broker.set_lost(Instant::now(), Some(Instant::now()));
        outcome
    }

    /// Writes the buffer. After a signal or a time limit, also writes the deliveries that have arrived, until the
    /// deadline.
    fn drain(
        &mut self,
        subscription: &mut Subscription,
        stop: Stop,
        deadline: Instant,
    ) -> io::Result<Stop> {
        self.flush(subscription)?;
        if matches!(stop, Stop::Count | Stop::End | Stop::ReaderGone) {
            return Ok(stop);
        }
        if subscription.queue.durable().is_some() {
            subscription.send_acknowledgement();
            // Without a cancellation, the broker continues to send messages that the next receiver of the queue
            // should get. If the cancellation fails, no acknowledgement would arrive either.
            if let Err(failure) = subscription.cancel(deadline) {
                log::debug!("{failure}");
                return Ok(stop);
            }
        }
        let read_until = Instant::now() + READING;
        while !self.has_enough()
            && !is_past(read_until)
            && let Ok(Some(delivery)) = subscription.next_arrived()
        {
            self.write(subscription, delivery)?;
        }
        // More messages may arrive while these are written.
        let mut waiting = subscription.waiting().count();
        while waiting > 0
            && !self.has_enough()
            && Instant::now() + CLOSING < deadline
            && let Ok(Some(delivery)) = subscription.try_next()
        {
            waiting -= 1;
            self.write(subscription, delivery)?;
        }
        self.flush(subscription)?;
        match (self.has_enough(), &subscription.queue.source) {
            (true, _) => Ok(Stop::Count),
            (false, Source::Exclusive) if waiting > 0 => Err(io::Error::new(
                ErrorKind::TimedOut,
                format!("{waiting} received messages were not written in time"),
            )),
            // A durable queue delivers the remaining messages again, and a stream keeps them.
            _ => Ok(stop),
        }
    }
}

#[cfg(test)]
mod tests;
