//! The methods of AMQP in use: their ids, and the reading and writing of their arguments.

use amq_protocol::frame::generation::gen_content_header_frame;
use amq_protocol::types::generation::gen_field_table;

use crate::declare::{Durability, Exchange, Queue, QueueState};
use crate::frame::{BODY, CLOSE, Fault, HEADER, METHOD, MethodId, push_frame};
use crate::message::{Delivery, Event, Return};
use crate::properties::{number, read_text, take_short};
use crate::{Properties, Table};

pub(crate) const START_OK: MethodId = [0, 10, 0, 11];
pub(crate) const TUNE: MethodId = [0, 10, 0, 30];
pub(crate) const TUNE_OK: MethodId = [0, 10, 0, 31];
pub(crate) const OPEN: MethodId = [0, 10, 0, 40];
const BLOCKED: MethodId = [0, 10, 0, 60];
const UNBLOCKED: MethodId = [0, 10, 0, 61];
pub(crate) const CHANNEL_OPEN: MethodId = [0, 20, 0, 10];
const CHANNEL_FLOW: MethodId = [0, 20, 0, 20];
const CHANNEL_CLOSE: MethodId = [0, 20, 0, 40];
const EXCHANGE_DECLARE: MethodId = [0, 40, 0, 10];
const QUEUE_DECLARE: MethodId = [0, 50, 0, 10];
const QUEUE_BIND: MethodId = [0, 50, 0, 20];
const QOS: MethodId = [0, 60, 0, 10];
const CONSUME: MethodId = [0, 60, 0, 20];
const CANCEL: MethodId = [0, 60, 0, 30];
const PUBLISH: MethodId = [0, 60, 0, 40];
const RETURN: MethodId = [0, 60, 0, 50];
pub(crate) const DELIVER: MethodId = [0, 60, 0, 60];
const ACK: MethodId = [0, 60, 0, 80];
const NACK: MethodId = [0, 60, 0, 120];
const CONFIRM_SELECT: MethodId = [0, 85, 0, 10];

/// The requests that the broker answers; the others are sent with the flag `no-wait`.
const ANSWERED: [MethodId; 10] = [
    OPEN,
    CLOSE,
    CHANNEL_OPEN,
    CHANNEL_CLOSE,
    EXCHANGE_DECLARE,
    QUEUE_DECLARE,
    QUEUE_BIND,
    QOS,
    CONSUME,
    CANCEL,
];

/// The class of messages.
const BASIC: u16 = 60;

/// Room for most content headers and tables, in bytes.
const ROOM: usize = 256;

/// The longest name, in bytes.
const MAX_SHORT_STRING: usize = 255;

/// A method of the broker.
#[derive(Debug)]
pub(crate) enum Method {
    /// A message for the consumer follows.
    Deliver(Box<Delivery>),
    /// A message that no queue has taken follows.
    Return(Box<Return>),
    /// News for the publisher.
    Event(Event),
    /// The broker has cancelled the consumer.
    Cancel,
    /// The broker asks for a pause, or for its end; to be answered.
    Flow { active: bool },
    /// The broker closes a channel; to be answered.
    ChannelClose(Close),
    /// The broker closes the connection; to be answered.
    Close(Close),
    /// The answer to this request.
    Answer(MethodId, Answer),
}

/// The content of an answer.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The request is done.
    Done,
    /// The queue is there.
    Declared(QueueState),
    /// The consumer of this tag has started.
    Consuming(String),
    /// The broker has closed the channel of the request instead.
    Refused,
}

/// How the broker closes a connection or a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// The reply code.
    pub code: u16,
    /// The reply text.
    pub text: String,
    /// Class and method of the refused request, if there is any.
    pub request: Option<MethodId>,
}

/// Reads a method.
///
/// # Errors
///
/// A method that no broker sends to a client, or with arguments that are cut off.
pub(crate) fn read(id: MethodId, arguments: &[u8]) -> Result<Method, Fault> {
    let [_, class, _, method] = id;
    read_known(id, arguments).ok_or_else(|| Fault::Frame(format!("method {class}.{method}")))
}

fn read_known(id: MethodId, mut arguments: &[u8]) -> Option<Method> {
    let bytes = &mut arguments;
    Some(match id {
        DELIVER => Method::Deliver(read_delivery(bytes)?),
        RETURN => {
            number::<2>(bytes)?;
            let reply_text = read_text(take_short(bytes)?);
            let (content, properties) = (Vec::new(), Properties::default());
            Method::Return(Box::new(Return { reply_text, content, properties }))
        }
        ACK | NACK => {
            let tag = u64::from_be_bytes(number(bytes)?);
            let multiple = number::<1>(bytes)?[0] & 1 != 0;
            Method::Event(match id {
                ACK => Event::Confirmed { tag, multiple },
                _ => Event::Nacked { tag, multiple },
            })
        }
        BLOCKED => Method::Event(Event::Blocked(read_text(take_short(bytes)?))),
        UNBLOCKED => Method::Event(Event::Unblocked),
        CANCEL => Method::Cancel,
        CHANNEL_FLOW => Method::Flow { active: number::<1>(bytes)?[0] & 1 != 0 },
        CHANNEL_CLOSE => Method::ChannelClose(read_close(bytes)?),
        CLOSE => Method::Close(read_close(bytes)?),
        _ => {
            let request = ANSWERED.into_iter().find(|request| answer_to(*request) == id)?;
            Method::Answer(request, read_answer(request, bytes)?)
        }
    })
}

/// The id of the answer to a request: the next method of the class, in all that are in use.
fn answer_to([c0, class, m0, method]: MethodId) -> MethodId {
    [c0, class, m0, method + 1]
}

fn read_answer(request: MethodId, bytes: &mut &[u8]) -> Option<Answer> {
    Some(match request {
        QUEUE_DECLARE => Answer::Declared(QueueState {
            name: read_text(take_short(bytes)?),
            messages: u32::from_be_bytes(number(bytes)?),
            consumers: u32::from_be_bytes(number(bytes)?),
        }),
        CONSUME => Answer::Consuming(read_text(take_short(bytes)?)),
        _ => Answer::Done,
    })
}

fn read_delivery(bytes: &mut &[u8]) -> Option<Box<Delivery>> {
    let mut delivery = Box::<Delivery>::default();
    let _consumer_tag = take_short(bytes)?;
    delivery.tag = u64::from_be_bytes(number(bytes)?);
    delivery.redelivered = number::<1>(bytes)?[0] & 1 != 0;
    delivery.exchange = read_text(take_short(bytes)?);
    delivery.routing_key = read_text(take_short(bytes)?);
    Some(delivery)
}

fn read_close(bytes: &mut &[u8]) -> Option<Close> {
    let code = u16::from_be_bytes(number(bytes)?);
    let text = read_text(take_short(bytes)?);
    let request: MethodId = number(bytes)?;
    Some(Close { code, text, request: (request != [0; 4]).then_some(request) })
}

/// A method that this client sends.
pub(crate) struct Request {
    pub id: MethodId,
    /// Whether the broker answers when it has accepted the request; otherwise only a later answer shows that.
    pub is_answered: bool,
    arguments: Vec<u8>,
}

impl Request {
    fn new(id: MethodId) -> Request {
        Request { id, is_answered: ANSWERED.contains(&id), arguments: Vec::new() }
    }

    fn short(mut self, number: u16) -> Request {
        self.arguments.extend(number.to_be_bytes());
        self
    }

    fn text(mut self, text: &str) -> Request {
        // Names are checked before; see `check_length`.
        let length = text.len().min(MAX_SHORT_STRING);
        self.arguments.push(length as u8);
        self.arguments.extend(&text.as_bytes()[..length]);
        self
    }

    /// Flags, the first in the lowest bit.
    fn bits(mut self, bits: &[bool]) -> Request {
        let set = bits.iter().enumerate().map(|(index, bit)| u8::from(*bit) << index);
        self.arguments.push(set.sum());
        self
    }

    fn table(mut self, table: &Table) -> Request {
        generate(&mut self.arguments, |room| Some(gen_field_table((room, 0), table).ok()?.1));
        self
    }

    pub fn frame(&self, channel: u16) -> Vec<u8> {
        let mut frame = Vec::new();
        push_frame(&mut frame, METHOD, channel, &[&self.id, &self.arguments]);
        frame
    }
}

pub(crate) fn close() -> Request {
    Request::new(CLOSE).short(200).text("goodbye").short(0).short(0)
}

pub(crate) fn close_ok() -> Request {
    Request::new(answer_to(CLOSE))
}

pub(crate) fn channel_open() -> Request {
    Request::new(CHANNEL_OPEN).text("")
}

pub(crate) fn channel_flow_ok(active: bool) -> Request {
    Request::new(answer_to(CHANNEL_FLOW)).bits(&[active])
}

pub(crate) fn channel_close() -> Request {
    Request::new(CHANNEL_CLOSE).short(200).text("done").short(0).short(0)
}

pub(crate) fn channel_close_ok() -> Request {
    Request::new(answer_to(CHANNEL_CLOSE))
}

/// Not passive, not auto-deleted, not internal.
pub(crate) fn declare_exchange(exchange: &Exchange) -> Request {
    let durable = exchange.durability == Durability::Durable;
    let names = Request::new(EXCHANGE_DECLARE).short(0).text(&exchange.name);
    let names = names.text(exchange.kind.name());
    names.bits(&[false, durable, false, false, false]).table(&Table::new())
}

/// Not auto-deleted.
pub(crate) fn declare_queue(queue: &Queue) -> Request {
    let flags = [queue.is_passive(), queue.is_durable(), queue.is_exclusive(), false, false];
    Request::new(QUEUE_DECLARE).short(0).text(&queue.name).bits(&flags).table(&queue.arguments)
}

pub(crate) fn bind(queue: &str, exchange: &str, routing_key: &str) -> Request {
    let names = Request::new(QUEUE_BIND).short(0).text(queue).text(exchange).text(routing_key);
    names.bits(&[false]).table(&Table::new())
}

/// Sets the prefetch count of later consumers.
pub(crate) fn qos(prefetch_count: u16) -> Request {
    // The size of the prefetch takes four bytes.
    Request::new(QOS).short(0).short(0).short(prefetch_count).bits(&[false])
}

/// With acknowledgements, under a tag that the broker chooses.
pub(crate) fn consume(queue: &str, arguments: &Table) -> Request {
    Request::new(CONSUME).short(0).text(queue).text("").bits(&[false; 4]).table(arguments)
}

pub(crate) fn cancel(consumer_tag: &str) -> Request {
    Request::new(CANCEL).text(consumer_tag).bits(&[false])
}

/// Without an answer.
pub(crate) fn confirm_select() -> Request {
    Request::new(CONFIRM_SELECT).bits(&[true])
}

pub(crate) fn publish(exchange: &str, routing_key: &str, mandatory: bool) -> Request {
    Request::new(PUBLISH).short(0).text(exchange).text(routing_key).bits(&[mandatory, false])
}

/// The frame of `basic.ack` for this delivery and all before it.
pub(crate) fn acknowledgement(channel: u16, tag: u64) -> Vec<u8> {
    let mut frame = Vec::new();
    push_frame(&mut frame, METHOD, channel, &[&ACK, &tag.to_be_bytes(), &[1]]);
    frame
}

/// Adds the frames of a message, which follow those of `basic.publish`; none has a payload of more than
/// `max_payload` bytes.
pub(crate) fn push_content(
    out: &mut Vec<u8>,
    channel: u16,
    properties: &Properties,
    body: &[u8],
    max_payload: usize,
) {
    let size = body.len() as u64;
    generate(out, |room| {
        Some(gen_content_header_frame((room, 0), channel, BASIC, size, properties).ok()?.1)
    });
    out.reserve(body.len() + HEADER + 1);
    for part in body.chunks(max_payload) {
        push_frame(out, BODY, channel, &[part]);
    }
}

/// Adds the bytes that `write` puts into the room it gets; `write` returns `None` if the room is too small.
fn generate(out: &mut Vec<u8>, write: impl Fn(&mut [u8]) -> Option<usize>) {
    let start = out.len();
    let mut room = ROOM;
    let length = loop {
        out.resize(start + room, 0);
        match write(&mut out[start..]) {
            None => room *= 2,
            Some(length) => break length,
        }
    };
    out.truncate(start + length);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_that_only_clients_send_are_refused() {
        for id in [START_OK, [0, 40, 0, 10], QUEUE_DECLARE, CONSUME, [0, 99, 0, 1]] {
            let outcome = read(id, &[0; 100]);
            assert!(matches!(outcome, Err(Fault::Frame(_))), "{id:?}: {outcome:?}");
        }
        assert!(
            matches!(read(QUEUE_DECLARE, &[]), Err(Fault::Frame(text)) if text == "method 50.10")
        );
        assert!(matches!(read(ACK, &[0; 8]), Err(Fault::Frame(_))), "cut off");
    }

    #[test]
    fn a_close_is_read() {
        for id in [CLOSE, CHANNEL_CLOSE] {
            let (Ok(Method::Close(close)) | Ok(Method::ChannelClose(close))) =
                read(id, b"\x01\x93\x04Gone\0\x28\0\x0a")
            else {
                panic!("no close");
            };
            let expected = Close { code: 403, text: "Gone".into(), request: Some([0, 40, 0, 10]) };
            assert_eq!(close, expected);
        }
    }
}
