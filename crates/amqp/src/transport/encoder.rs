//! Sent frames: those of the program, and what amiquip leaves out of its own.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use amq_protocol::frame::generation::{gen_content_header_frame, gen_method_frame};
use amq_protocol::protocol::AMQPClass;

use super::frame_filter::{BODY, FRAME_END, FRAME_MAX, HEADER, METHOD, START_OK};
use super::start_ok::extend_start_ok;
use crate::Properties;

const TUNE_OK: [u8; 4] = [0, 10, 0, 31];
const OPEN: [u8; 4] = [0, 10, 0, 40];
const CHANNEL_OPEN: [u8; 4] = [0, 20, 0, 10];

/// The smallest limit of frames that AMQP allows, in bytes.
pub const SMALLEST_FRAME_MAX: u32 = 4096;

/// The class of messages.
const BASIC: u16 = 60;

/// Room for most content headers, in bytes.
const HEADER_ROOM: usize = 256;

/// An answer of the broker that nobody waits for. A refusal in its place closes the connection or the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// `connection.open-ok`
    Open,
    /// `channel.open-ok`, on this channel
    ChannelOpen(u16),
    /// `basic.qos-ok`, on this channel
    Qos(u16),
}

impl Answer {
    fn channel_and_method(self) -> (u16, [u8; 4]) {
        match self {
            Answer::Open => (0, [0, 10, 0, 41]),
            Answer::ChannelOpen(channel) => (channel, [0, 20, 0, 11]),
            Answer::Qos(channel) => (channel, [0, 60, 0, 11]),
        }
    }

    /// The answer itself.
    pub fn frame(self) -> Vec<u8> {
        let (channel, method) = self.channel_and_method();
        let arguments: &[u8] = match self {
            Answer::Open => &[0],
            Answer::ChannelOpen(_) => &[0; 4],
            Answer::Qos(_) => &[],
        };
        frame(METHOD, channel, &[&method, arguments].concat())
    }
}

/// The answers that are still to come, in the order of the requests.
#[derive(Debug, Default)]
pub struct Answers(VecDeque<Answer>);

impl Answers {
    /// Notes that this answer will come.
    pub fn expect(&mut self, answer: Answer) {
        self.0.push_back(answer);
    }

    /// Takes this method out, if it is an answer that is expected.
    pub fn take(&mut self, channel: u16, method: &[u8; 4]) -> bool {
        let is_meant = |answer: &Answer| answer.channel_and_method() == (channel, *method);
        let place = self.0.iter().position(is_meant);
        place.is_some_and(|place| self.0.remove(place).is_some())
    }

    /// Whether this answer is still to come.
    pub fn contain(&self, answer: Answer) -> bool {
        self.0.contains(&answer)
    }
}

/// The settings of a connection, as far as amiquip's frames show them.
#[derive(Debug)]
pub struct Login {
    /// The name of the connection, until the broker has been told.
    pub name: Option<String>,
    /// The largest payload of a frame that the broker takes, in bytes.
    pub max_payload: usize,
    /// The time between two signs of life of the peer that amiquip watches for, or zero if there are none.
    pub heartbeat: Duration,
    /// When the last request of the login went out, until its answer comes.
    asked: Option<Instant>,
    /// The shortest time that an answer of the login has taken.
    pub round_trip: Option<Duration>,
}

impl Login {
    /// Notes that the peer has sent something.
    pub fn note_answer(&mut self) {
        if let Some(asked) = self.asked.take() {
            let taken = asked.elapsed();
            self.round_trip = Some(self.round_trip.map_or(taken, |least| least.min(taken)));
        }
    }

    /// For a connection of this name; `heartbeat` is the longest that amiquip agrees to.
    pub fn new(name: String, heartbeat: Duration) -> Login {
        Login {
            name: Some(name),
            max_payload: FRAME_MAX as usize - HEADER - 1,
            heartbeat,
            asked: None,
            round_trip: None,
        }
    }

    /// Passes frames of amiquip on to `outgoing`, with additions to `connection.start-ok`. Returns the answers that
    /// amiquip need not wait for: requests that follow may go out at once, and are not acted on after a refusal.
    pub fn pass(&mut self, frames: &[u8], outgoing: &mut Vec<u8>) -> Vec<Answer> {
        let mut answers = Vec::new();
        let mut rest = frames;
        // Until the broker has been told its name, each request waits for the answer to the last.
        self.asked = self.name.is_some().then(Instant::now);
        // The protocol header, and bytes that are no frame, are left as they are.
        while let Some(&[METHOD, c0, c1, ref size @ ..]) = rest.first_chunk::<HEADER>()
            && let Some((frame, after)) =
                rest.split_at_checked(HEADER + u32::from_be_bytes(*size) as usize + 1)
        {
            rest = after;
            match method_of(frame) {
                Some(START_OK) => {
                    let name = self.name.take().unwrap_or_default();
                    match extend_start_ok(frame, &name) {
                        Some(extended) => outgoing.extend(extended),
                        None => outgoing.extend_from_slice(frame),
                    }
                    continue;
                }
                // Channels (2 bytes), frame size (4), heartbeat (2).
                Some(TUNE_OK) => {
                    if let Some(&[_, _, a, b, c, d, e, f]) = frame[HEADER + 4..].first_chunk::<8>()
                    {
                        // Zero stands for no limit.
                        let frame_max = match u32::from_be_bytes([a, b, c, d]) {
                            0 => FRAME_MAX,
                            limit => limit.clamp(SMALLEST_FRAME_MAX, FRAME_MAX),
                        };
                        self.max_payload = frame_max as usize - HEADER - 1;
                        // A broker may want more heartbeats than the URI asks for.
                        self.heartbeat = Duration::from_secs(u16::from_be_bytes([e, f]).into());
                    }
                }
                Some(OPEN) => answers.push(Answer::Open),
                Some(CHANNEL_OPEN) => {
                    answers.push(Answer::ChannelOpen(u16::from_be_bytes([c0, c1])));
                }
                _ => {}
            }
            outgoing.extend_from_slice(frame);
        }
        outgoing.extend_from_slice(rest);
        answers
    }
}

/// A frame with this payload.
fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER + payload.len() + 1);
    push_frame(&mut frame, kind, channel, payload);
    frame
}

fn push_frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
    out.push(FRAME_END);
}

/// The frame of a method.
pub fn method(channel: u16, method: &AMQPClass) -> Vec<u8> {
    let mut frame = Vec::new();
    generate(&mut frame, |room| Some(gen_method_frame((room, 0), channel, method).ok()?.1));
    frame
}

/// Class and method of a frame.
pub fn method_of(frame: &[u8]) -> Option<[u8; 4]> {
    frame.get(HEADER..)?.first_chunk().copied()
}

/// The frame of `basic.ack` for this delivery and all before it.
pub fn acknowledgement(channel: u16, tag: u64) -> Vec<u8> {
    frame(METHOD, channel, &[&[0, 60, 0, 80][..], &tag.to_be_bytes(), &[1]].concat())
}

/// Adds the frames of a message after those of `basic.publish`.
pub fn push_content(
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
        push_frame(out, BODY, channel, part);
    }
}

/// Adds what `write` writes into the room it gets; returns its length, or `None` for want of room.
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
