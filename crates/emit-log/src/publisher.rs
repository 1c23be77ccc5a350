//! Publishing: nothing is forgotten before the broker has confirmed it.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, Confirm, ConnectionBlockedNotification, Return};
use anyhow::Error;
use crossbeam_channel::{Receiver, Select, TryRecvError, never};
use logs_common::exit::{Failure, Status, status_of};
use logs_common::message_id::MessageId;
use logs_common::packing::Packing;
use logs_common::retry::{Backoff, Patience, retry};
use logs_common::signals::Stop;
use logs_common::uri::Uri;

use crate::cli::Cli;
use crate::session::Session;
use crate::tally::Tally;
use crate::window::{Message, Settled, Window};

/// How long to try to get back to a lost broker, and to wait for one that confirms nothing,
/// unless `--retry` says otherwise.
const PATIENCE: Patience = Patience::For(Duration::from_secs(60));

/// The least time that a broker has for a confirmation, and, where that has passed, the time in
/// which it may turn out that only this process was stopped.
const SHORTEST_WAIT: Duration = Duration::from_secs(5);
const LAST_CHANCE: Duration = Duration::from_millis(500);

/// How long to let confirmations gather while there is room for few messages, at first and later.
const SHORTEST_REST: Duration = Duration::from_millis(1);
const LONGEST_REST: Duration = Duration::from_millis(32);

/// Publishes messages in order, connects again when the connection is lost, and sends what is
/// unconfirmed once more.
pub struct Publisher<'a> {
    cli: &'a Cli,
    uris: Vec<Uri>,
    properties: AmqpProperties,
    /// The run of their [`MessageId`], if messages have one.
    run: Option<u64>,
    session: Session<'a>,
    window: Window,
    tally: Arc<Tally>,
    /// When the broker last confirmed something, or had nothing to confirm.
    progress: Instant,
    /// Runs from the first failure to the next success.
    backoff: Option<Backoff>,
    /// Runs from the first message that a queue refuses until none is refused any more; the
    /// delivery tag of the last message that was sent again for that reason.
    refusing: Option<(Backoff, u64)>,
    /// Why the broker takes no messages for now, in its words.
    blocked: Option<String>,
}

impl<'a> Publisher<'a> {
    /// Connects.
    ///
    /// # Errors
    ///
    /// When no broker can be reached within `--retry`, or none lets us in.
    pub fn connect(cli: &'a Cli) -> Result<Publisher<'a>, Error> {
        let uris = cli.connection.uris()?;
        let properties = cli.properties()?;
        let session = retry(cli.connection.retry, || Session::open(cli, &uris))?;
        Ok(Publisher {
            cli,
            uris,
            properties,
            run: None,
            session,
            window: Window::new(),
            tally: Arc::new(Tally::new(!cli.no_confirm)),
            progress: Instant::now(),
            backoff: None,
            refusing: None,
            blocked: None,
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

    /// Publishes a message as soon as the window has room for it, and keeps it until it is
    /// confirmed.
    ///
    /// # Errors
    ///
    /// When the broker refuses a message, or is lost and does not come back in time; with
    /// `--no-confirm`, when it is lost. The text says what is in doubt.
    pub fn publish(&mut self, message: Message) -> Result<(), Error> {
        self.listen()?;
        if !self.window.has_room_for(&message) {
            self.wait_for_room(&message)?;
        }
        self.put(message)
    }

    /// Waits until there is room for a message, and for many where they are small: if each went
    /// out as soon as another one is confirmed, each would wake up everyone on its way.
    fn wait_for_room(&mut self, message: &Message) -> Result<(), Error> {
        let mut rest = SHORTEST_REST;
        loop {
            self.wait(&never::<()>(), &never())?;
            if self.window.is_crowded() {
                thread::sleep(rest);
                rest = (2 * rest).min(LONGEST_REST);
            } else if self.window.has_room_for(message) {
                return Ok(());
            }
        }
    }

    /// Sends a message off.
    fn put(&mut self, message: Message) -> Result<(), Error> {
        if self.window.is_empty() {
            self.progress = Instant::now();
        }
        self.window.push(message.clone());
        self.tally.set_in_doubt(self.window.records());
        match self.send(&self.session, &message) {
            Ok(()) => {
                self.settle_unconfirmed();
                Ok(())
            }
            Err(_) => self.reconnect(),
        }
    }

    /// Waits until all is confirmed, and closes the connection.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn finish(&mut self) -> Result<(), Error> {
        self.wait_for_all()?;
        if self.cli.no_confirm {
            let flushed = self.session.flush(self.longest_wait());
            flushed.map_err(|failure| self.doubt(failure.into()))?;
        }
        self.take_returns();
        if let Err(failure) = self.session.connection.close() {
            log::debug!("{failure}");
        }
        Ok(())
    }

    fn wait_for_all(&mut self) -> Result<(), Error> {
        while !self.window.is_empty() {
            self.wait(&never::<()>(), &never())?;
        }
        Ok(())
    }

    /// Waits for a word from the broker, on which it acts, or for something to come from `input`
    /// or `stop`, which it leaves there.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn wait<T>(&mut self, input: &Receiver<T>, stop: &Receiver<Stop>) -> Result<(), Error> {
        let mut select = self.select();
        select.recv(input);
        select.recv(stop);
        // Which of them it was shows when they are looked at.
        match self.deadline() {
            Some(deadline) => drop(select.ready_deadline(deadline)),
            None => drop(select.ready()),
        }
        self.attend()
    }

    fn select(&self) -> Select<'_> {
        let mut select = Select::new();
        select.recv(&self.session.confirms);
        select.recv(&self.session.blocked);
        select
    }

    /// Acts on all that the broker has said, and gives up if that is nothing for too long.
    fn attend(&mut self) -> Result<(), Error> {
        self.listen()?;
        if !self.is_overdue() {
            return Ok(());
        }
        // A process that was stopped for a while finds the time gone and the answer waiting.
        let _ = self.select().ready_timeout(LAST_CHANCE);
        self.listen()?;
        if !self.is_overdue() {
            return Ok(());
        }
        let (publishing, peer) = (self.session.publishing(), self.session.connection.peer());
        let why = self.blocked.as_ref().map(|reason| format!(", blocked by it: {reason}"));
        let (wait, why) = (self.longest_wait(), why.unwrap_or_default());
        let reason = format!(
            "{publishing}: {peer} has confirmed nothing for {wait:?}{why} (--retry sets how long \
             to wait)"
        );
        Err(self.doubt(Failure::unavailable(reason).into()))
    }

    /// Acts on all that the broker has said.
    fn listen(&mut self) -> Result<(), Error> {
        loop {
            // A return comes before the confirmation of the same message.
            let confirm = self.session.confirms.try_recv();
            self.take_returns();
            match confirm {
                Ok(Confirm::Ack(ack)) => {
                    let settled = self.window.settle(ack.delivery_tag, ack.multiple);
                    self.settle(settled);
                }
                Ok(Confirm::Nack(nack)) => {
                    let settled = self.window.refuse(nack.delivery_tag, nack.multiple);
                    self.count(settled);
                }
                Err(TryRecvError::Disconnected) => return self.reconnect(),
                Err(TryRecvError::Empty) => break,
            }
        }
        self.session.connection.backlog().all_taken();
        loop {
            match self.session.blocked.try_recv() {
                Ok(ConnectionBlockedNotification::Blocked(reason)) => {
                    log::warn!("blocked by the broker: {reason}");
                    self.blocked = Some(reason);
                }
                Ok(ConnectionBlockedNotification::Unblocked) => {
                    log::warn!("unblocked by the broker");
                    self.blocked = None;
                    self.settle_unconfirmed();
                }
                Err(TryRecvError::Disconnected) => return self.reconnect(),
                Err(TryRecvError::Empty) => break,
            }
        }
        match self.window.first_refused().cloned() {
            None => Ok(()),
            Some(first) => self.send_refused(&first),
        }
    }

    /// When to give up if nothing is confirmed until then.
    fn deadline(&self) -> Option<Instant> {
        if self.window.is_empty() {
            return None;
        }
        self.progress.checked_add(self.longest_wait())
    }

    /// How long the broker may take for a confirmation.
    fn longest_wait(&self) -> Duration {
        match self.patience() {
            Patience::For(duration) => duration.max(SHORTEST_WAIT),
            Patience::Forever => Duration::MAX,
        }
    }

    fn is_overdue(&self) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= Instant::now())
    }

    fn patience(&self) -> Patience {
        self.cli.connection.retry.unwrap_or(PATIENCE)
    }

    fn settle(&mut self, settled: Settled) {
        self.count(settled);
        self.progress = Instant::now();
        self.backoff = None;
        if self.refusing.as_ref().is_some_and(|(_, last)| self.window.is_past(*last)) {
            self.refusing = None;
        }
    }

    fn count(&self, settled: Settled) {
        self.tally.add_confirmed(settled.records);
        self.tally.add_unheard(settled.unheard);
        self.tally.set_in_doubt(self.window.records());
    }

    /// Without confirmations, what is sent is done with, unless the broker takes nothing.
    fn settle_unconfirmed(&mut self) {
        if self.cli.no_confirm && self.blocked.is_none() {
            let settled = self.window.settle_all();
            self.settle(settled);
        }
    }

    /// Takes note of what no queue took.
    fn take_returns(&mut self) {
        for returned in self.session.returns.try_iter() {
            log::debug!("{}: {}", self.session.publishing(), returned.reply_text);
            if self.cli.no_confirm {
                let packing = Packing::of(returned.properties.type_().as_deref());
                self.tally.add_unheard(packing.count(&returned.content));
            } else {
                self.window.mark_unheard(number_of(&returned));
            }
        }
    }

    /// Publishes what a queue has refused again, after a pause in which that may get room.
    fn send_refused(&mut self, first: &Message) -> Result<(), Error> {
        let patience = self.patience();
        let reason = format!("{}: refused by a queue", self.session.publishing());
        let error = self.at_record(first, Failure::unavailable(reason).into());
        let start = || (Backoff::new(patience), 0);
        let (backoff, _) = self.refusing.get_or_insert_with(start);
        backoff.pause(error).map_err(|error| self.doubt(error))?;
        for message in self.window.take_refused() {
            self.put(message)?;
        }
        if let Some((_, last)) = &mut self.refusing {
            *last = self.window.last_tag();
        }
        Ok(())
    }

    fn reconnect(&mut self) -> Result<(), Error> {
        let cause = self.session.end();
        self.recover(cause)
    }

    /// Opens another session after the end of one, and sends what is unconfirmed again.
    fn recover(&mut self, cause: Failure) -> Result<(), Error> {
        let settled = self.window.start_over();
        self.count(settled);
        self.blocked = None;
        if cause.status == Status::Data {
            return Err(self.refused(cause));
        }
        let mut error = Error::from(cause);
        if self.cli.no_confirm {
            // What the broker has not read is lost, and nobody knows what that is.
            return Err(self.doubt(error));
        }
        let patience = self.patience();
        loop {
            let backoff = self.backoff.get_or_insert_with(|| Backoff::new(patience));
            backoff.pause(error).map_err(|error| self.doubt(error))?;
            match self.resend() {
                Ok(()) => return Ok(()),
                Err(failure) => error = failure.into(),
            }
        }
    }

    fn resend(&mut self) -> Result<(), Failure> {
        let mut session = Session::open(self.cli, &self.uris)?;
        for message in self.window.unconfirmed() {
            let sent = self.send(&session, message);
            sent.map_err(|_| session.end())?;
        }
        let (peer, records) = (session.connection.peer(), self.window.records());
        log::warn!("connected to {peer} again; {records} messages are sent once more");
        self.session = session;
        self.progress = Instant::now();
        if self.window.is_empty() {
            // There is nothing whose confirmation would show that all is well.
            self.backoff = None;
        }
        Ok(())
    }

    /// Sees to it that all before a message that is too large for the broker is confirmed, as
    /// the refusal closed the channel, and names the message.
    fn refused(&mut self, cause: Failure) -> Error {
        let limit = cause.to_string();
        let limit = limit.rsplit("max size ").next().unwrap_or_default();
        let digits = limit.find(|c: char| !c.is_ascii_digit()).unwrap_or(limit.len());
        let refused = limit[..digits].parse().ok();
        let refused = refused.and_then(|limit| self.window.cut_at_larger_than(limit));
        self.tally.set_in_doubt(self.window.records());
        let Some(message) = refused else {
            return self.doubt(cause.into());
        };
        if let Err(error) = self.confirm_the_rest() {
            log::warn!("{error:#}");
        }
        let error = self.at_record(&message, cause.into());
        self.doubt(error)
    }

    fn confirm_the_rest(&mut self) -> Result<(), Error> {
        if !self.window.is_empty() {
            self.resend()?;
        }
        self.wait_for_all()
    }

    /// Names a record where there are many.
    fn at_record(&self, message: &Message, error: Error) -> Error {
        match self.run {
            Some(_) => error.context(format!("record {}", message.number)),
            None => error,
        }
    }

    /// Adds to `error` what became of the records, unless it tells that itself.
    fn doubt(&self, error: Error) -> Error {
        let sent = self.tally.confirmed() + self.tally.in_doubt() > 0;
        let is_told = self.run.is_none() && status_of(&error) != Status::Unavailable;
        match sent && !is_told {
            true => error.context(self.tally.to_string()),
            false => error,
        }
    }

    fn send(&self, session: &Session<'_>, message: &Message) -> amiquip::Result<()> {
        let mut properties = self.properties.clone();
        if let Some(run) = self.run {
            let id = MessageId { run, number: message.number };
            properties = properties.with_message_id(id.into());
        }
        if let Some(message_type) = message.packing.message_type() {
            properties = properties.with_type_(message_type.into());
        }
        session.publish(&message.body, properties, self.longest_wait())
    }
}

/// The number that [`Publisher::number_messages`] gave a message.
fn number_of(returned: &Return) -> Option<u64> {
    Some(MessageId::parse(returned.properties.message_id().as_deref()?)?.number)
}
