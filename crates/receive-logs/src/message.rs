//! A delivery, and the records of it that are written.

use std::ops::Range;

use amqp::{Delivery, Properties, Value};
use logs_common::wire::{FILE, HOST, Layout};

/// A delivery and its records: one, or those of a batch.
pub struct Message {
    /// The delivery.
    pub delivery: Box<Delivery>,
    /// How the records are joined, their count, and the number of the first one.
    pub layout: Layout,
    /// The indices of the records to write, from 0.
    selected: Range<u64>,
}

impl Message {
    /// Selects all records of the delivery.
    pub fn new(delivery: Box<Delivery>) -> Message {
        let layout = Layout::of(&delivery.properties, &delivery.body);
        Message { delivery, layout, selected: 0..layout.records }
    }

    /// Selects no record.
    pub fn skip_all(&mut self) {
        self.selected.start = self.selected.end;
    }

    /// Skips the first `count` of the selected records, or all if there are fewer. Returns how many are skipped.
    pub fn skip(&mut self, count: u64) -> u64 {
        let skipped = count.min(self.selected.end - self.selected.start);
        self.selected.start += skipped;
        skipped
    }

    /// The selected records, each with its index in the message.
    pub fn selected(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let records = self.layout.packing.records(&self.delivery.body);
        self.selected.clone().zip(records.skip(self.selected.start as usize))
    }
}

/// The machine that sent a message, if the header [`HOST`] names it.
pub fn host(properties: &Properties) -> Option<&str> {
    text_header(properties, HOST)
}

/// The file that has the record, if the header [`FILE`] names it.
pub fn file(properties: &Properties) -> Option<&str> {
    text_header(properties, FILE)
}

fn text_header<'a>(properties: &'a Properties, name: &str) -> Option<&'a str> {
    match properties.headers().as_ref()?.get(name)? {
        Value::LongString(text) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{delivery, lines};

    fn selected(message: &Message) -> Vec<(u64, &str)> {
        let text = |(index, record)| (index, str::from_utf8(record).unwrap());
        message.selected().map(text).collect()
    }

    #[test]
    fn records_are_selected_by_index() {
        let mut message = Message::new(delivery(lines(4, "a")));
        assert_eq!(selected(&message).len(), 4);
        assert_eq!(message.skip(1), 1);
        assert_eq!(selected(&message), [(1, "a"), (2, "a"), (3, "a")]);
        assert_eq!(message.skip(4), 3);
        assert_eq!(selected(&message), []);
    }

    #[test]
    fn a_message_of_another_program_is_one_record() {
        let mut message = Message::new(delivery(logs_tests::Message::new("a\nb")));
        assert_eq!(selected(&message), [(0, "a\nb")]);
        message.skip_all();
        assert_eq!(selected(&message), []);
    }
}
