//! What the broker has not confirmed yet.

use std::collections::VecDeque;
use std::mem;
use std::ops::Range;

use bytes::{Buf, Bytes};
use logs_common::wire::Packing;
use memchr::{memchr, memchr_iter, memrchr};

/// More messages in flight are not faster, and each may have to be sent again.
const MESSAGES: usize = 2000;

/// With more than these, it is better to wait until some are confirmed.
const CROWD: usize = MESSAGES / 4 * 3;

/// Bytes in flight; a single larger message is let through.
const BYTES: usize = 2 * 1024 * 1024;

/// A message to be published.
#[derive(Clone, Debug)]
pub struct Message {
    /// What is sent, byte for byte.
    pub body: Bytes,
    /// How the records are put into it.
    pub packing: Packing,
    /// How many they are.
    pub records: u64,
    /// The number of the first of them in this run, from 1.
    pub number: u64,
}

impl Message {
    /// The same records in messages that are no larger than `limit`, where no record is.
    pub fn split(self, limit: usize) -> Vec<Message> {
        let Some(separator) = self.packing.separator() else {
            return vec![self];
        };
        let mut pieces = Vec::new();
        let (mut rest, mut number) = (self.body, self.number);
        loop {
            let end = match rest.get(..=limit) {
                None => None,
                Some(within) => memrchr(separator, within).or_else(|| memchr(separator, &rest)),
            };
            let body = rest.split_to(end.unwrap_or(rest.len()));
            let records = memchr_iter(separator, &body).count() as u64 + 1;
            let packing = if records == 1 { Packing::Single } else { self.packing };
            pieces.push(Message { body, packing, records, number });
            if end.is_none() {
                return pieces;
            }
            number += records;
            rest.advance(1);
        }
    }
}

/// A message on its way.
struct InFlight {
    message: Message,
    confirmed: bool,
    unheard: bool,
}

impl InFlight {
    fn new(message: Message) -> InFlight {
        InFlight { message, confirmed: false, unheard: false }
    }
}

/// Records that are done with.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// All of them.
    pub records: u64,
    /// Those of them that no queue took.
    pub unheard: u64,
}

impl Settled {
    fn add(&mut self, in_flight: &InFlight) {
        self.records += in_flight.message.records;
        self.unheard += if in_flight.unheard { in_flight.message.records } else { 0 };
    }
}

/// Messages in the order sent. Their delivery tags are consecutive.
pub struct Window {
    messages: VecDeque<InFlight>,
    /// Messages that have to be sent again.
    refused: Vec<Message>,
    first_tag: u64,
    bytes: usize,
    records: u64,
}

impl Window {
    /// Nothing sent.
    pub fn new() -> Window {
        Window {
            messages: VecDeque::new(),
            refused: Vec::new(),
            first_tag: 1,
            bytes: 0,
            records: 0,
        }
    }

    /// Whether all is confirmed.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty() && self.refused.is_empty()
    }

    /// Records in all messages that are not confirmed.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Whether another message may be sent before some are confirmed.
    pub fn has_room_for(&self, message: &Message) -> bool {
        let fits = self.bytes + message.body.len() <= BYTES && self.messages.len() < MESSAGES;
        fits || self.messages.is_empty()
    }

    /// Whether so many messages are in flight that there is room for few.
    pub fn is_crowded(&self) -> bool {
        self.messages.len() > CROWD
    }

    /// Notes that a message is sent.
    pub fn push(&mut self, message: Message) {
        self.bytes += message.body.len();
        self.records += message.records;
        self.messages.push_back(InFlight::new(message));
    }

    /// Strikes off the message with this delivery tag, or all up to it, and returns how many records
    /// that ends.
    pub fn settle(&mut self, delivery_tag: u64, multiple: bool) -> Settled {
        let mut settled = Settled::default();
        for index in self.indexes(delivery_tag, multiple) {
            let in_flight = &mut self.messages[index];
            if !in_flight.confirmed {
                in_flight.confirmed = true;
                settled.add(in_flight);
            }
        }
        self.records -= settled.records;
        self.drop_confirmed();
        settled
    }

    /// Strikes off all messages.
    pub fn settle_all(&mut self) -> Settled {
        self.settle(self.last_tag(), true)
    }

    /// Notes that a queue refused the message with this delivery tag, or all up to it.
    pub fn refuse(&mut self, delivery_tag: u64, multiple: bool) {
        for index in self.indexes(delivery_tag, multiple) {
            let in_flight = &mut self.messages[index];
            if !in_flight.confirmed {
                self.refused.push(in_flight.message.clone());
                // It stays in its place, as that stands for its tag, but takes no room.
                self.bytes -= in_flight.message.body.len();
                in_flight.message.body = Bytes::new();
                in_flight.confirmed = true;
            }
        }
        // A broker may refuse in any order.
        self.refused.sort_by_key(|message| message.number);
        self.drop_confirmed();
    }

    /// The first message that a queue refused.
    pub fn first_refused(&self) -> Option<&Message> {
        self.refused.first()
    }

    /// Puts the messages that a queue refused behind all others, and returns them, to be sent again.
    pub fn requeue_refused(&mut self) -> Vec<Message> {
        let refused = mem::take(&mut self.refused);
        for message in &refused {
            self.bytes += message.body.len();
            self.messages.push_back(InFlight::new(message.clone()));
        }
        refused
    }

    /// Where the message with this delivery tag is, or all up to it are.
    fn indexes(&self, delivery_tag: u64, multiple: bool) -> Range<usize> {
        let end = delivery_tag.saturating_add(1).saturating_sub(self.first_tag) as usize;
        let start = if multiple { 0 } else { end.saturating_sub(1) };
        start..end.min(self.messages.len())
    }

    /// Gives up the places of confirmed messages, except behind an unconfirmed one: the place of a
    /// message stands for its delivery tag.
    fn drop_confirmed(&mut self) {
        let is_settled = |front: Option<&InFlight>| front.is_some_and(|front| front.confirmed);
        while is_settled(self.messages.front())
            && let Some(in_flight) = self.messages.pop_front()
        {
            self.bytes -= in_flight.message.body.len();
            self.first_tag += 1;
        }
    }

    /// The delivery tag of the message sent last.
    pub fn last_tag(&self) -> u64 {
        self.first_tag + self.messages.len() as u64 - 1
    }

    /// Whether the message with this delivery tag is at an end, and all before it.
    pub fn is_past(&self, delivery_tag: u64) -> bool {
        self.first_tag > delivery_tag
    }

    /// Notes that no queue took the message with this number; without one, the first.
    pub fn mark_unheard(&mut self, number: Option<u64>) {
        let mut messages = self.messages.iter_mut();
        let found = match number {
            // One that a queue refused leaves its place behind, and comes again under its number.
            Some(number) => messages
                .find(|in_flight| in_flight.message.number == number && !in_flight.confirmed),
            None => messages.next(),
        };
        if let Some(in_flight) = found {
            in_flight.unheard = true;
        }
    }

    /// Prepares for another session, in which all that is not confirmed is sent again in the
    /// order of numbers.
    pub fn start_over(&mut self) {
        let in_flight = mem::take(&mut self.messages).into_iter();
        let unconfirmed = in_flight.filter(|in_flight| !in_flight.confirmed);
        let mut again: Vec<_> = unconfirmed.map(|in_flight| in_flight.message).collect();
        again.append(&mut self.refused);
        again.sort_by_key(|message| message.number);
        self.messages = again.into_iter().map(InFlight::new).collect();
        self.first_tag = 1;
        self.recount();
    }

    /// Whether there is a message larger than `limit`.
    pub fn has_larger_than(&self, limit: usize) -> bool {
        self.messages.iter().any(|in_flight| in_flight.message.body.len() > limit)
    }

    /// Takes messages larger than `limit` apart that have several records.
    pub fn split_larger_than(&mut self, limit: usize) {
        let messages = mem::take(&mut self.messages).into_iter();
        self.messages = messages
            .flat_map(|InFlight { message, .. }| match message.body.len() > limit {
                true => message.split(limit),
                false => vec![message],
            })
            .map(InFlight::new)
            .collect();
        self.recount();
    }

    /// Takes the first message larger than `limit` out, and all that come after it.
    pub fn cut_at_larger_than(&mut self, limit: usize) -> Option<Message> {
        let index = self.messages.iter().position(|m| m.message.body.len() > limit)?;
        let refused = self.messages.drain(index..).next()?;
        self.recount();
        Some(refused.message)
    }

    fn recount(&mut self) {
        let messages = || self.messages.iter().map(|in_flight| &in_flight.message);
        self.bytes = messages().map(|message| message.body.len()).sum();
        self.records = messages().map(|message| message.records).sum();
    }

    /// The messages that are not confirmed, in the order sent.
    pub fn unconfirmed(&self) -> impl Iterator<Item = &Message> {
        let in_flight = self.messages.iter().filter(|in_flight| !in_flight.confirmed);
        in_flight.map(|in_flight| &in_flight.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(number: u64, length: usize) -> Message {
        Message { body: vec![b'x'; length].into(), packing: Packing::Single, records: 1, number }
    }

    fn window(messages: u64) -> Window {
        let mut window = Window::new();
        (1..=messages).for_each(|number| window.push(message(number, 10)));
        window
    }

    fn numbers(window: &Window) -> Vec<u64> {
        window.unconfirmed().map(|message| message.number).collect()
    }

    #[test]
    fn what_is_confirmed_out_of_order_counts_at_once_and_only_once() {
        let mut window = window(4);
        assert_eq!((window.settle(2, false).records, window.records()), (1, 3));
        assert_eq!(numbers(&window), [1, 3, 4]);
        assert_eq!((window.settle(2, true).records, window.records()), (1, 2));
        assert_eq!(window.settle(4, true).records, 2);
        assert!(window.is_empty());
    }

    #[test]
    fn confirmations_of_nothing_change_nothing() {
        let mut window = window(2);
        assert_eq!(window.settle(0, false).records, 0);
        assert_eq!(window.settle(9, false).records, 0);
        assert_eq!(window.settle(1, true).records, 1);
        assert_eq!(window.settle(1, true).records, 0);
        assert_eq!(numbers(&window), [2]);
    }

    #[test]
    fn a_new_session_counts_from_one_and_leaves_out_what_is_confirmed() {
        let mut window = window(5);
        window.settle(2, true);
        window.settle(4, false);
        window.start_over();
        assert_eq!(numbers(&window), [3, 5]);
        assert_eq!(window.bytes, 20);
        assert_eq!(window.settle(1, false).records, 1);
        assert_eq!(numbers(&window), [5]);
    }

    #[test]
    fn what_nobody_heard_is_counted_once_it_is_confirmed() {
        let mut window = window(3);
        window.mark_unheard(Some(2));
        window.mark_unheard(Some(7));
        assert_eq!(window.settle(3, true), Settled { records: 3, unheard: 1 });
        window.push(message(4, 1));
        window.mark_unheard(None);
        assert_eq!(window.settle(4, true), Settled { records: 1, unheard: 1 });
    }

    #[test]
    fn what_is_confirmed_out_of_order_does_not_count_again_when_it_starts_over() {
        let mut window = window(3);
        window.mark_unheard(Some(2));
        assert_eq!(window.settle(2, false), Settled { records: 1, unheard: 1 });
        window.start_over();
        assert_eq!(window.records(), 2);
        assert_eq!(window.settle(2, true), Settled { records: 2, unheard: 0 });
    }

    #[test]
    fn what_is_refused_is_sent_again() {
        let mut window = window(4);
        window.settle(2, false);
        window.refuse(3, true);
        assert_eq!(window.first_refused().unwrap().number, 1);
        assert_eq!((numbers(&window), window.records()), (vec![4], 3));
        assert!(window.is_past(3) && !window.is_past(4));
        let again = window.requeue_refused();
        assert_eq!(
            again.iter().map(|m| (m.number, m.body.len())).collect::<Vec<_>>(),
            [(1, 10), (3, 10)]
        );
        assert_eq!((window.last_tag(), window.records(), window.bytes), (6, 3, 30));
        assert_eq!(window.settle(6, true).records, 3);
        assert!(window.is_empty());
    }

    #[test]
    fn what_is_refused_is_not_forgotten_when_it_starts_over() {
        let mut window = window(3);
        window.refuse(2, false);
        window.start_over();
        assert_eq!((numbers(&window), window.records()), (vec![1, 2, 3], 3));
        assert!(window.first_refused().is_none());
    }

    #[test]
    fn it_is_bounded_in_messages_and_bytes_but_takes_any_single_message() {
        let full = window(MESSAGES as u64);
        assert!(!full.has_room_for(&message(1, 0)));
        assert!(window(MESSAGES as u64 - 1).has_room_for(&message(1, 0)));
        assert!(window(0).has_room_for(&message(1, 10 * BYTES)));
        assert!(!window(1).has_room_for(&message(1, BYTES)));
        assert!(window(1).has_room_for(&message(1, BYTES - 10)));
    }

    #[test]
    fn a_message_too_large_is_cut_out_with_all_after_it() {
        let mut window = window(2);
        window.push(message(3, 100));
        window.push(message(4, 10));
        assert_eq!(window.cut_at_larger_than(50).unwrap().number, 3);
        assert_eq!(numbers(&window), [1, 2]);
        assert!(window.cut_at_larger_than(50).is_none());
    }

    #[test]
    fn a_batch_that_is_too_large_is_split_between_its_records() {
        let batch = |body: &'static str, number| Message {
            body: body.into(),
            packing: Packing::Lines,
            records: body.matches('\n').count() as u64 + 1,
            number,
        };
        let split = |body, limit| -> Vec<_> {
            let pieces = batch(body, 7).split(limit);
            let body = |piece: &Message| String::from_utf8(piece.body.to_vec()).unwrap();
            pieces.iter().map(|piece| (piece.number, piece.records, body(piece))).collect()
        };
        let piece = |number, records, body: &str| (number, records, body.to_string());
        assert_eq!(split("a\nb\nc\nd", 3), [piece(7, 2, "a\nb"), piece(9, 2, "c\nd")]);
        assert_eq!(
            split("a\nbbbbb\n\n", 3),
            [piece(7, 1, "a"), piece(8, 1, "bbbbb"), piece(9, 2, "\n")]
        );
        assert_eq!(split("aaaa", 3), [piece(7, 1, "aaaa")]);
        assert_eq!(split("aaaa\n", 4), [piece(7, 1, "aaaa"), piece(8, 1, "")]);

        let mut window = Window::new();
        window.push(batch("1\n2\n3", 1));
        window.push(message(4, 100));
        window.split_larger_than(3);
        assert_eq!(numbers(&window), [1, 3, 4]);
        assert_eq!((window.records(), window.bytes), (4, 104), "a separator is gone");
        assert_eq!(window.cut_at_larger_than(3).unwrap().number, 4);
        assert_eq!((numbers(&window), window.records(), window.bytes), (vec![1, 3], 3, 4));
    }
}
