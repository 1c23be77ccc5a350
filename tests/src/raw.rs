//! AMQP byte by byte, for frames that no library would send.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// The type of a frame with a method.
pub const METHOD: u8 = 1;
/// The type of a frame with the properties of a message.
pub const CONTENT_HEADER: u8 = 2;
/// The type of a frame with a part of a message.
pub const BODY: u8 = 3;

/// A short string of AMQP.
pub fn short_string(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).expect("at most 255 bytes")], text].concat()
}

/// A table or a long string of AMQP: its size, and the content.
pub fn block(content: &[u8]) -> Vec<u8> {
    [&u32::try_from(content.len()).expect("4 GiB").to_be_bytes(), content].concat()
}

/// A frame.
pub fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    [&[kind], &channel.to_be_bytes()[..], &block(payload), &[0xce]].concat()
}

/// A frame with a method, which is identified by class and number.
pub fn method(channel: u16, (class, method): (u16, u16), arguments: &[u8]) -> Vec<u8> {
    frame(METHOD, channel, &[&class.to_be_bytes(), &method.to_be_bytes(), arguments].concat())
}

/// Reads a frame: its type and payload.
pub fn read_frame(socket: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut header = [0; 7];
    socket.read_exact(&mut header)?;
    let [kind, _, _, size @ ..] = header;
    let mut payload = vec![0; u32::from_be_bytes(size) as usize + 1];
    socket.read_exact(&mut payload)?;
    payload.pop();
    Ok((kind, payload))
}

/// The class and number of the method in a payload.
pub fn method_of(payload: &[u8]) -> (u16, u16) {
    match payload {
        [a, b, c, d, ..] => (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])),
        _ => panic!("no method: {payload:?}"),
    }
}

/// A publisher: a connection with one channel.
pub struct RawPublisher {
    socket: TcpStream,
}

impl RawPublisher {
    /// Logs in as guest, with frames of 128 KiB.
    pub fn connect(url: &str) -> RawPublisher {
        RawPublisher::connect_with(url, 128 * 1024)
    }

    /// Logs in as guest, with frames of at most `frame_max` bytes.
    pub fn connect_with(url: &str, frame_max: u32) -> RawPublisher {
        let (_, place) = url.split_once('@').expect("credentials in the URL");
        let (address, _) = place.split_once('/').expect("a vhost in the URL");
        let socket = TcpStream::connect(address).expect("connect");
        socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let mut raw = RawPublisher { socket };
        raw.send(b"AMQP\0\0\x09\x01");
        raw.expect((10, 10));
        let start_ok =
            [block(b""), short_string(b"PLAIN"), block(b"\0guest\0guest"), short_string(b"en_US")];
        raw.send(&method(0, (10, 11), &start_ok.concat()));
        raw.expect((10, 30));
        // 2047 channels, no heartbeats.
        let tune_ok = [&[7, 0xff], &frame_max.to_be_bytes()[..], &[0, 0]].concat();
        raw.send(&method(0, (10, 31), &tune_ok));
        raw.send(&method(0, (10, 40), b"\x01/\0\0"));
        raw.expect((10, 41));
        raw.send(&method(1, (20, 10), b"\0"));
        raw.expect((20, 11));
        raw
    }

    /// Publishes a message with these bytes as routing key, property flags, properties and body.
    pub fn publish(
        &mut self,
        exchange: &str,
        routing_key: &[u8],
        (flags, properties): (u16, &[u8]),
        body: &[u8],
    ) {
        let names = [short_string(exchange.as_bytes()), short_string(routing_key)].concat();
        self.send(&method(1, (60, 40), &[&[0, 0], &names[..], &[0]].concat()));
        let size = (body.len() as u64).to_be_bytes();
        let header = [&[0, 60, 0, 0], &size[..], &flags.to_be_bytes(), properties].concat();
        self.send(&frame(CONTENT_HEADER, 1, &header));
        if !body.is_empty() {
            self.send(&frame(BODY, 1, body));
        }
    }

    /// Waits until the broker has read all published messages.
    pub fn flush(&mut self) {
        self.send(&method(1, (60, 10), &[0; 7]));
        self.expect((60, 11));
    }

    fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the broker reads");
    }

    /// Reads a frame, which must be this method.
    fn expect(&mut self, method: (u16, u16)) {
        let (_, payload) = read_frame(&mut self.socket).expect("a frame");
        assert_eq!(method_of(&payload), method, "{}", String::from_utf8_lossy(&payload));
    }
}

/// The broker's end of a connection. The test controls each step.
pub struct RawBroker<S = TcpStream> {
    socket: S,
}

/// The frames of the client during the login, and the answers of the broker: `start`, `tune`, `open-ok` and
/// `channel.open-ok`.
const LOGIN: [((u16, u16), (u16, u16)); 4] =
    [((0, 0), (10, 10)), ((10, 11), (10, 30)), ((10, 40), (10, 41)), ((20, 10), (20, 11))];

impl<S: Read + Write> RawBroker<S> {
    /// The number of answers in a login.
    pub const LOGIN_STEPS: usize = LOGIN.len();

    /// A broker on a connected socket.
    pub fn new(socket: S) -> RawBroker<S> {
        RawBroker { socket }
    }

    /// Completes the login, up to an open channel.
    pub fn log_in(&mut self) {
        self.log_in_until(LOGIN.len());
    }

    /// Sends this number of answers of a login, and reads the client's frames up to the last of them.
    pub fn log_in_until(&mut self, answers: usize) {
        for (step, (request, answer)) in LOGIN.into_iter().enumerate().take(answers + 1) {
            match step {
                0 => self.socket.read_exact(&mut [0; 8]).expect("a protocol header"),
                _ => drop(self.expect(request)),
            }
            if step < answers {
                let arguments = match step {
                    // Version, no properties, mechanism, locale.
                    0 => [b"\0\x09", &block(b"")[..], &block(b"PLAIN EXTERNAL"), &block(b"en_US")]
                        .concat(),
                    // 2047 channels, frames of 128 KiB, no heartbeats.
                    1 => vec![7, 0xff, 0, 2, 0, 0, 0, 0],
                    2 => vec![0],
                    _ => block(b""),
                };
                self.send(if step == 3 { 1 } else { 0 }, answer, &arguments);
            }
        }
    }

    /// Reads methods until this one. Returns its arguments.
    pub fn expect(&mut self, method: (u16, u16)) -> Vec<u8> {
        loop {
            let (kind, mut payload) = read_frame(&mut self.socket).expect("a frame");
            if kind == METHOD && method_of(&payload) == method {
                return payload.split_off(4);
            }
        }
    }

    /// Reads a request and answers it on a channel.
    pub fn answer(&mut self, channel: u16, (class, request): (u16, u16), arguments: &[u8]) {
        self.expect((class, request));
        self.send(channel, (class, request + 1), arguments);
    }

    /// Sends a method.
    pub fn send(&mut self, channel: u16, id: (u16, u16), arguments: &[u8]) {
        self.write(&method(channel, id, arguments));
    }

    /// Closes the connection (class 10) or the channel (20) with a reason.
    pub fn close(&mut self, class: u16, code: u16, text: &str) {
        let (channel, number) = if class == 10 { (0, 50) } else { (1, 40) };
        let text = short_string(text.as_bytes());
        self.send(channel, (class, number), &[&code.to_be_bytes(), &text[..], &[0; 4]].concat());
    }

    /// Delivers a message to the consumer `tag`.
    pub fn deliver(&mut self, delivery_tag: u64, body: &[u8]) {
        self.deliver_on(1, delivery_tag, body);
    }

    /// The same on another channel.
    pub fn deliver_on(&mut self, channel: u16, delivery_tag: u64, body: &[u8]) {
        let names = [short_string(b"logs"), short_string(b"")].concat();
        let tags = [short_string(b"tag"), delivery_tag.to_be_bytes().to_vec()].concat();
        let mut bytes = method(channel, (60, 60), &[&tags[..], &[0], &names].concat());
        let size = (body.len() as u64).to_be_bytes();
        let header = [&[0, 60, 0, 0], &size[..], &[0, 0]].concat();
        bytes.extend(frame(CONTENT_HEADER, channel, &header));
        for part in body.chunks(100_000) {
            bytes.extend(frame(BODY, channel, part));
        }
        self.write(&bytes);
    }

    /// Sends bytes.
    pub fn write(&mut self, bytes: &[u8]) {
        // The client may have closed the connection; the test checks its reaction.
        let _ = self.socket.write_all(bytes).and_then(|()| self.socket.flush());
    }

    /// Reads until the client closes the connection.
    pub fn wait_for_end(&mut self) {
        while matches!(self.socket.read(&mut [0; 1024]), Ok(1..)) {}
    }

    /// The socket.
    pub fn socket(&mut self) -> &mut S {
        &mut self.socket
    }
}
