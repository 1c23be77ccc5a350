//! A blocking connection: it owns the socket, and its caller's thread does all reading and writing.
//!
//! A [call](Connection::call) sends a request and handles what arrives until the answer is there; messages and
//! events that arrive meanwhile are queued in their order, for [`Deliveries`](crate::Deliveries) or
//! [`Publishing`](crate::Publishing).

use std::collections::VecDeque;
use std::io::{ErrorKind as Io, Read, Write};
use std::mem;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::content::{Assembler, Message};
use crate::declare::{Exchange, NO_KEY, Queue, QueueState};
use crate::dial::{dial, resolve, share};
use crate::ending::Ending;
use crate::error::{Error, ErrorKind, Hint};
use crate::frame::{CLOSE, Fault, Frame, FrameReader, HEARTBEAT_FRAME};
use crate::heartbeats::Heartbeats;
use crate::login::{LoggedIn, Reserve, Tuning, log_in, no_login};
use crate::message::{Event, Inbound};
use crate::method::{self, Answer, CHANNEL_OPEN, Close, Method, OPEN, Request};
use crate::poll::{Woken, readable, wait, wait_for};
use crate::requests::{Requests, Ticket};
use crate::socket::Socket;
use crate::uri::{Mechanism, Uri};
use crate::{Table, Value};

/// The channel of messages.
pub(crate) const CHANNEL: u16 = 1;

/// The channel of requests whose refusal must not close the channel of messages.
pub(crate) const SECOND: u16 = 2;

/// The operation that opens it, as in messages.
const OPENING: &str = "open a channel";

/// How long the broker may take to answer `connection.close`.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes of deliveries that may wait for the program while it is busy. A receiver stays below 64 MiB with this limit;
/// prefetched log lines take less. Beyond the limit the socket is left unread, and RabbitMQ closes the connection after
/// half a minute.
const LARGEST_INBOX: usize = 56 * 1024 * 1024;

/// A program that was busy for longer than this, for instance with a blocked output, reads the socket once more after
/// the last message: the report of a lost connection depends on whether messages were waiting.
const ABSENCE: Duration = Duration::from_millis(50);

/// Bytes that wait for the socket from which on a publisher should wait.
const CONGESTED: usize = 256 * 1024;

/// The connection is lost, or the broker has closed the channel.
#[derive(Debug)]
pub struct Lost;

/// What has arrived for the program.
#[derive(Default)]
struct Inbox {
    messages: VecDeque<Inbound>,
    /// How many deliveries are among them, for any thread. Only the holder of the connection changes it.
    waiting: Arc<AtomicUsize>,
    /// Bytes of these deliveries, and of the delivery that the program handles.
    bytes: usize,
    handled: usize,
    /// Whether deliveries for which there is no room are dropped.
    drops_excess: bool,
    /// Whether deliveries are dropped from now on. A delivery after a dropped one would leave a gap between them.
    is_dropping: bool,
    /// Whether nothing more arrives on the channel.
    is_over: bool,
}

impl Inbox {
    fn push(&mut self, message: Inbound) {
        if !self.is_over {
            self.messages.push_back(message);
        }
    }

    fn add(&mut self, message: Message) {
        match message {
            Message::Returned(returned) => self.push(Inbound::Event(Event::Returned(returned))),
            Message::Delivery(_) if self.is_dropping || self.is_over => {}
            Message::Delivery(delivery) => {
                self.bytes += delivery.memory;
                self.messages.push_back(Inbound::Delivery(delivery));
                self.waiting.store(self.waiting() + 1, Ordering::Relaxed);
            }
        }
    }

    fn pop(&mut self) -> Option<Inbound> {
        // The program has handled the last message when it takes the next.
        self.bytes -= mem::take(&mut self.handled);
        let next = self.messages.pop_front();
        if let Some(Inbound::Delivery(delivery)) = &next {
            self.handled = delivery.memory;
            self.waiting.store(self.waiting() - 1, Ordering::Relaxed);
        }
        next
    }

    fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Whether the socket should be left unread, as the limit is reached; `held`: bytes of an incomplete message.
    fn is_full(&self, held: usize) -> bool {
        // A message that is larger than the limit is received alone.
        self.bytes > 0 && self.bytes + held >= LARGEST_INBOX
    }

    fn has_news(&self) -> bool {
        !self.messages.is_empty() || self.is_over
    }

    fn drop_deliveries(&mut self) {
        self.messages.retain(|message| !matches!(message, Inbound::Delivery(_)));
        self.waiting.store(0, Ordering::Relaxed);
        (self.bytes, self.handled) = (0, 0);
    }
}

/// The channel of requests whose refusal must not close that of messages.
#[derive(Debug, PartialEq, Eq)]
enum SecondChannel {
    Closed,
    Open,
    /// The broker has closed it.
    Refused(Close),
}

/// The operation, as in messages.
fn binding(queue: &str, exchange: &str, routing_key: &str) -> String {
    let operation = format!("bind queue '{queue}' to exchange '{exchange}'");
    match routing_key {
        NO_KEY => operation,
        key => format!("{operation} with routing key '{key}'"),
    }
}

fn has_news(connection: &Connection) -> bool {
    connection.inbox.has_news()
}

fn never(_: &Connection) -> bool {
    false
}

/// An open connection. Dropped, the socket is cut at once.
pub struct Connection {
    socket: Socket,
    frames: FrameReader,
    assembler: Assembler,
    inbox: Inbox,
    requests: Requests,
    heartbeats: Heartbeats,
    second: SecondChannel,
    /// Bytes that the socket has not taken yet, from `written` on.
    outgoing: Vec<u8>,
    written: usize,
    /// When the socket was last read.
    read_at: Instant,
    /// Why no more messages arrive.
    ending: Option<Ending>,
    /// Whether nothing more can be read from the socket.
    is_read_out: bool,
    /// The request that completes the login.
    opening: Ticket,
    /// The operation of the login, as in messages.
    login: String,
    /// Host and port, as in messages.
    peer: String,
    server_properties: Table,
    tuning: Tuning,
    round_trip: Duration,
    uri: Uri,
    hint: Hint,
    _reserve: Reserve,
}

impl Connection {
    /// Connects to one of `uris` and logs in. The URIs are tried in turn, from a random one on, so that clients spread
    /// over the nodes of a cluster. The broker lists the connection under the name `program`; `hint` ends the texts of
    /// errors.
    ///
    /// All steps together take at most the longest `connection_timeout` of the URIs. Each URI gets an equal share of
    /// the time that is left, and at most its own `connection_timeout`.
    ///
    /// # Errors
    ///
    /// When no broker accepts the login. If a later attempt may succeed, the text has the reasons of all URIs,
    /// otherwise the reason of the first.
    pub fn open(uris: &[Uri], program: &str, hint: Hint) -> Result<Connection, Error> {
        let longest = uris.iter().map(|uri| uri.connection_timeout).max().unwrap_or_default();
        let deadline = Instant::now() + longest;
        let first = fastrand::usize(..uris.len().max(1));
        let mut failures = Vec::new();
        for (tried, index) in (first..uris.len()).chain(0..first).enumerate() {
            let uri = &uris[index];
            // A node that swallows packets must leave time for the others.
            let share = share(deadline, uris.len() - tried);
            let deadline = share.min(Instant::now() + uri.connection_timeout);
            let opened = Connection::open_uri(uri, program, hint, deadline);
            // Before the next URI can be tried, the refusal of this broker must have arrived.
            let has_others = tried + 1 < uris.len();
            let settled = opened.and_then(|mut connection| match has_others {
                true => connection.wait_for_login(deadline).map(|()| connection),
                false => Ok(connection),
            });
            match settled {
                Ok(connection) => return Ok(connection),
                Err(failure) => {
                    log::debug!("{failure}");
                    failures.push((index, failure));
                }
            }
        }
        // Always in the same order, so that a repeated failure has the same text.
        failures.sort_by_key(|(index, _)| *index);
        let failures: Vec<_> = failures.into_iter().map(|(_, failure)| failure).collect();
        let reasons: Vec<_> = failures.iter().map(Error::to_string).collect();
        let has_kind = |kind| failures.iter().any(|failure| failure.kind() == kind);
        if has_kind(ErrorKind::Unreachable) {
            Err(Error::unreachable(reasons.join("; ")).with_hint(hint))
        } else if has_kind(ErrorKind::Unavailable) {
            Err(Error::unavailable(reasons.join("; ")))
        } else {
            Err(failures.into_iter().next().unwrap_or_else(|| Error::unreachable("no URI")))
        }
    }

    fn open_uri(
        uri: &Uri,
        program: &str,
        hint: Hint,
        deadline: Instant,
    ) -> Result<Connection, Error> {
        let addresses = resolve(uri, deadline)?;
        let mut last = None;
        for (tried, address) in addresses.iter().enumerate() {
            let deadline = share(deadline, addresses.len() - tried);
            let opened = dial(uri, *address, deadline)
                .and_then(|socket| Connection::log_in(uri, socket, program, hint, deadline))
                .map_err(|failure| match failure.kind() {
                    // Once for all URIs.
                    ErrorKind::Unreachable => failure,
                    _ => failure.with_hint(hint),
                });
            match opened {
                Err(failure) if failure.is_transient() => last = Some(failure),
                outcome => return outcome,
            }
        }
        Err(last.unwrap_or_else(|| {
            Error::unreachable(format!("connect to {uri}: no address for this name"))
        }))
    }

    fn log_in(
        uri: &Uri,
        socket: Socket,
        program: &str,
        hint: Hint,
        deadline: Instant,
    ) -> Result<Connection, Error> {
        let login = match uri.mechanism {
            Mechanism::Plain => format!("{uri} as '{}', vhost '{}'", uri.user, uri.vhost),
            Mechanism::External => format!("{uri}, vhost '{}'", uri.vhost),
        };
        let operation = format!("log in to {login}");
        let LoggedIn { socket, frames, unsent, server_properties, round_trip, tuning, reserve } =
            log_in(uri, socket, program, &operation, deadline)?;
        let mut requests = Requests::default();
        requests.add(0, OPEN, true, operation.clone());
        let mut connection = Connection {
            socket,
            frames,
            assembler: Assembler::default(),
            inbox: Inbox::default(),
            heartbeats: Heartbeats::new(tuning.heartbeat),
            second: SecondChannel::Closed,
            outgoing: unsent,
            written: 0,
            read_at: Instant::now(),
            ending: None,
            is_read_out: false,
            opening: requests.add(CHANNEL, CHANNEL_OPEN, true, operation.clone()),
            requests,
            login: operation,
            peer: uri.to_string(),
            server_properties,
            tuning,
            round_trip,
            uri: uri.clone(),
            hint,
            _reserve: reserve,
        };
        connection.outgoing.extend(method::channel_open().frame(CHANNEL));
        connection.flush();
        log::info!("connected to {login}, {}", connection.product());
        Ok(connection)
    }

    /// Declares an exchange. If a different exchange exists, the broker closes the channel, and a later call fails.
    pub fn declare_exchange(&mut self, exchange: &Exchange) {
        self.request(CHANNEL, &method::declare_exchange(exchange), exchange.declaring());
    }

    /// Declares a queue, or looks for an existing queue.
    ///
    /// # Errors
    ///
    /// A refusal, which closes the channel, a lost connection, and no answer within the connection timeout.
    pub fn declare_queue(&mut self, queue: &Queue) -> Result<QueueState, Error> {
        let timeout = self.timeout();
        let state = self.declare_within(queue, queue.declaring(), timeout)?;
        if queue.is_shared() {
            self.open_second()?;
        }
        Ok(state)
    }

    /// The same with another operation for errors, and another time limit.
    pub(crate) fn declare_within(
        &mut self,
        queue: &Queue,
        operation: String,
        timeout: Duration,
    ) -> Result<QueueState, Error> {
        match self.call(&method::declare_queue(queue), operation, timeout)? {
            Answer::Declared(state) => Ok(state),
            _ => Err(self.end()),
        }
    }

    /// Binds a queue to an exchange. After a refusal, a later call fails.
    pub fn bind(&mut self, queue: &str, exchange: &str, routing_key: &str) {
        let operation = binding(queue, exchange, routing_key);
        self.request(CHANNEL, &method::bind(queue, exchange, routing_key), operation);
    }

    /// Limits the unacknowledged messages of a consumer to `messages`. After a refusal, a later call fails.
    pub fn set_prefetch(&mut self, messages: u16) {
        self.request(CHANNEL, &method::qos(messages), "set the prefetch count".into());
    }

    /// A property of the broker from `connection.start`, such as `version` or `cluster_name`.
    pub fn server_property(&self, name: &str) -> Option<String> {
        match self.server_properties.get(name) {
            Some(Value::LongString(text)) => Some(text.clone()),
            _ => None,
        }
    }

    /// Product and version, such as `RabbitMQ 3.10.8`.
    fn product(&self) -> String {
        let names = ["product", "version"].iter().filter_map(|name| self.server_property(name));
        names.collect::<Vec<_>>().join(" ")
    }

    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// How long the broker may take to answer a request that has no other timeout.
    pub(crate) fn timeout(&self) -> Duration {
        self.uri.connection_timeout
    }

    pub(crate) fn max_payload(&self) -> usize {
        self.tuning.max_payload
    }

    pub(crate) fn round_trip(&self) -> Duration {
        self.round_trip
    }

    pub(crate) fn last_received(&self) -> Instant {
        self.heartbeats.last_received()
    }

    /// The number of deliveries that wait in this connection, for any thread. All received deliveries are counted now;
    /// later ones count when they are put together.
    pub(crate) fn waiting(&mut self) -> Arc<AtomicUsize> {
        self.handle_frames(never);
        Arc::clone(&self.inbox.waiting)
    }

    /// Opens the second channel if it is closed, without waiting.
    pub(crate) fn open_second(&mut self) -> Result<(), Error> {
        if self.has_second() {
            return Ok(());
        }
        if self.tuning.channel_max < SECOND {
            let text =
                format!("{OPENING}: channel_max of the broker or of the URI is less than {SECOND}");
            return Err(Error::new(ErrorKind::Configuration, text));
        }
        self.request(SECOND, &method::channel_open(), OPENING.into());
        self.second = SecondChannel::Open;
        Ok(())
    }

    /// Whether the second channel is open. The broker closes it when it refuses a request on it.
    pub(crate) fn has_second(&self) -> bool {
        self.second == SecondChannel::Open
    }

    /// The broker's reason if it has closed the second channel, as an error of this operation.
    pub(crate) fn refusal_on_second(&self, operation: &str) -> Option<Error> {
        match &self.second {
            SecondChannel::Refused(close) => {
                Some(Error::reply(operation, close.code, &close.text).with_hint(self.hint))
            }
            _ => None,
        }
    }

    /// Closes the second channel and drops its deliveries. A broker that does not answer within the connection
    /// timeout is cut.
    pub(crate) fn close_second(&mut self) {
        if self.has_second() {
            self.inbox.is_dropping = true;
            let ticket = self.request(SECOND, &method::channel_close(), "close a channel".into());
            self.wait_for_answer(ticket, Instant::now().checked_add(self.timeout()));
            self.inbox.is_dropping = false;
            if self.is_pending(ticket) {
                self.cut("no answer in time");
            }
        }
        self.inbox.drop_deliveries();
        self.second = SecondChannel::Closed;
    }

    /// Replaces the channel of messages, and drops its deliveries.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer within the connection timeout.
    pub(crate) fn replace_channel(&mut self) -> Result<(), Error> {
        let timeout = self.timeout();
        self.inbox.is_dropping = true;
        self.call(&method::channel_close(), "close a channel".into(), timeout)?;
        self.inbox.is_dropping = false;
        self.inbox.drop_deliveries();
        self.call(&method::channel_open(), OPENING.into(), timeout).map(drop)
    }

    // Requests and answers.

    /// Sends a request with the next bytes that are sent. If the broker refuses the request, a later call fails.
    pub(crate) fn request(&mut self, channel: u16, request: &Request, operation: String) -> Ticket {
        self.outgoing.extend(request.frame(channel));
        self.requests.add(channel, request.id, request.is_answered, operation)
    }

    /// Whether the answer to this request is still awaited.
    pub(crate) fn is_pending(&self, ticket: Ticket) -> bool {
        self.requests.is_pending(ticket)
    }

    /// The answer to this request, if it is there.
    pub(crate) fn take_answer(&mut self, ticket: Ticket) -> Option<Answer> {
        self.requests.take(ticket)
    }

    /// Sends a request on the channel of messages, and waits for its answer. Everything else that arrives meanwhile
    /// is queued.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer within `timeout`, which cuts the connection.
    pub(crate) fn call(
        &mut self,
        request: &Request,
        operation: String,
        timeout: Duration,
    ) -> Result<Answer, Error> {
        self.call_on(CHANNEL, request, operation, timeout)
    }

    /// The same on any channel.
    pub(crate) fn call_on(
        &mut self,
        channel: u16,
        request: &Request,
        operation: String,
        timeout: Duration,
    ) -> Result<Answer, Error> {
        let ticket = self.request(channel, request, operation.clone());
        self.wait_for_answer(ticket, Instant::now().checked_add(timeout));
        match self.take_answer(ticket) {
            Some(Answer::Refused) => {
                return Err(self.refusal_on_second(&operation).unwrap_or_else(|| self.end()));
            }
            Some(answer) => return Ok(answer),
            None => {}
        }
        if self.ending.is_some() {
            return Err(self.refusal(&operation).unwrap_or_else(|| self.end()));
        }
        self.cut("no answer in time");
        Err(match self.is_login_complete() {
            true => {
                let peer = &self.peer;
                Error::unavailable(format!("{operation} at {peer}: no answer within {timeout:?}"))
            }
            false => no_login(&self.login).with_hint(self.hint),
        })
    }

    /// Waits for this answer, or the end, at most until `until`.
    pub(crate) fn wait_for_answer(&mut self, ticket: Ticket, until: Option<Instant>) {
        let is_over =
            |connection: &Connection| connection.ending.is_some() || !connection.is_pending(ticket);
        while !is_over(self) && until.is_none_or(|until| Instant::now() < until) {
            self.wait_until(is_over, &[], until);
        }
    }

    /// Waits until the broker has acted on all requests before: those of a channel are handled in their order.
    ///
    /// # Errors
    ///
    /// As for [`call`](Connection::call).
    pub(crate) fn barrier(&mut self, operation: String, timeout: Duration) -> Result<(), Error> {
        // This prefetch count applies to later consumers; there are none.
        self.call(&method::qos(0), operation, timeout).map(drop)
    }

    /// Waits until the broker has accepted the login.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer by the `deadline`.
    pub(crate) fn wait_for_login(&mut self, deadline: Instant) -> Result<(), Error> {
        self.wait_for_answer(self.opening, Some(deadline));
        match self.is_login_complete() {
            true => Ok(()),
            false if self.ending.is_some() => {
                Err(self.refusal(&self.login).unwrap_or_else(|| self.end()))
            }
            false => Err(no_login(&self.login)),
        }
    }

    /// Whether the broker has accepted the login.
    pub(crate) fn is_login_complete(&self) -> bool {
        !self.is_pending(self.opening)
    }

    // Messages and events.

    /// The next message or event, if any is there.
    ///
    /// # Errors
    ///
    /// When nothing more arrives, after all messages and events.
    pub(crate) fn try_next(&mut self) -> Result<Option<Inbound>, Lost> {
        self.handle_frames(has_news);
        if !has_news(self) && self.read_at.elapsed() > ABSENCE {
            self.receive(has_news);
        }
        match self.inbox.pop() {
            None if self.inbox.is_over => Err(Lost),
            next => Ok(next),
        }
    }

    /// Waits until a message, an event or the end has arrived, all remaining bytes are sent, or one of `others` is
    /// ready, at most until `until`.
    pub(crate) fn wait(&mut self, others: &[BorrowedFd<'_>], until: Option<Instant>) -> Woken {
        self.wait_until(has_news, others, until)
    }

    /// Like `wait`; this answer ends the wait too.
    pub(crate) fn wait_or_answer(
        &mut self,
        ticket: Ticket,
        others: &[BorrowedFd<'_>],
        until: Option<Instant>,
    ) -> Woken {
        let is_done =
            |connection: &Connection| has_news(connection) || !connection.is_pending(ticket);
        self.wait_until(is_done, others, until)
    }

    /// Like `wait`; the end of the second channel and this answer end the wait too.
    pub(crate) fn wait_for_lookup(&mut self, answer: Option<Ticket>, until: Instant) {
        let is_done = |connection: &Connection| {
            has_news(connection)
                || !connection.has_second()
                || answer.is_some_and(|ticket| !connection.is_pending(ticket))
        };
        self.wait_until(is_done, &[], Some(until));
    }

    /// From now on drops deliveries that do not fit into the limit, and all later ones.
    pub(crate) fn drop_excess(&mut self) {
        self.inbox.drops_excess = true;
    }

    fn wait_until(
        &mut self,
        is_done: impl Fn(&Connection) -> bool,
        others: &[BorrowedFd<'_>],
        until: Option<Instant>,
    ) -> Woken {
        loop {
            let was_sending = self.is_sending();
            self.flush();
            let is_sending = self.is_sending();
            self.handle_frames(&is_done);
            // poll(2) does not see bytes that a TLS session holds.
            while !is_done(self) && self.socket.has_more() && self.receive(&is_done) {}
            if is_done(self) || self.is_read_out || was_sending && !is_sending {
                return wait_for(others, Some(Instant::now()));
            }
            let events = if is_sending { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            let mut files = readable(others);
            files.push(PollFd::new(&self.socket, events));
            let until_beat = until.into_iter().chain(self.next_beat()).min();
            let woken = wait(files, until_beat);
            if woken.by(others.len()) {
                self.flush();
                while self.receive(&is_done) && !is_done(self) && self.socket.has_more() {}
            }
            let is_timeout = until_beat.is_some_and(|time| time <= Instant::now());
            if !woken.by_any_of(others.len() + 1) && !is_timeout {
                // poll(2) has failed; the caller may have a reason to stop.
                return woken;
            }
            self.beat();
            let is_sent = is_sending && !self.is_sending();
            let is_late = until.is_some_and(|until| until <= Instant::now());
            if woken.by_any_of(others.len()) || is_sent || is_late || is_done(self) {
                return woken;
            }
        }
    }

    // Sending.

    /// Sends whole frames, as far as the socket takes them. The rest is sent with the next bytes or during a wait.
    pub(crate) fn send(&mut self, frames: &[u8]) {
        self.flush();
        let mut rest = frames;
        // `outgoing` would cost a copy.
        while self.outgoing.is_empty() && !rest.is_empty() {
            match self.socket.write(rest) {
                Ok(length) => rest = &rest[length..],
                Err(_) => break,
            }
        }
        if rest.len() < frames.len() {
            self.heartbeats.record_sent(Instant::now());
        }
        // After an error too: the flush meets it again and handles it.
        if !rest.is_empty() {
            self.outgoing.extend_from_slice(rest);
            self.flush();
        }
    }

    /// Sends whole frames with the next bytes or during a wait.
    pub(crate) fn send_later(&mut self, frames: &[u8]) {
        self.outgoing.extend_from_slice(frames);
    }

    pub(crate) fn is_sending(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether a publisher should wait, because more than [`CONGESTED`] bytes wait for the socket.
    pub(crate) fn is_congested(&self) -> bool {
        self.outgoing.len() - self.written > CONGESTED
    }

    /// Sends the remaining bytes, as far as the socket takes them.
    pub fn flush(&mut self) {
        if self.outgoing.is_empty() {
            return;
        }
        let before = self.written;
        while self.written < self.outgoing.len() {
            match self.socket.write(&self.outgoing[self.written..]) {
                Ok(length) => self.written += length,
                Err(error) if error.kind() == Io::Interrupted => {}
                Err(error) if error.kind() == Io::WouldBlock => break,
                Err(error) => {
                    // The peer may have sent a reason, which is still to be read. The end of the stream follows it.
                    log::debug!("write: {error}");
                    self.socket.end_writing();
                    self.written = self.outgoing.len();
                }
            }
        }
        if self.written > before {
            self.heartbeats.record_sent(Instant::now());
        }
        // Otherwise the sent part would grow without limit while the socket never takes all bytes.
        if self.written >= self.outgoing.len() / 2 {
            self.outgoing.drain(..self.written);
            self.written = 0;
        }
    }

    /// Sends a heartbeat if it is time, and ends the connection to a peer that has missed two.
    fn beat(&mut self) {
        let now = Instant::now();
        if self.next_beat().is_none_or(|time| now < time) {
            return;
        }
        // While the socket is left unread, the peer cannot be seen to be alive.
        let is_full = !self.inbox.drops_excess && self.inbox.is_full(self.assembler.held());
        if !is_full {
            // After SIGSTOP and SIGCONT, heartbeats wait in the socket.
            self.receive(never);
        }
        if !is_full && self.heartbeats.is_peer_silent(now) {
            self.cut("missed heartbeats from server");
        } else if self.heartbeats.is_due(now) && !self.is_sending() {
            self.outgoing.extend_from_slice(&HEARTBEAT_FRAME);
            self.flush();
        }
    }

    /// When to send a heartbeat, or to miss the peer's. While the socket takes no bytes, none can be sent.
    fn next_beat(&self) -> Option<Instant> {
        let next = match self.is_sending() {
            true => self.heartbeats.silent_time(),
            false => self.heartbeats.next_time(),
        };
        next.filter(|_| !self.is_read_out)
    }

    /// Sends a heartbeat if it is time, and reads up to the limit, for a program that is busy.
    pub(crate) fn keep_alive(&mut self) {
        self.flush();
        if self.next_beat().is_some_and(|time| time <= Instant::now()) {
            while !self.inbox.is_full(self.assembler.held()) && self.receive(never) {}
            self.beat();
        }
    }

    // Receiving.

    /// Reads from the socket once, and handles frames until `is_done`. Returns whether bytes were read and more may
    /// follow.
    fn receive(&mut self, is_done: impl Fn(&Connection) -> bool) -> bool {
        self.handle_frames(never);
        if self.is_read_out {
            return false;
        }
        let read = self.socket.read(self.frames.room());
        let now = Instant::now();
        self.read_at = now;
        if read
            .as_ref()
            .is_err_and(|error| matches!(error.kind(), Io::WouldBlock | Io::Interrupted))
        {
            return false;
        }
        self.heartbeats.record_received(now);
        self.inbox.is_dropping |=
            self.inbox.drops_excess && self.inbox.is_full(self.assembler.held());
        match read {
            Ok(length @ 1..) => {
                self.frames.add(length);
                self.handle_frames(is_done);
            }
            Ok(_) => self.end_reading(Ending::end_of_stream()),
            // A reset is an end like any other.
            Err(error) => self.end_reading(Ending::unreadable(&error)),
        }
        !self.is_read_out
    }

    /// Handles received frames until `is_done`. The program takes each message before the next is put together:
    /// then the memory of a message is still in the cache of the processor, and the next one uses it again.
    fn handle_frames(&mut self, is_done: impl Fn(&Connection) -> bool) {
        while !self.is_read_out && !is_done(self) {
            match self.handle_frame() {
                Ok(true) => {}
                Ok(false) => break,
                Err(fault) => self.end_reading(Ending::Fault(fault)),
            }
        }
    }

    /// Handles a frame, or a part of one; returns whether there was any.
    fn handle_frame(&mut self) -> Result<bool, Fault> {
        let complete = match self.frames.next()? {
            None => return Ok(false),
            Some(Frame::Heartbeat) => None,
            Some(Frame::Header { part, is_last }) => self.assembler.add_header(part, is_last)?,
            Some(Frame::Body(part)) => self.assembler.add_body(part, self.inbox.is_dropping)?,
            Some(Frame::Method { channel, id, arguments }) => {
                let method = method::read(id, arguments)?;
                self.handle_method(channel, method)?;
                None
            }
        };
        if let Some(message) = complete {
            self.inbox.add(message);
        }
        Ok(true)
    }

    fn handle_method(&mut self, channel: u16, method: Method) -> Result<(), Fault> {
        match method {
            Method::Deliver(delivery) => self.assembler.begin(Message::Delivery(delivery))?,
            Method::Return(returned) => self.assembler.begin(Message::Returned(returned))?,
            Method::Event(event) => self.inbox.push(Inbound::Event(event)),
            Method::Cancel => self.inbox.push(Inbound::Cancelled),
            Method::Flow { active } => {
                let ok = method::channel_flow_ok(active).frame(channel);
                self.outgoing.extend(ok);
                self.inbox.push(Inbound::Event(match active {
                    true => Event::Unblocked,
                    false => Event::Blocked("channel.flow".into()),
                }));
            }
            Method::ChannelClose(close) => {
                self.outgoing.extend(method::channel_close_ok().frame(channel));
                if channel == CHANNEL {
                    self.end_with(Ending::ChannelClosed(close));
                } else {
                    log::debug!("channel {channel}: {}", close.text);
                    self.requests.refuse(channel);
                    self.second = SecondChannel::Refused(close);
                }
            }
            Method::Close(close) => {
                self.outgoing.extend(method::close_ok().frame(0));
                self.flush();
                self.end_reading(Ending::Closed(close));
            }
            Method::Answer(id, answer) => {
                self.requests.answer(channel, id, answer);
                if id == CLOSE {
                    self.end_reading(Ending::end_of_stream());
                }
            }
        }
        Ok(())
    }

    // The end.

    /// Keeps the first reason; later ones follow from it.
    fn end_with(&mut self, ending: Ending) {
        self.ending.get_or_insert(ending);
        self.inbox.is_over = true;
    }

    fn end_reading(&mut self, ending: Ending) {
        self.end_with(ending);
        self.is_read_out = true;
    }

    fn cut(&mut self, reason: &str) {
        self.end_reading(Ending::Lost(reason.into()));
        self.socket.end();
    }

    /// How the broker has closed the connection or the channel, if it has.
    pub(crate) fn closed(&self) -> Option<&Close> {
        self.ending.as_ref()?.close()
    }

    /// The refusal of the broker, if it has closed the connection or the channel. The error names the refused operation:
    /// an earlier request, or else `operation`.
    pub(crate) fn refusal(&self, operation: &str) -> Option<Error> {
        let Close { code, text, request } = self.closed()?;
        let reply = |operation: &str| Error::reply(operation, *code, text);
        let earlier = request.and_then(|id| self.requests.operation(id));
        Some(match earlier {
            Some(earlier) if matches!(request, Some(OPEN | CHANNEL_OPEN)) => reply(earlier),
            Some(earlier) => reply(earlier).with_hint(self.hint),
            None if !self.is_login_complete() => reply(&self.login),
            None if self.requests.are_awaited(SECOND, CHANNEL_OPEN) => reply(OPENING),
            None => reply(operation).with_hint(self.hint),
        })
    }

    /// Closes a connection that is lost, and returns the reason.
    pub(crate) fn end(&mut self) -> Error {
        self.close_by(Instant::now() + CLOSE_TIMEOUT);
        let operation = self.subject();
        let Some(ending) = &self.ending else {
            return Error::unavailable(format!("{operation}: lost"));
        };
        let failure = match self.is_login_complete() {
            true => None,
            false => ending.failure_of_login(&operation),
        };
        failure.unwrap_or_else(|| ending.error(&operation)).with_hint(self.hint)
    }

    /// Closes a connection that is lost during this operation, and returns the refusal of the broker or the reason.
    pub(crate) fn end_during(&mut self, operation: &str) -> Error {
        let reason = self.end();
        self.refusal(operation).unwrap_or(reason)
    }

    /// The object of an end of the connection, as in messages.
    fn subject(&self) -> String {
        match self.is_login_complete() {
            true => format!("connection to {}", self.peer),
            false => self.login.clone(),
        }
    }

    /// Closes the connection, within a second.
    pub(crate) fn close(&mut self) {
        self.close_by(Instant::now() + CLOSE_TIMEOUT);
    }

    /// Closes the connection, by the `deadline`.
    pub(crate) fn close_by(&mut self, deadline: Instant) {
        if self.is_read_out {
            return;
        }
        self.drop_excess();
        let operation = format!("close the {}", self.subject());
        let ticket = self.request(0, &method::close(), operation);
        let is_closed =
            |connection: &Connection| connection.is_read_out || !connection.is_pending(ticket);
        while !is_closed(self) && Instant::now() < deadline {
            self.wait_until(is_closed, &[], Some(deadline));
        }
        match self.is_pending(ticket) {
            true => log::debug!("close the {}: no answer", self.subject()),
            false => log::debug!("{}: closed", self.subject()),
        }
        self.cut("closed");
    }
}
