//! The connection below a channel: connect, log in, call and close, each with a deadline.

use std::fmt::Display;
use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::BorrowedFd;
use std::process;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{AmqpValue, Auth, Channel, ConnectionOptions, ConnectionTuning};
use amq_protocol::protocol::AMQPClass;
use rustix::io::Errno;
use rustls::ClientConnection;

use crate::deadline::{Expired, Watchdog};
use crate::error::{Context, Error, ErrorKind, Hint};
use crate::panics::catch_panic;
use crate::transport::Stream;
use crate::transport::decoder::Inbound;
use crate::transport::encoder::{self, Answer};
use crate::transport::frame_filter::{CHANNEL, Close, FRAME_MAX};
use crate::transport::observed::{Observed, Reason};
use crate::transport::tls::{self, TlsSettings};
use crate::transport::wire::{Inbox, Reader, Wire, Woken, wait_for};
use crate::uri::{Mechanism, Uri};

/// How long a broker that has done its work may take to say goodbye.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The likely reasons of a peer that closes the connection without a byte: RabbitMQ itself always
/// answers, at least with its version of the protocol, unless it goes down at that moment.
const UNANSWERED: &str = "closed without an answer; the port may be another service's, or want TLS: \
                          amqp:// has 5672 by default, amqps:// 5671";

const OPEN: [u8; 4] = [0, 10, 0, 40];
const CHANNEL_OPEN: [u8; 4] = [0, 20, 0, 10];

/// The answer that ends the login.
const LET_IN: Answer = Answer::ChannelOpen(CHANNEL);

/// The channel of requests that must not close that of messages, and the opening of it, as in messages.
const SECOND: u16 = CHANNEL + 1;
const OPENING: &str = "open a channel";

/// The connection is lost, or the broker has closed the channel; the end of it tells why.
#[derive(Debug)]
pub struct Lost;

/// An open connection. Dropped without [`close`](Link::close), the socket is cut at once.
pub(crate) struct Link {
    // Dropped first: amiquip's own drop would wait for the broker, without a limit.
    watchdog: Watchdog,
    /// `None` once the connection is closed.
    amqp: Option<amiquip::Connection>,
    wire: Arc<Wire>,
    inbox: Inbox,
    /// Bytes of the delivery that the caller handles.
    handled: usize,
    /// The operation of the login, as in messages.
    login: String,
    /// Class, method and operation, as in messages, of requests whose refusal shows in place of a later answer.
    unanswered: Vec<([u8; 4], String)>,
    /// Host and port, as in messages.
    pub peer: String,
    uri: Uri,
    program: String,
    hint: Hint,
    /// How long the broker may take to answer a request, unless the call has a timeout of its own.
    pub timeout: Duration,
}

impl Link {
    /// Opens a connection to any of `uris`, with a channel. They are tried in turn, from any of
    /// them on, so that the nodes of a cluster share their clients. `program` is the name under
    /// which the broker lists the connection.
    ///
    /// All steps together take no longer than the longest `connection_timeout` of the URIs. Of
    /// that, each URI has an equal share of the time that those before it have left, but never more than
    /// its own `connection_timeout`.
    ///
    /// # Errors
    ///
    /// When no broker accepts the login: with the reasons of all, or, if time cures none of
    /// these, the reason of the first.
    pub fn open(uris: &[Uri], program: &str, hint: Hint) -> Result<(Link, Channel), Error> {
        let longest = uris.iter().map(|uri| uri.connection_timeout).max().unwrap_or_default();
        let deadline = Instant::now() + longest;
        let first = fastrand::usize(..uris.len().max(1));
        let mut failures = Vec::new();
        for (tried, place) in (first..uris.len()).chain(0..first).enumerate() {
            let uri = &uris[place];
            // A node that swallows packets must leave time for the others.
            let share = share(deadline, uris.len() - tried);
            let deadline = share.min(Instant::now() + uri.connection_timeout);
            // Where another broker may let us in, the refusal of this one has to be known.
            let has_others = tried + 1 < uris.len();
            let opened = Link::open_uri(uri, program, hint, deadline);
            let settled = opened.and_then(|(mut link, channel)| match has_others {
                true => link.wait_to_be_let_in(deadline).map(|()| (link, channel)),
                false => Ok((link, channel)),
            });
            match settled {
                Ok(opened) => return Ok(opened),
                Err(failure) => {
                    log::debug!("{failure}");
                    failures.push((place, failure));
                }
            }
        }
        // In the same order each time, so that a repeated failure is recognized by its text.
        failures.sort_by_key(|(place, _)| *place);
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
    ) -> Result<(Link, Channel), Error> {
        let addresses = resolve(uri, deadline)?;
        let mut last = None;
        for (tried, address) in addresses.iter().enumerate() {
            log::debug!("connecting to {uri} ({})", address.ip());
            let deadline = share(deadline, addresses.len() - tried);
            let connected = connect(address, time_left(deadline))
                .map_err(|error| unreachable(uri, *address, &error))
                .and_then(|socket| Link::log_in(uri, socket, program, hint, deadline));
            match connected {
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
        socket: TcpStream,
        program: &str,
        hint: Hint,
        deadline: Instant,
    ) -> Result<(Link, Channel), Error> {
        let login = match uri.mechanism {
            Mechanism::Plain => format!("{uri} as '{}', vhost '{}'", uri.user, uri.vhost),
            Mechanism::External => format!("{uri}, vhost '{}'", uri.vhost),
        };
        let operation = format!("log in to {login}");
        let local = |error: io::Error| Error::unavailable(format!("{operation}: {error}"));
        let watchdog = Watchdog::new(socket.try_clone().map_err(local)?)
            .map_err(|error| Error::no_thread(&operation, &error))?;
        let heartbeat = Duration::from_secs(uri.heartbeat.into());
        let tls = match &uri.tls {
            Some(settings) => Some(encrypt(uri, settings, &socket, &watchdog, deadline)?),
            None => None,
        };
        let stream =
            Stream::new(socket, tls, heartbeat, connection_name(program)).map_err(local)?;
        let wire = stream.wire();
        let opened = watchdog.within(deadline, || {
            let mut amqp = open_stream(stream, uri)?;
            let channel = amqp.open_channel(Some(CHANNEL))?;
            Ok((amqp, channel))
        });
        let (amqp, channel) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => return Err(not_logged_in(operation, error, &wire.observed)),
            Err(Expired) => {
                return Err(no_login(operation));
            }
        };
        log::info!("connected to {login}, {}", product(&amqp));
        let link = Link {
            watchdog,
            amqp: Some(amqp),
            wire,
            inbox: Inbox::default(),
            handled: 0,
            unanswered: vec![(OPEN, operation.clone()), (CHANNEL_OPEN, operation.clone())],
            login: operation,
            peer: uri.to_string(),
            uri: uri.clone(),
            program: program.into(),
            hint,
            timeout: uri.connection_timeout,
        };
        Ok((link, channel))
    }

    /// Opens another connection to the same broker.
    ///
    /// # Errors
    ///
    /// As for [`open`](Link::open).
    pub fn open_another(&self) -> Result<(Link, Channel), Error> {
        Link::open(slice::from_ref(&self.uri), &self.program, self.hint)
    }

    /// Opens another channel.
    ///
    /// # Errors
    ///
    /// As for [`call`](Link::call), and a lost connection.
    pub fn open_channel(&mut self) -> Result<Channel, Error> {
        let mut amqp = self.amqp.take();
        let opened = self.call(self.timeout, OPENING, || match &mut amqp {
            Some(amqp) => amqp.open_channel(Some(SECOND)),
            None => Err(amiquip::Error::ClientClosedConnection),
        });
        self.amqp = amqp;
        self.unanswered.push((CHANNEL_OPEN, OPENING.into()));
        opened?.context(OPENING)
    }

    /// Waits until the broker has let us in.
    ///
    /// # Errors
    ///
    /// A refusal, a lost connection, and no answer by the `deadline`.
    pub fn wait_to_be_let_in(&mut self, deadline: Instant) -> Result<(), Error> {
        let reader = self.wire.read_by(Reader::Program);
        self.wire.wait_for_answer(LET_IN, deadline);
        self.wire.read_by(reader);
        self.wire.take(&mut self.inbox);
        match self.is_let_in() {
            true => Ok(()),
            false if self.inbox.is_over => {
                let refusal = self.refusal(&self.login);
                Err(refusal.unwrap_or_else(|| self.end()))
            }
            false => Err(no_login(&self.login)),
        }
    }

    /// Lets this thread receive and send from now on, in place of amiquip's.
    pub fn take_over(&self) {
        self.wire.read_by(Reader::Program);
    }

    /// What comes next on the channel, if anything is there.
    ///
    /// # Errors
    ///
    /// When nothing more comes.
    pub fn try_next(&mut self) -> Result<Option<Inbound>, Lost> {
        // The caller comes back when the last delivery is handled.
        self.wire.record_handled(mem::take(&mut self.handled));
        if self.inbox.messages.is_empty() {
            self.wire.take(&mut self.inbox);
        }
        let next = self.inbox.messages.pop_front();
        self.inbox.deliveries -= usize::from(matches!(next, Some(Inbound::Delivery(_))));
        self.wire.observed.unhandled.store(self.inbox.deliveries, Ordering::Relaxed);
        match next {
            None if self.inbox.is_over => Err(Lost),
            Some(Inbound::Delivery(delivery)) => {
                self.handled = delivery.memory;
                Ok(Some(Inbound::Delivery(delivery)))
            }
            next => Ok(next),
        }
    }

    /// Waits until something has come on the channel or one of `others` is ready, at most `until` then.
    pub fn wait(&self, others: &[BorrowedFd<'_>], until: Option<Instant>) -> Woken {
        match self.inbox.messages.is_empty() && !self.inbox.is_over {
            true => self.wire.wait(others, until),
            false => wait_for(others, Some(Instant::now())),
        }
    }

    /// Waits until something has come on the channel, or this answer, at most `until` then.
    pub fn wait_for_answer(&self, answer: Answer, until: Option<Instant>) {
        self.wire.wait_for_message_or(answer, until);
    }

    /// Whether this answer has come.
    pub fn is_answered(&self, answer: Answer) -> bool {
        !self.wire.expects(answer)
    }

    /// Drops deliveries for which there is no room from now on, and all after them.
    pub fn drop_excess(&self) {
        self.wire.drop_excess();
    }

    /// Facts about the connection, for any thread.
    pub fn observed(&self) -> Arc<Observed> {
        Arc::clone(&self.wire.observed)
    }

    /// Sends frames, as far as the socket takes them, without waiting.
    pub fn send(&self, frames: &[u8]) {
        self.wire.send(frames);
    }

    /// Sends frames with what is sent next, or while somebody waits.
    pub fn send_later(&self, frames: &[u8]) {
        self.wire.send_later(frames);
    }

    /// Sends what was left for later.
    pub fn flush(&self) {
        self.wire.send(&[]);
    }

    /// Sends, with what is sent next, a request to which the broker does not answer, or only by a refusal in place of
    /// a later answer.
    pub fn request(&mut self, method: &AMQPClass, operation: impl Display) {
        let frame = encoder::method(CHANNEL, method);
        if let Some(id) = encoder::method_of(&frame) {
            self.unanswered.push((id, operation.to_string()));
        }
        self.wire.send_later(&frame);
    }

    /// The same for a request to which the broker answers when it has accepted it.
    pub fn request_answered(
        &mut self,
        method: &AMQPClass,
        answer: Answer,
        operation: impl Display,
    ) {
        self.wire.expect(answer);
        self.request(method, operation);
    }

    /// The largest payload of a frame that the broker takes, in bytes.
    pub fn max_payload(&self) -> usize {
        self.wire.max_payload()
    }

    /// The time to the broker and back.
    pub fn round_trip(&self) -> Duration {
        self.wire.round_trip()
    }

    /// Whether so many bytes wait to be sent that more had better not be added.
    pub fn is_congested(&self) -> bool {
        self.wire.is_congested()
    }

    /// Whether the broker has let us in.
    pub fn is_let_in(&self) -> bool {
        self.is_answered(LET_IN)
    }

    /// When the broker last gave a sign of life; the end of the connection counts as a sign.
    pub fn last_received(&self) -> Instant {
        self.wire.observed.last_received.get()
    }

    /// Calls `work`, which is a request to the broker, and cuts the connection if no answer comes
    /// within `timeout`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] when the time is up.
    pub fn call<T>(
        &self,
        timeout: Duration,
        operation: impl Display,
        work: impl FnOnce() -> T,
    ) -> Result<T, Error> {
        let reader = self.wire.read_by(Reader::Amiquip);
        let answered = match Instant::now().checked_add(timeout) {
            Some(deadline) => self.watchdog.within(deadline, work),
            // A time too far away to be expressed is as good as for ever.
            None => Ok(work()),
        };
        self.wire.read_by(reader);
        answered.map_err(|Expired| match self.is_let_in() {
            true => no_answer(format!("{operation} at {}", self.peer), timeout),
            false => no_login(&self.login).with_hint(self.hint),
        })
    }

    /// Waits until the broker has acted on all that was sent on `channel`, by a request whose answer
    /// comes after it.
    ///
    /// # Errors
    ///
    /// As for [`call`](Link::call).
    pub fn barrier(
        &self,
        channel: &Channel,
        timeout: Duration,
        operation: impl Display,
    ) -> Result<amiquip::Result<()>, Error> {
        // This prefetch count is for consumers to come, of which there are none.
        self.call(timeout, operation, || channel.qos(0, 0, false))
    }

    /// How the broker has closed the connection or a channel on it, if it has. Only the first close
    /// frame is kept: amiquip may interleave its close-ok with a publish, and RabbitMQ answers that
    /// with a second, misleading close.
    pub fn closed(&self) -> Option<&Close> {
        match self.wire.observed.ending.get() {
            Some(Reason::Closed(close)) => Some(close),
            _ => None,
        }
    }

    /// The refusal of the broker, if one has closed the connection or the channel: an error of the operation that
    /// was refused, which is `operation` unless it was an earlier one.
    pub fn refusal(&self, operation: impl Display) -> Option<Error> {
        let Close { code, text, request } = self.closed()?;
        let earlier = self.unanswered.iter().rev().find(|(id, _)| Some(id) == request.as_ref());
        Some(match earlier {
            Some((OPEN | CHANNEL_OPEN, login)) => Error::reply(login, *code, text),
            None if !self.is_let_in() => Error::reply(&self.login, *code, text),
            None if self.wire.expects(Answer::ChannelOpen(SECOND)) => {
                Error::reply(OPENING, *code, text)
            }
            Some((_, earlier)) => Error::reply(earlier, *code, text).with_hint(self.hint),
            None => Error::reply(operation, *code, text).with_hint(self.hint),
        })
    }

    /// Closes the connection, within a second.
    ///
    /// # Errors
    ///
    /// The reason why the connection was lost, if it was: only amiquip's close tells.
    pub fn close(&mut self) -> Result<(), Error> {
        self.close_by(Instant::now() + CLOSE_TIMEOUT)
    }

    /// A property that the broker has introduced itself with.
    pub fn server_property(&self, name: &str) -> Option<String> {
        server_property(self.amqp.as_ref()?, name)
    }

    /// Closes the connection, by the `deadline`.
    ///
    /// # Errors
    ///
    /// As for [`close`](Link::close).
    pub fn close_by(&mut self, deadline: Instant) -> Result<(), Error> {
        let Some(amqp) = self.amqp.take() else {
            return Ok(());
        };
        self.wire.drop_excess();
        self.wire.read_by(Reader::Amiquip);
        let operation = self.subject();
        let timeout = time_left(deadline);
        match self.watchdog.within(deadline, || amqp.close()) {
            Ok(outcome) => {
                log::debug!("{operation}: closed");
                outcome.context(operation)
            }
            Err(Expired) => Err(no_answer(format!("close the {operation}"), timeout)),
        }
    }

    /// What an end of the connection concerns, as in messages.
    fn subject(&self) -> String {
        match self.is_let_in() {
            true => format!("connection to {}", self.peer),
            false => self.login.clone(),
        }
    }

    /// Why an `operation` has failed: refused by the broker, or else because the connection is lost.
    pub fn explain(&mut self, operation: impl Display, error: amiquip::Error) -> Error {
        if let Some(refusal) = self.refusal(&operation) {
            return refusal;
        }
        let error = Error::from_amiquip(operation, error);
        match error.is_reply() {
            true => error.with_hint(self.hint),
            false => self.end(),
        }
    }

    /// Closes a connection that seems to be lost, and returns the reason.
    pub fn end(&mut self) -> Error {
        let (was_open, closed) = (self.amqp.is_some(), self.close());
        if !self.is_let_in()
            && let Some(failure) = failure_of_login(&self.login, &self.wire.observed)
        {
            return failure.with_hint(self.hint);
        }
        let operation = self.subject();
        match (self.closed(), closed) {
            // amiquip's I/O thread may panic where both sides close at once, and knows no reason then.
            (Some(Close { code, text, .. }), _) if was_open => {
                Error::reply(operation, *code, text).with_hint(self.hint)
            }
            (_, Err(reason)) => reason.with_hint(self.hint),
            _ => Error::unavailable(format!("{operation}: lost")),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // amiquip ends by what it reads.
        self.wire.read_by(Reader::Amiquip);
    }
}

/// The time left until a deadline that may have passed.
pub(crate) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn no_login(operation: impl Display) -> Error {
    Error::unreachable(format!("{operation}: no answer within the connection timeout"))
}

fn no_answer(operation: impl Display, timeout: Duration) -> Error {
    Error::unavailable(format!("{operation}: no answer within {timeout:?}"))
}

/// The deadline of the first of `parts` equal parts of the time until `deadline`.
fn share(deadline: Instant, parts: usize) -> Instant {
    Instant::now() + time_left(deadline) / parts.max(1) as u32
}

/// The time left; never zero, which `connect_timeout` refuses.
fn time_left(deadline: Instant) -> Duration {
    left(deadline).max(Duration::from_millis(1))
}

/// Connects. A socket that is connected to itself is refused: the system may give a client the very port
/// that nobody listens on.
fn connect(address: &SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let socket = TcpStream::connect_timeout(address, timeout)?;
    match socket.local_addr()? == *address {
        true => Err(io::ErrorKind::ConnectionRefused.into()),
        false => Ok(socket),
    }
}

/// Looks the host up, in a thread of its own, as the resolver of the system has no deadline.
fn resolve(uri: &Uri, deadline: Instant) -> Result<Vec<SocketAddr>, Error> {
    if let Ok(address) = uri.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, uri.port)]);
    }
    let target = (uri.host.clone(), uri.port);
    let (sender, receiver) = mpsc::channel();
    let look_up = move || sender.send(target.to_socket_addrs().map(Iterator::collect));
    let operation = format!("look up {uri}");
    thread::Builder::new().spawn(look_up).map_err(|error| Error::no_thread(&operation, &error))?;
    let reason = match receiver.recv_timeout(time_left(deadline)) {
        Ok(Ok(addresses)) => return Ok(addresses),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer from the name service".to_string(),
    };
    Err(Error::unreachable(format!("{operation}: {reason}")))
}

/// Opens a TLS session on the socket.
fn encrypt(
    uri: &Uri,
    settings: &TlsSettings,
    mut socket: &TcpStream,
    watchdog: &Watchdog,
    deadline: Instant,
) -> Result<ClientConnection, Error> {
    let operation = format!("connect to {uri}");
    match watchdog.within(deadline, || tls::handshake(settings, &uri.host, &mut socket)) {
        Ok(Ok(session)) => {
            if let (Some(version), Some(suite)) =
                (session.protocol_version(), session.negotiated_cipher_suite())
            {
                log::info!("TLS with {uri}: {version:?}, {:?}", suite.suite());
            }
            Ok(session)
        }
        Ok(Err(failure)) => Err(Error::new(failure.kind(), format!("{operation}: {failure}"))),
        Err(Expired) => {
            let text = "TLS handshake: no answer within the connection timeout";
            Err(Error::unreachable(format!("{operation}: {text}")))
        }
    }
}

fn unreachable(uri: &Uri, address: SocketAddr, error: &io::Error) -> Error {
    let reason = match error.kind() {
        io::ErrorKind::TimedOut => "no answer within the connection timeout".to_string(),
        _ => error.to_string(),
    };
    let through = match uri.to_string() == address.to_string() {
        true => String::new(),
        false => format!(" ({})", address.ip()),
    };
    Error::unreachable(format!("connect to {uri}{through}: {reason}"))
}

/// Why a login has failed: for the reason noted by the stream, or else for that of amiquip.
fn not_logged_in(operation: impl Display, error: amiquip::Error, observed: &Observed) -> Error {
    use amiquip::Error as E;
    if let Some(failure) = failure_of_login(&operation, observed) {
        return failure;
    }
    match (observed.ending.get(), error) {
        (Some(Reason::Closed(close)), _) => Error::reply(operation, close.code, &close.text),
        (None, E::UnexpectedSocketClose | E::IoErrorReadingSocket { .. })
            if !observed.has_received() =>
        {
            Error::unreachable(format!("{operation}: {UNANSWERED}"))
        }
        (_, error) => Error::from_amiquip(operation, error),
    }
}

/// Why a login has failed, where the bytes of the peer tell: those are no AMQP, or no TLS.
fn failure_of_login(operation: impl Display, observed: &Observed) -> Option<Error> {
    match observed.ending.get()? {
        Reason::Closed(_) => None,
        Reason::Fault(fault) => {
            Some(Error::new(ErrorKind::Protocol, format!("{operation}: {fault}")))
        }
        Reason::Tls(failure) => Some(Error::new(failure.kind(), format!("{operation}: {failure}"))),
    }
}

/// Logs in. Where the system has no thread for amiquip's timer, mio-extras panics.
fn open_stream(stream: Stream, uri: &Uri) -> amiquip::Result<amiquip::Connection> {
    let open = || {
        amiquip::Connection::insecure_open_stream(stream, options(uri), ConnectionTuning::default())
    };
    catch_panic(open)
        .unwrap_or_else(|| Err(amiquip::Error::ForkFailed { source: Errno::AGAIN.into() }))
}

fn options(uri: &Uri) -> ConnectionOptions<Auth> {
    let auth = match uri.mechanism {
        Mechanism::Plain => {
            Auth::Plain { username: uri.user.clone(), password: uri.password.expose().to_string() }
        }
        Mechanism::External => Auth::External,
    };
    ConnectionOptions::default()
        .auth(auth)
        .virtual_host(&uri.vhost)
        .heartbeat(uri.heartbeat)
        .channel_max(uri.channel_max)
        .frame_max(match uri.frame_max {
            0 => FRAME_MAX,
            limit => limit.min(FRAME_MAX),
        })
}

/// A property that the broker has introduced itself with.
fn server_property(amqp: &amiquip::Connection, name: &str) -> Option<String> {
    match amqp.server_properties().get(name) {
        Some(AmqpValue::LongString(text)) => Some(text.clone()),
        _ => None,
    }
}

/// The broker's name for itself, such as `RabbitMQ 3.10.8`.
fn product(amqp: &amiquip::Connection) -> String {
    let names = ["product", "version"].iter().filter_map(|name| server_property(amqp, name));
    names.collect::<Vec<_>>().join(" ")
}

/// `emit-log 0.2.0 (host:pid)`
fn connection_name(program: &str) -> String {
    let system = rustix::system::uname();
    let host = system.nodename().to_string_lossy();
    format!("{program} {} ({host}:{})", env!("CARGO_PKG_VERSION"), process::id())
}
