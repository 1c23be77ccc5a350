//! An outbox on disk. The input does not wait for the broker.
//!
//! While the broker keeps up, the spool is empty, and messages are only in memory. Two times lead to the disk: a
//! message waits [`MAX_WAIT`] at most for room in the window, and stays [`MAX_IN_MEMORY`] at most in the window alone.
//! As soon as a message is in the spool that is not sent yet, all later ones go there behind it.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::Error as AmqpError;
use amqp::retry::RetryFor;
use anyhow::Error;
use logs_process::exit::{Failure, Status};
use logs_process::logging::alert;

use super::{Spool, WhenFull};
use crate::counts::Counts;
use crate::message::Message;
use crate::outbox::{BrokerState, Ending, Outbox};
use crate::window::Window;

/// How long a message waits for room in the window before it goes to the spool. It is long enough that a broker that is
/// only slower than the input slows the input down, as without a spool. It is short enough that a pipe can hold the
/// output of the producer during this time.
const MAX_WAIT: Duration = Duration::from_millis(50);

/// How long a message may be only in memory. The rest of the guaranteed 100 ms is for delays of the system.
const MAX_IN_MEMORY: Duration = Duration::from_millis(80);

/// The interval at which confirmed messages are deleted from the spool. After a kill, messages that are confirmed and
/// not deleted are sent again, and receivers drop the duplicates.
const DELETE_INTERVAL: Duration = Duration::from_millis(100);

/// How long to wait for confirms after a signal. All messages are on disk before this wait.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// Messages in memory, which go to disk if they must wait.
pub struct SpoolOutbox {
    window: Window,
    spool: Spool,
    /// The messages to be sent next: from the spool, or from the input while the spool has no unread messages.
    waiting: VecDeque<Message>,
    deleted_at: Instant,
    /// How long to wait for the broker after the end of the input.
    retry_for: RetryFor,
    /// Whether a record was larger than the broker accepts.
    has_too_large: bool,
}

impl SpoolOutbox {
    /// Opens the spool in `dir`, with a limit of `limit` bytes.
    ///
    /// # Errors
    ///
    /// When the spool cannot be used.
    pub fn open(
        dir: &Path,
        limit: u64,
        when_full: WhenFull,
        retry_for: RetryFor,
    ) -> Result<SpoolOutbox, Failure> {
        let counts = Arc::new(Counts::with_spool(dir));
        let spool = Spool::open(dir, limit, when_full, Arc::clone(&counts), alert)?;
        match counts.spooled() {
            0 => {}
            records => log::warn!(
                "{records} records of an earlier run are in the spool {}; they are sent first",
                dir.display()
            ),
        }
        Ok(SpoolOutbox {
            window: Window::new(counts),
            spool,
            waiting: VecDeque::new(),
            deleted_at: Instant::now(),
            retry_for,
            has_too_large: false,
        })
    }

    /// Whether the spool has messages that are not sent.
    fn has_backlog(&self) -> bool {
        self.spool.has_unread() || self.waiting.front().is_some_and(|next| next.position.is_some())
    }

    /// When the first waiting message that is not in the spool was read.
    fn held_since(&self) -> Option<Instant> {
        self.waiting.front().filter(|next| next.position.is_none()).map(|next| next.read_at)
    }

    /// When all messages in the window must be in the spool; `None` if all are.
    fn unspooled_deadline(&self) -> Option<Instant> {
        self.window.unspooled_since().map(|since| since + MAX_IN_MEMORY)
    }

    /// Adds a message to the spool, behind all others.
    fn append(&mut self, message: &Message) -> Result<(), Failure> {
        self.spool_sent();
        self.spool.append(message, message.read_at + MAX_IN_MEMORY)
    }

    /// Puts the sent messages that are only in memory into the spool.
    fn spool_sent(&mut self) {
        for message in self.window.unspooled() {
            self.spool.append_sent(message);
        }
    }

    /// Puts the waiting messages of the input into the spool.
    fn spool_waiting(&mut self) -> Result<(), Failure> {
        while self.held_since().is_some()
            && let Some(message) = self.waiting.pop_front()
        {
            self.append(&message)?;
        }
        Ok(())
    }

    /// Puts all messages into the spool, and deletes the confirmed ones.
    fn spool_all(&mut self) -> Result<(), Failure> {
        self.spool_sent();
        let spooled = self.spool_waiting();
        self.delete_confirmed(Instant::now());
        spooled
    }

    /// Deletes the confirmed messages from the spool with its next commit.
    fn delete_confirmed(&mut self, now: Instant) {
        let waiting = self.waiting.front().and_then(|message| message.position);
        self.spool.confirm(self.window.first_position().or(waiting));
        self.deleted_at = now;
    }

    /// Drops a message that is too large for the broker.
    fn drop_too_large(&mut self, message: &Message) {
        let (length, limit) = (message.body.len(), self.window.max_body);
        alert(format_args!(
            "record {} is dropped: it has {length} bytes, and the broker accepts at most {limit}",
            message.number
        ));
        let counts = self.window.counts();
        counts.add_dropped(message.records, length as u64);
        if message.position.is_some() {
            counts.remove_spooled(message.records);
        }
        self.has_too_large = true;
    }
}

impl Outbox for SpoolOutbox {
    fn window(&self) -> &Window {
        &self.window
    }

    fn window_mut(&mut self) -> &mut Window {
        &mut self.window
    }

    fn needs_broker(&self) -> bool {
        false
    }

    fn put(&mut self, message: Message) -> Result<(), Error> {
        match self.has_backlog() {
            true => self.append(&message)?,
            false => self.waiting.push_back(message),
        }
        Ok(())
    }

    fn accepts_input(&self, broker: BrokerState) -> bool {
        let can_send = broker == BrokerState::Ready && !self.window.is_crowded();
        self.held_since().is_none() && (self.spool.has_room() || can_send && !self.has_backlog())
    }

    fn next(&mut self, broker: BrokerState) -> Result<Option<Message>, Error> {
        if broker != BrokerState::Ready {
            return Ok(None);
        }
        loop {
            if self.waiting.is_empty() {
                self.waiting.extend(self.spool.read()?);
            }
            let Some(message) = self.waiting.pop_front() else {
                return Ok(None);
            };
            let limit = self.window.max_body;
            if message.body.len() > limit {
                match &message.split(limit)[..] {
                    [record] => self.drop_too_large(record),
                    pieces => {
                        pieces.iter().rev().for_each(|piece| self.waiting.push_front(piece.clone()))
                    }
                }
                continue;
            }
            let has_room = match message.position {
                Some(_) => self.window.has_room_again_for(&message),
                None => self.window.has_room_for(&message),
            };
            if !has_room {
                self.waiting.push_front(message);
                return Ok(None);
            }
            self.window.push(message.clone());
            return Ok(Some(message));
        }
    }

    fn work(&mut self, broker: BrokerState) -> Result<(), Error> {
        let now = Instant::now();
        if now.duration_since(self.deleted_at) >= DELETE_INTERVAL && self.spool.has_unconfirmed() {
            self.delete_confirmed(now);
        }
        if broker < BrokerState::Blocked
            || self.unspooled_deadline().is_some_and(|time| time <= now)
        {
            self.spool_sent();
        }
        if broker != BrokerState::Ready
            || self.held_since().is_some_and(|time| time + MAX_WAIT <= now)
        {
            self.spool_waiting()?;
        }
        Ok(self.spool.work(now)?)
    }

    fn next_time(&self, broker: BrokerState) -> Option<Instant> {
        // Without a connection, no message is confirmed.
        let is_deleting = broker > BrokerState::Disconnected && self.spool.has_unconfirmed();
        let delete = is_deleting.then(|| self.deleted_at + DELETE_INTERVAL);
        let held = self.held_since().map(|since| since + MAX_WAIT);
        let times = delete.into_iter().chain(held).chain(self.spool.next_time());
        times.chain(self.unspooled_deadline()).min()
    }

    fn limit_bodies(&mut self, limit: usize, _: &AmqpError) {
        self.spool_sent();
        for message in self.window.drop_larger_than(limit) {
            self.drop_too_large(&message);
        }
    }

    fn is_empty(&self) -> bool {
        self.window.is_empty() && self.waiting.is_empty() && !self.spool.has_unread()
    }

    /// While the spool is empty, a sync waits until no record is only in memory, so that it writes no records.
    fn sync_time(&self, are_elsewhere: bool) -> Option<Instant> {
        let are_in_memory = are_elsewhere || self.unspooled_deadline().is_some();
        self.spool.sync_time().filter(|_| !self.spool.is_empty() || !are_in_memory)
    }

    fn sync(&mut self) -> Result<(), Error> {
        self.spool_all()?;
        Ok(self.spool.flush()?)
    }

    fn ending(&self) -> Option<Ending> {
        Some(Ending { patience: self.retry_for, grace: STOP_GRACE })
    }

    fn timeout_error(&self, mut what: String) -> Error {
        if let RetryFor::AtMost(duration) = self.retry_for
            && !duration.is_zero()
        {
            what += &format!(" for {duration:?}");
        }
        if let Some(error) = self.spool.failure() {
            what += &format!(" (the spool cannot be used: {error})");
        }
        what += " after the end of the input";
        if self.window.counts().spooled() > 0 {
            what += "; to send the rest, run emit-log --lines --spool with the same directory";
        }
        AmqpError::unavailable(what).into()
    }

    fn close(&mut self) -> Result<(), Error> {
        let spooled = self.spool_all();
        let closed = self.spool.close(|from| {
            let waiting = self.waiting.iter().filter(|message| message.position >= Some(from));
            self.window.records_from(from) + waiting.map(|message| message.records).sum::<u64>()
        });
        spooled.and(closed)?;
        let (status, text) = match self.window.counts().dropped() {
            _ if self.has_too_large => (Status::Data, "records are larger than the broker accepts"),
            (0, _) => return Ok(()),
            _ => (
                Status::Unavailable,
                "records were dropped, because the spool could not store or read them",
            ),
        };
        Err(Failure::new(status, text).into())
    }
}
