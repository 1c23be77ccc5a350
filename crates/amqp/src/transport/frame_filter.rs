//! Stands between amiquip and the network: amiquip believes what it reads.
//!
//! [`FrameFilter`] checks each frame in place, before amiquip parses it. A frame that only a broken or
//! hostile broker sends ends the connection; a message of any publisher is sanitized, so that it cannot end
//! the connection of every receiver.
//!
//! Frames are those of [AMQP 0-9-1](https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf),
//! 2.3.5: type (1 byte), channel (2), payload size (4), payload, 0xCE. The payload of a method
//! frame begins with class (2) and method (2).

use std::fmt::{self, Display};

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

/// The largest body of a message that RabbitMQ can be set up to take, in bytes.
const LARGEST_BODY: u64 = 512 * 1024 * 1024;

/// A heartbeat.
pub(super) const HEARTBEAT_FRAME: [u8; 8] = [HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END];

/// Levels of nested tables and arrays. The parser calls itself for each.
const DEEPEST: usize = 32;

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
    /// Bytes that are still to come of a body frame, its end included.
    rest: usize,
    /// Messages whose properties were dropped.
    pub sanitized: u64,
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

    /// Checks the first frame, or the part of a body frame; also tells whether another may follow.
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
        if size > FRAME_MAX as usize - HEADER - 1 {
            return Err(Fault::Frame(format!("a frame of {size} bytes")));
        }
        if kind == BODY {
            // The parser does not look into a body, so it need not be here as a whole.
            self.rest = size + 1;
            return Ok((HEADER, true));
        }
        let length = HEADER + size + 1;
        let Some(frame) = bytes.get_mut(..length) else {
            return Ok((0, false));
        };
        check_end(frame[length - 1])?;
        let payload = &mut frame[HEADER..length - 1];
        match kind {
            METHOD => self.check_method(u16::from_be_bytes(channel), payload)?,
            CONTENT_HEADER => self.check_content_header(payload)?,
            _ => {}
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
            // version, properties of the server
            START => Reader(arguments).skip(2).and_then(|r| r.table(1)).is_some(),
            TUNE => sanitize_tune(arguments).is_some(),
            CLOSE | CHANNEL_CLOSE => self.note_close(channel, id, arguments).is_some(),
            // consumer tag, delivery tag and redelivered, exchange, routing key
            DELIVER => sanitize_names(arguments, |r| r.short_string()?.skip(9)).is_some(),
            // reply code, reply text, exchange, routing key
            RETURN => sanitize_names(arguments, |r| r.skip(2)?.short_string()).is_some(),
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

    fn check_content_header(&mut self, payload: &mut [u8]) -> Result<(), Fault> {
        // Class and weight, size of the body, flags.
        let Some((&mut [_, _, _, _, ref size @ .., _, _], _)) =
            payload.split_first_chunk_mut::<14>()
        else {
            return Err(Fault::Frame("a content header without a size".into()));
        };
        let size = u64::from_be_bytes(*size);
        if size > LARGEST_BODY {
            return Err(Fault::Frame(format!("a message of {size} bytes")));
        }
        let (flags, properties) = payload[12..].split_at_mut(2);
        if check_properties(u16::from_be_bytes([flags[0], flags[1]]), properties).is_none() {
            // Without a flag, amiquip reads none of the bytes after the flags.
            flags.fill(0);
            if self.sanitized == 0 {
                log::warn!("a message has properties that cannot be read; they are left out");
            }
            self.sanitized += 1;
        }
        Ok(())
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

/// Whether this method ends the connection, or the channel of messages.
pub(super) fn is_close_of(channel: u16, method: &[u8; 4]) -> bool {
    *method == CLOSE || *method == CHANNEL_CLOSE && channel == CHANNEL
}

/// The arguments of `connection.close` and `channel.close`.
fn read_close(arguments: &[u8]) -> Option<Close> {
    let (&[code @ .., length], rest) = arguments.split_first_chunk::<3>()?;
    let (text, rest) = rest.split_at_checked(length.into())?;
    let request = rest.first_chunk().copied()?;
    let text = String::from_utf8_lossy(text).into_owned();
    Some(Close {
        code: u16::from_be_bytes(code),
        text,
        request: (request != [0; 4]).then_some(request),
    })
}

/// Replaces bytes that are not UTF-8 in the two names, short strings, after the arguments that `skip` skips.
fn sanitize_names(
    arguments: &mut [u8],
    skip: impl FnOnce(Reader<'_>) -> Option<Reader<'_>>,
) -> Option<()> {
    let mut at = arguments.len() - skip(Reader(arguments))?.0.len();
    for _ in 0..2 {
        let length = usize::from(*arguments.get(at)?);
        let name = arguments.get_mut(at + 1..at + 1 + length)?;
        while let Err(error) = str::from_utf8(name) {
            name[error.valid_up_to()] = b'?';
        }
        at += 1 + length;
    }
    Some(())
}

/// `None` if these are not properties that amiquip can read.
fn check_properties(flags: u16, properties: &[u8]) -> Option<()> {
    type Property = fn(Reader<'_>) -> Option<Reader<'_>>;
    const TEXT: Property = |reader| reader.short_string();
    const TABLE: Property = |reader| reader.table(1);
    const OCTET: Property = |reader| reader.skip(1);
    const TIME: Property = |reader| reader.skip(8);
    // content_type, content_encoding, headers, delivery_mode, priority, correlation_id, reply_to,
    // expiration, message_id, timestamp, type, user_id, app_id, cluster_id; from the highest flag
    // down. The lowest two stand for properties that nobody has defined yet.
    const PROPERTIES: [Property; 14] =
        [TEXT, TEXT, TABLE, OCTET, OCTET, TEXT, TEXT, TEXT, TEXT, TIME, TEXT, TEXT, TEXT, TEXT];
    let mut reader = Reader(properties);
    for (index, property) in PROPERTIES.iter().enumerate() {
        if flags & (0x8000 >> index) != 0 {
            reader = property(reader)?;
        }
    }
    (flags & 3 == 0 && reader.0.is_empty()).then_some(())
}

/// Whether the bytes are UTF-8; ASCII is found out sooner.
fn is_text(bytes: &[u8]) -> bool {
    bytes.is_ascii() || str::from_utf8(bytes).is_ok()
}

/// Bytes to be read from the front. Each method returns the rest, or `None` if the bytes are unsound.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn skip(self, length: usize) -> Option<Reader<'a>> {
        self.0.get(length..).map(Reader)
    }

    pub fn short_string(self) -> Option<Reader<'a>> {
        let (&length, rest) = self.0.split_first()?;
        let (text, rest) = rest.split_at_checked(length.into())?;
        is_text(text).then_some(Reader(rest))
    }

    /// The text of a short string, and the rest.
    pub fn take_string(self) -> Option<(String, Reader<'a>)> {
        let rest = self.short_string()?;
        let text = &self.0[1..self.0.len() - rest.0.len()];
        Some((str::from_utf8(text).ok()?.to_string(), rest))
    }

    /// The content after a size of four bytes, and the rest.
    fn block(self) -> Option<(&'a [u8], Reader<'a>)> {
        let (&size, rest) = self.0.split_first_chunk()?;
        let (content, rest) = rest.split_at_checked(u32::from_be_bytes(size) as usize)?;
        Some((content, Reader(rest)))
    }

    /// A table at this level of nesting.
    fn table(self, depth: usize) -> Option<Reader<'a>> {
        let (content, rest) = self.block()?;
        let mut content = Reader(content);
        while !content.0.is_empty() {
            content = content.short_string()?.value(depth)?;
        }
        Some(rest)
    }

    fn array(self, depth: usize) -> Option<Reader<'a>> {
        let (content, rest) = self.block()?;
        let mut content = Reader(content);
        while !content.0.is_empty() {
            content = content.value(depth)?;
        }
        Some(rest)
    }

    /// A type and a value, in a table or array at this level of nesting.
    fn value(self, depth: usize) -> Option<Reader<'a>> {
        let (kind, rest) = self.0.split_first()?;
        let rest = Reader(rest);
        match kind {
            b'V' => Some(rest),
            b't' | b'b' | b'B' => rest.skip(1),
            b's' | b'U' | b'u' => rest.skip(2),
            b'I' | b'i' | b'f' => rest.skip(4),
            b'D' => rest.skip(5),
            b'L' | b'l' | b'd' | b'T' => rest.skip(8),
            b'x' => Some(rest.block()?.1),
            b'S' => {
                let (text, rest) = rest.block()?;
                is_text(text).then_some(rest)
            }
            b'F' if depth < DEEPEST => rest.table(depth + 1),
            b'A' if depth < DEEPEST => rest.array(depth + 1),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame with this payload.
    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = (payload.len() as u32).to_be_bytes();
        [&[kind, 0, 1], &size[..], payload, &[FRAME_END]].concat()
    }

    fn short_string(text: &[u8]) -> Vec<u8> {
        [&[text.len() as u8], text].concat()
    }

    fn deliver(exchange: &[u8], routing_key: &[u8]) -> Vec<u8> {
        let start = [&DELIVER[..], &short_string(b"tag"), &[0; 9]].concat();
        frame(METHOD, &[start, short_string(exchange), short_string(routing_key)].concat())
    }

    fn content_header(flags: u16, properties: &[u8]) -> Vec<u8> {
        let start = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
        frame(CONTENT_HEADER, &[&start[..], &flags.to_be_bytes(), properties].concat())
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

    /// The sanitized bytes, which have to be let through whole, and the number of dropped properties.
    fn passed(mut bytes: Vec<u8>) -> (Vec<u8>, u64) {
        let mut filter = filter();
        assert_eq!(filter.check(&mut bytes), Ok(bytes.len()));
        (bytes, filter.sanitized)
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
    fn names_that_are_not_utf8_are_sanitized() {
        let (bytes, sanitized) = passed(deliver(b"logs", b"\xff"));
        assert_eq!((bytes, sanitized), (deliver(b"logs", b"?"), 0));
        let (bytes, _) = passed(deliver(b"l\xc3g", "ä\u{1f600}".as_bytes()));
        assert_eq!(bytes, deliver(b"l?g", "ä\u{1f600}".as_bytes()));
        let (bytes, _) = passed(deliver(b"", &[0xe2, 0x82, b'x', 0xff, 0xff]));
        assert_eq!(bytes, deliver(b"", b"??x??"));
    }

    #[test]
    fn properties_of_every_kind_are_let_through() {
        let values = b"\x01aV\x01bt\x01\x01cb\xff\x01dB\xff\x01es\xff\xff\x01fU\0\x01\x01gu\0\x01\
            \x01hI\0\0\0\x01\x01ii\0\0\0\x01\x01jf\0\0\0\0\x01kD\x02\0\0\0\x01\x01lL\0\0\0\0\0\0\0\x01\
            \x01ml\0\0\0\0\0\0\0\x01\x01nd\0\0\0\0\0\0\0\0\x01oT\0\0\0\0\0\0\0\0\
            \x01px\0\0\0\x01\xff\x01qS\0\0\0\x01s\x01rA\0\0\0\x03b\x01V\x01sF\0\0\0\x03\x01kV";
        let texts = |count| short_string("grün".as_bytes()).repeat(count);
        let properties = [texts(2), table(values), vec![2, 0], texts(4), vec![0; 8], texts(4)];
        let header = content_header(0xfffc, &properties.concat());
        assert_eq!(passed(header.clone()), (header, 0));
    }

    #[test]
    fn properties_that_cannot_be_read_are_dropped_and_the_message_is_not() {
        let text = short_string(b"\xff");
        let mut unsound = vec![
            (0x8000, vec![]),
            (0x8000, vec![5, b'x']),
            (0x8000, b"\x01xy".to_vec()),
            (0x0001, vec![]),
            (0x0002, vec![]),
            (0x2000, table(b"\x01k?")),
            (0x2000, table(b"\x01\xffV")),
            (0x2000, table(b"\x01kS\0\0\0\x01\xff")),
            (0x2000, table(b"\x01kS\0\0\0\x02x")),
            (0x2000, vec![0xff; 4]),
            (0x0040, vec![0; 7]),
        ];
        for index in [0, 1, 5, 6, 7, 8, 10, 11, 12, 13] {
            unsound.push((0x8000 >> index, text.clone()));
        }
        unsound.extend([33, 34, 100, 1000, 18_000].map(|levels| (0x2000, nested(levels))));
        for (flags, properties) in unsound {
            let (bytes, sanitized) = passed(content_header(flags, &properties));
            assert_eq!(sanitized, 1, "{flags:#x} {:?}", &properties[..properties.len().min(20)]);
            assert!(bytes == content_header(0, &properties));
        }
        assert_eq!(passed(content_header(0x2000, &nested(32))).1, 0);
    }

    #[test]
    fn impossible_frames_end_the_connection() {
        let with_end = |mut frame: Vec<u8>, end| {
            *frame.last_mut().unwrap() = end;
            frame
        };
        let huge_body = [&[0, 60, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0][..]].concat();
        for mut bytes in [
            b"\x01\0\0\x4d\x7c\x6d\0".to_vec(),
            b"\x03\0\0\0\x02\0\0".to_vec(),
            b"\x04\0\0\0\0\0\0\xce".to_vec(),
            with_end(frame(BODY, b"body"), 0),
            with_end(frame(HEARTBEAT, b""), 7),
            with_end(deliver(b"logs", b""), 0xff),
            frame(METHOD, b"\0\x3c"),
            frame(METHOD, &[&DELIVER[..], b"\x09tag"].concat()),
            frame(CONTENT_HEADER, b"\0\x3c\0\0"),
            frame(CONTENT_HEADER, &huge_body),
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
        let deliver = FrameFilter::default().check(&mut deliver(b"logs", b""));
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
        assert_eq!(passed(tune([0, 60])).0, tune([0, 60]));
        assert_eq!(passed(tune([0, 0])).0, tune([0xff, 0xff]));
    }
}
