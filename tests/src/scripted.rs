//! A broker that does what a test says, step by step, in the process of the test.
//!
//! [`ScriptedBroker`] speaks AMQP 0-9-1 over loopback. It lets clients in and answers their requests by
//! itself; each client that has opened a channel becomes a [`ScriptedSession`], which tells what the client
//! has published, and sends the confirmations, returns, notices and ends that the test asks for, in that
//! order. It is for the order of events, in milliseconds; what RabbitMQ really does is tested with RabbitMQ.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use socket2::SockRef;

use crate::raw::{self, BODY, CONTENT_HEADER, METHOD, block, frame, method_of, short_string};
use crate::{PATIENCE, wait_until};

type Method = (u16, u16);

const START: Method = (10, 10);
const START_OK: Method = (10, 11);
const TUNE: Method = (10, 30);
const OPEN: Method = (10, 40);
const OPEN_OK: Method = (10, 41);
const CLOSE: Method = (10, 50);
const CLOSE_OK: Method = (10, 51);
const BLOCKED: Method = (10, 60);
const UNBLOCKED: Method = (10, 61);
const CHANNEL_OPEN: Method = (20, 10);
const CHANNEL_OPEN_OK: Method = (20, 11);
const CHANNEL_CLOSE: Method = (20, 40);
const QOS: Method = (60, 10);
const QOS_OK: Method = (60, 11);
const RETURN: Method = (60, 50);
const ACK: Method = (60, 80);
const NACK: Method = (60, 120);

/// `exchange.declare`, as the request that a channel is closed for.
pub const EXCHANGE_DECLARE: Method = (40, 10);

/// `basic.publish`, as the request that a channel is closed for.
pub const PUBLISH: Method = (60, 40);

/// The channel that clients with one channel use.
const CHANNEL: u16 = 1;

/// A broker under a test's control.
pub struct ScriptedBroker {
    address: SocketAddr,
    shared: Arc<Shared>,
    sessions: Mutex<Receiver<ScriptedSession>>,
}

#[derive(Default)]
struct Shared {
    /// Whether those who connect are turned away.
    is_down: AtomicBool,
    is_over: AtomicBool,
    attempts: AtomicUsize,
    /// Whether the exchange exists, and is durable.
    exchange: Mutex<Option<bool>>,
    declarations: Mutex<Vec<bool>>,
}

/// What a client published.
#[derive(Clone, Debug)]
pub struct Published {
    /// The exchange.
    pub exchange: String,
    /// Whether it is to be returned if no queue takes it.
    pub mandatory: bool,
    /// The property `message_id`.
    pub message_id: Option<String>,
    /// The property `type`.
    pub message_type: Option<String>,
    /// The body.
    pub body: Vec<u8>,
    /// Flags and properties, as they came.
    properties: Vec<u8>,
}

/// What a client did.
#[derive(Debug)]
enum Event {
    Published(Published),
    /// It wants to know whether all that it sent has been read: `basic.qos`.
    Asked,
    /// It closes the connection.
    Closed,
}

impl ScriptedBroker {
    /// Starts one, which lets everybody in, and has no exchange.
    pub fn start() -> ScriptedBroker {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::<Shared>::default();
        let (sender, sessions) = mpsc::channel();
        let known = Arc::clone(&shared);
        thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                if known.is_over.load(Ordering::SeqCst) {
                    break;
                }
                if !known.is_down.load(Ordering::SeqCst) {
                    let (shared, sender) = (Arc::clone(&known), sender.clone());
                    thread::spawn(move || Client::new(socket, shared).serve(&sender));
                }
                known.attempts.fetch_add(1, Ordering::SeqCst);
            }
        });
        ScriptedBroker { address, shared, sessions: Mutex::new(sessions) }
    }

    /// Where it is. A scripted broker sends no heartbeats, so a client is not to wait for them.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@{}/%2f?heartbeat=0", self.address)
    }

    /// Waits for the next client that has opened a channel.
    pub fn accept(&self) -> ScriptedSession {
        let sessions = self.sessions.lock().expect("no panic");
        sessions.recv_timeout(PATIENCE).expect("a client opens a channel")
    }

    /// Turns those away who connect from now on, without a word.
    pub fn go_down(&self) {
        self.shared.is_down.store(true, Ordering::SeqCst);
    }

    /// Lets everybody in again.
    pub fn come_back(&self) {
        self.shared.is_down.store(false, Ordering::SeqCst);
    }

    /// Waits until so many more clients have connected than before, whether they were let in or not.
    pub fn wait_for_attempts(&self, more: usize) {
        let before = self.shared.attempts.load(Ordering::SeqCst);
        wait_until("a client tries to connect", || {
            self.shared.attempts.load(Ordering::SeqCst) >= before + more
        });
    }

    /// Makes the exchange anew: from now on it refuses declarations of the other durability.
    pub fn set_exchange(&self, durable: bool) {
        *self.shared.exchange.lock().expect("no panic") = Some(durable);
    }

    /// How the exchange was declared, in turn: whether durable.
    pub fn declarations(&self) -> Vec<bool> {
        self.shared.declarations.lock().expect("no panic").clone()
    }
}

impl Drop for ScriptedBroker {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        // The listener looks when somebody connects.
        let _ = TcpStream::connect(self.address);
    }
}

/// A client's connection with one channel. When it is dropped, the connection ends.
pub struct ScriptedSession {
    client: Arc<Client>,
    events: Receiver<Event>,
}

impl ScriptedSession {
    /// The next messages that the client publishes, so many of them.
    ///
    /// # Panics
    ///
    /// When it does something else first, or nothing within [`PATIENCE`].
    pub fn expect_publishes(&self, count: usize) -> Vec<Published> {
        let next = |index| match self.next() {
            Event::Published(published) => published,
            other => panic!("message {index} of {count} is expected, not {other:?}"),
        };
        (1..=count).map(next).collect()
    }

    /// What the client publishes, until it does something else or goes.
    pub fn publishes(&self) -> impl Iterator<Item = Published> {
        std::iter::from_fn(|| match self.events.recv_timeout(PATIENCE) {
            Ok(Event::Published(published)) => Some(published),
            _ => None,
        })
    }

    /// Waits until the client closes the connection, without having published anything more.
    pub fn expect_close(&self) {
        match self.next() {
            Event::Closed => {}
            other => panic!("connection.close is expected, not {other:?}"),
        }
    }

    /// Waits until the client asks whether all is read, without having published anything more.
    pub fn expect_question(&self) {
        match self.next() {
            Event::Asked => {}
            other => panic!("basic.qos is expected, not {other:?}"),
        }
    }

    fn next(&self) -> Event {
        self.events.recv_timeout(PATIENCE).expect("the client does something")
    }

    /// Confirms a message, or all up to it.
    pub fn ack(&self, delivery_tag: u64, multiple: bool) {
        self.client.send(CHANNEL, ACK, &confirmation(delivery_tag, multiple));
    }

    /// Refuses a message, or all up to it.
    pub fn nack(&self, delivery_tag: u64, multiple: bool) {
        self.client.send(CHANNEL, NACK, &confirmation(delivery_tag, multiple));
    }

    /// Returns a message, as no queue takes it.
    pub fn give_back(&self, message: &Published) {
        let exchange = short_string(message.exchange.as_bytes());
        let arguments = [&312_u16.to_be_bytes(), &short_string(b"NO_ROUTE")[..], &exchange, b"\0"];
        let size = (message.body.len() as u64).to_be_bytes();
        let header = [&[0, 60, 0, 0], &size[..], &message.properties].concat();
        let mut bytes = raw::method(CHANNEL, RETURN, &arguments.concat());
        bytes.extend(frame(CONTENT_HEADER, CHANNEL, &header));
        if !message.body.is_empty() {
            bytes.extend(frame(BODY, CHANNEL, &message.body));
        }
        self.client.write(&bytes);
    }

    /// Says that no messages are taken for now.
    pub fn block(&self, reason: &str) {
        self.client.send(0, BLOCKED, &short_string(reason.as_bytes()));
    }

    /// Says that messages are taken again.
    pub fn unblock(&self) {
        self.client.send(0, UNBLOCKED, b"");
    }

    /// Closes the channel because of a `request`, and reads over what else the client sends on it.
    pub fn close_channel(&self, code: u16, text: &str, request: Method) {
        self.client.close_channel(code, text, request);
    }

    /// Closes the connection, as an operator would.
    pub fn close(&self, code: u16, text: &str) {
        self.client.is_closing.store(true, Ordering::SeqCst);
        self.client.send(0, CLOSE, &close(code, text, (0, 0)));
    }

    /// Keeps the connection, and neither answers nor takes note of anything.
    pub fn go_silent(&self) {
        self.client.is_silent.store(true, Ordering::SeqCst);
    }

    /// Resets the connection.
    pub fn cut(self) {
        let socket = SockRef::from(&self.client.socket);
        socket.set_linger(Some(Duration::ZERO)).expect("an option");
    }
}

impl Drop for ScriptedSession {
    fn drop(&mut self) {
        let lingers = SockRef::from(&self.client.socket).linger().is_ok_and(|time| time.is_some());
        // A socket that lingers for no time is reset when the last handle on it goes. It may be gone.
        let how = if lingers { Shutdown::Read } else { Shutdown::Both };
        let _ = self.client.socket.shutdown(how);
    }
}

fn confirmation(delivery_tag: u64, multiple: bool) -> Vec<u8> {
    [&delivery_tag.to_be_bytes()[..], &[multiple.into()]].concat()
}

fn close(code: u16, text: &str, (class, method): Method) -> Vec<u8> {
    let text = short_string(text.as_bytes());
    let request = [class.to_be_bytes(), method.to_be_bytes()].concat();
    [&code.to_be_bytes(), &text[..], &request].concat()
}

/// The broker's end of a connection.
struct Client {
    socket: TcpStream,
    writing: Mutex<()>,
    /// The broker has closed the channel or the connection.
    is_closing: AtomicBool,
    is_silent: AtomicBool,
    shared: Arc<Shared>,
}

impl Client {
    fn new(socket: TcpStream, shared: Arc<Shared>) -> Arc<Client> {
        socket.set_nodelay(true).expect("an option");
        Arc::new(Client {
            socket,
            writing: Mutex::default(),
            is_closing: AtomicBool::default(),
            is_silent: AtomicBool::default(),
            shared,
        })
    }

    /// Lets the client in, and answers until it goes.
    fn serve(self: Arc<Client>, sessions: &Sender<ScriptedSession>) {
        // Whoever goes during the login does not become a session.
        if self.log_in().is_err() {
            return;
        }
        self.send(CHANNEL, CHANNEL_OPEN_OK, &block(b""));
        let (sender, events) = mpsc::channel();
        let session = ScriptedSession { client: Arc::clone(&self), events };
        // A test that has ended takes no more sessions; dropped, this one ends.
        let _ = sessions.send(session);
        // The error is that of a connection which the client or the test has cut.
        let _ = self.listen(&sender);
    }

    fn log_in(&self) -> io::Result<()> {
        (&self.socket).read_exact(&mut [0; 8])?;
        let text =
            |name: &[u8], text: &[u8]| [&short_string(name), &b"S"[..], &block(text)].concat();
        let properties = [text(b"product", b"scripted"), text(b"version", b"1")].concat();
        let start = [b"\0\x09", &block(&properties)[..], &block(b"PLAIN"), &block(b"en_US")];
        self.send(0, START, &start.concat());
        self.wait_for(START_OK)?;
        // 2047 channels, frames of 128 KiB, no heartbeats.
        self.send(0, TUNE, &[7, 0xff, 0, 2, 0, 0, 0, 0]);
        self.wait_for(OPEN)?;
        self.send(0, OPEN_OK, b"\0");
        self.wait_for(CHANNEL_OPEN)
    }

    fn wait_for(&self, expected: Method) -> io::Result<()> {
        while self.read_method()?.0 != expected {}
        Ok(())
    }

    fn listen(&self, events: &Sender<Event>) -> io::Result<()> {
        loop {
            let (method, arguments) = self.read_method()?;
            let event = match method {
                PUBLISH => Event::Published(self.read_published(&arguments)?),
                QOS => Event::Asked,
                CLOSE => Event::Closed,
                CLOSE_OK => return self.socket.shutdown(Shutdown::Both),
                EXCHANGE_DECLARE => {
                    self.declare(&arguments);
                    continue;
                }
                _ => continue,
            };
            // What a client sends on a channel that the broker has closed, the broker reads over.
            let is_closing = self.is_closing.load(Ordering::SeqCst) && method != CLOSE;
            if is_closing || self.is_silent.load(Ordering::SeqCst) {
                continue;
            }
            match method {
                QOS => self.send(CHANNEL, QOS_OK, b""),
                CLOSE => self.send(0, CLOSE_OK, b""),
                _ => {}
            }
            // A test that has ended reads no more events.
            let _ = events.send(event);
        }
    }

    /// Declares the exchange without an answer, unless it exists with the other durability.
    fn declare(&self, arguments: &[u8]) {
        let (name, rest) = read_short_string(&arguments[2..]);
        let (_, rest) = read_short_string(rest);
        let durable = rest[0] & 2 != 0;
        self.shared.declarations.lock().expect("no panic").push(durable);
        let existing = *self.shared.exchange.lock().expect("no panic");
        if existing.is_some_and(|existing| existing != durable) {
            let text = format!(
                "PRECONDITION_FAILED - inequivalent arg 'durable' for exchange '{name}' in vhost '/': \
                 received '{durable}' but current is '{}'",
                !durable
            );
            self.close_channel(406, &text, EXCHANGE_DECLARE);
        }
    }

    fn close_channel(&self, code: u16, text: &str, request: Method) {
        self.is_closing.store(true, Ordering::SeqCst);
        self.send(CHANNEL, CHANNEL_CLOSE, &close(code, text, request));
    }

    /// The next method, with its arguments.
    fn read_method(&self) -> io::Result<(Method, Vec<u8>)> {
        loop {
            if let (METHOD, mut payload) = raw::read_frame(&mut &self.socket)? {
                let arguments = payload.split_off(4);
                return Ok((method_of(&payload), arguments));
            }
        }
    }

    fn read_published(&self, arguments: &[u8]) -> io::Result<Published> {
        let (exchange, rest) = read_short_string(&arguments[2..]);
        let (_routing_key, rest) = read_short_string(rest);
        let (_, header) = raw::read_frame(&mut &self.socket)?;
        let size = u64::from_be_bytes(*header[4..].first_chunk().expect("a size"));
        let mut body = Vec::new();
        while (body.len() as u64) < size {
            body.extend(raw::read_frame(&mut &self.socket)?.1);
        }
        let properties = header[12..].to_vec();
        Ok(Published {
            exchange,
            mandatory: rest[0] & 1 != 0,
            message_id: text_property(&properties, 8),
            message_type: text_property(&properties, 10),
            body,
            properties,
        })
    }

    fn send(&self, channel: u16, method: Method, arguments: &[u8]) {
        self.write(&raw::method(channel, method, arguments));
    }

    fn write(&self, frames: &[u8]) {
        let _writing = self.writing.lock().expect("no panic");
        // The client may have gone; what it does then is for the test to look at.
        let _ = (&self.socket).write_all(frames);
    }
}

fn read_short_string(bytes: &[u8]) -> (String, &[u8]) {
    let (text, rest) = bytes[1..].split_at(bytes[0].into());
    (String::from_utf8_lossy(text).into_owned(), rest)
}

/// The short string that is the property with this index, from the highest flag down, if it is set.
fn text_property(properties: &[u8], index: usize) -> Option<String> {
    // Short strings, a table, octets and a time: from content_type to cluster_id.
    const KINDS: &[u8; 14] = b"ssFoossssTssss";
    let (flags, mut rest) = properties.split_first_chunk().expect("flags");
    let flags = u16::from_be_bytes(*flags);
    for (at, kind) in KINDS.iter().enumerate().filter(|(at, _)| flags & (0x8000 >> at) != 0) {
        if at == index {
            return Some(read_short_string(rest).0);
        }
        let length = match kind {
            b's' => 1 + usize::from(rest[0]),
            b'F' => 4 + u32::from_be_bytes(*rest.first_chunk().expect("a size")) as usize,
            b'o' => 1,
            _ => 8,
        };
        rest = &rest[length..];
    }
    None
}
