//! The methods of AMQP in use: their ids, what is read of the broker's, and the bytes of our own.

use amq_protocol::frame::generation::{gen_content_header_frame, gen_method_frame};
use amq_protocol::protocol::{AMQPClass, basic, channel, confirm, connection, exchange, queue};

use crate::declare::{Durability, Queue, QueueState};
use crate::frame::{BODY, Fault, HEADER, METHOD, push_frame};
use crate::properties::{number, read_text, take_short};
use crate::{Delivery, Event, Properties, Return, Table};

/// Class and method, two bytes each.
pub(crate) type MethodId = [u8; 4];

pub(crate) const START: MethodId = [0, 10, 0, 10];
pub(crate) const START_OK: MethodId = [0, 10, 0, 11];
pub(crate) const TUNE: MethodId = [0, 10, 0, 30];
pub(crate) const TUNE_OK: MethodId = [0, 10, 0, 31];
pub(crate) const OPEN: MethodId = [0, 10, 0, 40];
pub(crate) const CLOSE: MethodId = [0, 10, 0, 50];
const BLOCKED: MethodId = [0, 10, 0, 60];
const UNBLOCKED: MethodId = [0, 10, 0, 61];
pub(crate) const CHANNEL_OPEN: MethodId = [0, 20, 0, 10];
const CHANNEL_FLOW: MethodId = [0, 20, 0, 20];
const CHANNEL_CLOSE: MethodId = [0, 20, 0, 40];
const QUEUE_DECLARE: MethodId = [0, 50, 0, 10];
const QOS: MethodId = [0, 60, 0, 10];
const CONSUME: MethodId = [0, 60, 0, 20];
const CANCEL: MethodId = [0, 60, 0, 30];
const RETURN: MethodId = [0, 60, 0, 50];
pub(crate) const DELIVER: MethodId = [0, 60, 0, 60];
const ACK: MethodId = [0, 60, 0, 80];
const NACK: MethodId = [0, 60, 0, 120];

/// The requests whose answers are awaited.
const ANSWERED: [MethodId; 7] = [OPEN, CLOSE, CHANNEL_OPEN, QUEUE_DECLARE, QOS, CONSUME, CANCEL];

/// The class of messages.
const BASIC: u16 = 60;

/// Room for most content headers, in bytes.
const HEADER_ROOM: usize = 256;

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

/// What an answer says.
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
        DELIVER => Method::Deliver(Box::new(read_delivery(bytes)?)),
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
                _ => Event::Refused { tag, multiple },
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

fn read_delivery(bytes: &mut &[u8]) -> Option<Delivery> {
    let _consumer_tag = take_short(bytes)?;
    Some(Delivery {
        tag: u64::from_be_bytes(number(bytes)?),
        redelivered: number::<1>(bytes)?[0] & 1 != 0,
        exchange: read_text(take_short(bytes)?),
        routing_key: read_text(take_short(bytes)?),
        ..Delivery::default()
    })
}

fn read_close(bytes: &mut &[u8]) -> Option<Close> {
    let code = u16::from_be_bytes(number(bytes)?);
    let text = read_text(take_short(bytes)?);
    let request: MethodId = number(bytes)?;
    Some(Close { code, text, request: (request != [0; 4]).then_some(request) })
}

/// The method as a frame.
pub(crate) fn frame(channel: u16, method: &AMQPClass) -> Vec<u8> {
    let mut frame = Vec::new();
    generate(&mut frame, |room| Some(gen_method_frame((room, 0), channel, method).ok()?.1));
    frame
}

/// Class and method of a frame of [`frame`].
pub(crate) fn id_of(frame: &[u8]) -> MethodId {
    frame.get(HEADER..).and_then(|payload| payload.first_chunk()).copied().unwrap_or_default()
}

/// Whether the broker answers to this request when it has accepted it.
pub(crate) fn is_answered(method: &AMQPClass) -> bool {
    match method {
        AMQPClass::Connection(_) | AMQPClass::Channel(_) => true,
        AMQPClass::Queue(queue::AMQPMethod::Declare(declare)) => !declare.nowait,
        AMQPClass::Basic(
            basic::AMQPMethod::Qos(_)
            | basic::AMQPMethod::Consume(_)
            | basic::AMQPMethod::Cancel(_),
        ) => true,
        _ => false,
    }
}

pub(crate) fn channel_open() -> AMQPClass {
    AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open { out_of_band: String::new() }))
}

pub(crate) fn channel_close_ok() -> AMQPClass {
    AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {}))
}

pub(crate) fn channel_flow_ok(active: bool) -> AMQPClass {
    AMQPClass::Channel(channel::AMQPMethod::FlowOk(channel::FlowOk { active }))
}

pub(crate) fn close() -> AMQPClass {
    AMQPClass::Connection(connection::AMQPMethod::Close(connection::Close {
        reply_code: 200,
        reply_text: "goodbye".into(),
        class_id: 0,
        method_id: 0,
    }))
}

pub(crate) fn close_ok() -> AMQPClass {
    AMQPClass::Connection(connection::AMQPMethod::CloseOk(connection::CloseOk {}))
}

pub(crate) fn declare_fanout(exchange: &str, durability: Durability) -> AMQPClass {
    AMQPClass::Exchange(exchange::AMQPMethod::Declare(exchange::Declare {
        ticket: 0,
        exchange: exchange.into(),
        type_: "fanout".into(),
        passive: false,
        durable: durability == Durability::Durable,
        auto_delete: false,
        internal: false,
        nowait: true,
        arguments: Table::new(),
    }))
}

pub(crate) fn declare_queue(queue: &Queue) -> AMQPClass {
    AMQPClass::Queue(queue::AMQPMethod::Declare(queue::Declare {
        ticket: 0,
        queue: queue.name.clone(),
        passive: queue.is_passive(),
        durable: queue.is_durable(),
        exclusive: queue.is_exclusive(),
        auto_delete: false,
        nowait: false,
        arguments: queue.arguments.clone(),
    }))
}

pub(crate) fn bind(queue: &str, exchange: &str) -> AMQPClass {
    AMQPClass::Queue(queue::AMQPMethod::Bind(queue::Bind {
        ticket: 0,
        queue: queue.into(),
        exchange: exchange.into(),
        routing_key: String::new(),
        nowait: true,
        arguments: Table::new(),
    }))
}

/// Sets the prefetch count of later consumers.
pub(crate) fn qos(prefetch_count: u16) -> AMQPClass {
    let qos = basic::Qos { prefetch_size: 0, prefetch_count, global: false };
    AMQPClass::Basic(basic::AMQPMethod::Qos(qos))
}

pub(crate) fn consume(queue: &str, arguments: Table) -> AMQPClass {
    AMQPClass::Basic(basic::AMQPMethod::Consume(basic::Consume {
        ticket: 0,
        queue: queue.into(),
        consumer_tag: String::new(),
        no_local: false,
        no_ack: false,
        exclusive: false,
        nowait: false,
        arguments,
    }))
}

pub(crate) fn cancel(consumer_tag: &str) -> AMQPClass {
    let cancel = basic::Cancel { consumer_tag: consumer_tag.into(), nowait: false };
    AMQPClass::Basic(basic::AMQPMethod::Cancel(cancel))
}

pub(crate) fn confirm_select() -> AMQPClass {
    AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: true }))
}

pub(crate) fn publish(exchange: &str, mandatory: bool) -> AMQPClass {
    AMQPClass::Basic(basic::AMQPMethod::Publish(basic::Publish {
        ticket: 0,
        exchange: exchange.into(),
        routing_key: String::new(),
        mandatory,
        immediate: false,
    }))
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
    let mut room = HEADER_ROOM;
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
