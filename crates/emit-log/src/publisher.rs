//! The publisher: sends messages, and keeps each one until the broker has confirmed it.
//!
//! A [`Publisher`] is a state machine with the states of [`State`]. Only [`Publisher::wait`] blocks, and
//! [`Publisher::advance`] changes the state. An [`Outbox`] keeps messages until they are confirmed. [`recovery`]
//! handles each failure.

mod recovery;

use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use amqp::retry::{Attempts, RetryFor, Timings, retry};
use amqp::{Event, Lost, Mailbox, Properties, Publishing, Return, Start, Value, wait_for};
use anyhow::Error;
use logs_common::wire::{FILE, Layout, MessageId, TIMESTAMP_IN_MS};
use logs_process::metrics::{Metrics, MetricsFile};
use logs_process::status;

use crate::cli::Cli;
use crate::counts::Counts;
use crate::health::Health;
use crate::message::Message;
use crate::outbox::{BrokerState, Outbox};
use crate::session::{Session, SessionConfig};

/// The default of `--retry`: how long to retry a lost connection, and to wait for a broker that confirms nothing. With
/// `--lines`, it also limits the first connection.
pub const DEFAULT_RETRY: RetryFor = RetryFor::AtMost(Duration::from_secs(60));

/// Without `--lines`, the status thread starts after this time. Most messages are confirmed earlier, and the thread
/// would cost a tenth of all system calls.
const STATUS_DELAY: Duration = Duration::from_millis(100);

/// The time between two reads of confirms while the publisher waits for input.
const CONFIRM_DELAY: Duration = Duration::from_millis(20);

/// Publishes messages in order, reconnects when the connection is lost, and sends unconfirmed messages again.
pub struct Publisher {
    config: Arc<SessionConfig>,
    retry_for: RetryFor,
    /// Whether a failed first login is retried.
    retries_login: bool,
    timings: Timings,
    properties: Properties,
    /// Whether messages name their sender, and have an exact time.
    is_tagged: bool,
    state: State,
    /// The messages that are not confirmed.
    pub outbox: Box<dyn Outbox>,
    /// Whether the status thread is running.
    has_status_thread: bool,
    /// The file of `--metrics-file`, until the end of the publisher.
    _metrics: Option<MetricsFile>,
}

enum State {
    /// Connected. Messages are sent.
    Connected(Session),
    /// Connected, but messages are held `until` receivers have had time to return, or a queue has had time to get room.
    /// Then the messages to be sent again are sent first.
    Holding { session: Session, until: Instant },
    /// Attempts to connect are running. After one succeeds, messages are held `hold_until` then; with `None`, until
    /// receivers have had time to return.
    Reconnecting { attempts: Attempts<Publishing>, hold_until: Option<Instant>, health: Health },
    /// The connection is closed, or the publisher has failed.
    Ended,
}

impl Publisher {
    /// Connects, unless the outbox needs no broker yet.
    ///
    /// # Errors
    ///
    /// When no broker can be reached within `--retry`, or no login succeeds. Without `--lines` and `--retry`, there is
    /// one attempt.
    pub fn connect(
        cli: &Cli,
        config: Arc<SessionConfig>,
        outbox: Box<dyn Outbox>,
    ) -> Result<Publisher, Error> {
        let counts = Arc::clone(outbox.window().counts());
        let describe = move |metrics: &mut Metrics| counts.describe(metrics);
        let metrics = cli.verbosity.start_metrics("emit-log", describe)?;
        let mut publisher = Publisher {
            timings: config.timings,
            config,
            retry_for: cli.connection.retry.unwrap_or(DEFAULT_RETRY),
            retries_login: cli.has_records() || cli.connection.retry.is_some(),
            properties: cli.properties()?,
            is_tagged: cli.tag.is_some(),
            state: State::Ended,
            outbox,
            has_status_thread: false,
            _metrics: metrics,
        };
        let interval = cli.verbosity.status_interval;
        if cli.has_records() || interval.is_some() {
            publisher.start_status(interval);
        }
        if publisher.outbox.needs_broker() {
            publisher.connect_first(cli)?;
            return Ok(publisher);
        }
        publisher.retry_for = RetryFor::Ever;
        // Messages of an earlier run may be left from an outage, after which receivers need time to return.
        let hold_until = publisher.outbox.is_empty().then(Instant::now);
        let exchange = publisher.config.exchange.declaration();
        publisher.reconnect_now(exchange, hold_until, Health::default());
        Ok(publisher)
    }

    /// Waits for a first broker.
    fn connect_first(&mut self, cli: &Cli) -> Result<(), Error> {
        let retry_for = self.retries_login.then_some(self.retry_for);
        let now = Instant::now();
        self.counts().broker.set_lost(now, retry_for.unwrap_or(RetryFor::NO_TIME).end(now));
        // A single message is sent together with the login.
        let start = if cli.has_records() { Start::LoggedIn } else { Start::AtOnce };
        let mut failures = 0;
        let publishing = retry(retry_for, || {
            let opened = self.config.open(self.config.exchange.declaration(), start);
            opened.inspect_err(|_| {
                failures += 1;
                self.start_status(None);
            })
        })?;
        self.outbox.window_mut().set_round_trip(publishing.round_trip());
        let session = Session::new(publishing, Health::default());
        self.enter(match failures {
            0 => State::Connected(session),
            // Receivers may have been disconnected too, and need time to return.
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

    /// Whether messages can be sent, at least after an alarm.
    fn is_ready(&self) -> bool {
        self.broker_state() >= BrokerState::Blocked
    }

    /// Whether the broker accepts messages.
    fn broker_state(&self) -> BrokerState {
        match &self.state {
            State::Connected(session) if session.blocked.is_some() => BrokerState::Blocked,
            State::Connected(_) => BrokerState::Ready,
            State::Holding { .. } => BrokerState::Holding,
            State::Reconnecting { .. } | State::Ended => BrokerState::Disconnected,
        }
    }

    /// Publishes messages. Those that fit into the window are sent together, and [`wait`](Publisher::wait) sends the
    /// others. The outbox keeps all of them until they are confirmed, even after an error.
    ///
    /// # Errors
    ///
    /// When the broker rejects a message, or is lost and does not return in time. With `--no-confirm`, when the broker
    /// is lost.
    pub fn publish(&mut self, messages: impl IntoIterator<Item = Message>) -> Result<(), Error> {
        self.keep(messages)?;
        self.advance()
    }

    /// Puts messages into the outbox without sending any.
    ///
    /// # Errors
    ///
    /// When the outbox cannot store them.
    pub fn keep(&mut self, messages: impl IntoIterator<Item = Message>) -> Result<(), Error> {
        let mut messages = messages.into_iter();
        messages.try_for_each(|message| self.outbox.put(message))
    }

    /// Sends messages of the outbox until the window is full.
    fn send_next(&mut self) -> Result<(), Error> {
        // While a question is unanswered, its time continues.
        let is_asked = self.session().is_some_and(|session| session.is_asked);
        if !is_asked && self.outbox.window().is_empty() {
            self.record_answer();
        }
        while let State::Connected(session) = &self.state
            && !session.publishing.is_congested()
            && let Some(message) = self.outbox.next(self.broker_state())?
        {
            self.send(&message);
        }
        if let Some(session) = self.session_mut() {
            session.publishing.flush();
        }
        Ok(())
    }

    /// Encodes a message of the window, to be sent with the next flush.
    fn send(&mut self, message: &Message) {
        let State::Connected(session) = &mut self.state else {
            return;
        };
        let mut properties = self
            .properties
            .clone()
            .with_timestamp(message.timestamp / 1000)
            .with_message_id(message.id().into());
        // A table of headers for the timestamp alone would cost a tenth of the rate.
        if self.is_tagged || message.file.is_some() {
            let mut headers = self.properties.headers().clone().unwrap_or_default();
            let millis = Value::LongLongInt(message.timestamp as i64);
            headers.entry(TIMESTAMP_IN_MS.into()).or_insert(millis);
            if let Some(file) = &message.file {
                headers.entry(FILE.into()).or_insert(Value::LongString(file.to_string()));
            }
            properties = properties.with_headers(headers);
        }
        if let Some(message_type) = message.packing.message_type() {
            properties = properties.with_type_(message_type.into());
        }
        session.publishing.publish(&message.key, &message.body, &properties);
        self.complete_unconfirmed();
    }

    /// Waits until all messages are confirmed, and closes the connection. If `published` is an error, this does not
    /// wait, and unconfirmed messages stay in the outbox. If the outbox outlives this process, a `stop` ends the wait in the same way.
    ///
    /// # Errors
    ///
    /// That of `published`, or as for [`publish`](Publisher::publish). The text has the counts of records.
    pub fn finish(
        &mut self,
        published: Result<(), Error>,
        stop: Option<&Mailbox<i32>>,
    ) -> Result<(), Error> {
        let drained = published.and_then(|()| self.drain(stop));
        // The confirms that have arrived save a later run from sending these messages again.
        if drained.is_ok() || self.outbox.ending().is_some() {
            self.close();
        }
        self.enter(State::Ended);
        let closed = self.outbox.close();
        let window = self.outbox.window();
        drained.and(closed).map_err(|error| {
            match self.config.is_single && !window.may_have_arrived {
                // A single message that cannot have reached a broker needs no counts.
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
                return if end.is_some() { Ok(()) } else { Err(self.timeout_error()) };
            }
            let status_time = (!self.has_status_thread).then_some(begun + STATUS_DELAY);
            self.wait(None, stop, deadline.into_iter().chain(sync_time).chain(status_time).min())?;
            if status_time.is_some_and(|status_time| status_time <= Instant::now()) {
                self.start_status(None);
            }
        }
        counts.flush();
        Ok(())
    }

    /// Whether all messages are confirmed. Without confirms: whether the broker has read them.
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

    /// Whether messages are held so that receivers can return. This time does not count against the broker.
    fn is_pausing(&self) -> bool {
        matches!(&self.state, State::Holding { session, .. } if session.health.nacking.is_none())
    }

    /// Closes the connection.
    fn close(&mut self) {
        if let Some(mut session) = self.take_session() {
            // There may be returned messages. A lost connection has no consequence at this point.
            while let Ok(Some(event)) = session.publishing.try_event() {
                self.act_on(event);
            }
            session.publishing.close();
        }
    }

    /// Waits for an event of the broker, the end of an attempt to connect, or the time of the next step, and handles
    /// it. Returns at `until`, when `stop` is ready, or when `input` is ready and the outbox accepts input; reads from
    /// neither. Returns whether `input` is ready. Without `until`, confirms may be handled up to `CONFIRM_DELAY` later.
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
        let input = input.filter(|_| self.outbox.accepts_input(self.broker_state()));
        if input.is_none() && self.is_ready() {
            // Each confirm would wake this process, so the pause collects several.
            thread::sleep(self.outbox.window().pause());
        }
        let may_delay = input.is_some() && until.is_none() && !self.outbox.window().is_empty();
        let watched: Vec<_> = input.into_iter().chain(stop.map(AsFd::as_fd)).collect();
        let until = self.next_time().into_iter().chain(until).min();
        if may_delay && let State::Connected(session) = &self.state {
            // Each confirm would wake this process, so several are read at once.
            let rest = session.last_answer + CONFIRM_DELAY;
            let rest = until.map_or(rest, |until| until.min(rest));
            if session.publishing.wait_for_others(&watched, rest).by(0) {
                return Ok(true);
            }
        }
        let is_first_ready = match self.session_mut() {
            Some(session) => session.wait(&watched, until).by(0),
            None => wait_for(&watched, until).by(0),
        };
        self.advance()?;
        self.check_deadline()?;
        Ok(input.is_some() && is_first_ready)
    }

    /// The time of the next step if no event arrives before.
    fn next_time(&self) -> Option<Instant> {
        let time = match &self.state {
            State::Connected(_) => self.next_check(),
            State::Holding { until, .. } => Some(*until),
            State::Reconnecting { attempts, .. } => attempts.next(),
            State::Ended => None,
        };
        time.into_iter().chain(self.outbox.next_time(self.broker_state())).min()
    }

    /// Handles all events that have arrived, changes the state when it is time, and sends messages.
    fn advance(&mut self) -> Result<(), Error> {
        match &self.state {
            State::Connected(_) => {
                self.handle_events()?;
                self.hold_nacked()?;
            }
            State::Holding { until, .. } => {
                let is_over = *until <= Instant::now();
                self.handle_events()?;
                if is_over && let Some(session) = self.take_session() {
                    self.resume(session);
                }
            }
            State::Reconnecting { .. } => self.poll_attempts()?,
            State::Ended => {}
        }
        self.send_next()?;
        self.outbox.work(self.broker_state())
    }

    /// Handles all events that have arrived.
    fn handle_events(&mut self) -> Result<(), Error> {
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
                self.outbox.window_mut().nack(tag, multiple);
                self.record_answer();
            }
            Event::Returned(returned) => {
                log::debug!("{}: {}", self.config.publishing(), returned.reply_text);
                if self.config.confirms {
                    self.outbox.window_mut().record_return(id_of(&returned));
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

    /// Without confirms, counts sent messages as done, except during an alarm of the broker.
    fn complete_unconfirmed(&mut self) {
        if !self.config.confirms && self.session().is_some_and(|session| session.blocked.is_none())
        {
            self.outbox.window_mut().confirm_all();
        }
    }

    /// Starts the status thread, which prints a status line at each signal and at each `interval`.
    fn start_status(&mut self, interval: Option<Duration>) {
        if !mem::replace(&mut self.has_status_thread, true) {
            let counts = self.counts();
            status::answer("emit-log", interval, move || counts.status());
        }
    }

    /// Changes the state.
    fn enter(&mut self, state: State) {
        self.state = state;
        self.show_state();
    }

    /// Updates the status line.
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
            State::Ended => broker.set_lost(Instant::now(), Some(Instant::now())),
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

    /// Takes the session, if there is one, and leaves the state `Ended`.
    fn take_session(&mut self) -> Option<Session> {
        match mem::replace(&mut self.state, State::Ended) {
            State::Connected(session) | State::Holding { session, .. } => Some(session),
            other => {
                self.state = other;
                None
            }
        }
    }

    fn record_answer(&mut self) {
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

/// The id of a returned message.
fn id_of(returned: &Return) -> Option<MessageId> {
    MessageId::parse(returned.properties.message_id().as_deref()?)
}

#[cfg(test)]
mod tests;
