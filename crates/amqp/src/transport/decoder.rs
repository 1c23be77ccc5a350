//! Received frames: messages and confirmations for the program, all others for amiquip.

use std::mem;

use super::encoder::Answers;
use super::frame_filter::{
    BODY, CANCEL, DELIVER, Fault, HEADER, METHOD, RETURN, comes_in_parts, is_close_of,
};
use super::properties::{read_properties, read_text, take, take_short};
use super::wire::Inbox;
use crate::{Delivery, Event, Properties, Return};

const ACK: [u8; 4] = [0, 60, 0, 80];
const NACK: [u8; 4] = [0, 60, 0, 120];
const BLOCKED: [u8; 4] = [0, 10, 0, 60];
const UNBLOCKED: [u8; 4] = [0, 10, 0, 61];

/// The room to make for a body at once, in bytes: a broker may announce more than it sends.
const BODY_ROOM: usize = 1024 * 1024;

/// The largest body of a message that RabbitMQ can be set up to take, in bytes.
const LARGEST_BODY: u64 = 512 * 1024 * 1024;

/// Bytes of a content header that are read. What is beyond is skipped, with the properties in it.
const LARGEST_HEADER: usize = 4 * 1024 * 1024;

/// What the broker sends to the program.
#[derive(Debug)]
pub enum Inbound {
    /// A message for the consumer.
    Delivery(Box<Delivery>),
    /// An event for the publisher.
    Event(Event),
    /// The broker has cancelled the consumer.
    Cancelled,
}

/// Takes frames apart that the filter has let through.
#[derive(Default)]
pub struct Decoder {
    /// Bytes that are still to come of a frame that comes in parts, its end included.
    rest: usize,
    /// The kind of that frame.
    kind: u8,
    /// A content header, as far as it has come.
    header: Vec<u8>,
    /// The message that is coming.
    content: Option<Content>,
    /// Whether the properties of a message had to be repaired.
    has_repaired: bool,
}

/// A message, how large its body will be, and how much of that has come; nothing is known of the size before the
/// content header.
struct Content {
    message: Message,
    size: Option<usize>,
    length: usize,
}

enum Message {
    Delivery(Box<Delivery>),
    Returned(Box<Return>),
}

impl Decoder {
    /// Takes the next bytes: whole frames, except those that [come in parts](comes_in_parts).
    ///
    /// # Errors
    ///
    /// When the frames of a message do not belong together.
    pub fn decode(
        &mut self,
        mut bytes: &[u8],
        for_amiquip: &mut Vec<u8>,
        inbox: &mut Inbox,
        answers: &mut Answers,
    ) -> Result<(), Fault> {
        while !bytes.is_empty() {
            if self.rest > 0 {
                let (part, after) = bytes.split_at(self.rest.min(bytes.len()));
                self.rest -= part.len();
                let is_last = self.rest == 0;
                // The last byte is the end of the frame.
                let part = &part[..part.len() - usize::from(is_last)];
                match self.kind {
                    BODY => self.add_to_body(part, inbox),
                    _ => self.add_to_header(part, is_last, inbox)?,
                }
                bytes = after;
                continue;
            }
            let &[kind, c0, c1, ref size @ ..] = bytes.first_chunk::<HEADER>().ok_or_else(cut)?;
            let size = u32::from_be_bytes(*size) as usize;
            if comes_in_parts(kind) {
                if kind == BODY {
                    self.check_body(size)?;
                }
                (self.kind, self.rest) = (kind, size + 1);
                bytes = &bytes[HEADER..];
                continue;
            }
            let (frame, after) = bytes.split_at_checked(HEADER + size + 1).ok_or_else(cut)?;
            let payload = &frame[HEADER..HEADER + size];
            let channel = u16::from_be_bytes([c0, c1]);
            let is_taken = kind == METHOD && self.take_method(channel, payload, inbox, answers)?;
            if !is_taken {
                for_amiquip.extend_from_slice(frame);
            }
            bytes = after;
        }
        Ok(())
    }

    /// Returns whether amiquip is not to get this method.
    fn take_method(
        &mut self,
        channel: u16,
        payload: &[u8],
        inbox: &mut Inbox,
        answers: &mut Answers,
    ) -> Result<bool, Fault> {
        let Some((id, arguments)) = payload.split_first_chunk::<4>() else {
            return Err(cut());
        };
        let unsound = || Fault::Frame(format!("method {}.{}", id[1], id[3]));
        match *id {
            DELIVER => {
                let delivery = read_delivery(arguments).ok_or_else(unsound)?;
                self.begin(Message::Delivery(Box::new(delivery)))?;
            }
            RETURN => {
                let returned = read_return(arguments).ok_or_else(unsound)?;
                self.begin(Message::Returned(Box::new(returned)))?;
            }
            ACK | NACK => {
                let (tag, rest) = arguments.split_first_chunk().ok_or_else(unsound)?;
                let tag = u64::from_be_bytes(*tag);
                let multiple = rest.first().ok_or_else(unsound)? & 1 != 0;
                inbox.push(Inbound::Event(match *id {
                    ACK => Event::Confirmed { tag, multiple },
                    _ => Event::Refused { tag, multiple },
                }));
            }
            BLOCKED => {
                let reason = take_short(&mut &*arguments).ok_or_else(unsound)?;
                inbox.push(Inbound::Event(Event::Blocked(read_text(reason))));
            }
            UNBLOCKED => inbox.push(Inbound::Event(Event::Unblocked)),
            CANCEL => {
                inbox.push(Inbound::Cancelled);
                return Ok(false);
            }
            _ if is_close_of(channel, id) => {
                inbox.is_over = true;
                return Ok(false);
            }
            _ => return Ok(answers.take(channel, id)),
        }
        Ok(true)
    }

    fn begin(&mut self, message: Message) -> Result<(), Fault> {
        match self.content.replace(Content { message, size: None, length: 0 }) {
            None => Ok(()),
            Some(_) => Err(Fault::Frame("a message in the middle of another".into())),
        }
    }

    /// Takes the next part of a content header.
    fn add_to_header(
        &mut self,
        part: &[u8],
        is_last: bool,
        inbox: &mut Inbox,
    ) -> Result<(), Fault> {
        if is_last && self.header.is_empty() {
            return self.take_content_header(part, inbox);
        }
        let room = LARGEST_HEADER - self.header.len();
        self.header.extend_from_slice(&part[..part.len().min(room)]);
        if is_last {
            let header = mem::take(&mut self.header);
            self.take_content_header(&header, inbox)?;
        }
        Ok(())
    }

    fn take_content_header(&mut self, header: &[u8], inbox: &mut Inbox) -> Result<(), Fault> {
        let Some(Content { message, size: known @ None, .. }) = &mut self.content else {
            return Err(Fault::Frame("a content header without a message".into()));
        };
        // Class, weight, size of the body; flags and properties.
        let (head, properties) = header.split_first_chunk::<12>().ok_or_else(cut)?;
        let &[_, _, _, _, size @ ..] = head;
        let size = u64::from_be_bytes(size);
        if size > LARGEST_BODY {
            return Err(Fault::Frame(format!("a message of {size} bytes")));
        }
        let size = size as usize;
        let read = read_properties(properties);
        if read.is_repaired && !mem::replace(&mut self.has_repaired, true) {
            log::warn!(
                "a message has properties that cannot be read as they are: they are repaired or left out"
            );
        }
        let (body, properties) = message.parts();
        *properties = read.value;
        body.reserve_exact(size.min(BODY_ROOM));
        *known = Some(size);
        if let Message::Delivery(delivery) = message {
            delivery.memory = read.memory + size;
        }
        self.complete(inbox);
        Ok(())
    }

    /// Checks that a part of a body, with so many bytes, belongs to the message that is coming.
    fn check_body(&mut self, length: usize) -> Result<(), Fault> {
        match &self.content {
            // An empty part is of no message.
            _ if length == 0 => Ok(()),
            Some(Content { size: Some(size), length: before, .. }) if before + length <= *size => {
                Ok(())
            }
            Some(Content { size: Some(_), .. }) => {
                Err(Fault::Frame("a body that is longer than announced".into()))
            }
            _ => Err(Fault::Frame("a body without a message".into())),
        }
    }

    fn add_to_body(&mut self, bytes: &[u8], inbox: &mut Inbox) {
        let Some(Content { message, size: Some(size), length }) = &mut self.content else {
            return;
        };
        *length += bytes.len();
        let (body, _) = message.parts();
        if inbox.is_dropping {
            *body = Vec::new();
        } else {
            if *length > body.capacity() {
                // A vector would take up to twice the size by itself.
                let capacity = (*length).max(2 * body.capacity()).min(*size);
                body.reserve_exact(capacity - body.len());
            }
            body.extend_from_slice(bytes);
        }
        self.complete(inbox);
    }

    /// Hands on the message if all of it has come.
    fn complete(&mut self, inbox: &mut Inbox) {
        let is_complete = |content: &mut Content| content.size == Some(content.length);
        match self.content.take_if(is_complete).map(|content| content.message) {
            Some(Message::Delivery(delivery)) => inbox.deliver(delivery),
            Some(Message::Returned(returned)) => {
                inbox.push(Inbound::Event(Event::Returned(returned)));
            }
            None => {}
        }
    }

    /// Bytes held of a message that has not come as a whole.
    pub fn held(&self) -> usize {
        let content = match &self.content {
            Some(Content { message: Message::Delivery(delivery), size: Some(size), .. }) => {
                // All that the delivery will take, except the part of the body that is still to come.
                delivery.memory - size + delivery.body.len()
            }
            _ => 0,
        };
        self.header.len() + content
    }
}

impl Message {
    fn parts(&mut self) -> (&mut Vec<u8>, &mut Properties) {
        match self {
            Message::Delivery(delivery) => (&mut delivery.body, &mut delivery.properties),
            Message::Returned(returned) => (&mut returned.content, &mut returned.properties),
        }
    }
}

/// The arguments of `basic.deliver`: consumer tag, delivery tag, redelivered, exchange, routing key.
fn read_delivery(mut arguments: &[u8]) -> Option<Delivery> {
    take_short(&mut arguments)?;
    let &[ref tag @ .., redelivered] = take(&mut arguments, 9)?.first_chunk::<9>()?;
    Some(Delivery {
        tag: u64::from_be_bytes(*tag),
        redelivered: redelivered & 1 != 0,
        exchange: read_text(take_short(&mut arguments)?),
        routing_key: read_text(take_short(&mut arguments)?),
        properties: Properties::default(),
        body: Vec::new(),
        memory: 0,
    })
}

/// The arguments of `basic.return`: reply code, reply text, exchange, routing key.
fn read_return(mut arguments: &[u8]) -> Option<Return> {
    take(&mut arguments, 2)?;
    let reply_text = read_text(take_short(&mut arguments)?);
    Some(Return { reply_text, content: Vec::new(), properties: Properties::default() })
}

fn cut() -> Fault {
    Fault::Frame("a frame that is cut off".into())
}

#[cfg(test)]
mod tests {
    use super::super::frame_filter::{CONTENT_HEADER, FRAME_END};
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = (payload.len() as u32).to_be_bytes();
        [&[kind, 0, 1], &size[..], payload, &[FRAME_END]].concat()
    }

    fn deliver(routing_key: &[u8]) -> Vec<u8> {
        let names = [&[4][..], b"logs", &[routing_key.len() as u8], routing_key].concat();
        frame(METHOD, &[&DELIVER[..], b"\x03tag", &[0; 9], &names].concat())
    }

    fn content_header(size: u64, properties: &[u8]) -> Vec<u8> {
        frame(CONTENT_HEADER, &[&[0, 60, 0, 0], &size.to_be_bytes()[..], properties].concat())
    }

    /// The messages in these frames, which come in parts of so many bytes where that is allowed.
    fn decode(frames: &[Vec<u8>], part: usize) -> Result<Vec<Inbound>, Fault> {
        let (mut decoder, mut inbox) = (Decoder::default(), Inbox::default());
        let mut decode = |bytes: &[u8]| {
            decoder.decode(bytes, &mut Vec::new(), &mut inbox, &mut Answers::default())
        };
        for frame in frames {
            match comes_in_parts(frame[0]) {
                true => {
                    let (header, rest) = frame.split_at(HEADER);
                    decode(header)?;
                    rest.chunks(part).try_for_each(&mut decode)?;
                }
                false => decode(frame)?,
            }
        }
        assert_eq!(decoder.held(), 0);
        Ok(inbox.messages.into())
    }

    #[test]
    fn a_message_is_put_together_from_parts_of_any_size() {
        let headers =
            [&[0x20, 0][..], &100_000_u32.to_be_bytes(), b"\x01kS\0\x01\x86\x99"].concat();
        let headers = [headers, vec![b'h'; 99_993]].concat();
        let body = b"a message";
        let frames = [
            deliver(b"\xffkey"),
            content_header(body.len() as u64, &headers),
            frame(BODY, &body[..4]),
            frame(BODY, &body[4..]),
        ];
        for part in [1, 7, 1000, 1_000_000] {
            let messages = decode(&frames, part).unwrap();
            let [Inbound::Delivery(delivery)] = &messages[..] else { panic!("{messages:?}") };
            assert_eq!((&delivery.body[..], &*delivery.routing_key), (&body[..], "\u{fffd}key"));
            let headers = delivery.properties.headers().as_ref().unwrap();
            assert!(
                matches!(&headers["k"], crate::Value::LongString(text) if text.len() == 99_993)
            );
            assert!(delivery.memory > 100_000);
        }
    }

    #[test]
    fn of_a_header_without_end_the_rest_is_skipped() {
        let text = vec![b'h'; 2 * LARGEST_HEADER];
        let value = [&b"\x01aV\x01kS"[..], &(text.len() as u32).to_be_bytes(), &text].concat();
        let headers = [&[0x20, 0][..], &(value.len() as u32).to_be_bytes(), &value].concat();
        let messages = decode(&[deliver(b""), content_header(0, &headers)], 100_000).unwrap();
        let [Inbound::Delivery(delivery)] = &messages[..] else { panic!("{messages:?}") };
        assert_eq!(delivery.properties.headers().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn frames_that_do_not_belong_together_are_a_fault() {
        let (deliver, header, body) = (deliver(b""), content_header(1, &[0; 2]), frame(BODY, b"a"));
        for frames in [
            vec![deliver.clone(), deliver.clone()],
            vec![header.clone()],
            vec![body.clone()],
            vec![deliver.clone(), body.clone()],
            vec![deliver.clone(), header.clone(), header.clone()],
            vec![deliver.clone(), header, frame(BODY, b"ab")],
            vec![deliver.clone(), content_header(LARGEST_BODY + 1, &[0; 2])],
            vec![deliver, frame(CONTENT_HEADER, b"\0\x3c\0\0")],
            vec![frame(METHOD, &[&DELIVER[..], b"\x09tag"].concat())],
        ] {
            assert!(matches!(decode(&frames, 100), Err(Fault::Frame(_))), "{frames:?}");
        }
    }
}
