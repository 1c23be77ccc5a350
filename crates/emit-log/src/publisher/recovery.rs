//! The way back from each failure: a lost connection, a queue that refuses, a message too large for the
//! broker, and a broker that confirms nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::retry::{Attempts, Backoff, RetryFor};
use amqp::{Durability, Error as AmqpError, ErrorKind, Publishing, Start};
use anyhow::Error;

use super::{Publisher, State};
use crate::counts::Outage;
use crate::message::Message;
use crate::session::Session;

/// The least time that a broker has for a confirmation.
pub(super) const SHORTEST_WAIT: Duration = Duration::from_secs(5);

/// The time that a confirmation which is overdue has to come out of the socket.
const LAST_CHANCE: Duration = Duration::from_millis(500);

/// The longest pause while a queue refuses messages and none is confirmed, in longest delays between attempts to connect:
/// the other queues get each message again.
const LONGEST_REFUSAL: u32 = 5;

/// A queue refuses messages, which are sent again after pauses in which the queue may get room.
pub(super) struct Refusal {
    backoff: Backoff,
    /// When a message was last confirmed, or first refused.
    last_progress: Instant,
    /// The delivery tag of the last message that was sent again.
    last_tag: u64,
}

impl Publisher {
    /// Leaves a session that is lost, with all unconfirmed messages to be sent again.
    pub(super) fn lose_session(&mut self) -> Result<(), Error> {
        let hold_until = match &self.state {
            State::Holding { until, .. } => *until,
            _ => Instant::now(),
        };
        let Some(Session { mut publishing, .. }) = self.take_session() else {
            return Ok(());
        };
        self.window.start_over();
        let is_let_in = publishing.is_let_in();
        let is_in_doubt = self.window.counts().in_doubt() > 0;
        self.may_have_arrived |= is_in_doubt && !publishing.is_refused();
        let (declared, mut cause) = (publishing.declared(), publishing.end());
        // The next connection needs its file descriptors.
        drop(publishing);
        if self.has_worked && matches!(cause.kind(), ErrorKind::Permission | ErrorKind::Protocol) {
            cause = cause.after_success();
        }
        self.has_worked |= is_let_in;
        let durability = self.config.exchange.durability();
        match (cause.kind(), declared) {
            _ if !is_let_in && !self.retries_login => Err(self.with_counts(cause)),
            // Without confirmations nobody knows which messages the broker has read.
            _ if !self.config.confirms => Err(self.with_counts(cause)),
            (ErrorKind::TooLarge, _) => {
                self.leave_out_too_large(cause)?;
                self.reconnect_now(durability, Some(hold_until));
                Ok(())
            }
            (ErrorKind::OtherDurability, Some(declared)) => {
                self.config.exchange.note_other_durability();
                self.reconnect_now(declared.other(), Some(hold_until));
                Ok(())
            }
            _ => self.reconnect_after(cause, durability),
        }
    }

    /// Connects again after a broker was lost.
    fn reconnect_after(&mut self, cause: AmqpError, durability: Durability) -> Result<(), Error> {
        let text = format!("{cause}; trying again");
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        let connect = self.connect_again(durability);
        let attempts = Attempts::new(cause, self.backoff_since(since), connect);
        let attempts = attempts.map_err(|error| self.with_counts(error))?;
        log::warn!("{text}");
        self.window.counts().set_outage(Outage { since, until: attempts.end() });
        self.enter(State::Reconnecting { attempts, hold_until: None });
        Ok(())
    }

    /// Connects without a pause before the first attempt, as where the broker has closed only this channel, and
    /// receivers are still there.
    pub(super) fn reconnect_now(&mut self, durability: Durability, hold_until: Option<Instant>) {
        let backoff = self.backoff_since(Instant::now());
        let attempts = Attempts::now(backoff, self.connect_again(durability));
        self.enter(State::Reconnecting { attempts, hold_until });
    }

    fn backoff_since(&self, start: Instant) -> Backoff {
        Backoff::since(start, self.retry_for).with_timings(self.timings)
    }

    fn connect_again(
        &self,
        durability: Durability,
    ) -> impl Fn() -> Result<Publishing, AmqpError> + Send + Sync + 'static {
        let (config, has_worked) = (Arc::clone(&self.config), self.has_worked);
        let has_spool = self.has_spool();
        move || {
            let opened = config.open(durability, Start::LetIn);
            opened.map_err(|error| match error.kind() {
                _ if has_worked => error.after_success(),
                // With a spool nothing waits for the first broker: another program may answer there for now.
                ErrorKind::Protocol if has_spool => AmqpError::unavailable(error.to_string()),
                _ => error,
            })
        }
    }

    /// Takes the connection of a successful attempt, and begins the next attempt when it is time.
    pub(super) fn poll_attempts(&mut self) -> Result<(), Error> {
        let State::Reconnecting { attempts, hold_until } = &mut self.state else {
            return Ok(());
        };
        let outcome = attempts.poll();
        if attempts.has_failed() {
            // Even if only the channel was closed before: now there is no broker, and receivers lose it too.
            *hold_until = None;
            let since = *self.failing_since.get_or_insert_with(Instant::now);
            self.window.counts().set_outage(Outage { since, until: attempts.end() });
        }
        let hold_until = *hold_until;
        let Some(publishing) = outcome.map_err(|error| self.with_counts(error))? else {
            return Ok(());
        };
        self.window.set_round_trip(publishing.round_trip());
        let until = hold_until.unwrap_or_else(|| {
            let outage = self.failing_since.map(|since| since.elapsed());
            let (pause, peer) = (self.timings.time_to_return(outage), publishing.peer());
            log::info!("connected to {peer}; receivers have {pause:.1?} to come back too");
            Instant::now() + pause
        });
        self.enter(State::Holding { session: Session::new(publishing), until });
        Ok(())
    }

    /// Goes on with a session, first with the messages to be sent again.
    pub(super) fn resume(&mut self, session: Session) -> Result<(), Error> {
        let counts = self.window.counts();
        if counts.end_outage() {
            let (peer, records) = (session.publishing.peer(), counts.in_doubt());
            log::warn!("connected to {peer} again; {records} messages are sent once more");
        }
        if self.window.is_empty() {
            // No confirmation will come that would end the failures.
            self.failing_since = None;
        }
        self.enter(State::Connected(session));
        self.note_answer();
        let messages = self.window.resend();
        if let Some(refusal) = &mut self.refusal {
            refusal.last_tag = self.window.last_tag();
        }
        messages.iter().for_each(|message| self.send(message));
        self.flush();
        Ok(())
    }

    /// A confirmation ends an outage, and ends a refusal if it is that of the last message sent again. A refusal that
    /// goes on has more time.
    pub(super) fn end_failures(&mut self) {
        self.failing_since = None;
        self.has_worked = true;
        let max_wait = self.max_wait();
        if let Some(refusal) = &mut self.refusal {
            refusal.last_progress = Instant::now();
            refusal.backoff.extend(RetryFor::AtMost(max_wait));
        }
        let window = &self.window;
        let is_over = |refusal: &mut Refusal| {
            window.first_to_resend().is_none() && window.is_past(refusal.last_tag)
        };
        drop(self.refusal.take_if(is_over));
    }

    /// Holds all messages back for a pause if a queue has refused a message.
    pub(super) fn hold_refused(&mut self) -> Result<(), Error> {
        let (State::Connected(_), Some(first)) = (&self.state, self.window.first_to_resend())
        else {
            return Ok(());
        };
        let reason = format!("{}: refused by a queue", self.config.publishing());
        let error = self.at_record(first, ErrorKind::Unavailable, &reason);
        let now = Instant::now();
        let mut refusal = self.refusal.take().unwrap_or_else(|| Refusal {
            backoff: self.backoff_since(now),
            last_progress: now,
            last_tag: 0,
        });
        // As long as the time without a confirmation, so that the pauses double.
        let longest = LONGEST_REFUSAL * self.timings.longest_delay;
        let pause = (now - refusal.last_progress).min(longest);
        // Without the number, so that the reason is logged once.
        let pause = refusal.backoff.after_at_least(pause, AmqpError::unavailable(reason));
        let pause = pause.map_err(|_| self.with_counts(error))?;
        self.refusal = Some(refusal);
        if let Some(session) = self.take_session() {
            self.enter(State::Holding { session, until: Instant::now() + pause });
        }
        Ok(())
    }

    /// Splits batches that are too large for the broker. A single record that is too large ends the
    /// publisher, once all earlier records are confirmed.
    fn leave_out_too_large(&mut self, cause: AmqpError) -> Result<(), Error> {
        let limit = max_size_in(&cause.to_string());
        // If no message is larger than the limit, all would be sent and refused again and again.
        let Some(limit) = limit.filter(|limit| self.window.has_larger_than(*limit)) else {
            return Err(self.with_counts(cause));
        };
        self.max_body = limit;
        if self.has_spool() {
            self.give_up_too_large(limit);
            return Ok(());
        }
        if let Some(message) = self.window.cut_to(limit) {
            let error = self.at_record(&message, cause.kind(), &cause.to_string());
            self.rejected = Some(error.into());
        }
        Ok(())
    }

    /// Names the record, unless there is only one.
    fn at_record(&self, message: &Message, kind: ErrorKind, text: &str) -> AmqpError {
        match self.is_single {
            true => AmqpError::new(kind, text),
            false => AmqpError::new(kind, format!("record {}: {text}", message.number)),
        }
    }

    /// Gives up if the broker has confirmed nothing for too long.
    pub(super) fn check_deadline(&mut self) -> Result<(), Error> {
        if !self.is_overdue() {
            return Ok(());
        }
        let State::Connected(session) = &mut self.state else {
            return Ok(());
        };
        // After SIGSTOP and SIGCONT the deadline may have passed while the confirmation waits in the socket.
        session.publishing.wait(&[], Some(Instant::now() + LAST_CHANCE));
        self.listen()?;
        match self.state {
            State::Connected(_) if self.is_overdue() => {
                let wait = self.max_wait();
                Err(self.out_of_time(&format!("has confirmed nothing for {wait:?}")))
            }
            _ => Ok(()),
        }
    }

    /// The error of a broker that takes too long, with `what` that comes to.
    pub(super) fn out_of_time(&mut self, what: &str) -> Error {
        self.may_have_arrived = true;
        let publishing = self.config.publishing();
        let session = self.session();
        let peer = session.map_or("no broker", |session| session.publishing.peer());
        let reason = session.and_then(|session| session.blocked.as_ref());
        let why = reason.map(|reason| format!(", blocked by it: {reason}")).unwrap_or_default();
        self.with_counts(AmqpError::unavailable(format!(
            "{publishing}: {peer} {what}{why} (--retry sets how long to wait)"
        )))
    }

    fn is_overdue(&self) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= Instant::now())
    }

    /// The time at which to give up if no message is confirmed until then.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Connected(session) if !self.window.is_empty() => {
                session.last_answer.checked_add(self.max_wait())
            }
            _ => None,
        }
    }

    /// The time that the broker has for a confirmation.
    pub(super) fn max_wait(&self) -> Duration {
        match self.retry_for {
            RetryFor::AtMost(duration) => duration.max(SHORTEST_WAIT),
            RetryFor::Ever => Duration::MAX,
        }
    }
}

/// The limit in RabbitMQ's words for a message that is too large: `... max size 1000`.
fn max_size_in(text: &str) -> Option<usize> {
    let (_, limit) = text.rsplit_once("max size ")?;
    let digits = limit.find(|c: char| !c.is_ascii_digit()).unwrap_or(limit.len());
    limit[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_size_is_that_in_the_words_of_the_broker() {
        let text = "publish to exchange 'max size 7': PRECONDITION_FAILED - message size 1001 is \
                    larger than configured max size 1000 (send less)";
        assert_eq!(max_size_in(text), Some(1000));
        assert_eq!(max_size_in("PRECONDITION_FAILED - message size"), None);
    }
}
