//! With `--spool`: messages go to the disk in place of waiting for the broker, and from there to the broker.
//!
//! While the broker keeps up, the spool is empty, and messages are in the window alone, as ever. Two times
//! lead to the disk: a message waits [`HOLD_BACK`] at most for room in the window, and stays [`IN_MEMORY`] at
//! most in the window alone. As soon as a message is in the spool that is not sent yet, all later ones go
//! there behind it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::retry::RetryFor;
use amqp::{Error as AmqpError, Mailbox};
use anyhow::Error;
use logs_process::exit::{Failure, Status};
use logs_process::logging::alert;

use super::recovery::SHORTEST_WAIT;
use super::{DEFAULT_RETRY, Publisher, State};
use crate::cli::Cli;
use crate::counts::Counts;
use crate::message::Message;
use crate::spool::{Spool, Spooled};

/// How long a message waits for room in the window before it goes to the spool: long enough for a broker that
/// is merely slower than the input to hold the input back, as without a spool, and short enough for a pipe to
/// hold what a program writes meanwhile.
const HOLD_BACK: Duration = Duration::from_millis(50);

/// How long a message may be in memory only. The rest of the promised 100 ms is for the system to run us.
const IN_MEMORY: Duration = Duration::from_millis(80);

/// The time between two marks in the spool. What was confirmed since the last mark is sent again after a
/// kill, and left out by receivers.
const MARK: Duration = Duration::from_millis(100);

/// How long the broker may take to confirm the rest after a signal; all is on disk by then.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// A spool, and what the publisher keeps of it.
pub(super) struct Spooling {
    spool: Spool,
    /// A message that was read from the spool and is not sent yet, or the pieces of one.
    next: VecDeque<Spooled>,
    /// The run of the records of this input.
    run: u64,
    /// When the messages that are being published were read.
    read_at: Instant,
    marked: Instant,
    /// How long to wait for the broker after the end of the input.
    retry_for: RetryFor,
    /// A record was larger than the broker takes.
    has_too_large: bool,
}

impl Spooling {
    /// Opens the spool of the command line, if there is one.
    pub(super) fn open(cli: &Cli, counts: &Arc<Counts>) -> Result<Option<Spooling>, Error> {
        let Some(dir) = &cli.spool else {
            return Ok(None);
        };
        let limit = cli.spool_size.as_u64();
        let spool = Spool::open(dir, limit, cli.when_full, Arc::clone(counts), alert)?;
        match counts.spooled() {
            0 => {}
            records => log::warn!(
                "{records} records of an earlier run are in the spool {}; they are sent first",
                dir.display()
            ),
        }
        Ok(Some(Spooling {
            spool,
            next: VecDeque::new(),
            run: 0,
            read_at: Instant::now(),
            marked: Instant::now(),
            retry_for: cli.connection.retry.unwrap_or(DEFAULT_RETRY),
            has_too_large: false,
        }))
    }

    pub(super) fn set_run(&mut self, run: u64) {
        self.run = run;
    }

    /// Whether an earlier run has left messages.
    pub(super) fn has_backlog(&self) -> bool {
        !self.next.is_empty() || self.spool.has_unread()
    }
}

impl Publisher {
    /// Whether input may be taken.
    pub fn takes_input(&self) -> bool {
        match &self.spooling {
            None => self.is_ready(),
            Some(spooling) => {
                spooling.spool.has_room()
                    || !spooling.has_backlog() && self.can_send() && !self.window.is_crowded()
            }
        }
    }

    /// Notes when the messages that come next were read.
    pub fn begin_chunk(&mut self, read_at: Instant) {
        if let Some(spooling) = &mut self.spooling {
            spooling.read_at = read_at;
        }
    }

    /// Ends the messages that were read together: those in the spool are written, and sent if possible.
    ///
    /// # Errors
    ///
    /// As for [`publish`](Publisher::publish).
    pub fn end_chunk(&mut self) -> Result<(), Error> {
        self.work_spool()
    }

    /// With a spool: puts a message there, without looking for a broker.
    ///
    /// # Errors
    ///
    /// When the spool is damaged.
    pub fn keep(&mut self, message: &Message) -> Result<(), Error> {
        self.spool_unconfirmed();
        if let Some(Spooling { spool, run, read_at, .. }) = &mut self.spooling {
            spool.append(*run, message, *read_at + IN_MEMORY)?;
        }
        Ok(())
    }

    /// Whether what cannot be published is kept on disk.
    pub fn has_spool(&self) -> bool {
        self.spooling.is_some()
    }

    /// Whether the broker takes messages.
    fn can_send(&self) -> bool {
        self.is_ready() && self.session().is_some_and(|session| session.blocked.is_none())
    }

    /// Publishes a message, or puts it into the spool. Even with an error it is in the spool.
    pub(super) fn publish_or_spool(&mut self, message: Message) -> Result<(), Error> {
        loop {
            if let Err(error) = self.advance() {
                return self.keep(&message).and(Err(error));
            }
            let Some(spooling) = &self.spooling else {
                return Ok(());
            };
            let deadline = spooling.read_at + HOLD_BACK;
            let is_turn = !spooling.has_backlog() && self.run == Some(spooling.run);
            let fits = message.body.len() <= self.max_body;
            if !self.can_send() || !is_turn || !fits {
                return self.keep(&message);
            }
            if self.has_room_for(&message) {
                let read_at = spooling.read_at;
                if self.window.is_empty() {
                    self.note_answer();
                }
                self.window.push_read_at(message.clone(), read_at);
                self.send(&message);
                return Ok(());
            }
            if deadline <= Instant::now() {
                return self.keep(&message);
            }
            if let Err(error) = self.wait(None, None, Some(deadline)) {
                return self.keep(&message).and(Err(error));
            }
        }
    }

    /// Puts the unconfirmed messages that are in memory only into the spool.
    pub(super) fn spool_unconfirmed(&mut self) {
        if let Some(Spooling { spool, run, .. }) = &mut self.spooling {
            for message in self.window.unspooled() {
                spool.append_sent(*run, message);
            }
        }
    }

    /// When to [`sync_spool`](Publisher::sync_spool). First all records are to be in the spool that are in memory only,
    /// here or, if any are, elsewhere. An empty spool is not to be filled for that: it waits until there are none.
    pub fn sync_time(&self, are_elsewhere: bool) -> Option<Instant> {
        let spool = &self.spooling.as_ref()?.spool;
        let are_in_memory = are_elsewhere || self.unspooled_deadline().is_some();
        spool.sync_time().filter(|_| !spool.is_empty() || !are_in_memory)
    }

    /// Brings the spool, with all messages that were published, to the disk itself. That can take long.
    ///
    /// # Errors
    ///
    /// When the spool is damaged.
    pub fn sync_spool(&mut self) -> Result<(), Error> {
        self.leave_in_spool()
    }

    /// Sends what is in the spool, as far as the window has room, and does what is due.
    pub(super) fn work_spool(&mut self) -> Result<(), Error> {
        let Some(spooling) = &mut self.spooling else {
            return Ok(());
        };
        let now = Instant::now();
        if now.duration_since(spooling.marked) >= MARK && spooling.spool.has_unconfirmed() {
            self.mark_spool(now);
        }
        if !self.is_ready() || self.unspooled_deadline().is_some_and(|time| time <= now) {
            self.spool_unconfirmed();
        }
        if let Some(Spooling { spool, .. }) = &mut self.spooling {
            spool.work(now)?;
        }
        // Confirmations gather: many messages at a time wake fewer processes.
        if self.window.is_crowded() {
            return Ok(());
        }
        while self.can_send()
            && !self.is_congested()
            && let Some(message) = self.next_spooled()?
        {
            self.window.push(message.clone());
            self.send(&message);
        }
        self.flush();
        Ok(())
    }

    /// The next message in the spool, if the window has room for it.
    fn next_spooled(&mut self) -> Result<Option<Message>, Error> {
        let Publisher { spooling, window, run, max_body, .. } = self;
        let Some(Spooling { spool, next, run: own_run, has_too_large, .. }) = spooling else {
            return Ok(None);
        };
        loop {
            let spooled = match next.pop_front() {
                Some(spooled) => Some(spooled),
                None => spool.read()?,
            };
            let Some(spooled) = spooled else {
                // The next messages are those of the input.
                if window.is_empty() {
                    *run = Some(*own_run);
                }
                return Ok(None);
            };
            // The numbers in the window are those of one run.
            let is_turn = *run == Some(spooled.run) || window.is_empty();
            if !is_turn || !window.has_room_for(&spooled.message) {
                next.push_front(spooled);
                return Ok(None);
            }
            *run = Some(spooled.run);
            if spooled.message.body.len() <= *max_body {
                return Ok(Some(spooled.message));
            }
            let run = spooled.run;
            for message in spooled.message.split(*max_body) {
                match message.body.len() <= *max_body {
                    true => next.push_back(Spooled { run, message }),
                    false => {
                        *has_too_large = true;
                        give_up(window.counts(), &message, *max_body);
                    }
                }
            }
        }
    }

    /// Gives up the messages in the window that the broker cannot take.
    pub(super) fn give_up_too_large(&mut self, limit: usize) {
        self.spool_unconfirmed();
        let given_up = self.window.give_up_larger_than(limit);
        for message in &given_up {
            give_up(self.window.counts(), message, limit);
        }
        if let Some(spooling) = &mut self.spooling {
            spooling.has_too_large |= !given_up.is_empty();
        }
    }

    /// Marks in the spool which messages are confirmed.
    fn mark_spool(&mut self, now: Instant) {
        let in_window = self.window.first_position();
        if let Some(Spooling { spool, next, marked, .. }) = &mut self.spooling {
            let next = next.front().and_then(|spooled| spooled.message.position);
            spool.acknowledge(in_window.or(next));
            *marked = now;
        }
    }

    /// The time of the next step of the spool.
    pub(super) fn next_spool_time(&self) -> Option<Instant> {
        let Spooling { spool, marked, .. } = self.spooling.as_ref()?;
        // While nothing is confirmed, no mark moves.
        let is_marking = self.session().is_some() && spool.has_unconfirmed();
        let mark = is_marking.then(|| *marked + MARK);
        mark.into_iter().chain(spool.next_time()).chain(self.unspooled_deadline()).min()
    }

    pub(super) fn unspooled_deadline(&self) -> Option<Instant> {
        self.window.unspooled_since().map(|since| since + IN_MEMORY)
    }

    /// With a spool: waits until all messages are confirmed, a `stop`, or until the broker has confirmed
    /// nothing for `--retry`. What is left is on disk.
    pub(super) fn finish_spooled(&mut self, stop: Option<&Mailbox<i32>>) -> Result<(), Error> {
        let drained = self.drain(stop);
        self.close();
        let outcome = drained.and(self.end_spool());
        let counts = self.window.counts();
        let has_too_large = self.spooling.as_ref().is_some_and(|spooling| spooling.has_too_large);
        let outcome = outcome.and_then(|()| match counts.dropped() {
            _ if has_too_large => {
                let text = "records are larger than the broker takes";
                Err(Failure::new(Status::Data, text).into())
            }
            (0, _) => Ok(()),
            _ => {
                let text = "records were dropped, as the spool could not take or read them";
                Err(Failure::new(Status::Unavailable, text).into())
            }
        });
        outcome.map_err(|error| error.context(counts.to_string()))
    }

    /// Waits until all messages are confirmed. After a `stop`, which leaves all on disk, a broker that is there has a
    /// moment for that.
    fn drain(&mut self, stop: Option<&Mailbox<i32>>) -> Result<(), Error> {
        let is_stopped = || stop.is_some_and(|stop| !stop.is_empty());
        let (mut done, mut since) = (self.window.counts().done(), Instant::now());
        loop {
            self.advance()?;
            if self.is_drained() {
                return Ok(());
            }
            let sync_time = self.sync_time(false);
            if sync_time.is_some_and(|time| time <= Instant::now()) {
                self.sync_spool()?;
            }
            if is_stopped() {
                break;
            }
            if done != self.window.counts().done() || self.is_pausing() {
                (done, since) = (self.window.counts().done(), Instant::now());
            }
            let deadline = self.patience().and_then(|patience| since.checked_add(patience));
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(self.given_up());
            }
            self.wait(None, stop, deadline.into_iter().chain(sync_time).min())?;
        }
        self.leave_in_spool()?;
        let end = Instant::now() + self.session().map_or(Duration::ZERO, |_| STOP_GRACE);
        while !self.is_drained() && Instant::now() < end {
            self.wait(None, None, Some(end))?;
        }
        Ok(())
    }

    fn is_drained(&self) -> bool {
        self.window.is_empty() && !self.spooling.as_ref().is_some_and(Spooling::has_backlog)
    }

    /// Whether nothing is sent so that receivers can come back: this time is not the broker's.
    fn is_pausing(&self) -> bool {
        matches!(self.state, State::Holding { .. }) && self.refusal.is_none()
    }

    /// How long the broker may confirm nothing, unless for ever. A broker that was not found to be away has a moment at
    /// least.
    fn patience(&self) -> Option<Duration> {
        let RetryFor::AtMost(patience) = self.spooling.as_ref()?.retry_for else {
            return None;
        };
        match &self.state {
            State::Reconnecting { attempts, .. } if attempts.has_failed() => Some(patience),
            _ if self.is_pausing() => None,
            _ => Some(patience.max(SHORTEST_WAIT)),
        }
    }

    /// Makes sure that all unconfirmed messages are on disk.
    fn leave_in_spool(&mut self) -> Result<(), Error> {
        self.spool_unconfirmed();
        self.mark_spool(Instant::now());
        if let Some(Spooling { spool, .. }) = &mut self.spooling {
            spool.flush()?;
        }
        Ok(())
    }

    /// Makes sure that all unconfirmed messages are on disk, or else counted.
    ///
    /// # Errors
    ///
    /// When the spool is damaged.
    pub fn end_spool(&mut self) -> Result<(), Error> {
        self.spool_unconfirmed();
        self.mark_spool(Instant::now());
        let window = &self.window;
        if let Some(Spooling { spool, next, .. }) = &mut self.spooling {
            spool.close(|from| {
                let next = next.iter().map(|spooled| &spooled.message);
                let next = next.filter(|message| message.position >= Some(from));
                window.records_from(from) + next.map(|message| message.records).sum::<u64>()
            })?;
        }
        Ok(())
    }

    fn given_up(&self) -> Error {
        let Some(Spooling { spool, retry_for, .. }) = &self.spooling else {
            return Error::msg("no spool");
        };
        let publishing = self.config.publishing();
        let mut what = match self.session() {
            Some(session) => format!("{} has confirmed nothing", session.publishing.peer()),
            None => "no broker".to_string(),
        };
        if let RetryFor::AtMost(duration) = retry_for
            && !duration.is_zero()
        {
            what += &format!(" for {duration:?}");
        }
        if let Some(error) = spool.failure() {
            what += &format!(" (the spool cannot be used: {error})");
        }
        let text = format!(
            "{publishing}: {what} after the end of the input; emit-log --lines --spool with the \
             same directory sends what is left"
        );
        AmqpError::unavailable(text).into()
    }
}

fn give_up(counts: &Counts, message: &Message, limit: usize) {
    let length = message.body.len();
    alert(format_args!(
        "record {} is dropped: {length} bytes, and the broker takes {limit} at most",
        message.number
    ));
    counts.add_dropped(message.records, length as u64);
    counts.take_spooled(message.records);
}
