//! Publishing: nothing is forgotten before the broker has confirmed it.
//!
//! A publisher is connected, or it is reconnecting, or it is connected again and holding back what it
//! has until receivers are back too. [`Publisher::wait`] is the one place that waits, and
//! [`Publisher::advance`] the one that goes from one state to the next.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::mem;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use amqp::{Durability, ErrorKind, Event, Lost, Properties, Publishing, Return};
use anyhow::Error;
use crossbeam_channel::{Receiver, Select, never};
use logs_common::exit::{Status, status_of};
use logs_common::retry::{Attempts, Backoff, RetryFor, Timings, retry};
use logs_common::wire::MessageId;
use logs_common::wire::Packing;

use crate::cli::Cli;
use crate::session::SessionConfig;
use crate::tally::{Away, Tally};
use crate::window::{Message, Settled, Window};

/// How long to try to get back to a lost broker, and to wait for one that confirms nothing,
/// unless `--retry` says otherwise. With `--lines` also how long to look for the first one.
const DEFAULT_RETRY: RetryFor = RetryFor::AtMost(Duration::from_secs(60));

/// The least time that a broker has for a confirmation, and, where that has passed, the time in
/// which it may turn out that only this process was stopped.
const SHORTEST_WAIT: Duration = Duration::from_secs(5);
const LAST_CHANCE: Duration = Duration::from_millis(500);

/// How long to let confirmations gather while there is room for few messages, at first and later.
const SHORTEST_REST: Duration = Duration::from_millis(1);
const LONGEST_REST: Duration = Duration::from_millis(32);

/// Publishes messages in order, connects again when the connection is lost, and sends what is
/// unconfirmed once more.
pub struct Publisher {
    config: Arc<SessionConfig>,
    retry_for: RetryFor,
    timings: Timings,
    properties: Properties,
    /// The run of their [`MessageId`], if messages have one.
    run: Option<u64>,
    state: State,
    window: Window,
    tally: Arc<Tally>,
    /// When the broker last confirmed or refused something, or had nothing to confirm.
    last_answer: Instant,
    /// Since when there has been no broker, or none that has confirmed anything.
    failing_since: Option<Instant>,
    /// From the first message that a queue refuses until none is refused any more.
    refusal: Option<Refusal>,
    /// Why the broker takes no messages for now, in its words.
    blocked: Option<String>,
    /// The largest body that the broker takes, once it has refused a larger one.
    max_body: usize,
    /// The error with which the publisher ends as soon as all before it is confirmed.
    rejected: Option<Error>,
}

enum State {
    /// Messages go out.
    Connected(Publishing),
    /// There is a connection again; nothing goes out until this time.
    Holding(Publishing, Instant),
    /// There is none, and attempts to get one are under way.
    Reconnecting(Attempts<Publishing>),
    /// All is done, or has failed.
    Ended,
}

/// A queue refuses messages, which are sent again after pauses in which it may get room.
struct Refusal {
    backoff: Backoff,
    /// When to send them again, while they wait for that.
    resend_at: Option<Instant>,
    /// The delivery tag of the last message that was sent again.
    last_tag: u64,
}

impl Publisher {
    /// Connects.
    ///
    /// # Errors
    ///
    /// When no broker can be reached within `--retry` (60 s by default with `--lines`, which holds up
    /// the program before it, and not at all without), or none lets us in.
    pub fn connect(cli: &Cli) -> Result<Publisher, Error> {
        Publisher::connect_with(cli, Timings::default())
    }

    fn connect_with(cli: &Cli, timings: Timings) -> Result<Publisher, Error> {
        let config = Arc::new(SessionConfig::new(cli)?);
        let properties = cli.properties()?;
        let retry_for = cli.connection.retry.or(cli.lines.then_some(DEFAULT_RETRY));
        let mut failures = 0;
        let session = retry(retry_for, || {
            let opened = config.open(config.exchange.durability());
            opened.inspect_err(|_| failures += 1)
        })?;
        let state = match failures {
            0 => State::Connected(session),
            // Receivers may have been without this broker for long.
            _ => State::Holding(session, Instant::now() + timings.time_to_return(None)),
        };
        Ok(Publisher {
            retry_for: cli.connection.retry.unwrap_or(DEFAULT_RETRY),
            timings,
            properties,
            run: None,
            state,
            window: Window::new(),
            tally: Arc::new(Tally::new(config.confirms)),
            config,
            last_answer: Instant::now(),
            failing_since: None,
            refusal: None,
            blocked: None,
            max_body: usize::MAX,
            rejected: None,
        })
    }

    /// Gives each message a [`MessageId`] from now on.
    pub fn number_messages(&mut self) {
        // With keys from the operating system: no two runs may have the same number, wherever they are.
        self.run = Some(RandomState::new().build_hasher().finish());
    }

    /// What became of the records so far.
    pub fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// Whether a message would go out at once, if the window has room for it.
    pub fn is_ready(&self) -> bool {
        let is_resending = self.refusal.as_ref().is_some_and(|r| r.resend_at.is_some());
        matches!(self.state, State::Connected(_)) && !is_resending && self.rejected.is_none()
    }

    /// Publishes a message as soon as there is a broker and the window has room for it, and keeps it
    /// until it is confirmed.
    ///
    /// # Errors
    ///
    /// When the broker refuses a message, or is lost and does not come back in time; with
    /// `--no-confirm`, when it is lost. The text says what is in doubt.
    pub fn publish(&mut self, message: Message) -> Result<(), Error> {
        if message.body.len() <= self.max_body {
            return self.publish_whole(message);
        }
        let pieces = message.split(self.max_body);
        pieces.into_iter().try_for_each(|piece| self.publish_whole(piece))
    }

    fn publish_whole(&mut self, message: Message) -> Result<(), Error> {
        self.advance()?;
        while !self.is_ready() || !self.window.has_room_for(&message) {
            self.wait_for_room(&message)?;
        }
        if self.window.is_empty() {
            self.last_answer = Instant::now();
        }
        self.window.push(message.clone());
        self.count_in_doubt();
        self.send_all(&[message])
    }

    /// Waits until there is room for a message, and for many where they are small: if each went
    /// out as soon as another one is confirmed, each would wake up everyone on its way.
    fn wait_for_room(&mut self, message: &Message) -> Result<(), Error> {
        let mut rest = SHORTEST_REST;
        loop {
            self.wait(&never::<()>(), &never())?;
            if self.is_ready() && self.window.is_crowded() {
                thread::sleep(rest);
                rest = (2 * rest).min(LONGEST_REST);
            } else if !self.is_ready() || self.window.has_room_for(message) {
                return Ok(());
            }
        }
    }

    /// Waits until all is confirmed, and closes the connection.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn finish(&mut self) -> Result<(), Error> {
        while !self.window.is_empty() || self.rejected.is_some() {
            self.wait(&never::<()>(), &never())?;
        }
        if !self.config.confirms {
            self.flush()?;
        }
        if let Some(mut session) = self.take_session() {
            // All is sent: that the connection is lost does not matter any more.
            while let Ok(Some(event)) = session.try_event() {
                self.act_on(event);
            }
            session.close();
        }
        Ok(())
    }

    /// Waits until the broker has taken all that was sent without confirmations.
    fn flush(&mut self) -> Result<(), Error> {
        let max_wait = self.max_wait();
        if let State::Connected(session) | State::Holding(session, _) = &mut self.state {
            let flushed = session.flush(max_wait);
            flushed.map_err(|error| self.with_counts(error.into()))?;
            self.tally.set_in_doubt(0);
        }
        Ok(())
    }

    /// Waits for something to act on, and acts on it: a word from the broker, the end of an attempt to
    /// connect, a time that has come. Returns as well when something comes from `stop` or, while there
    /// is a broker, from `input`, and leaves it there.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn wait<T>(&mut self, input: &Receiver<T>, stop: &Receiver<i32>) -> Result<(), Error> {
        let mut select = Select::new();
        match &self.state {
            State::Connected(session) | State::Holding(session, _) => {
                session.select(&mut select);
            }
            State::Reconnecting(attempts) => {
                select.recv(attempts.outcomes());
            }
            State::Ended => {}
        }
        if self.is_ready() {
            select.recv(input);
        }
        select.recv(stop);
        // Which of them it was shows when they are looked at.
        match self.next_time() {
            Some(time) => drop(select.ready_deadline(time)),
            None => drop(select.ready()),
        }
        self.advance()?;
        self.check_deadline()
    }

    /// When there is something to do, whatever comes until then.
    fn next_time(&self) -> Option<Instant> {
        match &self.state {
            State::Connected(_) => {
                let resend_at = self.refusal.as_ref().and_then(|refusal| refusal.resend_at);
                [resend_at, self.deadline()].into_iter().flatten().min()
            }
            State::Holding(_, until) => Some(*until),
            State::Reconnecting(attempts) => attempts.next(),
            State::Ended => None,
        }
    }

    /// Does what there is to do in this state.
    fn advance(&mut self) -> Result<(), Error> {
        match &mut self.state {
            State::Connected(_) => {
                self.listen()?;
                self.resend_refused()?;
            }
            State::Holding(_, until) => {
                let is_over = *until <= Instant::now();
                self.listen()?;
                if is_over && let Some(session) = self.take_session() {
                    self.resume(session)?;
                }
            }
            State::Reconnecting(attempts) => {
                let outcome = attempts.poll();
                if attempts.has_failed() {
                    self.failing_since.get_or_insert_with(Instant::now);
                }
                if let Some(session) = outcome.map_err(|error| self.with_counts(error.into()))? {
                    self.connected(session)?;
                }
            }
            State::Ended => {}
        }
        if self.window.is_empty()
            && let Some(error) = self.rejected.take()
        {
            return Err(self.with_counts(error));
        }
        Ok(())
    }

    /// Acts on all that the broker has said.
    fn listen(&mut self) -> Result<(), Error> {
        while let State::Connected(session) | State::Holding(session, _) = &mut self.state {
            match session.try_event() {
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
                let settled = self.window.settle(tag, multiple);
                self.settle(settled);
            }
            Event::Refused { tag, multiple } => {
                self.window.refuse(tag, multiple);
                self.last_answer = Instant::now();
            }
            Event::Returned(returned) => {
                log::debug!("{}: {}", self.config.publishing(), returned.reply_text);
                if self.config.confirms {
                    self.window.mark_unheard(number_of(&returned));
                } else {
                    let packing = Packing::of(returned.properties.type_().as_deref());
                    self.tally.add_unheard(packing.count(&returned.content));
                }
            }
            Event::Blocked(reason) => {
                log::warn!("blocked by the broker: {reason}");
                self.blocked = Some(reason);
            }
            Event::Unblocked => {
                log::warn!("unblocked by the broker");
                self.blocked = None;
                self.settle_unconfirmed();
            }
        }
    }

    /// Gives up if the broker has confirmed nothing for too long.
    fn check_deadline(&mut self) -> Result<(), Error> {
        if !self.is_overdue() {
            return Ok(());
        }
        let State::Connected(session) = &self.state else {
            return Ok(());
        };
        // After SIGSTOP and SIGCONT the time may be up while the answer waits in the socket.
        let mut select = Select::new();
        session.select(&mut select);
        let _ = select.ready_timeout(LAST_CHANCE);
        let peer = session.peer().to_string();
        self.listen()?;
        if !self.is_overdue() {
            return Ok(());
        }
        let publishing = self.config.publishing();
        let why = self.blocked.as_ref().map(|reason| format!(", blocked by it: {reason}"));
        let (wait, why) = (self.max_wait(), why.unwrap_or_default());
        let reason = format!(
            "{publishing}: {peer} has confirmed nothing for {wait:?}{why} (--retry sets how long \
             to wait)"
        );
        Err(self.with_counts(amqp::Error::unavailable(reason).into()))
    }

    /// When to give up if nothing is confirmed until then.
    fn deadline(&self) -> Option<Instant> {
        if self.window.is_empty() {
            return None;
        }
        self.last_answer.checked_add(self.max_wait())
    }

    /// How long the broker may take for a confirmation.
    fn max_wait(&self) -> Duration {
        match self.retry_for {
            RetryFor::AtMost(duration) => duration.max(SHORTEST_WAIT),
            RetryFor::Ever => Duration::MAX,
        }
    }

    fn is_overdue(&self) -> bool {
        let is_connected = matches!(self.state, State::Connected(_));
        is_connected && self.deadline().is_some_and(|deadline| deadline <= Instant::now())
    }

    fn settle(&mut self, settled: Settled) {
        self.count(settled);
        self.last_answer = Instant::now();
        self.failing_since = None;
        let is_over = |refusal: &Refusal| {
            refusal.resend_at.is_none()
                && self.window.is_past(refusal.last_tag)
                && self.window.first_refused().is_none()
        };
        if self.refusal.as_ref().is_some_and(is_over) {
            self.refusal = None;
        }
    }

    /// Adds to the counts what is at an end.
    fn count(&self, settled: Settled) {
        self.tally.add_done(settled.records);
        self.tally.add_unheard(settled.unheard);
        self.count_in_doubt();
    }

    fn count_in_doubt(&self) {
        if self.config.confirms {
            self.tally.set_in_doubt(self.window.records());
        } else {
            // It stays in doubt until the broker has answered to something after it.
            self.tally.set_in_doubt(self.tally.done() + self.window.records());
        }
    }

    /// Without confirmations, what is sent is done with, unless the broker takes nothing.
    fn settle_unconfirmed(&mut self) {
        if !self.config.confirms && self.blocked.is_none() {
            let settled = self.window.settle_all();
            self.settle(settled);
        }
    }

    /// Publishes what a queue has refused again, after a pause.
    fn resend_refused(&mut self) -> Result<(), Error> {
        let Some(first) = self.window.first_refused().cloned() else {
            return Ok(());
        };
        let mut refusal = match self.refusal.take() {
            Some(refusal) => refusal,
            None => {
                let backoff = self.backoff_since(Instant::now());
                Refusal { backoff, resend_at: None, last_tag: 0 }
            }
        };
        match refusal.resend_at {
            None => {
                let reason = format!("{}: refused by a queue", self.config.publishing());
                let error = self.at_record(&first, ErrorKind::Unavailable, &reason);
                let pause = refusal.backoff.after(error);
                let pause = pause.map_err(|error| self.with_counts(error.into()))?;
                refusal.resend_at = Some(Instant::now() + pause);
                self.refusal = Some(refusal);
                Ok(())
            }
            Some(time) if time > Instant::now() => {
                self.refusal = Some(refusal);
                Ok(())
            }
            Some(_) => {
                let messages = self.window.requeue_refused();
                let last_tag = self.window.last_tag();
                self.refusal = Some(Refusal { resend_at: None, last_tag, ..refusal });
                self.send_all(&messages)
            }
        }
    }

    /// Ends a session in which something failed.
    fn lose_session(&mut self) -> Result<(), Error> {
        match self.take_session() {
            Some(mut session) => {
                let declared = session.declared();
                self.lose(session.end(), declared)
            }
            None => Ok(()),
        }
    }

    fn take_session(&mut self) -> Option<Publishing> {
        match mem::replace(&mut self.state, State::Ended) {
            State::Connected(session) | State::Holding(session, _) => Some(session),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Acts on the loss of the connection, on which the exchange was `declared` so, for this `cause`: what
    /// is unconfirmed will be sent again.
    fn lose(&mut self, cause: amqp::Error, declared: Option<Durability>) -> Result<(), Error> {
        self.window.start_over();
        self.blocked = None;
        if let Some(refusal) = &mut self.refusal {
            (refusal.resend_at, refusal.last_tag) = (None, self.window.last_tag());
        }
        if !self.config.confirms {
            // What the broker has not read is lost, and nobody knows what that is.
            return Err(self.with_counts(cause.into()));
        }
        if cause.kind() == ErrorKind::TooLarge {
            self.leave_out_too_large(cause)?;
            return self.reconnect_now(self.config.exchange.durability());
        }
        if cause.kind() == ErrorKind::OtherDurability
            && let Some(declared) = declared
        {
            // The channel was closed before any message: nothing is lost, and nothing to wait for.
            self.config.exchange.note_other_durability();
            return self.reconnect_now(declared.other());
        }
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        let text = format!("{cause}; trying again");
        let connect = self.connect_again(self.config.exchange.durability());
        let attempts = Attempts::new(cause, self.backoff_since(since), connect);
        let attempts = attempts.map_err(|error| self.with_counts(error.into()))?;
        log::warn!("{text}");
        self.tally.set_away(Some(Away { since, until: attempts.end() }));
        self.state = State::Reconnecting(attempts);
        Ok(())
    }

    fn reconnect_now(&mut self, durability: Durability) -> Result<(), Error> {
        let backoff = self.backoff_since(Instant::now());
        let attempts = Attempts::now(backoff, self.connect_again(durability));
        self.state = State::Reconnecting(attempts);
        Ok(())
    }

    fn backoff_since(&self, start: Instant) -> Backoff {
        Backoff::since(start, self.retry_for).with_timings(self.timings)
    }

    fn connect_again(
        &self,
        durability: Durability,
    ) -> impl Fn() -> Result<Publishing, amqp::Error> + Send + Sync + 'static {
        let config = Arc::clone(&self.config);
        move || config.open(durability)
    }

    /// Goes on with a new session: at once where nothing but the session was lost, and otherwise when
    /// receivers have had time to come back too.
    fn connected(&mut self, session: Publishing) -> Result<(), Error> {
        let Some(since) = self.failing_since else {
            return self.resume(session);
        };
        let pause = self.timings.time_to_return(Some(since.elapsed()));
        let peer = session.peer();
        log::info!("connected to {peer}; receivers have {pause:.1?} to come back too");
        self.state = State::Holding(session, Instant::now() + pause);
        Ok(())
    }

    /// Sends what is unconfirmed again.
    fn resume(&mut self, session: Publishing) -> Result<(), Error> {
        if self.failing_since.is_some() {
            let (peer, records) = (session.peer(), self.window.records());
            log::warn!("connected to {peer} again; {records} messages are sent once more");
        }
        self.tally.set_away(None);
        self.last_answer = Instant::now();
        if self.window.is_empty() {
            // There is nothing whose confirmation would show that all is well.
            self.failing_since = None;
        }
        self.state = State::Connected(session);
        let messages: Vec<_> = self.window.unconfirmed().cloned().collect();
        self.send_all(&messages)
    }

    /// Sends messages that are in the window already.
    fn send_all(&mut self, messages: &[Message]) -> Result<(), Error> {
        let State::Connected(session) = &self.state else {
            return Ok(());
        };
        let sent = messages.iter().try_for_each(|message| self.send(session, message));
        match sent {
            Ok(()) => {
                self.settle_unconfirmed();
                Ok(())
            }
            Err(_) => self.lose_session(),
        }
    }

    /// Takes batches apart that the broker refuses for their size, as the refusal closed the channel.
    /// If a record itself is too large, the publisher ends with that, once all before it is confirmed.
    fn leave_out_too_large(&mut self, cause: amqp::Error) -> Result<(), Error> {
        let limit = max_size_in(&cause.to_string());
        // Without a message to leave out, all would be sent and refused again, without an end.
        let Some(limit) = limit.filter(|limit| self.window.has_larger_than(*limit)) else {
            return Err(self.with_counts(cause.into()));
        };
        self.max_body = limit;
        self.window.split_larger_than(limit);
        if let Some(message) = self.window.cut_at_larger_than(limit) {
            let error = self.at_record(&message, cause.kind(), &cause.to_string());
            self.rejected = Some(error.into());
        }
        self.count_in_doubt();
        Ok(())
    }

    /// Names a record where there are many.
    fn at_record(&self, message: &Message, kind: ErrorKind, text: &str) -> amqp::Error {
        match self.run {
            Some(_) => amqp::Error::new(kind, format!("record {}: {text}", message.number)),
            None => amqp::Error::new(kind, text),
        }
    }

    /// Adds to `error` what became of the records, unless there is nothing to say of the one.
    fn with_counts(&self, error: Error) -> Error {
        let is_told = self.run.is_none() && status_of(&error) != Status::Unavailable;
        match self.tally.sent() + self.tally.not_sent() > 0 && !is_told {
            true => error.context(self.tally.to_string()),
            false => error,
        }
    }

    fn send(&self, session: &Publishing, message: &Message) -> Result<(), Lost> {
        let mut properties = self.properties.clone();
        if let Some(run) = self.run {
            let id = MessageId { run, number: message.number };
            properties = properties.with_message_id(id.into());
        }
        if let Some(message_type) = message.packing.message_type() {
            properties = properties.with_type_(message_type.into());
        }
        session.publish(&message.body, properties, self.max_wait())
    }
}

/// The number that [`Publisher::number_messages`] gave a message.
fn number_of(returned: &Return) -> Option<u64> {
    Some(MessageId::parse(returned.properties.message_id().as_deref()?)?.number)
}

/// The limit in RabbitMQ's words for a message that is too large: `... max size 1000`.
fn max_size_in(text: &str) -> Option<usize> {
    let (_, limit) = text.rsplit_once("max size ")?;
    let digits = limit.find(|c: char| !c.is_ascii_digit()).unwrap_or(limit.len());
    limit[..digits].parse().ok()
}

#[cfg(test)]
mod tests;
