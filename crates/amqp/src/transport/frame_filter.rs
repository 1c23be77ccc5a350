//! Stands between amiquip and the network: amiquip believes what it reads.
//!
//! [`FrameFilter`] checks each frame in place, before amiquip parses it. A frame that only a broken or
//! hostile broker sends ends the connection. A message of any publisher does not, or it could end the connection of
//! every receiver.
//!
//! Frames are those of [AMQP 0-9-1](https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf),
//! 2.3.5: type (1 byte), channel (2), payload size (4), payload, 0xCE. The payload of a method
//! frame begins with class (2) and method (2).

use std::fmt::{self, Display};

use super::properties::{read_table, read_text, take, take_long};

pub(super) const HEADER: usize = 7;
pub(super) const FRAME_END: u8 = 0xce;

pub(super) const METHOD: u8 = 1;
pub(super) const CONTENT_HEADER: u8 = 2;
pub(super) const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;

const START: [u8; 4] = [0, 10, 0, 10];
pub(super) const START_OK: [u8; 4] = [0, 10, 0, 11];
const TUNE: [u8; 4] = [0, 10, 0, 30];
const CLOSE: [u8; 4] = [0, 10, 0, 50];
const CHANNEL_CLOSE: [u8; 4] = [0, 20, 0, 40];
pub(super) const CANCEL: [u8; 4] = [0, 60, 0, 30];
pub(super) const RETURN: [u8; 4] = [0, 60, 0, 50];
pub(super) const DELIVER: [u8; 4] = [0, 60, 0, 60];

/// The channel of messages: the first that amiquip opens.
pub const CHANNEL: u16 = 1;

/// The largest frame to ask for, in bytes, as RabbitMQ suggests by itself.
pub const FRAME_MAX: u32 = 128 * 1024;

/// A heartbeat.
pub(super) const HEARTBEAT_FRAME: [u8; 8] = [HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END];

/// Why the connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The peer speaks another protocol, with the name of its kind of server.
    NotAmqp(&'static str),
    /// An impossible frame, with the fault.
    Frame(String),
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::NotAmqp(what) => write!(f, "{what} answers, not an AMQP 0-9-1 broker"),
            Fault::Frame(what) => write!(f, "what answers breaks the rules of AMQP ({what})"),
        }
    }
}

/// Checks the bytes from a broker. Whatever they are, the filter does not panic, and keeps none of them.
#[derive(Debug, Default)]
pub struct FrameFilter {
    /// A frame has been let through.
    is_started: bool,
    /// Bytes that are still to come of a frame that is let through in parts, its end included.
    rest: usize,
    /// How the broker has closed the connection or a channel, the first time.
    pub closed: Option<Close>,
}

/// How the broker closes a connection or a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// The reply code.
    pub code: u16,
    /// The reply text.
    pub text: String,
    /// Class and method of the refused request, if there is any.
    pub request: Option<[u8; 4]>,
}

impl FrameFilter {
    /// Checks and sanitizes `bytes`, which follow those let through before, and returns how many of
    /// them to let through. The rest begins a frame that is checked as a whole: it has to come
    /// again with more, up to [`FRAME_MAX`].
    ///
    /// # Errors
    ///
    /// When the connection cannot go on.
    pub fn check(&mut self, bytes: &mut [u8]) -> Result<usize, Fault> {
        if !self.is_started && bytes.first().is_some_and(|kind| *kind != METHOD) {
            return match bytes.len() {
                // More bytes may be needed to name the protocol.
                ..8 => Ok(0),
                _ => Err(Fault::NotAmqp(name_protocol(bytes))),
            };
        }
        let mut passed = 0;
        loop {
            let (length, is_whole) = self.check_next(&mut bytes[passed..])?;
            passed += length;
            if !is_whole {
                return Ok(passed);
            }
            self.is_started = true;
        }
    }

    /// Takes note that no more comes after `bytes`, which were not let through.
    ///
    /// # Errors
    ///
    /// When the bytes are of another protocol, however few.
    pub fn end(&self, bytes: &[u8]) -> Result<(), Fault> {
        match bytes {
            [METHOD, ..] | [] => Ok(()),
            _ if !self.is_started => Err(Fault::NotAmqp(name_protocol(bytes))),
            _ => Ok(()),
        }
    }

    /// Checks the first frame, or the next part of a frame; also returns whether another may follow.
    fn check_next(&mut self, bytes: &mut [u8]) -> Result<(usize, bool), Fault> {
        if self.rest > 0 {
            let length = self.rest.min(bytes.len());
            self.rest -= length;
            if self.rest == 0 {
                check_end(bytes[length - 1])?;
            }
            return Ok((length, self.rest == 0));
        }
        let Some(header) = bytes.first_chunk::<HEADER>() else {
            return Ok((0, false));
        };
        let &[kind, channel @ .., _, _, _, _] = header;
        let size = [header[3], header[4], header[5], header[6]];
        let size = u32::from_be_bytes(size) as usize;
        if !matches!(kind, METHOD | CONTENT_HEADER | BODY | HEARTBEAT) {
            return Err(Fault::Frame(format!("frame type {kind}")));
        }
        if comes_in_parts(kind) {
            self.rest = size + 1;
            return Ok((HEADER, true));
        }
        if size > FRAME_MAX as usize - HEADER - 1 {
            return Err(Fault::Frame(format!("a frame of {size} bytes")));
        }
        let length = HEADER + size + 1;
        let Some(frame) = bytes.get_mut(..length) else {
            return Ok((0, false));
        };
        check_end(frame[length - 1])?;
        let payload = &mut frame[HEADER..length - 1];
        if kind == METHOD {
            self.check_method(u16::from_be_bytes(channel), payload)?;
        }
        Ok((length, true))
    }

    fn check_method(&mut self, channel: u16, payload: &mut [u8]) -> Result<(), Fault> {
        let Some((id, arguments)) = payload.split_first_chunk_mut::<4>() else {
            return Err(Fault::Frame("a method without a name".into()));
        };
        if !self.is_started && !matches!(*id, START | CLOSE) {
            return Err(Fault::Frame("another method before connection.start".into()));
        }
        let is_sound = match *id {
            START => is_sound_start(arguments),
            TUNE => sanitize_tune(arguments).is_some(),
            CLOSE | CHANNEL_CLOSE => self.note_close(channel, id, arguments).is_some(),
            // Only a client sends these, with a table that the parser would follow to any depth:
            // start-ok; declare, bind and unbind of exchanges and of queues; consume.
            START_OK | [0, 40, 0, 10 | 30 | 40] => false,
            [0, 50, 0, 10 | 20 | 50] | [0, 60, 0, 20] => false,
            _ => true,
        };
        match is_sound {
            true => Ok(()),
            false => Err(Fault::Frame(format!("method {}.{}", id[1], id[3]))),
        }
    }

    fn note_close(&mut self, channel: u16, id: &[u8; 4], arguments: &[u8]) -> Option<()> {
        let close = read_close(arguments)?;
        if is_close_of(channel, id) {
            self.closed.get_or_insert(close);
        }
        Some(())
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

/// Whether a frame of this kind is let through in parts, as it is not for amiquip. Such a frame may be larger than
/// agreed on: the broker adds a header of its own to headers that nearly fill a frame.
pub(super) fn comes_in_parts(kind: u8) -> bool {
    matches!(kind, CONTENT_HEADER | BODY)
}

fn check_end(byte: u8) -> Result<(), Fault> {
    match byte {
        FRAME_END => Ok(()),
        _ => Err(Fault::Frame(format!("a frame that ends in {byte:#04x}"))),
    }
}

/// Suggests heartbeats in place of a broker that does not: amiquip then asks for those of the URI, and the
/// broker sends them.
fn sanitize_tune(arguments: &mut [u8]) -> Option<()> {
    // Channels, frame size, heartbeat in seconds.
    let heartbeat = arguments.get_mut(6..8)?;
    if heartbeat == [0, 0] {
        heartbeat.fill(0xff);
    }
    Some(())
}

/// Whether amiquip can read the properties of the server, which follow the version.
fn is_sound_start(mut arguments: &[u8]) -> bool {
    let table = take(&mut arguments, 2).and_then(|_| take_long(&mut arguments));
    table.is_some_and(|table| !read_table(table).is_repaired)
}

/// Whether this method ends the connection, or the channel of messages.
pub(super) fn is_close_of(channel: u16, method: &[u8; 4]) -> bool {
    *method == CLOSE || *method == CHANNEL_CLOSE && channel == CHANNEL
}

/// The arguments of `connection.close` and `channel.close`.
fn read_close(arguments: &[u8]) -> Option<Close> {
    let (&[code @ .., length], rest) = arguments.split_first_chunk::<3>()?;
    let (text, rest) = rest.split_at_checked(length.into())?;
    let request = rest.first_chunk().copied()?;
    Some(Close {
        code: u16::from_be_bytes(code),
        text: read_text(text),
        request: (request != [0; 4]).then_some(request),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame with this payload.
    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = (payload.len() as u32).to_be_bytes();
        [&[kind, 0, 1], &size[..], payload, &[FRAME_END]].concat()
    }

    fn table(content: &[u8]) -> Vec<u8> {
        [&(content.len() as u32).to_be_bytes(), content].concat()
    }

    /// So many nested tables.
    fn nested(levels: usize) -> Vec<u8> {
        (1..levels).fold(table(b""), |inner, _| table(&[b"\x01kF", &inner[..]].concat()))
    }

    /// A filter that has let the start of a connection through.
    fn filter() -> FrameFilter {
        FrameFilter { is_started: true, ..FrameFilter::default() }
    }

    /// The bytes that are let through, which have to be all.
    fn passed(mut bytes: Vec<u8>) -> Vec<u8> {
        assert_eq!(filter().check(&mut bytes), Ok(bytes.len()));
        bytes
    }

    /// Bytes that a broker sent to a receiver: login, declarations, and messages with and without
    /// properties, headers and a body of several kinds.
    const RECEIVED: &[u8] = include_bytes!("../../tests/data/received.bin");

    /// Feeds bytes in chunks of random size, as a stream would; returns those let through.
    fn feed(bytes: &[u8], chunk: impl Fn() -> usize) -> (Vec<u8>, Result<(), Fault>) {
        let (mut filter, mut passed, mut pending) =
            (FrameFilter::default(), Vec::new(), Vec::new());
        let mut rest = bytes;
        while !rest.is_empty() {
            let (next, after) = rest.split_at(chunk().clamp(1, rest.len()));
            pending.extend_from_slice(next);
            rest = after;
            match filter.check(&mut pending) {
                Ok(length) => passed.extend(pending.drain(..length)),
                Err(fault) => return (passed, Err(fault)),
            }
            assert!(pending.len() <= FRAME_MAX as usize);
        }
        (passed, Ok(()))
    }

    #[test]
    fn sound_bytes_are_let_through_as_they_are_however_they_are_cut() {
        for longest in [1, 2, 7, 8, 9, 100, RECEIVED.len()] {
            for _ in 0..20 {
                let (passed, outcome) = feed(RECEIVED, || fastrand::usize(1..=longest));
                assert_eq!(outcome, Ok(()));
                assert!(passed == RECEIVED, "changed, in chunks of up to {longest} bytes");
            }
        }
    }

    #[test]
    fn corrupt_bytes_neither_panic_nor_pile_up() {
        for _ in 0..20_000 {
            let mut bytes = RECEIVED.to_vec();
            for _ in 0..fastrand::usize(1..8) {
                match fastrand::u8(..3) {
                    0 => bytes[fastrand::usize(..RECEIVED.len() / 2)] = fastrand::u8(..),
                    1 => bytes.truncate(bytes.len() - fastrand::usize(..RECEIVED.len() / 10)),
                    _ => drop(bytes.remove(fastrand::usize(..RECEIVED.len() / 2))),
                }
            }
            let (passed, _) = feed(&bytes, || fastrand::usize(1..500));
            assert!(passed.len() <= bytes.len());
        }
    }

    #[test]
    fn a_content_header_may_be_larger_than_agreed_on() {
        let (large, method) =
            (frame(CONTENT_HEADER, &vec![0; 1 << 20]), frame(METHOD, &[0, 10, 0, 61]));
        let mut filter = filter();
        for part in [large, method].concat().chunks(FRAME_MAX as usize) {
            assert_eq!(filter.check(&mut part.to_vec()), Ok(part.len()));
        }
        assert_eq!(filter.rest, 0);
    }

    #[test]
    fn impossible_frames_end_the_connection() {
        let with_end = |mut frame: Vec<u8>, end| {
            *frame.last_mut().unwrap() = end;
            frame
        };
        for mut bytes in [
            b"\x01\0\0\x4d\x7c\x6d\0".to_vec(),
            b"\x08\0\0\0\x02\0\0".to_vec(),
            b"\x04\0\0\0\0\0\0\xce".to_vec(),
            with_end(frame(BODY, b"body"), 0),
            with_end(frame(HEARTBEAT, b""), 7),
            frame(METHOD, b"\0\x3c"),
            with_end(frame(CONTENT_HEADER, b"header"), 0),
        ] {
            let outcome = filter().check(&mut bytes);
            assert!(matches!(outcome, Err(Fault::Frame(_))), "{outcome:?}");
        }
    }

    #[test]
    fn no_method_takes_the_parser_deep_into_the_stack() {
        // Before the table: the method, a reserved field, the name and the flags.
        let declare = [&[0, 50, 0, 10, 0, 0, 0, 0][..], &nested(10_000)].concat();
        let outcome = filter().check(&mut frame(METHOD, &declare));
        assert_eq!(outcome, Err(Fault::Frame("method 50.10".into())));
        let start = [&START[..], &[0, 9], &nested(10_000)].concat();
        let outcome = FrameFilter::default().check(&mut frame(METHOD, &start));
        assert_eq!(outcome, Err(Fault::Frame("method 10.10".into())));
    }

    #[test]
    fn what_is_not_amqp_is_named() {
        for (bytes, name) in [
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], "an HTTP server"),
            (b"SSH-2.0-OpenSSH_9.2\r\n", "an SSH server"),
            (b"\x15\x03\x03\0\x02\x02\x46", "a TLS server (write amqps:// for it)"),
            (b"AMQP\0\x01\0\0", "an AMQP 1.0 server"),
            (b"AMQP\0\0\x09\x01", "a server of another version of AMQP"),
            (b"220 mail ESMTP", "something else"),
            (b"?", "something else"),
        ] {
            let mut filter = FrameFilter::default();
            let checked = filter.check(&mut bytes.to_vec());
            let ended = checked.and_then(|length| {
                assert_eq!(length, 0);
                filter.end(bytes)
            });
            assert_eq!(ended, Err(Fault::NotAmqp(name)));
        }
        let deliver = FrameFilter::default().check(&mut frame(METHOD, &DELIVER));
        assert!(matches!(deliver, Err(Fault::Frame(_))), "before the start");
        assert_eq!(FrameFilter::default().end(b""), Ok(()));
    }

    #[test]
    fn a_close_is_read_and_heartbeats_are_asked_for() {
        let mut filter = filter();
        for close in [CLOSE, CHANNEL_CLOSE] {
            let arguments = b"\x01\x93\x04Gone\0\x28\0\x0a";
            let mut frame = frame(METHOD, &[&close[..], arguments].concat());
            filter.check(&mut frame).unwrap();
            let close = Close { code: 403, text: "Gone".into(), request: Some([0, 40, 0, 10]) };
            assert_eq!(filter.closed.take(), Some(close));
        }
        let closes = [&CHANNEL_CLOSE, &CLOSE]
            .map(|close| frame(METHOD, &[&close[..], b"\x01\x94\0", &close[..]].concat()));
        filter.check(&mut closes.concat()).unwrap();
        assert_eq!(filter.closed.unwrap().request, Some(CHANNEL_CLOSE), "the first counts");
        let tune = |heartbeat: [u8; 2]| {
            frame(METHOD, &[&TUNE[..], &[0, 0, 0, 2, 0, 0], &heartbeat].concat())
        };
        assert_eq!(passed(tune([0, 60])), tune([0, 60]));
        assert_eq!(passed(tune([0, 0])), tune([0xff, 0xff]));
    }
}
