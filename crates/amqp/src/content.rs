//! A message is put together from its method, its content header and the parts of its body.

use std::mem;

use crate::Properties;
use crate::frame::Fault;
use crate::message::{Delivery, Return};
use crate::properties::read_properties;

/// The largest body that RabbitMQ can be configured to accept, in bytes.
const LARGEST_BODY: u64 = 512 * 1024 * 1024;

/// Bytes of a content header that are read. The properties beyond are left out.
const LARGEST_HEADER: usize = 4 * 1024 * 1024;

/// A message with content.
#[derive(Debug)]
pub(crate) enum Message {
    Delivery(Box<Delivery>),
    Returned(Box<Return>),
}

impl Message {
    fn parts(&mut self) -> (&mut Vec<u8>, &mut Properties) {
        match self {
            Message::Delivery(delivery) => (&mut delivery.body, &mut delivery.properties),
            Message::Returned(returned) => (&mut returned.content, &mut returned.properties),
        }
    }
}

/// Puts messages together, one after another.
#[derive(Default)]
pub(crate) struct Assembler {
    state: State,
    /// Whether the properties of an earlier message were repaired.
    has_repaired: bool,
}

#[derive(Default)]
enum State {
    #[default]
    Idle,
    /// The content header is next, or arrives in parts.
    Header { message: Message, header: Vec<u8> },
    /// A body of `size` bytes is next, of which `length` have arrived.
    Body { message: Message, size: usize, length: usize },
}

impl Assembler {
    /// Begins a message.
    ///
    /// # Errors
    ///
    /// When the message before is not complete.
    pub fn begin(&mut self, message: Message) -> Result<(), Fault> {
        let header = Vec::new();
        match mem::replace(&mut self.state, State::Header { message, header }) {
            State::Idle => Ok(()),
            _ => Err(Fault::Frame("a message in the middle of another".into())),
        }
    }

    /// Adds a part of the content header. Returns the message if it is complete, as without a body.
    ///
    /// # Errors
    ///
    /// A content header without a message, or that is not sound.
    pub fn add_header(&mut self, part: &[u8], is_last: bool) -> Result<Option<Message>, Fault> {
        let State::Header { header, .. } = &mut self.state else {
            return Err(Fault::Frame("a content header without a message".into()));
        };
        if !is_last || !header.is_empty() {
            let room = LARGEST_HEADER - header.len();
            header.extend_from_slice(&part[..part.len().min(room)]);
        }
        if !is_last {
            return Ok(None);
        }
        let State::Header { mut message, header } = mem::take(&mut self.state) else {
            return Ok(None);
        };
        let header = if header.is_empty() { part } else { &header };
        // Class and weight, then the size of the body; flags and properties.
        let Some((&[_, _, _, _, ref size @ ..], properties)) = header.split_first_chunk::<12>()
        else {
            return Err(Fault::Frame("a frame that is cut off".into()));
        };
        let size = u64::from_be_bytes(*size);
        if size > LARGEST_BODY {
            return Err(Fault::Frame(format!("a message of {size} bytes")));
        }
        let size = size as usize;
        let (body, target) = message.parts();
        // A body that grows would be copied, and leave holes in the heap. Room that is not used costs no memory; if
        // there is none, the body grows as it arrives.
        let _ = body.try_reserve_exact(size);
        let read = read_properties(properties, target);
        if read.is_repaired && !mem::replace(&mut self.has_repaired, true) {
            log::warn!(
                "a message has properties that cannot be read as they are: they are repaired or left out"
            );
        }
        if let Message::Delivery(delivery) = &mut message {
            delivery.memory = read.memory + size;
        }
        if size == 0 {
            return Ok(Some(message));
        }
        self.state = State::Body { message, size, length: 0 };
        Ok(None)
    }

    /// Adds a part of the body; `is_dropped` if the message will be dropped. Returns the message if it is complete.
    ///
    /// # Errors
    ///
    /// A body without a message, or that is longer than announced.
    pub fn add_body(&mut self, part: &[u8], is_dropped: bool) -> Result<Option<Message>, Fault> {
        let State::Body { message, size, length } = &mut self.state else {
            return match part {
                // An empty frame belongs to no message.
                [] => Ok(None),
                _ => Err(Fault::Frame("a body without a message".into())),
            };
        };
        *length += part.len();
        if *length > *size {
            return Err(Fault::Frame("a body that is longer than announced".into()));
        }
        let (body, _) = message.parts();
        match is_dropped {
            true => *body = Vec::new(),
            false => body.extend_from_slice(part),
        }
        if length < size {
            return Ok(None);
        }
        match mem::take(&mut self.state) {
            State::Body { message, .. } => Ok(Some(message)),
            _ => Ok(None),
        }
    }

    /// Bytes held of an incomplete message.
    pub fn held(&self) -> usize {
        match &self.state {
            State::Idle => 0,
            State::Header { header, .. } => header.len(),
            // All that the delivery will take, except the part of the body that is still to come.
            State::Body { message: Message::Delivery(delivery), size, .. } => {
                delivery.memory - size + delivery.body.len()
            }
            State::Body { message: Message::Returned(_), .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Value;

    fn delivery() -> Message {
        Message::Delivery(Box::default())
    }

    fn header(size: u64, properties: &[u8]) -> Vec<u8> {
        [&[0, 60, 0, 0], &size.to_be_bytes()[..], properties].concat()
    }

    /// The message with this header and body, which arrive in parts of `part` bytes.
    fn assemble(header: &[u8], body: &[u8], part: usize) -> Result<Option<Delivery>, Fault> {
        let mut assembler = Assembler::default();
        assembler.begin(delivery())?;
        let (mut complete, mut rest) = (None, header);
        while !rest.is_empty() {
            let (next, after) = rest.split_at(part.min(rest.len()));
            rest = after;
            complete = assembler.add_header(next, rest.is_empty())?;
        }
        for part in body.chunks(part) {
            assert!(complete.is_none());
            complete = assembler.add_body(part, false)?;
        }
        Ok(complete.map(|message| match message {
            Message::Delivery(delivery) => *delivery,
            Message::Returned(_) => panic!("a delivery was begun"),
        }))
    }

    #[test]
    fn a_message_is_put_together_from_parts_of_any_size() {
        let headers =
            [&[0x20, 0][..], &100_000_u32.to_be_bytes(), b"\x01kS\0\x01\x86\x99"].concat();
        let headers = [headers, vec![b'h'; 99_993]].concat();
        for part in [1, 7, 1000, 1_000_000] {
            let delivery = assemble(&header(9, &headers), b"a message", part).unwrap().unwrap();
            assert_eq!(delivery.body, b"a message");
            let headers = delivery.properties.headers().as_ref().unwrap();
            assert!(matches!(&headers["k"], Value::LongString(text) if text.len() == 99_993));
            assert!(delivery.memory > 100_000);
        }
    }

    #[test]
    fn the_end_of_a_huge_header_is_left_out() {
        let text = vec![b'h'; 2 * LARGEST_HEADER];
        let value = [&b"\x01aV\x01kS"[..], &(text.len() as u32).to_be_bytes(), &text].concat();
        let headers = [&[0x20, 0][..], &(value.len() as u32).to_be_bytes(), &value].concat();
        let delivery = assemble(&header(0, &headers), b"", 100_000).unwrap().unwrap();
        assert_eq!(delivery.properties.headers().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn frames_that_do_not_belong_together_are_a_fault() {
        let mut assembler = Assembler::default();
        assert!(assembler.add_header(&header(1, &[0; 2]), true).is_err(), "no message");
        assert!(assembler.add_body(b"a", false).is_err(), "no message");
        assert!(matches!(assembler.add_body(b"", false), Ok(None)));
        assembler.begin(delivery()).unwrap();
        assert!(assembler.begin(delivery()).is_err());
        for (header, body) in [
            (header(1, &[0; 2]), &b"ab"[..]),
            (header(LARGEST_BODY + 1, &[0; 2]), b""),
            (header(u64::MAX, &[0; 2]), b""),
            (vec![0; 11], b""),
        ] {
            assert!(matches!(assemble(&header, body, 100), Err(Fault::Frame(_))), "{header:?}");
        }
    }

    #[test]
    fn an_incomplete_message_is_counted() {
        let mut assembler = Assembler::default();
        assembler.begin(delivery()).unwrap();
        assembler.add_header(&header(1000, &[0; 2]), true).unwrap();
        let before = assembler.held();
        assembler.add_body(&[0; 400], false).unwrap();
        assert_eq!(assembler.held(), before + 400);
        assembler.add_body(&[0; 600], false).unwrap();
        assert_eq!(assembler.held(), 0);
    }
}
