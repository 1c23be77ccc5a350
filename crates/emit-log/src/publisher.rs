//! Publishing: no message is forgotten before the broker has confirmed it.
//!
//! A [`Publisher`] is a machine with the four states of [`State`]. [`Publisher::wait`] alone waits, and
//! [`Publisher::advance`] goes from a state to the next. Here are the states and the way of a message;
//! [`recovery`] has the way back from each failure, [`spooling`] the way through the disk.

mod recovery;
mod spooling;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use amqp::retry::{Attempts, RetryFor, Timings, retry};
use amqp::{Event, Lost, Mailbox, Properties, Publishing, Return, Start, wait_for};
use anyhow::Error;
use logs_common::wire::{Layout, MessageId};
use logs_process::status;

use crate::cli::Cli;
use crate::counts::Counts;
use crate::message::Message;
use crate::session::{Session, SessionConfig};
use crate::window::Window;

use recovery::Refusal;
use spooling::Spooling;

/// The time to get back to a lost broker, and to wait for a broker that confirms nothing, unless
/// `--retry` sets another. With `--lines` also the time to reach the first broker.
const DEFAULT_RETRY: RetryFor = RetryFor::AtMost(Duration::from_secs(60));

/// A single message that is confirmed within this time ends without a thread that answers those who ask for the
/// status: the thread would be a tenth of all system calls.
const SOON: Duration = Duration::from_millis(100);

/// The pauses in which confirmations gather while the window is crowded.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(32);

/// Publishes messages in order, connects again when the connection is lost, and sends unconfirmed
/// messages once more.
pub struct Publisher {
    config: Arc<SessionConfig>,
    retry_for: RetryFor,
    /// Whether a broker that does not let us in is tried again.
    retries_login: bool,
    /// Whether a message was confirmed, or an earlier session has logged in: later refusals may pass.
    has_worked: bool,
    timings: Timings,
    properties: Properties,
    /// The run of the messages' [`MessageId`], if messages have one.
    run: Option<u64>,
    /// Whether there is one message: its errors do not name its number.
    is_single: bool,
    /// Whether the broker may have a message that it has not confirmed.
    may_have_arrived: bool,
    state: State,
    window: Window,
    /// The start of an outage that has not ended with a confirmation yet.
    failing_since: Option<Instant>,
    /// From the first message that a queue refuses until all refused messages are confirmed.
    refusal: Option<Refusal>,
    /// The largest body that the broker takes, once the broker has refused a larger one.
    max_body: usize,
    /// The error with which the publisher ends as soon as all messages in the window are confirmed.
    rejected: Option<Error>,
    /// With `--spool`.
    spooling: Option<Spooling>,
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
    Reconnecting { attempts: Attempts<Publishing>, hold_until: Option<Instant> },
    /// The connection is closed, or the publisher has failed.
    Ended,
}

impl Publisher {
    /// Connects.
    ///
    /// # Errors
    ///
    /// When no broker can be reached within `--retry` (by default 60 s with `--lines`, and at the first
    /// attempt without), or none lets us in.
    pub fn connect(cli: &Cli) -> Result<Publisher, Error> {
        Publisher::connect_with(cli, Timings::default())
    }

    fn connect_with(cli: &Cli, timings: Timings) -> Result<Publisher, Error> {
        let config = Arc::new(SessionConfig::new(cli)?);
        let properties = cli.properties()?;
        let counts = Arc::new(match &cli.spool {
            Some(dir) => Counts::with_spool(dir),
            None => Counts::new(config.confirms),
        });
        let mut publisher = Publisher::new(Arc::clone(&config), properties, timings, counts);
        publisher.is_single = !cli.lines;
        let interval = cli.verbosity.status_interval;
        if cli.lines || interval.is_some() {
            publisher.answer_status(interval);
        }
        if cli.spool.is_some() {
            publisher.open_spool(cli)?;
            return Ok(publisher);
        }
        let retry_for = cli.connection.retry.or(cli.lines.then_some(DEFAULT_RETRY));
        let now = Instant::now();
        let until = retry_for.unwrap_or(RetryFor::NO_TIME).end(now);
        publisher.counts().broker.set_lost(now, until);
        // A single message goes out with the login.
        let start = if cli.lines { Start::LetIn } else { Start::AtOnce };
        let mut failures = 0;
        let publishing = retry(retry_for, || {
            let opened = config.open(config.exchange.durability(), start);
            opened.inspect_err(|_| {
                failures += 1;
                publisher.answer_status(None);
            })
        })?;
        let round_trip = publishing.round_trip();
        let session = Session::new(publishing);
        let state = match failures {
            0 => State::Connected(session),
            // Receivers may have been without this broker for long.
            _ => State::Holding { session, until: Instant::now() + timings.time_to_return(None) },
        };
        publisher.retry_for = cli.connection.retry.unwrap_or(DEFAULT_RETRY);
        publisher.retries_login = retry_for.is_some();
        publisher.window.set_round_trip(round_trip);
        publisher.enter(state);
        Ok(publisher)
    }

    /// With a spool nothing waits for the first connection.
    fn open_spool(&mut self, cli: &Cli) -> Result<(), Error> {
        self.spooling = Spooling::open(cli, self.window.counts())?;
        self.retry_for = RetryFor::Ever;
        // What an earlier run has left may be due to an outage, from which receivers have yet to come back.
        let has_backlog = self.spooling.as_ref().is_some_and(Spooling::has_backlog);
        let hold_until = (!has_backlog).then(Instant::now);
        self.reconnect_now(self.config.exchange.durability(), hold_until);
        Ok(())
    }

    fn new(
        config: Arc<SessionConfig>,
        properties: Properties,
        timings: Timings,
        counts: Arc<Counts>,
    ) -> Publisher {
        Publisher {
            retry_for: DEFAULT_RETRY,
            retries_login: true,
            has_worked: false,
            timings,
            properties,
            run: None,
            is_single: false,
            may_have_arrived: false,
            state: State::Ended,
            window: Window::new(counts),
            config,
            failing_since: None,
            refusal: None,
            max_body: usize::MAX,
            rejected: None,
            spooling: None,
            answers: false,
        }
    }

    /// Gives each message a [`MessageId`] from now on.
    pub fn number_messages(&mut self) {
        // With keys from the operating system: no two runs on any machine may have the same number.
        let run = RandomState::new().build_hasher().finish();
        self.run = Some(run);
        if let Some(spooling) = &mut self.spooling {
            spooling.set_run(run);
        }
    }

    /// The counts of records so far.
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(self.window.counts())
    }

    /// Whether a message would go out at once, if the window has room for the message.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Connected(_)) && self.rejected.is_none()
    }

    /// Publishes a message as soon as there is a broker and room in the window, and keeps the message
    /// until the broker has confirmed it.
    ///
    /// # Errors
    ///
    /// When the broker refuses a message, or is lost and does not come back in time; with
    /// `--no-confirm`, when the broker is lost. The text says how many records are in doubt.
    pub fn publish(&mut self, message: Message) -> Result<(), Error> {
        self.publish_all([message])
    }

    /// The same for several messages, which go out together.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn publish_all(
        &mut self,
        messages: impl IntoIterator<Item = Message>,
    ) -> Result<(), Error> {
        messages.into_iter().try_for_each(|message| self.publish_next(message))?;
        self.flush();
        Ok(())
    }

    fn publish_next(&mut self, message: Message) -> Result<(), Error> {
        if self.spooling.is_some() {
            return self.publish_or_spool(message);
        }
        if message.body.len() <= self.max_body {
            return self.publish_whole(message);
        }
        let pieces = message.split(self.max_body);
        pieces.into_iter().try_for_each(|piece| self.publish_whole(piece))
    }

    fn publish_whole(&mut self, message: Message) -> Result<(), Error> {
        self.advance()?;
        while !self.is_ready() || !self.has_room_for(&message) {
            self.wait_for_room(&message)?;
        }
        if self.window.is_empty() {
            self.note_answer();
        }
        self.window.push(message.clone());
        self.send(&message);
        Ok(())
    }

    /// Whether a message may be sent before any is confirmed.
    fn has_room_for(&self, message: &Message) -> bool {
        self.window.has_room_for(message) && !self.is_congested()
    }

    fn is_congested(&self) -> bool {
        self.session().is_some_and(|session| session.publishing.is_congested())
    }

    /// Waits until there is room for a message, and for many where messages are small: if a message went
    /// out at each confirmation, each would wake every process on its way.
    fn wait_for_room(&mut self, message: &Message) -> Result<(), Error> {
        let mut pause = FIRST_PAUSE;
        loop {
            self.wait(None, None, None)?;
            if self.is_ready() && self.window.is_crowded() {
                thread::sleep(pause);
                pause = (2 * pause).min(LONGEST_PAUSE);
            } else if !self.is_ready() || self.has_room_for(message) {
                return Ok(());
            }
        }
    }

    /// Sends a message that is in the window already, with the next [`flush`](Publisher::flush).
    fn send(&mut self, message: &Message) {
        let State::Connected(session) = &mut self.state else {
            return;
        };
        let mut properties = self.properties.clone().with_timestamp(message.timestamp);
        if let Some(run) = self.run {
            let id = MessageId { run, number: message.number };
            properties = properties.with_message_id(id.into());
        }
        if let Some(message_type) = message.packing.message_type() {
            properties = properties.with_type_(message_type.into());
        }
        session.publishing.publish(&message.body, &properties);
        self.complete_unconfirmed();
    }

    fn flush(&mut self) {
        if let Some(session) = self.session_mut() {
            session.publishing.flush();
        }
    }

    /// Waits until all messages are confirmed, and closes the connection.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn finish(&mut self) -> Result<(), Error> {
        self.finish_or_stop(None)
    }

    /// Like [`finish`](Publisher::finish); with a spool, a `stop` leaves there what is unconfirmed.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish); with a spool, also when records were dropped.
    pub fn finish_or_stop(&mut self, stop: Option<&Mailbox<i32>>) -> Result<(), Error> {
        if self.has_spool() {
            return self.finish_spooled(stop);
        }
        let begun = Instant::now();
        let soon = begun + SOON;
        while !self.window.is_empty() || self.rejected.is_some() {
            self.wait(None, None, (!self.answers).then_some(soon))?;
            if soon <= Instant::now() {
                self.answer_status(None);
            }
            if self.is_ready() && self.window.has_many() {
                // Confirmations gather: each would wake this process.
                thread::sleep((begun.elapsed() / 20).min(LONGEST_PAUSE));
            }
        }
        if !self.config.confirms {
            self.wait_until_taken(soon)?;
        }
        self.close();
        Ok(())
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

    /// Without confirmations: waits until the broker has taken all that was sent. After `soon` the status is answered.
    fn wait_until_taken(&mut self, soon: Instant) -> Result<(), Error> {
        let deadline = Instant::now().checked_add(self.max_wait());
        let Some(session) = self.session_mut() else {
            return Ok(());
        };
        session.publishing.ask();
        loop {
            let soon = (!self.answers).then_some(soon);
            let until = deadline.into_iter().chain(soon).min();
            let Some(session) = self.session_mut() else {
                return Ok(());
            };
            session.publishing.wait_for_answer(until);
            if session.publishing.has_answered() {
                self.window.flush();
                return Ok(());
            }
            self.advance()?;
            let now = Instant::now();
            if deadline.is_some_and(|deadline| deadline <= now) {
                let wait = self.max_wait();
                return Err(self.out_of_time(&format!("has not taken all within {wait:?}")));
            }
            if soon.is_some_and(|soon| soon <= now) {
                self.answer_status(None);
            }
        }
    }

    /// Waits for an event of the broker, the end of an attempt to connect, or the time of the next step,
    /// and acts on that; at most `until` then. Also returns when `stop` or, while messages can go out, `input` is
    /// ready, and takes nothing from them; returns whether the input is.
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
        let input = input.filter(|_| self.takes_input());
        let watched: Vec<_> = input.into_iter().chain(stop.map(AsFd::as_fd)).collect();
        let until = self.next_time().into_iter().chain(until).min();
        let woken = match &mut self.state {
            State::Connected(session) | State::Holding { session, .. } => {
                session.publishing.wait(&watched, until)
            }
            State::Reconnecting { .. } | State::Ended => wait_for(&watched, until),
        };
        self.advance()?;
        self.check_deadline()?;
        Ok(input.is_some() && woken.by(0))
    }

    /// The time of the next step, if no event comes before.
    fn next_time(&self) -> Option<Instant> {
        let time = match &self.state {
            State::Connected(_) => self.deadline(),
            State::Holding { until, .. } => Some(*until),
            State::Reconnecting { attempts, .. } => attempts.next(),
            State::Ended => None,
        };
        time.into_iter().chain(self.next_spool_time()).min()
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
                    self.resume(session)?;
                }
            }
            State::Reconnecting { .. } => self.poll_attempts()?,
            State::Ended => {}
        }
        self.work_spool()?;
        if self.window.is_empty()
            && let Some(error) = self.rejected.take()
        {
            return Err(self.with_counts(error));
        }
        Ok(())
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
                self.window.confirm(tag, multiple);
                self.end_failures();
                self.note_answer();
            }
            Event::Refused { tag, multiple } => {
                self.window.refuse(tag, multiple);
                // Other queues have taken the message.
                self.may_have_arrived = true;
                self.note_answer();
            }
            Event::Returned(returned) => {
                log::debug!("{}: {}", self.config.publishing(), returned.reply_text);
                if self.config.confirms {
                    self.window.mark_returned(number_of(&returned));
                } else {
                    let layout = Layout::of(&returned.properties, &returned.content);
                    self.window.count_returned(layout.records);
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
            self.window.confirm_all();
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
        let broker = &self.window.counts().broker;
        match &self.state {
            State::Connected(session) | State::Holding { session, .. } => {
                let remark = match (&session.blocked, &self.state) {
                    (Some(reason), _) => format!("blocked: {reason}"),
                    (None, State::Holding { .. }) => "holding messages back".into(),
                    _ => String::new(),
                };
                broker.set_open(session.publishing.peer(), remark);
            }
            State::Reconnecting { attempts, .. } => {
                broker.set_lost(self.failing_since.unwrap_or_else(Instant::now), attempts.end());
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

    /// Adds the counts to an `error`. A single message that no broker can have needs none; with a spool, the
    /// counts are added when all is there.
    fn with_counts(&self, error: impl Into<Error>) -> Error {
        let (error, counts) = (error.into(), self.window.counts());
        let is_not_sent = self.is_single && !self.may_have_arrived;
        match counts.sent() + counts.not_sent() > 0 && !is_not_sent && !self.has_spool() {
            true => error.context(counts.to_string()),
            false => error,
        }
    }
}

/// The number that [`Publisher::number_messages`] gave a message.
fn number_of(returned: &Return) -> Option<u64> {
    Some(MessageId::parse(returned.properties.message_id().as_deref()?)?.number)
}

#[cfg(test)]
mod tests;
