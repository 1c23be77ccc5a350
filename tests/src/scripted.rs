//! A broker in the process of the test, which follows a script step by step.
//!
//! [`ScriptedBroker`] speaks AMQP 0-9-1 over loopback. It logs clients in and answers their requests. A client that
//! has opened a channel becomes a [`ScriptedSession`]. The session reports what the client publishes or acknowledges.
//! It sends deliveries, confirms, returns, notices and closes in the order of the test. It tests orders of events
//! that differ by milliseconds; the behaviour of RabbitMQ itself is tested with RabbitMQ.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, Weak};
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
const CHANNEL_OPEN_OK: Method = (20, 11);
const CHANNEL_CLOSE: Method = (20, 40);
const CHANNEL_CLOSE_OK: Method = (20, 41);
const EXCHANGE_DECLARE_OK: Method = (40, 11);
const QUEUE_DECLARE_OK: Method = (50, 11);
const QUEUE_BIND_OK: Method = (50, 21);
const QOS: Method = (60, 10);
const QOS_OK: Method = (60, 11);
const CONSUME_OK: Method = (60, 21);
const CANCEL_OK: Method = (60, 31);
const RETURN: Method = (60, 50);
const DELIVER: Method = (60, 60);
const ACK: Method = (60, 80);
const NACK: Method = (60, 120);

/// `channel.open`, the last request of the login.
pub const CHANNEL_OPEN: Method = (20, 10);

/// `exchange.declare`, to close a channel for it or to withhold its answer.
pub const EXCHANGE_DECLARE: Method = (40, 10);

/// `queue.declare`.
pub const QUEUE_DECLARE: Method = (50, 10);

/// `queue.bind`.
pub const QUEUE_BIND: Method = (50, 20);

/// `basic.consume`.
pub const CONSUME: Method = (60, 20);

/// `basic.cancel`.
pub const CANCEL: Method = (60, 30);

/// `basic.publish`, to close a channel for it.
pub const PUBLISH: Method = (60, 40);

/// The channel of clients that open one channel.
const CHANNEL: u16 = 1;

/// The consumer tag of all consumers.
const TAG: &[u8] = b"scripted";

/// The name of a queue that the broker names.
const OWN_QUEUE: &str = "amq.gen-scripted";

/// A broker that a test controls.
pub struct ScriptedBroker {
    address: SocketAddr,
    shared: Arc<Shared>,
    sessions: Mutex<Receiver<ScriptedSession>>,
}

#[derive(Default)]
struct Shared {
    /// Whether new connections are closed at once.
    is_down: AtomicBool,
    is_over: AtomicBool,
    attempts: AtomicUsize,
    /// Whether the exchange exists, and whether it is durable.
    exchange: Mutex<Option<bool>>,
    /// Whether transient exchanges are refused.
    needs_durable: AtomicBool,
    declarations: Mutex<Vec<bool>>,
    queue: Mutex<QueueCounts>,
    /// The requests that get no answer: each with the number of answered ones, and the requests that have arrived.
    withheld: Mutex<Vec<(Method, usize)>>,
    requests: Mutex<Vec<Method>>,
    /// The requests that are refused: each with a reply code and a text.
    refused: Mutex<Vec<(Method, u16, String)>>,
    /// The server properties besides `product`.
    properties: Mutex<Vec<(String, String)>>,
    stream: Mutex<Vec<StreamMessage>>,
    /// The clients that consume the stream.
    readers: Mutex<Vec<Weak<Client>>>,
}

impl Shared {
    fn count_requests(&self, request: Method) -> usize {
        let requests = self.requests.lock().expect("no panic");
        requests.iter().filter(|known| **known == request).count()
    }
}

/// A message of a stream.
#[derive(Clone, Debug)]
pub struct StreamMessage {
    /// The offset.
    pub offset: u64,
    /// When the message arrived, by the clock of the broker, in seconds since 1970.
    pub arrived: u64,
    /// The message.
    pub message: Message,
}

/// The state of the queue, for any name.
#[derive(Clone, Copy, Debug, Default)]
pub struct QueueCounts {
    /// Whether the queue exists before it is declared.
    pub exists: bool,
    /// The number of messages in the queue.
    pub messages: u32,
    /// The number of consumers of the queue.
    pub consumers: u32,
}

/// A message that the broker delivers.
#[derive(Clone, Debug, Default)]
pub struct Message {
    /// The property `message_id`.
    pub message_id: Option<String>,
    /// The property `type`.
    pub message_type: Option<String>,
    /// The property `timestamp`.
    pub timestamp: Option<u64>,
    /// The header `x-stream-offset`.
    pub offset: Option<u64>,
    /// The flag `redelivered`.
    pub redelivered: bool,
    /// The body.
    pub body: Vec<u8>,
}

impl Message {
    /// A message without properties.
    pub fn new(body: impl Into<Vec<u8>>) -> Message {
        Message { body: body.into(), ..Message::default() }
    }
}

/// A message that a client has published.
#[derive(Clone, Debug)]
pub struct Published {
    /// The exchange.
    pub exchange: String,
    /// The flag `mandatory`.
    pub mandatory: bool,
    /// The property `message_id`.
    pub message_id: Option<String>,
    /// The property `type`.
    pub message_type: Option<String>,
    /// The body.
    pub body: Vec<u8>,
    /// Property flags and properties, undecoded.
    properties: Vec<u8>,
}

/// An action of a client.
#[derive(Debug)]
enum Event {
    Published(Published),
    /// `basic.qos`, by which the client asks whether the broker has read everything.
    Asked,
    /// `basic.consume`.
    Consumed,
    /// `basic.ack` of all messages up to this one.
    Acknowledged(u64),
    /// `basic.cancel`.
    Cancelled,
    /// `connection.close`.
    Closed,
}

impl ScriptedBroker {
    /// Starts a broker that accepts all clients and has no exchange.
    pub fn start() -> ScriptedBroker {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::<Shared>::default();
        shared.properties.lock().expect("no panic").push(("version".into(), "1".into()));
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

    /// The URL of the broker. A scripted broker sends no heartbeats, so the URL disables them.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@{}/%2f?heartbeat=0", self.address)
    }

    /// Waits for the next client that has opened a channel.
    pub fn accept(&self) -> ScriptedSession {
        let sessions = self.sessions.lock().expect("no panic");
        sessions.recv_timeout(PATIENCE).expect("a client opens a channel")
    }

    /// Drops the sessions that were not accepted.
    pub fn forget_sessions(&self) {
        self.sessions.lock().expect("no panic").try_iter().for_each(drop);
    }

    /// Closes new connections at once from now on.
    pub fn go_down(&self) {
        self.shared.is_down.store(true, Ordering::SeqCst);
    }

    /// Accepts all clients again.
    pub fn come_back(&self) {
        self.shared.is_down.store(false, Ordering::SeqCst);
    }

    /// Waits until this number of clients more have connected. Refused ones count as well.
    pub fn wait_for_attempts(&self, more: usize) {
        let before = self.shared.attempts.load(Ordering::SeqCst);
        wait_until("a client tries to connect", || {
            self.shared.attempts.load(Ordering::SeqCst) >= before + more
        });
    }

    /// Sets the durability of the exchange. From now on, declarations of the other durability are refused.
    pub fn set_exchange(&self, durable: bool) {
        *self.shared.exchange.lock().expect("no panic") = Some(durable);
    }

    /// Refuses transient exchanges from now on, as RabbitMQ refuses other features that are removed.
    pub fn refuse_transient_exchanges(&self) {
        self.shared.needs_durable.store(true, Ordering::SeqCst);
    }

    /// Sets the state of the queue.
    pub fn set_queue(&self, counts: QueueCounts) {
        *self.shared.queue.lock().expect("no panic") = counts;
    }

    /// Sends no answer to requests of this kind from now on.
    pub fn withhold(&self, request: Method) {
        self.shared.withheld.lock().expect("no panic").push((request, 0));
    }

    /// Answers this number of requests of this kind more, and none after them.
    pub fn withhold_after(&self, request: Method, more: usize) {
        let last = self.count_requests(request) + more;
        self.shared.withheld.lock().expect("no panic").push((request, last));
    }

    /// Answers all requests again.
    pub fn withhold_nothing(&self) {
        self.shared.withheld.lock().expect("no panic").clear();
    }

    /// From now on, closes the channel of a client that makes a request of this kind. Passive declarations are still
    /// answered.
    pub fn refuse(&self, request: Method, code: u16, text: &str) {
        self.shared.refused.lock().expect("no panic").push((request, code, text.into()));
    }

    /// Refuses no requests from now on.
    pub fn refuse_nothing(&self) {
        self.shared.refused.lock().expect("no panic").clear();
    }

    /// Sets the server properties of the login.
    pub fn set_properties(&self, properties: &[(&str, &str)]) {
        let owned = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
        let properties = properties.iter().map(owned).collect();
        *self.shared.properties.lock().expect("no panic") = properties;
    }

    /// Sets the content of the stream, for any name. Sends new messages to its consumers.
    pub fn set_stream(&self, messages: impl IntoIterator<Item = StreamMessage>) {
        *self.shared.stream.lock().expect("no panic") = messages.into_iter().collect();
        self.shared.queue.lock().expect("no panic").exists = true;
        let readers = self.shared.readers.lock().expect("no panic").clone();
        for client in readers.iter().filter_map(Weak::upgrade) {
            // Sent as one chunk. Otherwise, a client could receive an answer between the messages.
            client.hold_back();
            client.deliver_stream();
            client.send_held_back();
        }
    }

    /// Delivers no more messages of the stream to its present consumers, and does not report it, like a node after a
    /// partition.
    pub fn forget_consumers(&self) {
        let readers = self.shared.readers.lock().expect("no panic").clone();
        for client in readers.iter().filter_map(Weak::upgrade) {
            *client.next.lock().expect("no panic") = None;
        }
    }

    /// The number of requests of this kind that have arrived.
    pub fn count_requests(&self, request: Method) -> usize {
        self.shared.count_requests(request)
    }

    /// Waits until this number of requests of this kind have arrived in total.
    pub fn wait_for_requests(&self, request: Method, count: usize) {
        wait_until(&format!("there are {count} requests {request:?}"), || {
            self.count_requests(request) >= count
        });
    }

    /// The durability of each declaration of the exchange.
    pub fn declarations(&self) -> Vec<bool> {
        self.shared.declarations.lock().expect("no panic").clone()
    }
}

impl Drop for ScriptedBroker {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        // The listener checks for the end at each connection.
        let _ = TcpStream::connect(self.address);
    }
}

/// A connection of a client with one channel. Dropping it ends the connection.
pub struct ScriptedSession {
    client: Arc<Client>,
    events: Receiver<Event>,
}

impl ScriptedSession {
    /// The next `count` messages that the client publishes.
    ///
    /// # Panics
    ///
    /// When the client does something else first, or nothing within [`PATIENCE`].
    pub fn expect_publishes(&self, count: usize) -> Vec<Published> {
        let next = |index| match self.next() {
            Event::Published(published) => published,
            other => panic!("message {index} of {count} is expected, not {other:?}"),
        };
        (1..=count).map(next).collect()
    }

    /// The messages that the client publishes until it does something else or disconnects.
    pub fn publishes(&self) -> impl Iterator<Item = Published> {
        std::iter::from_fn(|| match self.events.recv_timeout(PATIENCE) {
            Ok(Event::Published(published)) => Some(published),
            _ => None,
        })
    }

    /// Waits until the client closes the connection. It must not publish before.
    pub fn expect_close(&self) {
        match self.next() {
            Event::Closed => {}
            other => panic!("connection.close is expected, not {other:?}"),
        }
    }

    /// Waits until the client sends `basic.qos`, which asks whether everything is read. It must not publish before.
    pub fn expect_question(&self) {
        match self.next() {
            Event::Asked => {}
            other => panic!("basic.qos is expected, not {other:?}"),
        }
    }

    /// Waits until the client consumes.
    pub fn expect_consume(&self) {
        match self.next_but_question() {
            Event::Consumed => {}
            other => panic!("basic.consume is expected, not {other:?}"),
        }
    }

    /// Waits until the client acknowledges. Returns the delivery tag.
    pub fn expect_ack(&self) -> u64 {
        match self.next_but_question() {
            Event::Acknowledged(tag) => tag,
            other => panic!("basic.ack is expected, not {other:?}"),
        }
    }

    /// Waits until the client cancels its consumer.
    pub fn expect_cancel(&self) {
        match self.next_but_question() {
            Event::Cancelled => {}
            other => panic!("basic.cancel is expected, not {other:?}"),
        }
    }

    /// The delivery tags of all acknowledgements until the connection ends.
    pub fn acks_to_the_end(&self) -> Vec<u64> {
        let events = std::iter::from_fn(|| self.events.recv_timeout(PATIENCE).ok());
        let tag = |event| match event {
            Event::Acknowledged(tag) => Some(tag),
            _ => None,
        };
        events.filter_map(tag).collect()
    }

    fn next_but_question(&self) -> Event {
        loop {
            match self.next() {
                Event::Asked => {}
                other => return other,
            }
        }
    }

    /// Delivers a message. Returns its delivery tag.
    pub fn deliver(&self, message: &Message) -> u64 {
        self.deliver_part(message, message.body.len())
    }

    /// Delivers only the first `length` bytes of the body of a message.
    pub fn deliver_part(&self, message: &Message, length: usize) -> u64 {
        self.client.deliver(message, length)
    }

    /// Cancels the consumer, as RabbitMQ does when its queue is deleted.
    pub fn cancel_consumer(&self) {
        self.client.send(CHANNEL, CANCEL, &[&short_string(TAG)[..], &[1]].concat());
    }

    /// Answers `basic.consume`, if that answer is [withheld](ScriptedBroker::withhold).
    pub fn confirm_consume(&self) {
        self.client.send(CHANNEL, CONSUME_OK, &short_string(TAG));
    }

    /// Answers `basic.cancel`, if that answer is [withheld](ScriptedBroker::withhold).
    pub fn confirm_cancel(&self) {
        self.client.send(CHANNEL, CANCEL_OK, &short_string(TAG));
    }

    /// Sends all frames of `script` at once, so that the client has read the last one before it reacts to the first.
    pub fn in_one_piece(&self, script: impl FnOnce(&ScriptedSession)) {
        self.client.hold_back();
        script(self);
        self.client.send_held_back();
    }

    fn next(&self) -> Event {
        self.events.recv_timeout(PATIENCE).expect("the client does something")
    }

    /// Confirms a message, or all up to it.
    pub fn ack(&self, delivery_tag: u64, multiple: bool) {
        self.client.send(CHANNEL, ACK, &confirmation(delivery_tag, multiple));
    }

    /// Nacks a message, or all up to it.
    pub fn nack(&self, delivery_tag: u64, multiple: bool) {
        self.client.send(CHANNEL, NACK, &confirmation(delivery_tag, multiple));
    }

    /// Returns a message as unroutable.
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

    /// Blocks the connection, as RabbitMQ does at an alarm.
    pub fn block(&self, reason: &str) {
        self.client.send(0, BLOCKED, &short_string(reason.as_bytes()));
    }

    /// Unblocks the connection.
    pub fn unblock(&self) {
        self.client.send(0, UNBLOCKED, b"");
    }

    /// Closes the channel because of a `request`. Ignores further frames on it.
    pub fn close_channel(&self, code: u16, text: &str, request: Method) {
        self.client.close_channel(CHANNEL, code, text, request);
    }

    /// Closes the connection, as an operator does.
    pub fn close(&self, code: u16, text: &str) {
        self.client.is_closing.store(true, Ordering::SeqCst);
        self.client.send(0, CLOSE, &close(code, text, (0, 0)));
    }

    /// Keeps the connection open without any answer or record.
    pub fn go_silent(&self) {
        self.client.is_silent.store(true, Ordering::SeqCst);
    }

    /// Leaves the bytes of the client unread from now on.
    pub fn stop_reading(&self) {
        self.client.is_deaf.store(true, Ordering::SeqCst);
    }

    /// Reads again.
    pub fn continue_reading(&self) {
        self.client.is_deaf.store(false, Ordering::SeqCst);
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
        // A socket with a linger time of 0 is reset when its last handle is closed. It may be closed already.
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
    /// The frames that are held back to be sent at once.
    writing: Mutex<Option<Vec<u8>>>,
    deliveries: AtomicU64,
    /// The channel of the consumer.
    consuming: AtomicU16,
    /// Per channel: the prefetch count, and the last delivery tag that the client has acknowledged.
    prefetch: [AtomicU64; 3],
    acknowledged: AtomicU64,
    /// The offset of the next message of the stream to deliver.
    next: Mutex<Option<u64>>,
    /// Whether the broker has closed the channel or the connection.
    is_closing: AtomicBool,
    is_silent: AtomicBool,
    /// Whether it leaves the socket unread.
    is_deaf: AtomicBool,
    shared: Arc<Shared>,
}

impl Client {
    fn new(socket: TcpStream, shared: Arc<Shared>) -> Arc<Client> {
        socket.set_nodelay(true).expect("an option");
        Arc::new(Client {
            socket,
            writing: Mutex::default(),
            deliveries: AtomicU64::default(),
            consuming: AtomicU16::new(CHANNEL),
            prefetch: [const { AtomicU64::new(u64::MAX) }; 3],
            acknowledged: AtomicU64::default(),
            next: Mutex::default(),
            is_closing: AtomicBool::default(),
            is_silent: AtomicBool::default(),
            is_deaf: AtomicBool::default(),
            shared,
        })
    }

    /// Logs the client in, and answers it until it disconnects.
    fn serve(self: Arc<Client>, sessions: &Sender<ScriptedSession>) {
        // A client that disconnects during the login does not become a session.
        if self.log_in().is_err() {
            return;
        }
        self.shared.requests.lock().expect("no panic").push(CHANNEL_OPEN);
        if !self.is_withheld(CHANNEL_OPEN) {
            self.send(CHANNEL, CHANNEL_OPEN_OK, &block(b""));
        }
        let (sender, events) = mpsc::channel();
        let session = ScriptedSession { client: Arc::clone(&self), events };
        // If the test has ended, it accepts no sessions, and this one is dropped.
        let _ = sessions.send(session);
        // The client or the test has cut the connection.
        let _ = self.listen(&sender);
    }

    fn log_in(&self) -> io::Result<()> {
        (&self.socket).read_exact(&mut [0; 8])?;
        let text = |name: &str, text: &str| {
            [&short_string(name.as_bytes()), &b"S"[..], &block(text.as_bytes())].concat()
        };
        let mut properties = text("product", "scripted");
        for (name, value) in &*self.shared.properties.lock().expect("no panic") {
            properties.extend(text(name, value));
        }
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
        while self.read_method()?.1 != expected {}
        Ok(())
    }

    fn listen(self: &Arc<Client>, events: &Sender<Event>) -> io::Result<()> {
        loop {
            while self.is_deaf.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(2));
            }
            let (channel, method, arguments) = self.read_method()?;
            let event = match method {
                PUBLISH => Some(Event::Published(self.read_published(&arguments)?)),
                CLOSE => Some(Event::Closed),
                // Only the channel of messages matters to the test.
                _ if channel != CHANNEL => None,
                QOS => Some(Event::Asked),
                CONSUME => Some(Event::Consumed),
                ACK => {
                    let tag = u64::from_be_bytes(*arguments.first_chunk().expect("a tag"));
                    Some(Event::Acknowledged(tag))
                }
                CANCEL => Some(Event::Cancelled),
                CLOSE_OK => return self.socket.shutdown(Shutdown::Both),
                _ => None,
            };
            self.shared.requests.lock().expect("no panic").push(method);
            // The broker ignores frames on a channel that it has closed.
            let is_closing = self.is_closing.load(Ordering::SeqCst) && method != CLOSE;
            if method == EXCHANGE_DECLARE {
                self.record_declaration(&arguments);
            }
            if is_closing || self.is_silent.load(Ordering::SeqCst) {
                continue;
            }
            if !self.is_withheld(method) {
                self.answer(channel, method, &arguments);
            }
            // If the test has ended, it reads no more events.
            event.into_iter().for_each(|event| drop(events.send(event)));
        }
    }

    fn is_withheld(&self, request: Method) -> bool {
        let withheld = self.shared.withheld.lock().expect("no panic").clone();
        // A broker answers nothing on a channel that it has not opened.
        let is_open = !withheld.contains(&(CHANNEL_OPEN, 0));
        let count = self.shared.count_requests(request);
        withheld.iter().any(|(withheld, last)| *withheld == request && count > *last)
            || !is_open && ![OPEN, CLOSE].contains(&request)
    }

    fn answer(self: &Arc<Client>, channel: u16, method: Method, arguments: &[u8]) {
        let refused = self.shared.refused.lock().expect("no panic").clone();
        if let Some((_, code, text)) = refused.iter().find(|(refused, ..)| *refused == method)
            && !(method == QUEUE_DECLARE && is_passive(arguments))
        {
            return self.close_channel(channel, *code, text, method);
        }
        match method {
            QOS => {
                let count = u16::from_be_bytes([arguments[4], arguments[5]]);
                // The client asks whether everything is read by setting the prefetch count of the connection again.
                if count > 0 {
                    self.prefetch[usize::from(channel)].store(count.into(), Ordering::SeqCst);
                }
                self.send(channel, QOS_OK, b"");
            }
            ACK => {
                let tag = u64::from_be_bytes(*arguments.first_chunk().expect("a tag"));
                self.acknowledged.store(tag, Ordering::SeqCst);
                self.deliver_stream();
            }
            CLOSE => self.send(0, CLOSE_OK, b""),
            CHANNEL_OPEN => self.send(channel, CHANNEL_OPEN_OK, &block(b"")),
            CHANNEL_CLOSE => {
                *self.next.lock().expect("no panic") = None;
                self.deliveries.store(0, Ordering::SeqCst);
                self.acknowledged.store(0, Ordering::SeqCst);
                self.consuming.store(CHANNEL, Ordering::SeqCst);
                self.send(channel, CHANNEL_CLOSE_OK, b"");
            }
            EXCHANGE_DECLARE => self.declare(arguments),
            QUEUE_DECLARE => self.declare_queue(channel, arguments),
            QUEUE_BIND => {
                let (_queue, rest) = read_short_string(&arguments[2..]);
                let (_exchange, rest) = read_short_string(rest);
                let (_routing_key, rest) = read_short_string(rest);
                if rest[0] & 1 == 0 {
                    self.send(channel, QUEUE_BIND_OK, b"");
                }
            }
            CONSUME => {
                self.consuming.store(channel, Ordering::SeqCst);
                self.send(channel, CONSUME_OK, &short_string(TAG));
                self.read_stream(arguments);
            }
            CANCEL => self.send(channel, CANCEL_OK, &short_string(TAG)),
            _ => {}
        }
    }

    /// Delivers the first `length` bytes of the body of a message. Returns the delivery tag.
    fn deliver(&self, message: &Message, length: usize) -> u64 {
        let tag = 1 + self.deliveries.fetch_add(1, Ordering::SeqCst);
        let arguments = [
            &short_string(TAG)[..],
            &tag.to_be_bytes(),
            &[message.redelivered.into()],
            &short_string(b"logs"),
            b"\0",
        ];
        let offset = |offset: u64| {
            block(&[&short_string(b"x-stream-offset")[..], b"l", &offset.to_be_bytes()].concat())
        };
        let text = |text: &String| short_string(text.as_bytes());
        // The flags and values of headers, message_id, timestamp and type, in this order.
        let properties = [
            (message.offset.map(offset), 0x2000_u16),
            (message.message_id.as_ref().map(text), 0x80),
            (message.timestamp.map(|time| time.to_be_bytes().to_vec()), 0x40),
            (message.message_type.as_ref().map(text), 0x20),
        ];
        let set = || properties.iter().filter_map(|(bytes, flag)| Some((bytes.as_ref()?, flag)));
        let flags: u16 = set().map(|(_, flag)| flag).sum();
        let set: Vec<u8> = set().flat_map(|(bytes, _)| bytes.clone()).collect();
        let size = (message.body.len() as u64).to_be_bytes();
        let header = [&[0, 60, 0, 0], &size[..], &flags.to_be_bytes(), &set].concat();
        let channel = self.consuming.load(Ordering::SeqCst);
        let mut bytes = raw::method(channel, DELIVER, &arguments.concat());
        bytes.extend(frame(CONTENT_HEADER, channel, &header));
        for part in message.body[..length].chunks(100_000) {
            bytes.extend(frame(BODY, channel, part));
        }
        self.write(&bytes);
        tag
    }

    /// Makes the client a reader of the stream, if the arguments of `basic.consume` have a stream offset.
    fn read_stream(self: &Arc<Client>, arguments: &[u8]) {
        let name = b"x-stream-offset";
        let Some(at) = arguments.windows(name.len()).position(|bytes| bytes == name) else {
            return;
        };
        let (kind, value) = arguments[at + name.len()..].split_first().expect("a type");
        let number = u64::from_be_bytes(*value.first_chunk().expect("a value"));
        let stream = self.shared.stream.lock().expect("no panic").clone();
        let after_all = || stream.last().map_or(0, |last| last.offset + 1);
        let next = match (kind, &value[4..]) {
            (b'l', _) => number,
            (b'T', _) => {
                let found = stream.iter().find(|message| message.arrived >= number);
                found.map_or_else(after_all, |found| found.offset)
            }
            (_, text) if text.starts_with(b"first") => 0,
            (_, text) if text.starts_with(b"last") => {
                // The whole stream is one chunk.
                stream.first().map_or(0, |first| first.offset)
            }
            _ => after_all(),
        };
        *self.next.lock().expect("no panic") = Some(next);
        self.shared.readers.lock().expect("no panic").push(Arc::downgrade(self));
        self.deliver_stream();
    }

    /// Delivers messages of the stream, as many as the prefetch count allows.
    fn deliver_stream(&self) {
        let mut next = self.next.lock().expect("no panic");
        let Some(next) = &mut *next else {
            return;
        };
        let stream = self.shared.stream.lock().expect("no panic").clone();
        let channel = usize::from(self.consuming.load(Ordering::SeqCst));
        for StreamMessage { offset, message, .. } in stream {
            let waiting =
                self.deliveries.load(Ordering::SeqCst) - self.acknowledged.load(Ordering::SeqCst);
            if offset >= *next && waiting < self.prefetch[channel].load(Ordering::SeqCst) {
                *next = offset + 1;
                let message = Message { offset: message.offset.or(Some(offset)), ..message };
                self.deliver(&message, message.body.len());
            }
        }
    }

    /// Declares the queue. If the client declares a missing queue passively, closes the channel.
    fn declare_queue(&self, channel: u16, arguments: &[u8]) {
        let (name, rest) = read_short_string(&arguments[2..]);
        let passive = rest[0] & 1 != 0;
        let mut counts = self.shared.queue.lock().expect("no panic");
        if passive && !counts.exists {
            let text = format!("NOT_FOUND - no queue '{name}' in vhost '/'");
            return self.close_channel(channel, 404, &text, QUEUE_DECLARE);
        }
        counts.exists = true;
        let name = if name.is_empty() { OWN_QUEUE } else { &name };
        let answer = [
            &short_string(name.as_bytes())[..],
            &counts.messages.to_be_bytes(),
            &counts.consumers.to_be_bytes(),
        ];
        self.send(channel, QUEUE_DECLARE_OK, &answer.concat());
    }

    fn record_declaration(&self, arguments: &[u8]) {
        let (_, options) = read_declaration(arguments);
        self.shared.declarations.lock().expect("no panic").push(options & 2 != 0);
    }

    /// Declares the exchange, unless it exists with the other durability.
    fn declare(&self, arguments: &[u8]) {
        let (name, options) = read_declaration(arguments);
        let durable = options & 2 != 0;
        let existing = *self.shared.exchange.lock().expect("no panic");
        if !durable && self.shared.needs_durable.load(Ordering::SeqCst) {
            let text = "INTERNAL_ERROR - Feature `transient_exchanges` is removed; its use is not possible anymore.\n\
                        If RabbitMQ refuses to start because of this, ...";
            self.is_closing.store(true, Ordering::SeqCst);
            self.send(0, CLOSE, &close(541, text, EXCHANGE_DECLARE));
        } else if existing.is_some_and(|existing| existing != durable) {
            let text = format!(
                "PRECONDITION_FAILED - inequivalent arg 'durable' for exchange '{name}' in vhost '/': \
                 received '{durable}' but current is '{}'",
                !durable
            );
            self.close_channel(CHANNEL, 406, &text, EXCHANGE_DECLARE);
        } else if options & 16 == 0 {
            self.send(CHANNEL, EXCHANGE_DECLARE_OK, b"");
        }
    }

    fn close_channel(&self, channel: u16, code: u16, text: &str, request: Method) {
        if channel == CHANNEL {
            self.is_closing.store(true, Ordering::SeqCst);
        }
        self.send(channel, CHANNEL_CLOSE, &close(code, text, request));
    }

    /// The next method, with its channel and its arguments.
    fn read_method(&self) -> io::Result<(u16, Method, Vec<u8>)> {
        loop {
            let mut start = [0; 3];
            (&self.socket).read_exact(&mut start)?;
            let [kind, channel @ ..] = start;
            // `raw` reads a frame from its start, so the byte that was read is put before the rest.
            let (_, mut payload) = raw::read_frame(&mut start.as_slice().chain(&self.socket))?;
            if kind == METHOD {
                let arguments = payload.split_off(4);
                return Ok((u16::from_be_bytes(channel), method_of(&payload), arguments));
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
        let mut writing = self.writing.lock().expect("no panic");
        match &mut *writing {
            Some(held_back) => held_back.extend(frames),
            // The client may have closed the connection; the test checks its reaction.
            None => drop((&self.socket).write_all(frames)),
        }
    }

    fn hold_back(&self) {
        *self.writing.lock().expect("no panic") = Some(Vec::new());
    }

    fn send_held_back(&self) {
        let held_back = self.writing.lock().expect("no panic").take();
        self.write(&held_back.unwrap_or_default());
    }
}

/// The name of an exchange, and the options as bits.
fn read_declaration(arguments: &[u8]) -> (String, u8) {
    let (name, rest) = read_short_string(&arguments[2..]);
    let (_type, rest) = read_short_string(rest);
    (name, rest[0])
}

/// Whether the arguments of `queue.declare` have the flag `passive`.
fn is_passive(arguments: &[u8]) -> bool {
    read_short_string(&arguments[2..]).1[0] & 1 != 0
}

fn read_short_string(bytes: &[u8]) -> (String, &[u8]) {
    let (text, rest) = bytes[1..].split_at(bytes[0].into());
    (String::from_utf8_lossy(text).into_owned(), rest)
}

/// The property with this index, from the highest flag down, if it is set. It must be a short string.
fn text_property(properties: &[u8], index: usize) -> Option<String> {
    // The types from content_type to cluster_id: short strings, a table, octets and a time.
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
