//! The handling of each failure: a lost connection, a queue that nacks, a message that is too large for the broker, and
//! a broker that confirms nothing.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::retry::{Attempts, Backoff, RetryFor};
use amqp::{Error as AmqpError, ErrorKind, Exchange, Publishing, Start};
use anyhow::Error;
use logs_common::exchange::with_other_durability;
use logs_process::time::whole_seconds;

use super::{Publisher, State};
use crate::counts::Outage;
use crate::health::{Health, Nacking};
use crate::session::Session;

/// The shortest time to wait for a confirm.
const SHORTEST_WAIT: Duration = Duration::from_secs(5);

/// How long the broker may confirm nothing until another connection is tried. RabbitMQ (3.10 to 4.3) may send the
/// messages of a channel to a leader that is gone, after its node was cut off from the others: it then confirms nothing
/// on this channel, and reports nothing.
const STALL: Duration = Duration::from_secs(30);

/// How long to read from the socket after the deadline, in case a confirm has arrived already.
const LAST_CHANCE: Duration = Duration::from_millis(500);

/// The longest pause while a queue nacks messages and none is confirmed, as a multiple of the longest delay between
/// attempts to connect. The pauses are long because the other queues get each message again.
const LONGEST_NACK_PAUSE: u32 = 5;

impl Publisher {
    /// Handles a lost session. All unconfirmed messages are to be sent again.
    pub(super) fn lose_session(&mut self) -> Result<(), Error> {
        let hold_until = match &self.state {
            State::Holding { until, .. } => *until,
            _ => Instant::now(),
        };
        let Some(Session { mut publishing, mut health, .. }) = self.take_session() else {
            return Ok(());
        };
        let window = self.outbox.window_mut();
        window.start_over();
        if !publishing.is_refused() {
            window.set_may_have_arrived();
        }
        let is_login_complete = publishing.is_login_complete();
        let has_answered = publishing.has_answered();
        let (declared, mut cause) = (publishing.declared().cloned(), publishing.end());
        // The next connection needs its file descriptors.
        drop(publishing);
        if health.has_worked && matches!(cause.kind(), ErrorKind::Permission | ErrorKind::Protocol)
        {
            cause = cause.after_success();
        }
        health.has_worked |= is_login_complete;
        let exchange = self.config.exchange.declaration();
        match cause.kind() {
            _ if !is_login_complete && !self.retries_login => Err(cause.into()),
            // The broker has read all messages.
            _ if has_answered => Ok(()),
            // Without confirms, the publisher does not know which messages the broker has read.
            _ if !self.config.confirms => Err(cause.into()),
            ErrorKind::TooLarge => {
                self.drop_too_large(cause)?;
                self.reconnect_now(exchange, Some(hold_until), health);
                Ok(())
            }
            _ => match declared.and_then(|declared| with_other_durability(&declared, &cause)) {
                Some(other) => {
                    self.reconnect_now(other, Some(hold_until), health);
                    Ok(())
                }
                None => self.reconnect_after(cause, exchange, health),
            },
        }
    }

    /// Starts to reconnect after the broker was lost.
    fn reconnect_after(
        &mut self,
        cause: AmqpError,
        exchange: Exchange,
        mut health: Health,
    ) -> Result<(), Error> {
        let text = format!("{cause}; trying again");
        let since = *health.failing_since.get_or_insert_with(Instant::now);
        let connect = self.connect_again(exchange, &health);
        let attempts = Attempts::new(cause, self.backoff_since(since), connect)?;
        log::warn!("{text}");
        self.counts().set_outage(Outage { since, until: attempts.end() });
        self.enter(State::Reconnecting { attempts, hold_until: None, health });
        Ok(())
    }

    /// Starts to reconnect without a pause before the first attempt. This is for a broker that has closed only this
    /// channel, so receivers are still subscribed.
    pub(super) fn reconnect_now(
        &mut self,
        exchange: Exchange,
        hold_until: Option<Instant>,
        health: Health,
    ) {
        let backoff = self.backoff_since(Instant::now());
        let attempts = Attempts::now(backoff, self.connect_again(exchange, &health));
        self.enter(State::Reconnecting { attempts, hold_until, health });
    }

    fn backoff_since(&self, start: Instant) -> Backoff {
        Backoff::since(start, self.retry_for).with_timings(self.timings)
    }

    fn connect_again(
        &self,
        exchange: Exchange,
        health: &Health,
    ) -> impl Fn() -> Result<Publishing, AmqpError> + Send + Sync + 'static {
        let (config, has_worked) = (Arc::clone(&self.config), health.has_worked);
        let needs_broker = self.outbox.needs_broker();
        move || {
            let opened = config.open(exchange.clone(), Start::LoggedIn);
            opened.map_err(|error| match error.kind() {
                _ if has_worked => error.after_success(),
                // If the outbox outlives this process, the first connection can wait: another program may use the port
                // temporarily.
                ErrorKind::Protocol if !needs_broker => AmqpError::unavailable(error.to_string()),
                _ => error,
            })
        }
    }

    /// Uses the connection of a successful attempt, and starts the next attempt when it is time.
    pub(super) fn poll_attempts(&mut self) -> Result<(), Error> {
        let State::Reconnecting { attempts, hold_until, health } = &mut self.state else {
            return Ok(());
        };
        let outcome = attempts.poll();
        if attempts.has_failed() {
            // There is no broker, so receivers have lost their connections too, and need time to return.
            *hold_until = None;
            let since = *health.failing_since.get_or_insert_with(Instant::now);
            let counts = self.outbox.window().counts();
            counts.set_outage(Outage { since, until: attempts.end() });
        }
        let Some(publishing) = outcome? else {
            return Ok(());
        };
        let (hold_until, health) = (*hold_until, mem::take(health));
        self.outbox.window_mut().set_round_trip(publishing.round_trip());
        let until = hold_until.unwrap_or_else(|| {
            let outage = health.failing_since.map(|since| since.elapsed());
            let (pause, peer) = (self.timings.time_to_return(outage), publishing.peer());
            log::info!("connected to {peer}; receivers have {pause:.1?} to return");
            Instant::now() + pause
        });
        self.enter(State::Holding { session: Session::new(publishing, health), until });
        Ok(())
    }

    /// Sends messages on a session, first those to be sent again.
    pub(super) fn resume(&mut self, mut session: Session) {
        let window = self.outbox.window_mut();
        let counts = window.counts();
        if counts.end_outage() {
            let (peer, records) = (session.publishing.peer(), counts.in_doubt());
            log::warn!("connected to {peer} again; {records} records are sent again");
        }
        if window.is_empty() {
            // No confirm will arrive that ends the failures.
            session.health.failing_since = None;
        }
        let messages = window.resend();
        if let Some(nacking) = &mut session.health.nacking {
            nacking.last_tag = window.last_tag();
        }
        session.last_answer = Instant::now();
        self.enter(State::Connected(session));
        messages.iter().for_each(|message| self.send(message));
    }

    /// Ends the failures after a confirm.
    pub(super) fn end_failures(&mut self) {
        let more = RetryFor::AtMost(self.max_wait());
        if let State::Connected(session) | State::Holding { session, .. } = &mut self.state {
            session.last_answer = Instant::now();
            session.health.confirm(self.outbox.window(), more);
        }
    }

    /// Holds all messages for a pause if a queue has nacked a message, or no queue has got it.
    pub(super) fn hold_nacked(&mut self) -> Result<(), Error> {
        let window = self.outbox.window();
        let Some(first) = window.first_to_resend() else {
            return Ok(());
        };
        if window.is_probing() && window.awaits_answer() {
            return Ok(());
        }
        if window.has_passed_probe() {
            self.take_session().into_iter().for_each(|session| self.resume(session));
            return Ok(());
        }
        let cause = match self.config.resends_unroutable {
            true => "not routed to any queue, or nacked by a queue",
            false => "nacked by a queue",
        };
        let reason = format!("{}: {cause}", self.config.publishing());
        let error = self.config.at_record(first, ErrorKind::Unavailable, &reason);
        let Some(mut session) = self.take_session() else {
            return Ok(());
        };
        let now = Instant::now();
        let nacking = session.health.nacking.get_or_insert_with(|| Nacking {
            backoff: self.backoff_since(now),
            last_progress: now,
            last_tag: 0,
        });
        // The pause is as long as the time without a confirm, so that the pauses double.
        let longest = LONGEST_NACK_PAUSE * self.timings.longest_delay;
        let pause = (now - nacking.last_progress).min(longest);
        // This reason has no record number, so that it is logged only once.
        let pause = nacking.backoff.after_at_least(pause, AmqpError::unavailable(reason));
        let until = Instant::now() + pause.map_err(|_| error)?;
        self.enter(State::Holding { session, until });
        Ok(())
    }

    /// Splits or drops the messages to be sent again that are too large for the broker.
    fn drop_too_large(&mut self, cause: AmqpError) -> Result<(), Error> {
        let window = self.outbox.window_mut();
        // If no message is larger than the limit, the broker would reject the same messages again and again.
        let Some(limit) = cause.size_limit().filter(|limit| window.has_larger_than(*limit)) else {
            return Err(cause.into());
        };
        window.max_body = limit;
        self.outbox.limit_bodies(limit, &cause);
        Ok(())
    }

    /// Tries another connection if the broker has confirmed nothing for too long, or fails.
    pub(super) fn check_deadline(&mut self) -> Result<(), Error> {
        if !self.is_overdue() && !self.is_stalled() {
            return Ok(());
        }
        let State::Connected(session) = &mut self.state else {
            return Ok(());
        };
        // After SIGSTOP and SIGCONT, the deadline may have passed while the confirm is in the socket.
        session.publishing.wait(&[], Some(Instant::now() + LAST_CHANCE));
        self.handle_events()?;
        match &self.state {
            State::Connected(session) if self.is_overdue() => {
                let (peer, wait) = (session.publishing.peer(), self.max_wait());
                let what = match session.is_asked {
                    true => "has not read all messages within",
                    false => "has confirmed nothing for",
                };
                let blocked = session.blocked.as_ref();
                let why = blocked.map(|reason| format!("; it blocks publishers: {reason}"));
                let text = format!(
                    "{}: {peer} {what} {wait:?}{} (--retry sets how long to wait)",
                    self.config.publishing(),
                    why.unwrap_or_default()
                );
                self.outbox.window_mut().set_may_have_arrived();
                Err(AmqpError::unavailable(text).into())
            }
            State::Connected(_) if self.is_stalled() => self.leave_stalled_session(),
            _ => Ok(()),
        }
    }

    /// Replaces a session on which the broker confirms nothing. All unconfirmed messages are to be sent again.
    fn leave_stalled_session(&mut self) -> Result<(), Error> {
        let Some(Session { publishing, mut health, last_answer, .. }) = self.take_session() else {
            return Ok(());
        };
        let window = self.outbox.window_mut();
        window.start_over();
        window.set_may_have_arrived();
        let wait = whole_seconds(last_answer.elapsed());
        let (route, peer) = (self.config.publishing(), publishing.peer());
        let text = format!("{route}: {peer} has confirmed nothing for {wait}");
        // The next connection needs its file descriptors.
        drop(publishing);
        health.failing_since.get_or_insert(last_answer);
        let exchange = self.config.exchange.declaration();
        self.reconnect_after(AmqpError::unavailable(text), exchange, health)
    }

    /// The error if the broker confirms nothing in time after the end of the input.
    pub(super) fn timeout_error(&self) -> Error {
        let what = match self.session() {
            Some(session) => format!("{} has confirmed nothing", session.publishing.peer()),
            None => "no broker".into(),
        };
        self.outbox.timeout_error(format!("{}: {what}", self.config.publishing()))
    }

    fn is_overdue(&self) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= Instant::now())
    }

    fn is_stalled(&self) -> bool {
        self.stall_time().is_some_and(|time| time <= Instant::now())
    }

    /// When to call [`check_deadline`](Publisher::check_deadline).
    pub(super) fn next_check(&self) -> Option<Instant> {
        self.deadline().into_iter().chain(self.stall_time()).min()
    }

    /// When to try another connection if no message is confirmed before. The time doubles with each, because other queues
    /// get the messages again.
    pub(super) fn stall_time(&self) -> Option<Instant> {
        match &self.state {
            State::Connected(session)
                if self.config.confirms
                    && session.blocked.is_none()
                    && !session.publishing.is_sending()
                    && !self.outbox.window().is_empty() =>
            {
                // A large message may take minutes to be sent.
                let last = session.last_answer.max(session.sent_at);
                let failing = session.health.failing_since.map(|since| last - since);
                Some(last + STALL.max(failing.unwrap_or_default()))
            }
            _ => None,
        }
    }

    /// When to fail if no message is confirmed before.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Connected(session) if session.is_asked || !self.outbox.window().is_empty() => {
                session.last_answer.checked_add(self.max_wait())
            }
            _ => None,
        }
    }

    /// How long the broker may confirm nothing after the end of the input; `None` for no limit. The limit is at least
    /// [`SHORTEST_WAIT`] unless an attempt to connect has failed.
    pub(super) fn patience(&self, retry_for: RetryFor) -> Option<Duration> {
        let RetryFor::AtMost(patience) = retry_for else {
            return None;
        };
        match &self.state {
            State::Reconnecting { attempts, .. } if attempts.has_failed() => Some(patience),
            _ if self.is_pausing() => None,
            _ => Some(patience.max(SHORTEST_WAIT)),
        }
    }

    /// How long the broker may confirm nothing.
    pub(super) fn max_wait(&self) -> Duration {
        match self.retry_for {
            RetryFor::AtMost(duration) => duration.max(SHORTEST_WAIT),
            RetryFor::Ever => Duration::MAX,
        }
    }
}
