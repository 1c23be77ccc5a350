//! Received bytes become checked frames, in one pass.
//!
//! A frame that only a broken or hostile broker sends ends the connection. A frame with a message of any
//! publisher does not: otherwise one message could end the connections of all receivers.
//!
//! Frames are those of [AMQP 0-9-1](https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf),
//! 2.3.5: type (1 byte), channel (2), payload size (4), payload, 0xCE. The payload of a method
//! frame begins with class (2) and method (2).

use std::fmt::{self, Display};

/// Bytes before the payload of a frame.
pub(crate) const HEADER: usize = 7;
pub(crate) const FRAME_END: u8 = 0xce;

pub(crate) const METHOD: u8 = 1;
pub(crate) const CONTENT_HEADER: u8 = 2;
pub(crate) const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;

/// Class and method, two bytes each.
pub(crate) type MethodId = [u8; 4];

/// The methods with which a broker may begin.
pub(crate) const START: MethodId = [0, 10, 0, 10];
pub(crate) const CLOSE: MethodId = [0, 10, 0, 50];

/// The largest frame to agree to, in bytes: the default of RabbitMQ.
pub const FRAME_MAX: u32 = 128 * 1024;

/// Frames with content are smaller than this, in bytes: no body is larger than 512 MiB.
const LARGEST: usize = 1 << 30;

/// The smallest limit of frames that AMQP allows, in bytes.
pub(crate) const SMALLEST_FRAME_MAX: u32 = 4096;

/// A heartbeat.
pub(crate) const HEARTBEAT_FRAME: [u8; 8] = [HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END];

/// Why the bytes of a peer cannot be read further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The peer speaks another protocol; the name of its kind of server.
    NotAmqp(&'static str),
    /// An impossible frame, and its fault.
    Frame(String),
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::NotAmqp(what) => write!(f, "{what} answers, not an AMQP 0-9-1 broker"),
            Fault::Frame(what) => write!(f, "the peer violates AMQP ({what})"),
        }
    }
}

/// A frame, or a part of one. Content headers and bodies are passed on in parts, as they may be larger than the
/// agreed limit: the broker adds its own header to headers that nearly fill a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A whole method.
    Method {
        /// The channel, 0 for the connection.
        channel: u16,
        /// Class and method.
        id: MethodId,
        /// The rest of the payload.
        arguments: &'a [u8],
    },
    /// The next part of a content header.
    Header {
        /// Bytes of the payload.
        part: &'a [u8],
        /// Whether the frame ends here.
        is_last: bool,
    },
    /// The next part of a body.
    Body(&'a [u8]),
    /// A heartbeat.
    Heartbeat,
}

/// Cuts the bytes of a peer into frames. It keeps at most [`FRAME_MAX`] bytes, and never panics.
pub struct FrameReader {
    bytes: Vec<u8>,
    /// Bytes from `start` to `end` are received and not returned yet.
    start: usize,
    end: usize,
    /// Whether a frame was returned.
    is_started: bool,
    /// Bytes still to come of a frame that is returned in parts, with its end byte.
    rest: usize,
    /// The type of that frame.
    kind: u8,
}

impl FrameReader {
    /// A reader before the first byte.
    pub fn new() -> FrameReader {
        let bytes = vec![0; FRAME_MAX as usize];
        FrameReader { bytes, start: 0, end: 0, is_started: false, rest: 0, kind: 0 }
    }

    /// Room for more bytes, never empty; to be asked for when [`next`](FrameReader::next) has returned `None`.
    pub fn room(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        &mut self.bytes[self.end..]
    }

    /// Adds the first `length` bytes of the [`room`](FrameReader::room).
    pub fn add(&mut self, length: usize) {
        self.end += length;
    }

    /// The next frame, or part of a frame; `None` if more bytes are needed.
    ///
    /// # Errors
    ///
    /// A peer that does not speak AMQP, or breaks its rules.
    pub fn next(&mut self) -> Result<Option<Frame<'_>>, Fault> {
        if self.rest > 0 {
            return self.next_part();
        }
        let bytes = &self.bytes[self.start..self.end];
        if !self.is_started && bytes.first().is_some_and(|kind| *kind != METHOD) {
            return match bytes.len() {
                // More bytes may be needed to name the protocol.
                ..8 => Ok(None),
                _ => Err(Fault::NotAmqp(name_protocol(bytes))),
            };
        }
        let Some([kind, c0, c1, size @ ..]) = bytes.first_chunk::<HEADER>().copied() else {
            return Ok(None);
        };
        let size = u32::from_be_bytes(size) as usize;
        match kind {
            CONTENT_HEADER | BODY if size >= LARGEST => {
                return Err(Fault::Frame(format!("a frame of {size} bytes")));
            }
            CONTENT_HEADER | BODY => {
                self.start += HEADER;
                (self.kind, self.rest) = (kind, size + 1);
                return self.next_part();
            }
            METHOD | HEARTBEAT if size > FRAME_MAX as usize - HEADER - 1 => {
                return Err(Fault::Frame(format!("a frame of {size} bytes")));
            }
            METHOD | HEARTBEAT => {}
            _ => return Err(Fault::Frame(format!("frame type {kind}"))),
        }
        let length = HEADER + size + 1;
        if self.end - self.start < length {
            return Ok(None);
        }
        let frame = &self.bytes[self.start..self.start + length];
        check_end(frame[length - 1])?;
        self.start += length;
        if kind == HEARTBEAT {
            return Ok(Some(Frame::Heartbeat));
        }
        let Some((id, arguments)) = frame[HEADER..length - 1].split_first_chunk::<4>() else {
            return Err(Fault::Frame("a method without a name".into()));
        };
        let is_first = !std::mem::replace(&mut self.is_started, true);
        if is_first && !matches!(*id, START | CLOSE) {
            return Err(Fault::Frame("another method before connection.start".into()));
        }
        Ok(Some(Frame::Method { channel: u16::from_be_bytes([c0, c1]), id: *id, arguments }))
    }

    fn next_part(&mut self) -> Result<Option<Frame<'_>>, Fault> {
        let length = self.rest.min(self.end - self.start);
        if length == 0 {
            return Ok(None);
        }
        let part = &self.bytes[self.start..self.start + length];
        self.start += length;
        self.rest -= length;
        let is_last = self.rest == 0;
        let part = match part.split_last() {
            Some((end, payload)) if is_last => {
                check_end(*end)?;
                payload
            }
            _ => part,
        };
        Ok(Some(match self.kind {
            BODY => Frame::Body(part),
            _ => Frame::Header { part, is_last },
        }))
    }

    /// Checks what is left at the end of the stream.
    ///
    /// # Errors
    ///
    /// When the bytes are of another protocol, however few.
    pub fn finish(&self) -> Result<(), Fault> {
        match &self.bytes[self.start..self.end] {
            [METHOD, ..] | [] => Ok(()),
            bytes if !self.is_started => Err(Fault::NotAmqp(name_protocol(bytes))),
            _ => Ok(()),
        }
    }
}

/// The kind of server that begins like this, which no AMQP 0-9-1 broker does.
fn name_protocol(bytes: &[u8]) -> &'static str {
    match bytes {
        [b'A', b'M', b'Q', b'P', 0..=3, 1, 0, 0, ..] => "an AMQP 1.0 server",
        [b'A', b'M', b'Q', b'P', ..] => "a server of another version of AMQP",
        [b'H', b'T', b'T', b'P', b'/', ..] => "an HTTP server",
        [b'S', b'S', b'H', b'-', ..] => "an SSH server",
        [0x15 | 0x16, 3, ..] => "a TLS server (write amqps:// for it)",
        _ => "something else",
    }
}

fn check_end(byte: u8) -> Result<(), Fault> {
    match byte {
        FRAME_END => Ok(()),
        _ => Err(Fault::Frame(format!("a frame that ends in {byte:#04x}"))),
    }
}

/// Adds a frame to `out`.
pub(crate) fn push_frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: &[&[u8]]) {
    let size: usize = payload.iter().map(|part| part.len()).sum();
    out.push(kind);
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(&(size as u32).to_be_bytes());
    payload.iter().for_each(|part| out.extend_from_slice(part));
    out.push(FRAME_END);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::DELIVER;

    /// A frame with this payload.
    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        push_frame(&mut frame, kind, 1, &[payload]);
        frame
    }

    /// Bytes that a broker sent to a receiver: login, declarations, and messages with and without
    /// properties, headers and a body of several kinds.
    const RECEIVED: &[u8] = include_bytes!("../tests/data/received.bin");

    /// Feeds bytes in chunks, as a stream would; returns the frames as bytes again, parts joined.
    fn feed(bytes: &[u8], chunk: impl Fn() -> usize) -> (Vec<u8>, Result<(), Fault>) {
        let (mut reader, mut out, mut part) = (FrameReader::new(), Vec::new(), Vec::new());
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = reader.room();
            let length = chunk().clamp(1, rest.len()).min(room.len());
            let (next, after) = rest.split_at(length);
            room[..length].copy_from_slice(next);
            rest = after;
            reader.add(length);
            loop {
                match reader.next() {
                    Ok(None) => break,
                    Err(fault) => return (out, Err(fault)),
                    Ok(Some(Frame::Heartbeat)) => out.extend(HEARTBEAT_FRAME),
                    Ok(Some(Frame::Method { channel, id, arguments })) => {
                        push_frame(&mut out, METHOD, channel, &[&id, arguments]);
                    }
                    Ok(Some(Frame::Header { part: bytes, .. } | Frame::Body(bytes))) => {
                        part.extend_from_slice(bytes);
                        if reader.rest == 0 {
                            push_frame(&mut out, reader.kind, 1, &[&part]);
                            part.clear();
                        }
                    }
                }
            }
        }
        (out, reader.finish())
    }

    #[test]
    fn sound_frames_are_read_however_they_are_cut() {
        for longest in [1, 2, 7, 8, 9, 100, RECEIVED.len()] {
            for _ in 0..20 {
                let (read, outcome) = feed(RECEIVED, || fastrand::usize(1..=longest));
                assert_eq!(outcome, Ok(()));
                assert!(read == RECEIVED, "changed, in chunks of up to {longest} bytes");
            }
        }
    }

    #[test]
    fn corrupt_bytes_do_not_panic() {
        for _ in 0..20_000 {
            let mut bytes = RECEIVED.to_vec();
            for _ in 0..fastrand::usize(1..8) {
                match fastrand::u8(..3) {
                    0 => bytes[fastrand::usize(..RECEIVED.len() / 2)] = fastrand::u8(..),
                    1 => bytes.truncate(bytes.len() - fastrand::usize(..RECEIVED.len() / 10)),
                    _ => drop(bytes.remove(fastrand::usize(..RECEIVED.len() / 2))),
                }
            }
            let (read, _) = feed(&bytes, || fastrand::usize(1..500));
            assert!(read.len() <= bytes.len());
        }
    }

    /// A reader after the start of a connection.
    fn started() -> FrameReader {
        FrameReader { is_started: true, ..FrameReader::new() }
    }

    fn add(reader: &mut FrameReader, bytes: &[u8]) {
        reader.room()[..bytes.len()].copy_from_slice(bytes);
        reader.add(bytes.len());
    }

    #[test]
    fn a_content_header_may_be_larger_than_the_limit() {
        let mut reader = started();
        let (mut length, mut methods) = (0, 0);
        let frames = [frame(CONTENT_HEADER, &vec![0; 1 << 20]), frame(METHOD, &[0, 10, 0, 61])];
        for chunk in frames.concat().chunks(FRAME_MAX as usize) {
            add(&mut reader, chunk);
            while let Some(frame) = reader.next().unwrap() {
                match frame {
                    Frame::Header { part, is_last } => {
                        length += part.len();
                        assert_eq!(is_last, length == 1 << 20);
                    }
                    frame => {
                        assert!(matches!(frame, Frame::Method { id: [0, 10, 0, 61], .. }));
                        methods += 1;
                    }
                }
            }
        }
        assert_eq!((length, methods), (1 << 20, 1));
    }

    #[test]
    fn impossible_frames_end_the_connection() {
        let with_end = |mut frame: Vec<u8>, end| {
            *frame.last_mut().unwrap() = end;
            frame
        };
        for bytes in [
            b"\x01\0\0\x4d\x7c\x6d\0".to_vec(),
            b"\x08\0\0\0\x02\0\0".to_vec(),
            b"\x04\0\0\0\0\0\0\xce".to_vec(),
            with_end(frame(BODY, b"body"), 0),
            with_end(frame(HEARTBEAT, b""), 7),
            frame(METHOD, b"\0\x3c"),
            with_end(frame(CONTENT_HEADER, b"header"), 0),
        ] {
            let mut reader = started();
            add(&mut reader, &bytes);
            let outcome = reader.next();
            assert!(matches!(outcome, Err(Fault::Frame(_))), "{outcome:?}");
        }
    }

    #[test]
    fn other_protocols_are_named() {
        for (bytes, name) in [
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], "an HTTP server"),
            (b"SSH-2.0-OpenSSH_9.2\r\n", "an SSH server"),
            (b"\x15\x03\x03\0\x02\x02\x46", "a TLS server (write amqps:// for it)"),
            (b"AMQP\0\x01\0\0", "an AMQP 1.0 server"),
            (b"AMQP\0\0\x09\x01", "a server of another version of AMQP"),
            (b"220 mail ESMTP", "something else"),
            (b"?", "something else"),
        ] {
            assert_eq!(feed(bytes, || 100), (vec![], Err(Fault::NotAmqp(name))));
        }
        let (_, outcome) = feed(&frame(METHOD, &DELIVER), || 100);
        assert!(matches!(outcome, Err(Fault::Frame(_))), "before the start");
        assert_eq!(FrameReader::new().finish(), Ok(()));
    }
}
