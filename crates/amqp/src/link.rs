//! The connection below a channel: connect, log in, call and close, each with a deadline.
//!
//! None of amiquip's calls has one of its own; a [`Watchdog`] sees to that.

use std::fmt::Display;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::process;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{
    AmqpValue, Auth, Channel, ConnectionBlockedNotification, ConnectionOptions, ConnectionTuning,
};
use crossbeam_channel::Receiver;
use rustix::io::Errno;
use rustls::ClientConnection;

use crate::deadline::{Expired, Watchdog};
use crate::error::{During, Error, ErrorKind};
use crate::panics::catch_panic;
use crate::transport::backlog::Backlog;
use crate::transport::frame_filter::{Close, FRAME_MAX};
use crate::transport::tls::{self, TlsSettings};
use crate::transport::{Ending, LastReceived, Reason, Stream};
use crate::uri::{Mechanism, Uri};

/// How long a broker that has done its work may take to say goodbye.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// What a peer that closes the connection without a byte is likely to be: RabbitMQ itself always
/// answers, be it with the protocol that it speaks, unless it goes down at that moment.
const UNANSWERED: &str = "closed without an answer; the port may be another service's, or want TLS: \
                          amqp:// has 5672 by default, amqps:// 5671";

/// An open connection. Dropped without [`close`](Link::close), it is cut at once.
pub(crate) struct Link {
    // Dropped first: amiquip's own drop would wait for the broker, without a limit.
    watchdog: Watchdog,
    amqp: Option<amiquip::Connection>,
    peer: String,
    backlog: Arc<Backlog>,
    last_received: LastReceived,
    ending: Ending,
    /// How long the broker may take to answer a request, unless one has a limit of its own.
    pub limit: Duration,
}

impl Link {
    /// Opens a connection to one of `uris`, and a channel on it. They are tried in turn, from any of
    /// them on, so that the nodes of a cluster share their clients. `program` is the name under
    /// which the broker lists the connection.
    ///
    /// All of it together takes no longer than the longest `connection_timeout` of the URIs. Of
    /// that, each URI has an equal share of what those before it have left, but never more than
    /// its own `connection_timeout`.
    ///
    /// # Errors
    ///
    /// When none of them lets us in: [`ErrorKind::Unavailable`] with the reasons of all, or, if no
    /// wait can cure any of these, the reason of the first.
    pub fn open(uris: &[Uri], program: &str) -> Result<(Link, Channel), Error> {
        let longest = uris.iter().map(|uri| uri.connection_timeout).max().unwrap_or_default();
        let deadline = Instant::now() + longest;
        let first = fastrand::usize(..uris.len().max(1));
        let mut failures = Vec::new();
        for tried in 0..uris.len() {
            let place = (first + tried) % uris.len();
            let uri = &uris[place];
            // A node that swallows packets must leave time for the others.
            let share = share(deadline, uris.len() - tried);
            let deadline = share.min(Instant::now() + uri.connection_timeout);
            match Link::open_uri(uri, program, deadline) {
                Ok(opened) => return Ok(opened),
                Err(failure) => {
                    log::debug!("{failure}");
                    failures.push((place, failure));
                }
            }
        }
        // In the same order each time, so that the same is not told twice.
        failures.sort_by_key(|(place, _)| *place);
        let may_pass = failures.iter().any(|(_, failure)| failure.is_transient());
        if !may_pass && !failures.is_empty() {
            return Err(failures.swap_remove(0).1);
        }
        let reasons: Vec<_> = failures.iter().map(|(_, failure)| failure.to_string()).collect();
        let hint = "is the broker running? --uri or AMQP_URL names another";
        Err(Error::unavailable(format!("{} ({hint})", reasons.join("; "))))
    }

    fn open_uri(uri: &Uri, program: &str, deadline: Instant) -> Result<(Link, Channel), Error> {
        let addresses = resolve(uri, deadline)?;
        let mut last = None;
        for (tried, address) in addresses.iter().enumerate() {
            log::debug!("connecting to {uri} ({})", address.ip());
            let deadline = share(deadline, addresses.len() - tried);
            let connected = connect(address, time_left(deadline))
                .map_err(|error| unreachable(uri, *address, &error))
                .and_then(|socket| Link::log_in(uri, socket, program, deadline));
            match connected {
                Err(failure) if failure.is_transient() => last = Some(failure),
                outcome => return outcome,
            }
        }
        Err(last.unwrap_or_else(|| {
            Error::unavailable(format!("connect to {uri}: no address for this name"))
        }))
    }

    fn log_in(
        uri: &Uri,
        socket: TcpStream,
        program: &str,
        deadline: Instant,
    ) -> Result<(Link, Channel), Error> {
        use amiquip::Error as E;
        let login = match uri.mechanism {
            Mechanism::Plain => format!("{uri} as '{}', vhost '{}'", uri.user, uri.vhost),
            Mechanism::External => format!("{uri}, vhost '{}'", uri.vhost),
        };
        let operation = format!("log in to {login}");
        let local = |error: io::Error| Error::unavailable(format!("{operation}: {error}"));
        let watchdog = Watchdog::new(socket.try_clone().map_err(local)?)
            .map_err(|error| Error::no_thread(&operation, &error))?;
        let heartbeat = Duration::from_secs(uri.heartbeat.into());
        let name = connection_name(program);
        let tls = match &uri.tls {
            Some(settings) => Some(encrypt(uri, settings, &socket, &watchdog, deadline)?),
            None => None,
        };
        let stream = Stream::new(socket, tls, heartbeat, name).map_err(local)?;
        let (backlog, last_received, ending) =
            (stream.backlog(), stream.last_received(), stream.ending());
        let opened = watchdog.within(deadline, || {
            let mut amqp = open_stream(stream, uri)?;
            let channel = amqp.open_channel(None)?;
            Ok((amqp, channel))
        });
        let (amqp, channel) = match (opened, ending.get()) {
            (Ok(Ok(opened)), _) => opened,
            (Ok(Err(_)), Some(Reason::Closed(close))) => {
                return Err(Error::reply(operation, close.code, &close.text));
            }
            (Ok(Err(_)), Some(Reason::Fault(fault))) => {
                return Err(Error::new(ErrorKind::Protocol, format!("{operation}: {fault}")));
            }
            (Ok(Err(_)), Some(Reason::Tls(failure))) => {
                return Err(Error::new(failure.kind(), format!("{operation}: {failure}")));
            }
            (Ok(Err(E::UnexpectedSocketClose | E::IoErrorReadingSocket { .. })), None)
                if backlog.is_empty() =>
            {
                return Err(Error::unavailable(format!("{operation}: {UNANSWERED}")));
            }
            (Ok(Err(error)), None) => return Err(Error::from_amiquip(operation, error)),
            (Err(Expired), _) => {
                let text = format!("{operation}: no answer within the connection timeout");
                return Err(Error::unavailable(text));
            }
        };
        log::info!("connected to {login}, {}", product(&amqp));
        let (amqp, peer, limit) = (Some(amqp), uri.to_string(), uri.connection_timeout);
        let link = Link { watchdog, amqp, peer, backlog, last_received, ending, limit };
        Ok((link, channel))
    }

    /// Opens another channel.
    ///
    /// # Errors
    ///
    /// A lost connection, and no answer within the connection timeout.
    pub fn open_channel(&mut self) -> Result<Channel, Error> {
        let operation = "open a channel";
        let deadline = Instant::now() + self.limit;
        let opened = self.watchdog.within(deadline, || match &mut self.amqp {
            Some(amqp) => amqp.open_channel(None),
            None => Err(amiquip::Error::ClientClosedConnection),
        });
        opened.map_err(|Expired| no_answer(operation, self.limit))?.during(operation)
    }

    /// Host and port, as in messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Counts what the broker sends. A program has to keep it up to date as it takes that.
    pub fn backlog(&self) -> &Backlog {
        &self.backlog
    }

    /// When something came from the broker, be it the end of the connection.
    pub fn last_received(&self) -> Instant {
        self.last_received.get()
    }

    /// Calls `work`, which asks the broker something, and cuts the connection if no answer comes
    /// within the connection timeout.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] when the time is up.
    pub fn call<T>(&self, operation: impl Display, work: impl FnOnce() -> T) -> Result<T, Error> {
        self.call_within(self.limit, operation, work)
    }

    /// The same with another limit.
    ///
    /// # Errors
    ///
    /// As for [`call`](Link::call).
    pub fn call_within<T>(
        &self,
        limit: Duration,
        operation: impl Display,
        work: impl FnOnce() -> T,
    ) -> Result<T, Error> {
        // What is delivered and not taken must not keep the answer from being read.
        self.backlog.all_taken();
        match Instant::now().checked_add(limit) {
            None => Ok(work()),
            Some(deadline) => {
                let answered = self.watchdog.within(deadline, work);
                answered.map_err(|Expired| {
                    let peer = &self.peer;
                    no_answer(format!("{operation} at {peer}"), limit)
                })
            }
        }
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
        limit: Duration,
        operation: impl Display,
    ) -> Result<amiquip::Result<()>, Error> {
        // The prefetch count is that of consumers to come.
        self.call_within(limit, operation, || channel.qos(0, 0, false))
    }

    /// Notices of a broker that stops taking messages, and takes them again.
    ///
    /// # Errors
    ///
    /// A lost connection.
    pub fn listen_for_blocked(
        &mut self,
    ) -> amiquip::Result<Receiver<ConnectionBlockedNotification>> {
        match &mut self.amqp {
            Some(amqp) => amqp.listen_for_connection_blocked(),
            None => Err(amiquip::Error::ClientClosedConnection),
        }
    }

    /// How the broker has closed the connection or a channel on it, if it has. What it says after
    /// that does not count: amiquip may answer in the middle of a message that it sends, which
    /// RabbitMQ takes for a breach of the protocol.
    pub fn closed(&self) -> Option<&Close> {
        match self.ending.get() {
            Some(Reason::Closed(close)) => Some(close),
            _ => None,
        }
    }

    /// Closes the connection, within a second.
    ///
    /// # Errors
    ///
    /// The reason why the connection was lost, if it was: amiquip tells it nowhere else.
    pub fn close(&mut self) -> Result<(), Error> {
        self.close_by(Instant::now() + CLOSE_LIMIT)
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
        // As in `call_within`.
        self.backlog.all_taken();
        let operation = format!("connection to {}", self.peer);
        let limit = time_left(deadline);
        match self.watchdog.within(deadline, || amqp.close()) {
            Ok(outcome) => {
                log::debug!("{operation}: closed");
                outcome.during(operation)
            }
            Err(Expired) => Err(no_answer(format!("close the {operation}"), limit)),
        }
    }

    /// An error that the broker has replied with, or else why the connection is lost.
    pub(crate) fn why(&mut self, error: Error) -> Error {
        match error.is_reply() {
            true => error,
            false => self.end(),
        }
    }

    /// Closes a connection that seems to be lost, and returns the reason.
    pub fn end(&mut self) -> Error {
        match self.close() {
            Err(reason) => reason,
            Ok(()) => Error::unavailable(format!("connection to {}: lost", self.peer)),
        }
    }
}

/// The time left until a deadline that may have passed.
pub(crate) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn no_answer(operation: impl Display, limit: Duration) -> Error {
    Error::unavailable(format!("{operation}: no answer within {limit:?}"))
}

/// The deadline for the next of `parts` things that have to be done by `deadline`.
fn share(deadline: Instant, parts: usize) -> Instant {
    Instant::now() + time_left(deadline) / parts.max(1) as u32
}

/// The time left; never zero, which some calls take for "for ever".
fn time_left(deadline: Instant) -> Duration {
    left(deadline).max(Duration::from_millis(1))
}

/// Connects; not to itself, as it may come about where nobody listens on a port from the range of
/// those that the system gives to clients.
fn connect(address: &SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let socket = TcpStream::connect_timeout(address, limit)?;
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
    Err(Error::unavailable(format!("{operation}: {reason}")))
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
            Err(Error::unavailable(format!("{operation}: {text}")))
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
    Error::unavailable(format!("connect to {uri}{through}: {reason}"))
}

/// Logs in. Where the system has no thread for amiquip's timer, mio-extras panics.
fn open_stream(stream: Stream, uri: &Uri) -> amiquip::Result<amiquip::Connection> {
    let open = || amiquip::Connection::insecure_open_stream(stream, options(uri), tuning());
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
        .frame_max(FRAME_MAX)
}

/// What the broker says that it is, such as `RabbitMQ 3.10.8`.
fn product(amqp: &amiquip::Connection) -> String {
    let properties = amqp.server_properties();
    let texts = ["product", "version"].iter().filter_map(|name| match properties.get(*name) {
        Some(AmqpValue::LongString(text)) => Some(text.as_str()),
        _ => None,
    });
    texts.collect::<Vec<_>>().join(" ")
}

/// amiquip's I/O thread is woken whenever its queue was empty; with a queue as short as the
/// default (16) that is for nearly every message.
fn tuning() -> ConnectionTuning {
    ConnectionTuning::default().mem_channel_bound(256)
}

/// `emit-log 0.1.0 (host:pid)`
fn connection_name(program: &str) -> String {
    let system = rustix::system::uname();
    let host = system.nodename().to_string_lossy();
    format!("{program} {} ({host}:{})", env!("CARGO_PKG_VERSION"), process::id())
}
