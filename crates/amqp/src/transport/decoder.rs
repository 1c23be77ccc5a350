//! Received frames: messages and confirmations for the program, all others for amiquip.

use amq_protocol::protocol::basic::parse_properties;

use super::encoder::Answers;
use super::frame_filter::{
    BODY, CANCEL, CONTENT_HEADER, DELIVER, Fault, HEADER, METHOD, RETURN, Reader, is_close_of,
};
use super::wire::Inbox;
use crate::{Delivery, Event, Properties, Return};

const ACK: [u8; 4] = [0, 60, 0, 80];
const NACK: [u8; 4] = [0, 60, 0, 120];
const BLOCKED: [u8; 4] = [0, 10, 0, 60];
const UNBLOCKED: [u8; 4] = [0, 10, 0, 61];

/// The room to make for a body at once, in bytes: a broker may announce more than it sends.
const BODY_ROOM: usize = 1024 * 1024;

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
    /// Bytes that are still to come of a body frame, its end included.
    rest: usize,
    /// The message that is coming.
    content: Option<Content>,
}

/// A message, and how much of its body is still to come; nothing is known of that before the content header.
struct Content {
    message: Message,
    missing: Option<usize>,
}

enum Message {
    Delivery(Box<Delivery>),
    Returned(Box<Return>),
}

impl Decoder {
    /// Takes the next bytes: whole frames, but for body frames, which may come in parts.
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
                // The last byte is the end of the frame.
                let body = &part[..part.len() - usize::from(self.rest == 0)];
                self.add_to_body(body, inbox)?;
                bytes = after;
                continue;
            }
            let &[kind, c0, c1, ref size @ ..] = bytes.first_chunk::<HEADER>().ok_or_else(cut)?;
            let size = u32::from_be_bytes(*size) as usize;
            if kind == BODY {
                self.rest = size + 1;
                bytes = &bytes[HEADER..];
                continue;
            }
            let (frame, after) = bytes.split_at_checked(HEADER + size + 1).ok_or_else(cut)?;
            let payload = &frame[HEADER..HEADER + size];
            let channel = u16::from_be_bytes([c0, c1]);
            let is_taken = match kind {
                METHOD => self.take_method(channel, payload, inbox, answers)?,
                CONTENT_HEADER => {
                    self.take_content_header(payload, inbox)?;
                    true
                }
                _ => false,
            };
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
                let (reason, _) = Reader(arguments).take_string().ok_or_else(unsound)?;
                inbox.push(Inbound::Event(Event::Blocked(reason)));
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
        match self.content.replace(Content { message, missing: None }) {
            None => Ok(()),
            Some(_) => Err(Fault::Frame("a message in the middle of another".into())),
        }
    }

    fn take_content_header(&mut self, payload: &[u8], inbox: &mut Inbox) -> Result<(), Fault> {
        let Some(Content { message, missing: missing @ None }) = &mut self.content else {
            return Err(Fault::Frame("a content header without a message".into()));
        };
        // Class, weight, size of the body; flags and properties.
        let (head, properties) = payload.split_first_chunk::<12>().ok_or_else(cut)?;
        let &[_, _, _, _, size @ ..] = head;
        let size = u64::from_be_bytes(size) as usize;
        let Ok((_, parsed)) = parse_properties(properties) else {
            return Err(Fault::Frame("properties that cannot be read".into()));
        };
        let (body, properties) = message.parts();
        *properties = parsed;
        body.reserve_exact(size.min(BODY_ROOM));
        *missing = Some(size);
        self.complete(inbox);
        Ok(())
    }

    fn add_to_body(&mut self, bytes: &[u8], inbox: &mut Inbox) -> Result<(), Fault> {
        let content = self.content.as_mut();
        let Some(Content { message, missing: Some(missing) }) = content else {
            // An empty frame, or the end of one, is of no message.
            return match bytes.is_empty() {
                true => Ok(()),
                false => Err(Fault::Frame("a body without a message".into())),
            };
        };
        let Some(left) = missing.checked_sub(bytes.len()) else {
            return Err(Fault::Frame("a body that is longer than announced".into()));
        };
        *missing = left;
        message.parts().0.extend_from_slice(bytes);
        self.complete(inbox);
        Ok(())
    }

    fn complete(&mut self, inbox: &mut Inbox) {
        let is_complete = |content: &mut Content| content.missing == Some(0);
        match self.content.take_if(is_complete).map(|content| content.message) {
            Some(Message::Delivery(delivery)) => inbox.deliver(delivery),
            Some(Message::Returned(returned)) => {
                inbox.push(Inbound::Event(Event::Returned(returned)));
            }
            None => {}
        }
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
fn read_delivery(arguments: &[u8]) -> Option<Delivery> {
    let Reader(rest) = Reader(arguments).short_string()?;
    let (tag, rest) = rest.split_first_chunk()?;
    let (redelivered, rest) = rest.split_first()?;
    let (exchange, rest) = Reader(rest).take_string()?;
    let (routing_key, _) = rest.take_string()?;
    Some(Delivery {
        tag: u64::from_be_bytes(*tag),
        redelivered: redelivered & 1 != 0,
        exchange,
        routing_key,
        properties: Properties::default(),
        body: Vec::new(),
    })
}

/// The arguments of `basic.return`: reply code, reply text, exchange, routing key.
fn read_return(arguments: &[u8]) -> Option<Return> {
    let (reply_text, _) = Reader(arguments).skip(2)?.take_string()?;
    Some(Return { reply_text, content: Vec::new(), properties: Properties::default() })
}

fn cut() -> Fault {
    Fault::Frame("a frame that is cut off".into())
}
