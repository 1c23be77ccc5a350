//! The window: messages that are sent and not confirmed, and their limit.

use std::collections::VecDeque;
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use logs_common::wire::MessageId;

use crate::counts::Counts;
use crate::message::{Message, Position};

/// Limit for the messages in flight to a nearby broker. A larger window is not faster, and after a lost connection each
/// of them must be sent again.
const MAX_MESSAGES: usize = 2000;

/// The round-trip time up to which [`MAX_MESSAGES`] suffice: 2,000 messages per 20 ms are 100,000 confirms a second. A
/// broker on the same machine may need some of this time to answer under load.
const NEARBY: Duration = Duration::from_millis(20);

/// Limit for the messages in flight to a distant broker.
const MAX_FAR_MESSAGES: usize = 20 * MAX_MESSAGES;

/// Messages in flight for each millisecond of the round-trip time. This is several times the rate of a broker, so that
/// late confirms do not block other messages.
const PER_MILLISECOND: usize = 400;

/// Limit for the bytes in flight. A single larger message is sent alone.
const MAX_BYTES: usize = 8 * 1024 * 1024;

/// The pause in which confirms accumulate, for each message in flight: a fast broker confirms a quarter of them in this
/// time. The second constant limits the pause.
const PAUSE: Duration = Duration::from_nanos(2500);
const LONGEST_PAUSE: Duration = Duration::from_millis(32);

/// A message that was sent.
struct InFlight {
    message: Message,
    /// The broker has confirmed or nacked the message.
    answered: bool,
    /// The broker has returned the message, because it is unroutable.
    returned: bool,
}

/// The messages that are sent and not confirmed, all of one run. Only the window changes the counts of sent records.
pub struct Window {
    /// The messages in flight, in the order of their delivery tags. The tags are consecutive, so an answered message
    /// keeps its place until all earlier ones are answered.
    in_flight: VecDeque<InFlight>,
    /// Messages that were nacked, or sent on a lost connection, in the order of their numbers.
    to_resend: Vec<Message>,
    /// Messages sent for the first time.
    sent: u64,
    /// The delivery tag of the first message in flight.
    first_tag: u64,
    /// The delivery tag up to which all messages in flight are in the spool.
    spooled_tag: u64,
    /// Whether a message may be only in memory.
    has_unspooled: bool,
    /// Bytes of all bodies in flight.
    bytes: usize,
    /// Whether the window was full, so that new messages wait until a quarter of it is free.
    is_full: bool,
    /// The largest body that the broker accepts, in bytes. It is known after the broker has rejected a larger one.
    pub max_body: usize,
    /// Whether the broker may have a message that is not confirmed.
    pub may_have_arrived: bool,
    /// Whether unroutable messages are to be sent again, until they are routed.
    resends_unroutable: bool,
    /// Whether the next message is sent alone, to find out whether a queue gets it. Otherwise, a queue that appears could
    /// get later messages first.
    is_probing: bool,
    /// The round-trip time to the broker.
    round_trip: Duration,
    counts: Arc<Counts>,
}

impl Window {
    /// An empty window that changes `counts`.
    pub fn new(counts: impl Into<Arc<Counts>>) -> Window {
        Window {
            in_flight: VecDeque::new(),
            to_resend: Vec::new(),
            sent: 0,
            first_tag: 1,
            spooled_tag: 0,
            has_unspooled: false,
            bytes: 0,
            is_full: false,
            max_body: usize::MAX,
            may_have_arrived: false,
            resends_unroutable: false,
            is_probing: false,
            round_trip: Duration::ZERO,
            counts: counts.into(),
        }
    }

    /// From now on, unroutable messages are to be sent again.
    pub fn resend_unroutable(&mut self) {
        (self.resends_unroutable, self.is_probing) = (true, true);
    }

    /// Whether a message is sent alone, to find out whether a queue gets it.
    pub fn is_probing(&self) -> bool {
        self.is_probing
    }

    /// Whether messages are sent again after a message that was sent alone.
    pub fn has_passed_probe(&self) -> bool {
        self.resends_unroutable && !self.is_probing
    }

    /// Whether the broker has yet to answer for a message.
    pub fn awaits_answer(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// The counts of records.
    pub fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    /// Whether all messages are confirmed.
    pub fn is_empty(&self) -> bool {
        self.in_flight.is_empty() && self.to_resend.is_empty()
    }

    /// Whether another message may be sent before any is confirmed.
    pub fn has_room_for(&self, message: &Message) -> bool {
        if self.is_probing {
            return self.is_empty();
        }
        let fits =
            self.bytes + message.body.len() <= MAX_BYTES && self.in_flight.len() < self.limit();
        fits || self.in_flight.is_empty()
    }

    /// The same, but a full window has no room until a quarter of it is free. Otherwise each confirm would lead to a
    /// single message, which wakes every process on its way.
    pub fn has_room_again_for(&mut self, message: &Message) -> bool {
        self.is_full = !self.has_room_for(message) || self.is_full && self.is_crowded();
        !self.is_full
    }

    /// Whether more than three quarters of the window are in use.
    pub fn is_crowded(&self) -> bool {
        self.in_flight.len() > self.limit() / 4 * 3
    }

    /// How long to pause, so that several confirms arrive together.
    pub fn pause(&self) -> Duration {
        match self.in_flight.len() {
            ..=20 => Duration::ZERO,
            messages => (PAUSE * messages as u32).min(LONGEST_PAUSE),
        }
    }

    /// Records that the broker may have the messages in flight.
    pub fn set_may_have_arrived(&mut self) {
        self.may_have_arrived |= self.counts.in_doubt() > 0;
    }

    /// Sets the round-trip time. It must not include the time in which a broker under load processes messages, because
    /// the larger window would only add to that load.
    pub fn set_round_trip(&mut self, round_trip: Duration) {
        self.round_trip = round_trip;
    }

    /// Limit for the messages in flight: enough to keep a broker busy until their confirms arrive.
    fn limit(&self) -> usize {
        if self.round_trip <= NEARBY {
            return MAX_MESSAGES;
        }
        let milliseconds = self.round_trip.as_millis() as usize;
        milliseconds.saturating_mul(PER_MILLISECOND).clamp(MAX_MESSAGES, MAX_FAR_MESSAGES)
    }

    /// Adds a message that is sent for the first time.
    pub fn push(&mut self, message: Message) {
        self.sent += 1;
        let message = Message { order: self.sent, ..message };
        self.counts.add_sent(message.records);
        self.has_unspooled |= message.position.is_none();
        self.append(message);
    }

    fn append(&mut self, message: Message) {
        let is_spooled = message.position.is_some();
        self.bytes += message.body.len();
        self.in_flight.push_back(InFlight { message, answered: false, returned: false });
        if is_spooled {
            self.spooled_tag = self.last_tag();
        }
    }

    /// When the first message in flight that is only in memory was read.
    pub fn unspooled_since(&self) -> Option<Instant> {
        let mut unspooled = self.in_flight.range(self.first_unspooled()..);
        unspooled.find(|in_flight| !in_flight.answered).map(|in_flight| in_flight.message.read_at)
    }

    /// The index of the first message in flight that may be only in memory.
    fn first_unspooled(&self) -> usize {
        let place = (self.spooled_tag + 1).saturating_sub(self.first_tag) as usize;
        place.min(self.in_flight.len())
    }

    /// The unconfirmed messages that are only in memory, in the order in which they were sent. The caller must put them into
    /// the spool.
    pub fn unspooled(&mut self) -> Vec<&mut Message> {
        if !mem::take(&mut self.has_unspooled) {
            return Vec::new();
        }
        let first = self.first_unspooled();
        self.spooled_tag = self.last_tag();
        let unanswered = self.in_flight.range_mut(first..).filter(|in_flight| !in_flight.answered);
        let messages = unanswered.map(|in_flight| &mut in_flight.message);
        let mut messages: Vec<_> = messages.chain(&mut self.to_resend).collect();
        messages.retain(|message| message.position.is_none());
        messages.sort_by_key(|message| message.order);
        messages
    }

    /// The lowest position of an unconfirmed message in the spool.
    pub fn first_position(&self) -> Option<Position> {
        self.unconfirmed().filter_map(|message| message.position).min()
    }

    /// The number of unconfirmed records whose position in the spool is `from` or later.
    pub fn records_from(&self, from: Position) -> u64 {
        let spooled = self.unconfirmed().filter(|message| message.position >= Some(from));
        spooled.map(|message| message.records).sum()
    }

    /// The unconfirmed messages, in no particular order.
    pub fn unconfirmed(&self) -> impl Iterator<Item = &Message> {
        let unanswered = self.in_flight.iter().filter(|in_flight| !in_flight.answered);
        unanswered.map(|in_flight| &in_flight.message).chain(&self.to_resend)
    }

    /// Handles a confirm of the message with this delivery tag; with `multiple`, of all earlier ones too.
    pub fn confirm(&mut self, delivery_tag: u64, multiple: bool) {
        let (mut confirmed, mut spooled, mut unroutable) = (0, 0, 0);
        for index in self.indexes(delivery_tag, multiple) {
            if self.resends_unroutable && self.in_flight[index].returned {
                self.put_back(index);
                continue;
            }
            let in_flight = &mut self.in_flight[index];
            if !mem::replace(&mut in_flight.answered, true) {
                self.is_probing = false;
                let Message { records, position, .. } = in_flight.message;
                confirmed += records;
                spooled += if position.is_some() { records } else { 0 };
                unroutable += if in_flight.returned { records } else { 0 };
            }
        }
        self.counts.add_done(confirmed);
        self.counts.remove_spooled(spooled);
        self.counts.add_unroutable(unroutable);
        self.drop_answered();
    }

    /// Counts all messages in flight as confirmed.
    pub fn confirm_all(&mut self) {
        self.confirm(self.last_tag(), true);
    }

    /// Handles a nack of the message with this delivery tag; with `multiple`, of all earlier ones too. These messages
    /// are to be sent again.
    pub fn nack(&mut self, delivery_tag: u64, multiple: bool) {
        // Other queues may have accepted the message.
        self.may_have_arrived = true;
        for index in self.indexes(delivery_tag, multiple) {
            self.put_back(index);
        }
        self.drop_answered();
    }

    /// Puts an unanswered message in flight among those to be sent again. A broker may answer in any order, but messages
    /// are sent again in their first order.
    fn put_back(&mut self, index: usize) {
        let in_flight = &mut self.in_flight[index];
        if !mem::replace(&mut in_flight.answered, true) {
            self.is_probing = self.resends_unroutable;
            let message = in_flight.message.clone();
            let place = self.to_resend.partition_point(|other| other.order < message.order);
            self.to_resend.insert(place, message);
            // The entry remains, because delivery tags are consecutive, but without its body.
            self.bytes -= mem::take(&mut in_flight.message.body).len();
        }
    }

    /// Records that the message with this id is unroutable; without an id, the first message.
    pub fn record_return(&mut self, id: Option<MessageId>) {
        // A nacked message leaves an entry with its id, so answered entries are skipped.
        let is_meant = |in_flight: &&mut InFlight| match id {
            Some(id) => in_flight.message.id() == id && !in_flight.answered,
            None => true,
        };
        if let Some(in_flight) = self.in_flight.iter_mut().find(is_meant) {
            in_flight.returned = true;
        }
    }

    /// Prepares for a new connection, on which all unconfirmed messages are sent again.
    pub fn start_over(&mut self) {
        let unanswered = self.in_flight.drain(..).filter(|in_flight| !in_flight.answered);
        self.to_resend.extend(unanswered.map(|in_flight| in_flight.message));
        self.to_resend.sort_by_key(|message| message.order);
        (self.first_tag, self.spooled_tag, self.bytes) = (1, 0, 0);
        self.is_probing = self.resends_unroutable;
    }

    /// The first message to be sent again.
    pub fn first_to_resend(&self) -> Option<&Message> {
        self.to_resend.first()
    }

    /// Moves the messages to be sent again behind all others in flight, and returns them. While probing, only the first.
    pub fn resend(&mut self) -> Vec<Message> {
        let mut messages = mem::take(&mut self.to_resend);
        if self.is_probing && !messages.is_empty() {
            self.to_resend = messages.split_off(1);
        }
        messages.iter().for_each(|message| self.append(message.clone()));
        messages
    }

    /// Whether a message to be sent again is larger than `limit`.
    pub fn has_larger_than(&self, limit: usize) -> bool {
        self.to_resend.iter().any(|message| message.body.len() > limit)
    }

    /// Splits messages to be sent again that are larger than `limit`. Removes and returns the first one that cannot be
    /// split. All later messages are dropped, because the publisher ends with an error before them.
    pub fn split_to_limit(&mut self, limit: usize) -> Option<Message> {
        let messages = mem::take(&mut self.to_resend).into_iter();
        self.to_resend = messages.flat_map(|message| message.split(limit)).collect();
        let too_large = self.to_resend.iter().position(|message| message.body.len() > limit)?;
        let removed = self.to_resend.split_off(too_large);
        self.counts.withdraw(removed.iter().map(|message| message.records).sum());
        removed.into_iter().next()
    }

    /// With a spool: splits messages to be sent again that are larger than `limit`. Removes and returns those that
    /// cannot be split.
    pub fn drop_larger_than(&mut self, limit: usize) -> Vec<Message> {
        let messages = mem::take(&mut self.to_resend).into_iter();
        let (removed, kept): (Vec<_>, _) = messages
            .flat_map(|message| message.split(limit))
            .partition(|message| message.body.len() > limit);
        self.to_resend = kept;
        self.counts.withdraw(removed.iter().map(|message| message.records).sum());
        removed
    }

    /// The index of the message with this delivery tag; with `multiple`, those of all earlier ones too.
    fn indexes(&self, delivery_tag: u64, multiple: bool) -> Range<usize> {
        let end = delivery_tag.saturating_add(1).saturating_sub(self.first_tag) as usize;
        let start = if multiple { 0 } else { end.saturating_sub(1) };
        start..end.min(self.in_flight.len())
    }

    fn drop_answered(&mut self) {
        while self.in_flight.front().is_some_and(|first| first.answered)
            && let Some(in_flight) = self.in_flight.pop_front()
        {
            self.bytes -= in_flight.message.body.len();
            self.first_tag += 1;
        }
    }

    /// The delivery tag of the last message sent.
    pub fn last_tag(&self) -> u64 {
        self.first_tag + self.in_flight.len() as u64 - 1
    }

    /// Whether the broker has answered the message with this delivery tag and all earlier ones.
    pub fn is_past(&self, delivery_tag: u64) -> bool {
        self.first_tag > delivery_tag
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use logs_common::wire::Packing;

    fn message(number: u64, length: usize) -> Message {
        Message::single(vec![b'x'; length], number)
    }

    fn window(messages: u64) -> Window {
        let mut window = Window::new(Counts::new(true));
        (1..=messages).for_each(|number| window.push(message(number, 10)));
        window
    }

    /// The numbers of the messages in flight, and of those to be sent again.
    fn numbers(window: &Window) -> (Vec<u64>, Vec<u64>) {
        let unanswered = window.in_flight.iter().filter(|in_flight| !in_flight.answered);
        let in_flight = unanswered.map(|in_flight| in_flight.message.number).collect();
        (in_flight, window.to_resend.iter().map(|message| message.number).collect())
    }

    /// Records done, in doubt and unroutable.
    fn counts(window: &Window) -> (u64, u64, u64) {
        let counts = window.counts();
        (counts.done(), counts.in_doubt(), counts.unroutable())
    }

    #[test]
    fn confirms_out_of_order_count_at_once_and_only_once() {
        let mut window = window(4);
        window.confirm(2, false);
        assert_eq!(counts(&window), (1, 3, 0));
        assert_eq!(numbers(&window).0, [1, 3, 4]);
        window.confirm(2, true);
        assert_eq!(counts(&window), (2, 2, 0));
        window.confirm(4, true);
        assert_eq!(counts(&window), (4, 0, 0));
        assert!(window.is_empty());
    }

    #[test]
    fn confirms_of_unknown_messages_change_nothing() {
        let mut window = window(2);
        window.confirm(0, false);
        window.confirm(9, false);
        assert_eq!(counts(&window), (0, 2, 0));
        window.confirm(1, true);
        window.confirm(1, true);
        assert_eq!(counts(&window), (1, 1, 0));
        assert_eq!(numbers(&window).0, [2]);
    }

    #[test]
    fn a_new_connection_skips_confirmed_messages() {
        let mut window = window(5);
        window.confirm(2, true);
        window.confirm(4, false);
        window.start_over();
        assert_eq!(numbers(&window), (vec![], vec![3, 5]));
        assert_eq!((window.bytes, window.last_tag()), (0, 0));
        assert_eq!(window.resend().len(), 2);
        assert_eq!((window.bytes, window.last_tag()), (20, 2));
        window.confirm(1, false);
        assert_eq!(numbers(&window), (vec![5], vec![]));
        assert_eq!(counts(&window), (4, 1, 0));
    }

    #[test]
    fn returned_messages_are_counted_once_they_are_confirmed() {
        let mut window = window(3);
        window.record_return(Some(MessageId { run: 0, number: 2 }));
        window.record_return(Some(MessageId { run: 0, number: 7 }));
        assert_eq!(counts(&window), (0, 3, 0));
        window.confirm(3, true);
        assert_eq!(counts(&window), (3, 0, 1));
        window.push(message(4, 1));
        window.record_return(None);
        window.confirm(4, true);
        assert_eq!(counts(&window), (4, 0, 2));
    }

    #[test]
    fn a_return_on_an_earlier_connection_does_not_count() {
        let mut window = window(3);
        window.record_return(Some(MessageId { run: 0, number: 2 }));
        window.record_return(Some(MessageId { run: 0, number: 3 }));
        window.confirm(2, false);
        assert_eq!(counts(&window), (1, 2, 1));
        window.start_over();
        window.resend();
        window.confirm(2, true);
        assert_eq!(counts(&window), (3, 0, 1));
    }

    #[test]
    fn nacked_messages_are_sent_again() {
        let mut window = window(4);
        window.confirm(2, false);
        window.nack(3, true);
        assert_eq!(window.first_to_resend().map(|message| message.number), Some(1));
        assert_eq!(numbers(&window), (vec![4], vec![1, 3]));
        assert_eq!(counts(&window), (1, 3, 0));
        assert_eq!(window.bytes, 10, "nacked messages take no room");
        assert!(window.is_past(3) && !window.is_past(4));
        let again = window.resend();
        assert_eq!(
            again.iter().map(|m| (m.number, m.body.len())).collect::<Vec<_>>(),
            [(1, 10), (3, 10)]
        );
        assert_eq!((window.last_tag(), window.bytes), (6, 30));
        window.confirm(6, true);
        assert_eq!(counts(&window), (4, 0, 0));
        assert!(window.is_empty());
    }

    #[test]
    fn a_nacked_message_can_be_returned_later() {
        let mut window = window(2);
        window.nack(2, false);
        window.resend();
        window.record_return(Some(MessageId { run: 0, number: 2 }));
        window.confirm(3, true);
        assert_eq!(counts(&window), (2, 0, 1));
    }

    #[test]
    fn a_new_connection_keeps_the_order_of_nacked_messages() {
        let mut window = window(3);
        window.nack(2, false);
        window.start_over();
        assert_eq!(numbers(&window), (vec![], vec![1, 2, 3]));
        assert_eq!(counts(&window), (0, 3, 0));
    }

    #[test]
    fn a_window_has_limits_but_accepts_any_single_message() {
        let full = window(MAX_MESSAGES as u64);
        assert!(!full.has_room_for(&message(1, 0)) && full.is_crowded());
        assert!(window(MAX_MESSAGES as u64 - 1).has_room_for(&message(1, 0)));
        assert!(window(0).has_room_for(&message(1, 10 * MAX_BYTES)));
        assert!(!window(1).has_room_for(&message(1, MAX_BYTES)));
        assert!(window(1).has_room_for(&message(1, MAX_BYTES - 10)));
    }

    #[test]
    fn a_window_to_a_distant_broker_is_larger() {
        let mut window = window(MAX_MESSAGES as u64);
        assert!(!window.has_room_for(&message(1, 0)));
        window.set_round_trip(NEARBY);
        assert_eq!(window.limit(), MAX_MESSAGES);
        window.set_round_trip(Duration::from_millis(50));
        assert!(window.has_room_for(&message(1, 0)));
        assert_eq!(window.limit(), 50 * PER_MILLISECOND);
        window.set_round_trip(Duration::from_secs(5));
        assert_eq!(window.limit(), MAX_FAR_MESSAGES);
    }

    #[test]
    fn a_too_large_message_is_removed_with_later_ones() {
        let mut window = window(2);
        window.push(message(3, 100));
        window.push(message(4, 10));
        window.start_over();
        assert!(window.has_larger_than(50) && !window.has_larger_than(100));
        assert_eq!(window.split_to_limit(50).map(|message| message.number), Some(3));
        assert_eq!(numbers(&window), (vec![], vec![1, 2]));
        assert_eq!(counts(&window), (0, 2, 0));
        assert!(window.split_to_limit(50).is_none());
    }

    #[test]
    fn a_too_large_batch_is_split() {
        let mut window = Window::new(Counts::new(true));
        window.push(Message::joined("1\n2\n3".into(), Packing::Lines, 1));
        window.push(message(4, 3));
        window.start_over();
        assert!(window.split_to_limit(3).is_none());
        assert_eq!(numbers(&window).1, [1, 3, 4]);
        assert_eq!(counts(&window), (0, 4, 0));
        window.resend();
        assert_eq!(window.bytes, 7, "a separator is gone");
    }
}
