//! Publishing: nothing is forgotten before the broker has confirmed it.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, Confirm, ConnectionBlockedNotification, Return};
use anyhow::Error;
use crossbeam_channel::{Receiver, Select, TryRecvError, never};
use logs_common::exit::{Failure, Status, status_of};
use logs_common::packing::Packing;
use logs_common::retry::{Backoff, Patience};
use logs_common::uri::Uri;

use crate::cli::Cli;
use crate::session::Session;
use crate::window::{Message, Window};

/// How long to try to get back to a lost broker, and to wait for one that confirms nothing,
/// unless `--retry` says otherwise.
const PATIENCE: Patience = Patience::For(Duration::from_secs(60));

/// Publishes messages in order, connects again when the connection is lost, and sends what is
/// unconfirmed once more.
pub struct Publisher<'a> {
    cli: &'a Cli,
    uris: Vec<Uri>,
    properties: AmqpProperties,
    /// What the property `message_id` begins with, if messages have one.
    run: Option<String>,
    session: Session<'a>,
    window: Window,
    tally: Arc<Tally>,
    unheard: u64,
    /// When the broker last confirmed something, or had nothing to confirm.
    progress: Instant,
    /// Runs from the first failure to the next confirmation.
    backoff: Option<Backoff>,
    blocked: bool,
}

/// What became of the records so far; other threads may add to it and read it.
#[derive(Debug, Default)]
pub struct Tally {
    unconfirmed: bool,
    read: AtomicU64,
    confirmed: AtomicU64,
    in_doubt: AtomicU64,
}

impl Tally {
    /// Notes that records are read, which are going to be sent.
    pub fn add_read(&self, records: u64) {
        self.read.fetch_add(records, Ordering::Relaxed);
    }

    /// Records that the broker has confirmed; with `--no-confirm`, that were sent.
    pub fn confirmed(&self) -> u64 {
        self.confirmed.load(Ordering::Relaxed)
    }

    /// Records that were sent and are not confirmed.
    pub fn in_doubt(&self) -> u64 {
        self.in_doubt.load(Ordering::Relaxed)
    }

    /// What there is to say of those that are not in doubt.
    pub fn verdict(&self) -> &'static str {
        if self.unconfirmed {
            "sent without confirmation"
        } else {
            "confirmed"
        }
    }
}

impl Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (confirmed, in_doubt) = (self.confirmed(), self.in_doubt());
        write!(f, "{confirmed} {}, {in_doubt} in doubt", self.verdict())?;
        match self
            .read
            .load(Ordering::Relaxed)
            .saturating_sub(confirmed + in_doubt)
        {
            0 => Ok(()),
            not_sent => write!(f, ", {not_sent} read and not sent"),
        }
    }
}

impl<'a> Publisher<'a> {
    /// Connects.
    ///
    /// # Errors
    ///
    /// When no broker can be reached within `--retry`, or none lets us in.
    pub fn connect(cli: &'a Cli) -> Result<Publisher<'a>, Error> {
        let uris = cli.connection.uris()?;
        let mut backoff = Backoff::new(cli.connection.retry.unwrap_or(Patience::NONE));
        let session = loop {
            match Session::open(cli, &uris) {
                Ok(session) => break session,
                Err(failure) => backoff.pause(failure.into())?,
            }
        };
        Ok(Publisher {
            cli,
            uris,
            properties: cli.properties(),
            run: None,
            session,
            window: Window::new(),
            tally: Arc::new(Tally {
                unconfirmed: cli.no_confirm,
                ..Tally::default()
            }),
            unheard: 0,
            progress: Instant::now(),
            backoff: None,
            blocked: false,
        })
    }

    /// Gives each message a `message_id` from now on, `emit-log/RUN/NUMBER`, by which receivers
    /// can see what is missing and what comes twice.
    pub fn number_messages(&mut self) {
        self.run = Some(format!("emit-log/{:016x}/", fastrand::u64(..)));
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
    /// When the broker refuses a message, or is lost and does not come back in time. The text
    /// says what is in doubt.
    pub fn publish(&mut self, message: Message) -> Result<(), Error> {
        self.attend()?;
        while !self.window.has_room_for(&message) {
            self.wait(&never::<()>(), &never())?;
        }
        if self.window.is_empty() {
            self.progress = Instant::now();
        }
        let sent = self.send(&self.session, &message);
        self.window.push(message);
        self.count();
        match sent {
            Ok(()) => self.settle_unconfirmed(),
            Err(error) => {
                let cause = self.session.cause(error);
                self.recover(cause)?;
            }
        }
        Ok(())
    }

    /// Waits until all is confirmed, closes the connection, and returns the number of records
    /// that no receiver's queue took (counted with `--mandatory` only).
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn finish(&mut self) -> Result<u64, Error> {
        while !self.window.is_empty() {
            self.wait(&never::<()>(), &never())?;
        }
        if self.cli.no_confirm {
            self.session.flush()?;
        }
        self.take_returns();
        if let Err(failure) = self.session.connection.close() {
            log::debug!("{failure}");
        }
        Ok(self.unheard)
    }

    /// Waits for a word from the broker, on which it acts, or for something to come from `input`
    /// or `stop`, which it leaves there.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn wait<T>(&mut self, input: &Receiver<T>, stop: &Receiver<i32>) -> Result<(), Error> {
        let mut select = Select::new();
        select.recv(&self.session.confirms);
        select.recv(&self.session.blocked);
        select.recv(input);
        select.recv(stop);
        match self.deadline() {
            // Which of them it was shows when they are looked at.
            Some(deadline) => drop(select.ready_deadline(deadline)),
            None => drop(select.ready()),
        }
        self.attend()
    }

    /// Acts on all that the broker has said.
    fn attend(&mut self) -> Result<(), Error> {
        loop {
            match self.session.confirms.try_recv() {
                Ok(Confirm::Ack(ack)) => {
                    self.take_returns();
                    self.settle(ack.delivery_tag, ack.multiple);
                }
                Ok(Confirm::Nack(_)) => {
                    let reason = format!("{}: refused by a queue", self.session.publishing());
                    return self.recover(Failure::unavailable(reason));
                }
                Err(TryRecvError::Disconnected) => return self.reconnect(),
                Err(TryRecvError::Empty) => break,
            }
        }
        loop {
            match self.session.blocked.try_recv() {
                Ok(ConnectionBlockedNotification::Blocked(reason)) => {
                    log::warn!("blocked by the broker: {reason}");
                    self.blocked = true;
                }
                Ok(ConnectionBlockedNotification::Unblocked) => {
                    log::warn!("unblocked by the broker");
                    self.blocked = false;
                    self.settle_unconfirmed();
                }
                Err(TryRecvError::Disconnected) => return self.reconnect(),
                Err(TryRecvError::Empty) => break,
            }
        }
        if self
            .deadline()
            .is_some_and(|deadline| deadline <= Instant::now())
        {
            let (publishing, peer) = (self.session.publishing(), self.session.connection.peer());
            let reason = format!("{publishing}: {peer} has confirmed nothing for too long");
            return Err(self.doubt(Failure::unavailable(reason).into()));
        }
        Ok(())
    }

    /// When to give up if nothing is confirmed until then.
    fn deadline(&self) -> Option<Instant> {
        match self.patience() {
            Patience::For(duration) if !self.window.is_empty() => {
                self.progress.checked_add(duration)
            }
            _ => None,
        }
    }

    fn patience(&self) -> Patience {
        self.cli.connection.retry.unwrap_or(PATIENCE)
    }

    fn settle(&mut self, delivery_tag: u64, multiple: bool) {
        let settled = self.window.settle(delivery_tag, multiple);
        self.unheard += settled.unheard;
        self.tally
            .confirmed
            .fetch_add(settled.records, Ordering::Relaxed);
        self.count();
        self.progress = Instant::now();
        self.backoff = None;
    }

    /// Without confirmations, what is sent is done with, unless it only fills a buffer.
    fn settle_unconfirmed(&mut self) {
        if self.cli.no_confirm && !self.blocked {
            self.settle(u64::MAX - 1, true);
        }
    }

    fn count(&self) {
        self.tally
            .in_doubt
            .store(self.window.records(), Ordering::Relaxed);
    }

    /// Takes note of what no queue took. It comes before its confirmation.
    fn take_returns(&mut self) {
        for returned in self.session.returns.try_iter() {
            if self.cli.no_confirm {
                let packing = Packing::of(returned.properties.type_().as_deref());
                self.unheard += packing.records(&returned.content).count() as u64;
            } else {
                self.window.mark_unheard(number_of(&returned));
            }
        }
    }

    fn reconnect(&mut self) -> Result<(), Error> {
        let cause = self.session.end();
        self.recover(cause)
    }

    /// Opens another session after the end of one, and sends what is unconfirmed again.
    fn recover(&mut self, cause: Failure) -> Result<(), Error> {
        self.window.start_over();
        self.blocked = false;
        if cause.status == Status::Data {
            return Err(self.refused(cause));
        }
        let patience = self.patience();
        let mut error = Error::from(cause);
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
        log::warn!(
            "connected to {} again; {} messages are sent once more",
            session.connection.peer(),
            self.window.records()
        );
        for message in self.window.unconfirmed() {
            let sent = self.send(&session, message);
            sent.map_err(|error| session.cause(error))?;
        }
        self.session = session;
        self.progress = Instant::now();
        self.settle_unconfirmed();
        Ok(())
    }

    /// Sees to it that all before a message that is too large for the broker is confirmed, as
    /// the refusal closed the channel, and names the message.
    fn refused(&mut self, cause: Failure) -> Error {
        let limit = cause.to_string();
        let limit = limit.rsplit("max size ").next().unwrap_or_default();
        let digits = limit
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(limit.len());
        let refused = limit[..digits].parse().ok();
        let refused = refused.and_then(|limit| self.window.cut_at_larger_than(limit));
        self.count();
        let mut error = Error::from(cause);
        if let (Some(message), Some(_)) = (refused, &self.run) {
            error = error.context(format!("record {}", message.number));
            let rest = self.resend().map_err(Error::from).and_then(|()| {
                while !self.window.is_empty() {
                    self.wait(&never::<()>(), &never())?;
                }
                Ok(())
            });
            if let Err(error) = rest {
                log::warn!("{error:#}");
            }
        }
        self.doubt(error)
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
        if let Some(run) = &self.run {
            properties = properties.with_message_id(format!("{run}{}", message.number));
        }
        if let Some(message_type) = message.packing.message_type() {
            properties = properties.with_type_(message_type.into());
        }
        session.publish(&message.body, properties)
    }
}

/// The number that [`Publisher::number_messages`] gave a message.
fn number_of(returned: &Return) -> Option<u64> {
    let (_, number) = returned
        .properties
        .message_id()
        .as_deref()?
        .rsplit_once('/')?;
    number.parse().ok()
}
