//! Publishing: no message is forgotten before the broker has confirmed it.
//!
//! A [`Publisher`] is a machine with the four states of [`State`]. [`Publisher::wait`] alone waits, and
//! [`Publisher::advance`] goes from a state to the next. Messages are in an [`Outbox`] until they are confirmed. Here are
//! the states and the way of a message; [`recovery`] has the way back from each failure.

mod recovery;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use amqp::retry::{Attempts, RetryFor, Timings, retry};
use amqp::{Event, Lost, Mailbox, NO_KEY, Properties, Publishing, Return, Start, wait_for};
use anyhow::Error;
use logs_common::wire::{Layout, MessageId};
use logs_process::status;

use crate::cli::Cli;
use crate::counts::Counts;
use crate::health::Health;
use crate::message::Message;
use crate::outbox::{Broker, Outbox};
use crate::session::{Session, SessionConfig};

/// The time to get back to a lost broker, and to wait for a broker that confirms nothing, unless
/// `--retry` sets another. With `--lines` also the time to reach the first broker.
pub const DEFAULT_RETRY: RetryFor = RetryFor::AtMost(Duration::from_secs(60));

/// A single message that is confirmed within this time ends without a thread that answers those who ask for the
/// status: the thread would be a tenth of all system calls.
const SOON: Duration = Duration::from_millis(100);

/// The time between two reads of confirmations while there is input and nothing depends on them.
const UNHURRIED: Duration = Duration::from_millis(20);

/// Publishes messages in order, connects again when the connection is lost, and sends unconfirmed
/// messages once more.
pub struct Publisher {
    config: Arc<SessionConfig>,
    retry_for: RetryFor,
    /// Whether a broker that does not let us in is tried again.
    retries_login: bool,
    timings: Timings,
    properties: Properties,
    /// The run of the messages' [`MessageId`].
    run: u64,
    state: State,
    /// The messages that are not confirmed.
    pub outbox: Box<dyn Outbox>,
    /// Whether those who ask for the status get an answer.
    answers: bool,
}

enum State {
    /// Messages go out.
    Connected(Session),
    /// Connected, but no message goes out `until` receivers have had time to come back, or a queue to get
    /// room. The first to go out then are the messages to be sent again.
    Holding { session: Session, until: Instant },
    /// The connection is lost, and attempts to connect are under way. Messages are held `hold_until` then;
    /// without, until receivers have had time to come back too.
    Reconnecting { attempts: Attempts<Publishing>, hold_until: Option<Instant>, health: Health },
    /// The connection is closed, or the publisher has failed.
    Ended,
}

impl Publisher {
    /// Connects, unless the outbox needs no broker yet.
    ///
    /// # Errors
    ///
    /// When no broker can be reached within `--retry` (by default 60 s with `--lines`, and at the first
    /// attempt without), or none lets us in.
    pub fn connect(
        cli: &Cli,
        config: Arc<SessionConfig>,
        outbox: Box<dyn Outbox>,
    ) -> Result<Publisher, Error> {
        let mut publisher = Publisher {
            timings: config.timings,
            config,
            retry_for: cli.connection.retry.unwrap_or(DEFAULT_RETRY),
            retries_login: cli.lines || cli.connection.retry.is_some(),
            properties: cli.properties()?,
            // With keys from the operating system: no two runs on any machine may have the same number.
            run: RandomState::new().build_hasher().finish(),
            state: State::Ended,
            outbox,
            answers: false,
        };
        let interval = cli.verbosity.status_interval;
        if cli.lines || interval.is_some() {
            publisher.answer_status(interval);
        }
        if publisher.outbox.needs_broker() {
            publisher.connect_first(cli)?;
            return Ok(publisher);
        }
        publisher.retry_for = RetryFor::Ever;
        // What an earlier run has left may be due to an outage, from which receivers have yet to come back.
        let hold_until = publisher.outbox.is_empty().then(Instant::now);
        let durability = publisher.config.exchange.durability();
        publisher.reconnect_now(durability, hold_until, Health::default());
        Ok(publisher)
    }

    /// Waits for a first broker.
    fn connect_first(&mut self, cli: &Cli) -> Result<(), Error> {
        let retry_for = self.retries_login.then_some(self.retry_for);
        let now = Instant::now();
        self.counts().broker.set_lost(now, retry_for.unwrap_or(RetryFor::NO_TIME).end(now));
        // A single message goes out with the login.
        let start = if cli.lines { Start::LoggedIn } else { Start::AtOnce };
        let mut failures = 0;
        let publishing = retry(retry_for, || {
            let opened = self.config.open(self.config.exchange.durability(), start);
            opened.inspect_err(|_| {
                failures += 1;
                self.answer_status(None);
            })
        })?;
        self.outbox.window_mut().set_round_trip(publishing.round_trip());
        let session = Session::new(publishing, Health::default());
        self.enter(match failures {
            0 => State::Connected(session),
            // Receivers may have been without this broker for long.
            _ => State::Holding {
                session,
                until: Instant::now() + self.timings.time_to_return(None),
            },
        });
        Ok(())
    }

    /// The counts of records so far.
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(self.outbox.window().counts())
    }

    /// Whether messages go out.
    fn is_ready(&self) -> bool {
        self.broker() >= Broker::Blocked
    }

    /// Whether the broker takes messages.
    fn broker(&self) -> Broker {
        match &self.state {
            State::Connected(session) if session.blocked.is_some() => Broker::Blocked,
            State::Connected(_) => Broker::Ready,
            State::Holding { .. } => Broker::Holding,
            State::Reconnecting { .. } | State::Ended => Broker::Away,
        }
    }

    /// Publishes messages: those for which there is room go out together, the rest while somebody
    /// [waits](Publisher::wait). All are kept until the broker has confirmed them, even with an error.
    ///
    /// # Errors
    ///
    /// When the broker refuses a message, or is lost and does not come back in time; with
    /// `--no-confirm`, when the broker is lost.
    pub fn publish(&mut self, messages: impl IntoIterator<Item = Message>) -> Result<(), Error> {
        self.keep(messages)?;
        self.advance()
    }

    /// Keeps messages, without looking for a broker.
    ///
    /// # Errors
    ///
    /// When they cannot be kept.
    pub fn keep(&mut self, messages: impl IntoIterator<Item = Message>) -> Result<(), Error> {
        let mut messages = messages.into_iter();
        messages.try_for_each(|message| self.outbox.put(Message { run: self.run, ..message }))
    }

    /// Sends what the outbox has, as far as there is room.
    fn send_next(&mut self) -> Result<(), Error> {
        // The time of a question without an answer goes on.
        let is_asked = self.session().is_some_and(|session| session.is_asked);
        if !is_asked && self.outbox.window().is_empty() {
            self.note_answer();
        }
        while let State::Connected(session) = &self.state
            && !session.publishing.is_congested()
            && let Some(message) = self.outbox.next(self.broker())?
        {
            self.send(&message);
        }
        if let Some(session) = self.session_mut() {
            session.publishing.flush();
        }
        Ok(())
    }

    /// Sends a message that is in the window already, with the next flush.
    fn send(&mut self, message: &Message) {
        let State::Connected(session) = &mut self.state else {
            return;
        };
        let id = MessageId { run: message.run, number: message.number };
        let mut properties =
            self.properties.clone().with_timestamp(message.timestamp).with_message_id(id.into());
        if let Some(message_type) = message.packing.message_type() {
            properties = properties.with_type_(message_type.into());
        }
        session.publishing.publish(NO_KEY, &message.body, &properties);
        self.complete_unconfirmed();
    }

    /// Waits until all messages are confirmed, and closes the connection, unless it is already known that publishing
    /// has failed. Then all that is not confirmed stays in the outbox, and so it does with a `stop` if the outbox is to
    /// outlive the program.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish), also of what was `published`. The text says how many records are in doubt.
    pub fn finish(
        &mut self,
        published: Result<(), Error>,
        stop: Option<&Mailbox<i32>>,
    ) -> Result<(), Error> {
        let drained = published.and_then(|()| self.drain(stop));
        // What is confirmed by now need not be sent again by a later run.
        if drained.is_ok() || self.outbox.ending().is_some() {
            self.close();
        }
        let closed = self.outbox.close();
        let window = self.outbox.window();
        drained.and(closed).map_err(|error| {
            match self.config.is_single && !window.may_have_arrived {
                // A single message that no broker can have needs no counts.
                true => error,
                false => window.counts().add_to(error),
            }
        })
    }

    /// Waits until all messages are confirmed.
    fn drain(&mut self, stop: Option<&Mailbox<i32>>) -> Result<(), Error> {
        let (ending, counts) = (self.outbox.ending(), self.counts());
        let begun = Instant::now();
        let (mut done, mut since, mut end) = (counts.done(), begun, None);
        self.advance()?;
        while !self.is_drained() {
            let now = Instant::now();
            let sync_time = self.outbox.sync_time(false);
            let stop = stop.filter(|_| end.is_none() && ending.is_some());
            let is_stopped = stop.is_some_and(|stop| !stop.is_empty());
            if is_stopped || sync_time.is_some_and(|time| time <= now) {
                self.outbox.sync()?;
            }
            if let Some(ending) = ending.filter(|_| is_stopped) {
                let grace = self.session().map_or(Duration::ZERO, |_| ending.grace);
                end = Some(Instant::now() + grace);
            }
            if done != counts.done() || self.is_pausing() {
                (done, since) = (counts.done(), Instant::now());
            }
            let patience = ending.and_then(|ending| self.patience(ending.patience));
            let deadline = end.or(patience.and_then(|patience| since.checked_add(patience)));
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return if end.is_some() { Ok(()) } else { Err(self.given_up()) };
            }
            let soon = (!self.answers).then_some(begun + SOON);
            self.wait(None, stop, deadline.into_iter().chain(sync_time).chain(soon).min())?;
            if soon.is_some_and(|soon| soon <= Instant::now()) {
                self.answer_status(None);
            }
        }
        counts.flush();
        Ok(())
    }

    /// Whether all messages are confirmed. Without confirmations: whether the broker has taken them.
    fn is_drained(&mut self) -> bool {
        let is_empty = self.outbox.is_empty();
        let confirms = self.config.confirms;
        match self.session_mut() {
            Some(session) if is_empty && !confirms => {
                session.ask();
                session.publishing.has_answered()
            }
            _ => is_empty,
        }
    }

    /// Whether nothing is sent so that receivers can come back: this time is not the broker's.
    fn is_pausing(&self) -> bool {
        matches!(&self.state, State::Holding { session, .. } if session.health.refusal.is_none())
    }

    /// Closes the connection.
    fn close(&mut self) {
        if let Some(mut session) = self.take_session() {
            // Messages may have been returned; a loss of the connection has no consequence any more.
            while let Ok(Some(event)) = session.publishing.try_event() {
                self.act_on(event);
            }
            session.publishing.close();
        }
    }

    /// Waits for an event of the broker, the end of an attempt to connect, or the time of the next step,
    /// and acts on that; at most `until` then. Also returns when `stop` or, while messages can go out, `input` is
    /// ready, and takes nothing from them; returns whether the input is. Without `until`, confirmations may be acted on
    /// a moment later.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn wait(
        &mut self,
        input: Option<BorrowedFd<'_>>,
        stop: Option<&Mailbox<i32>>,
        until: Option<Instant>,
    ) -> Result<bool, Error> {
        let input = input.filter(|_| self.outbox.takes_input(self.broker()));
        if input.is_none() && self.is_ready() {
            // Confirmations gather: each would wake this process.
            thread::sleep(self.outbox.window().pause());
        }
        let is_unhurried = input.is_some() && until.is_none() && !self.outbox.window().is_empty();
        let watched: Vec<_> = input.into_iter().chain(stop.map(AsFd::as_fd)).collect();
        let until = self.next_time().into_iter().chain(until).min();
        if is_unhurried && let State::Connected(session) = &self.state {
            // Many confirmations are read at a time: each would wake this process.
            let rest = session.last_answer + UNHURRIED;
            let rest = until.map_or(rest, |until| until.min(rest));
            if session.publishing.wait_for_others(&watched, rest).by(0) {
                return Ok(true);
            }
        }
        let is_first_ready = match self.session_mut() {
            Some(session) => session.publishing.wait(&watched, until).by(0),
            None => wait_for(&watched, until).by(0),
        };
        self.advance()?;
        self.check_deadline()?;
        Ok(input.is_some() && is_first_ready)
    }

    /// The time of the next step, if no event comes before.
    fn next_time(&self) -> Option<Instant> {
        let time = match &self.state {
            State::Connected(_) => self.deadline(),
            State::Holding { until, .. } => Some(*until),
            State::Reconnecting { attempts, .. } => attempts.next(),
            State::Ended => None,
        };
        time.into_iter().chain(self.outbox.next_time(self.broker())).min()
    }

    /// Acts on all events that have come, and goes to the next state when it is time.
    fn advance(&mut self) -> Result<(), Error> {
        match &self.state {
            State::Connected(_) => {
                self.listen()?;
                self.hold_refused()?;
            }
            State::Holding { until, .. } => {
                let is_over = *until <= Instant::now();
                self.listen()?;
                if is_over && let Some(session) = self.take_session() {
                    self.resume(session);
                }
            }
            State::Reconnecting { .. } => self.poll_attempts()?,
            State::Ended => {}
        }
        self.send_next()?;
        self.outbox.work(self.broker())
    }

    /// Acts on all events that have come.
    fn listen(&mut self) -> Result<(), Error> {
        while let Some(session) = self.session_mut() {
            match session.publishing.try_event() {
                Ok(None) => break,
                Ok(Some(event)) => self.act_on(event),
                Err(Lost) => return self.lose_session(),
            }
        }
        Ok(())
    }

    fn act_on(&mut self, event: Event) {
        match event {
            Event::Confirmed { tag, multiple } => {
                self.outbox.window_mut().confirm(tag, multiple);
                self.end_failures();
            }
            Event::Nacked { tag, multiple } => {
                self.outbox.window_mut().refuse(tag, multiple);
                self.note_answer();
            }
            Event::Returned(returned) => {
                log::debug!("{}: {}", self.config.publishing(), returned.reply_text);
                if self.config.confirms {
                    self.outbox.window_mut().mark_returned(number_of(&returned));
                } else {
                    let layout = Layout::of(&returned.properties, &returned.content);
                    self.counts().add_unroutable(layout.records);
                }
            }
            Event::Blocked(reason) => {
                log::warn!("blocked by the broker: {reason}");
                self.set_blocked(Some(reason));
            }
            Event::Unblocked => {
                log::warn!("unblocked by the broker");
                self.set_blocked(None);
                self.complete_unconfirmed();
            }
        }
    }

    /// Without confirmations, sent messages are done, except while the broker takes none.
    fn complete_unconfirmed(&mut self) {
        if !self.config.confirms && self.session().is_some_and(|session| session.blocked.is_none())
        {
            self.outbox.window_mut().confirm_all();
        }
    }

    /// Answers those who ask for the status from now on, and at each `interval`.
    fn answer_status(&mut self, interval: Option<Duration>) {
        if !mem::replace(&mut self.answers, true) {
            let counts = self.counts();
            status::answer("emit-log", interval, move || counts.status());
        }
    }

    /// Goes to a state.
    fn enter(&mut self, state: State) {
        self.state = state;
        self.show_state();
    }

    /// Lets those who ask for the status see the state.
    fn show_state(&self) {
        let broker = &self.outbox.window().counts().broker;
        match &self.state {
            State::Connected(session) | State::Holding { session, .. } => {
                let remark = match (&session.blocked, &self.state) {
                    (Some(reason), _) => format!("blocked: {reason}"),
                    (None, State::Holding { .. }) => "holding messages back".into(),
                    _ => String::new(),
                };
                broker.set_open(session.publishing.peer(), remark);
            }
            State::Reconnecting { attempts, health, .. } => {
                broker.set_lost(health.failing_since.unwrap_or_else(Instant::now), attempts.end());
            }
            State::Ended => {}
        }
    }

    fn session(&self) -> Option<&Session> {
        match &self.state {
            State::Connected(session) | State::Holding { session, .. } => Some(session),
            State::Reconnecting { .. } | State::Ended => None,
        }
    }

    fn session_mut(&mut self) -> Option<&mut Session> {
        match &mut self.state {
            State::Connected(session) | State::Holding { session, .. } => Some(session),
            State::Reconnecting { .. } | State::Ended => None,
        }
    }

    /// Takes the session out, and leaves the state `Ended`.
    fn take_session(&mut self) -> Option<Session> {
        match mem::replace(&mut self.state, State::Ended) {
            State::Connected(session) | State::Holding { session, .. } => Some(session),
            other => {
                self.state = other;
                None
            }
        }
    }

    fn note_answer(&mut self) {
        if let Some(session) = self.session_mut() {
            session.last_answer = Instant::now();
        }
    }

    fn set_blocked(&mut self, reason: Option<String>) {
        if let Some(session) = self.session_mut() {
            session.blocked = reason;
        }
        self.show_state();
    }
}

/// The number of a message of this run.
fn number_of(returned: &Return) -> Option<u64> {
    Some(MessageId::parse(returned.properties.message_id().as_deref()?)?.number)
}

#[cfg(test)]
mod tests;
