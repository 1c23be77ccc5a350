//! The login. amiquip authenticates and tunes the connection on a socket that it is lent; then the socket is
//! taken back for good, and amiquip's threads end.
//!
//! amiquip waits for each answer. So the login ends before its last answer: as soon as amiquip has written
//! `connection.open`, whose answer is left to the [connection](crate::connection). The next requests need
//! no round trip of their own then.

use std::io::{self, ErrorKind as Io, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::process;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{Auth, Connection, ConnectionOptions, ConnectionTuning, Error as AmiquipError};
use mio::event::Evented;
use mio::unix::EventedFd;
use mio::{Poll, PollOpt, Ready, Token};
use rustix::io::Errno;

use crate::Table;
use crate::ending::Ending;
use crate::error::{Error, ErrorKind};
use crate::frame::{
    FRAME_MAX, Fault, Frame, FrameReader, HEADER, METHOD, MethodId, SMALLEST_FRAME_MAX, START,
    push_frame,
};
use crate::lock::lock;
use crate::method::{self, OPEN, START_OK, TUNE, TUNE_OK};
use crate::properties::{number, read_table, take, take_long};
use crate::socket::Socket;
use crate::start_ok::extend_start_ok;
use crate::uri::{Mechanism, Uri};
use crate::within::Within;

/// The threads of a login: that of this module, and the one that amiquip starts.
const THREADS: [&str; 2] = ["login", "amiquip-io"];

/// The likely reasons of a peer that closes the connection without a byte: RabbitMQ itself always
/// answers, at least with its version of the protocol, unless it goes down at that moment.
const UNANSWERED: &str = "closed without an answer; the port may be another service's, or want TLS: \
                          amqp:// has 5672 by default, amqps:// 5671";

/// A socket on which the login has been sent.
pub(crate) struct LoggedIn {
    pub socket: Socket,
    /// What the broker has sent behind the last frame for amiquip.
    pub frames: FrameReader,
    /// The last frames of the login, which are to be sent first.
    pub unsent: Vec<u8>,
    /// How the broker has introduced itself.
    pub server_properties: Table,
    /// The shortest time that an answer of the login has taken.
    pub round_trip: Duration,
    pub tuning: Tuning,
    pub reserve: Reserve,
}

/// As many file descriptors as amiquip takes for a login besides the socket. A connection has them until it is
/// dropped, so that a process without any left can still replace a lost connection.
pub(crate) struct Reserve {
    _pipes: [io::Result<(PipeReader, PipeWriter)>; 2],
}

impl Reserve {
    fn new() -> Reserve {
        Reserve { _pipes: [io::pipe(), io::pipe()] }
    }
}

/// What both sides have agreed on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tuning {
    /// The highest number of a channel.
    pub channel_max: u16,
    /// The largest payload of a frame that the broker takes, in bytes.
    pub max_payload: usize,
    /// The time between two signs of life, or zero.
    pub heartbeat: Duration,
}

/// Logs in on a connected socket, by the `deadline`.
///
/// # Errors
///
/// A refused login, a peer that is no AMQP 0-9-1 broker, a lost connection, no answer in time.
pub(crate) fn log_in(
    uri: &Uri,
    socket: Socket,
    program: &str,
    operation: &str,
    deadline: Instant,
) -> Result<LoggedIn, Error> {
    let (descriptor, session) =
        (socket.as_fd().as_raw_fd(), Session::new(socket, program, deadline));
    let session = Arc::new(Mutex::new(session));
    let lent = Lent { session: Arc::clone(&session), descriptor };
    let open = || {
        Connection::insecure_open_stream(lent, options(uri), ConnectionTuning::default()).map(drop)
    };
    let (sender, outcome) = mpsc::channel();
    let opened = thread::scope(|scope| {
        let thread = thread::Builder::new().name(THREADS[0].into());
        let thread = thread.spawn_scoped(scope, move || drop(sender.send(open())));
        let thread = thread.map_err(|error| Error::no_thread(operation, &error))?;
        let left = deadline.saturating_duration_since(Instant::now());
        let opened = match outcome.recv_timeout(left) {
            Err(mpsc::RecvTimeoutError::Timeout) => {
                lock(&session).socket.end();
                None
            }
            // mio-extras panics where the system has no thread for amiquip's timer.
            outcome => Some(
                outcome.unwrap_or(Err(AmiquipError::ForkFailed { source: Errno::AGAIN.into() })),
            ),
        };
        let _ = thread.join();
        Ok(opened)
    })?;
    let session = Arc::into_inner(session)
        .ok_or_else(|| Error::unavailable(format!("{operation}: amiquip keeps the socket")))?
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let Some(outcome) = opened else {
        return Err(no_login(operation));
    };
    let failure = match session.state {
        State::Opened(tuning) => {
            return Ok(LoggedIn {
                socket: session.socket,
                frames: session.frames,
                unsent: session.unsent,
                server_properties: session.server_properties,
                round_trip: session.round_trip.unwrap_or_default(),
                tuning,
                reserve: Reserve::new(),
            });
        }
        State::Failed(Ending::Closed(close)) => {
            Some(Error::reply(operation, close.code, &close.text))
        }
        State::Failed(ending) => ending.failure_of_login(operation),
        State::Starting | State::Tuned => None,
    };
    use AmiquipError as E;
    Err(match (failure, outcome) {
        (Some(failure), _) => failure,
        (None, Err(E::UnexpectedSocketClose | E::IoErrorReadingSocket { .. }))
            if !session.has_received =>
        {
            Error::unreachable(format!("{operation}: {UNANSWERED}"))
        }
        (None, Err(error)) => from_amiquip(operation, error),
        // amiquip has got no answer to `connection.open`.
        (None, Ok(())) => Error::unavailable(format!("{operation}: connection lost")),
    })
}

/// The error of a broker that does not answer to the login.
pub(crate) fn no_login(operation: &str) -> Error {
    Error::unreachable(format!("{operation}: no answer within the connection timeout"))
}

/// Whether a panic of this thread becomes an error, so that the panic hook need not report it.
pub fn is_expected_panic() -> bool {
    thread::current().name().is_some_and(|name| THREADS.contains(&name))
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

/// `emit-log 0.2.0 (host:pid)`
fn connection_name(program: &str) -> String {
    let system = rustix::system::uname();
    let host = system.nodename().to_string_lossy();
    format!("{program} {} ({host}:{})", env!("CARGO_PKG_VERSION"), process::id())
}

/// An error of amiquip during the login.
fn from_amiquip(operation: &str, error: AmiquipError) -> Error {
    use AmiquipError as E;
    let (kind, text) = match error {
        E::ForkFailed { source } => return Error::no_thread(operation, &source),
        E::MalformedFrame | E::FrameUnexpected => {
            (ErrorKind::Protocol, format!("the peer does not speak AMQP 0-9-1 ({error})"))
        }
        E::UnsupportedAuthMechanism { available, requested } => {
            let remedy = mechanism_remedy(&available, &requested);
            let text = format!("the broker offers {available}, not {requested} ({remedy})");
            (ErrorKind::Permission, text)
        }
        // A guess of amiquip: RabbitMQ refuses a login in words.
        E::InvalidCredentials => (
            ErrorKind::Unavailable,
            "connection closed without a word (if it stays so, check user and password)".into(),
        ),
        E::FrameMaxTooSmall { .. } | E::UnsupportedLocale { .. } => {
            (ErrorKind::Protocol, error.to_string())
        }
        E::CreatePollHandle { .. } | E::RegisterWithPollHandle { .. } => {
            (ErrorKind::Unavailable, error.to_string())
        }
        // All others mean that the connection is gone.
        _ => (ErrorKind::Unavailable, format!("connection lost ({error})")),
    };
    Error::new(kind, format!("{operation}: {text}"))
}

/// What to do where the broker offers other mechanisms of login than the requested one.
fn mechanism_remedy(available: &str, requested: &str) -> &'static str {
    match requested {
        "EXTERNAL" => {
            "enable its plugin rabbitmq_auth_mechanism_ssl, and list EXTERNAL in its auth_mechanisms"
        }
        _ if available.split(' ').any(|name| name == "EXTERNAL") => {
            "?auth_mechanism=external in the URI logs in by the client's certificate"
        }
        _ => "list PLAIN in its auth_mechanisms",
    }
}

/// The login on one socket, as far as amiquip's frames show it.
struct Session {
    socket: Socket,
    deadline: Instant,
    frames: FrameReader,
    /// Bytes that amiquip may read.
    for_amiquip: Vec<u8>,
    unsent: Vec<u8>,
    state: State,
    connection_name: String,
    server_properties: Table,
    /// Whether the peer has sent anything.
    has_received: bool,
    /// When the last request was sent, until its answer arrives.
    sent_at: Option<Instant>,
    round_trip: Option<Duration>,
}

enum State {
    /// The broker is to introduce itself, and to ask for a tuning.
    Starting,
    /// amiquip has the last frame that it needs.
    Tuned,
    /// amiquip has written `connection.open`.
    Opened(Tuning),
    /// The peer has ended the login.
    Failed(Ending),
}

impl Session {
    fn new(socket: Socket, program: &str, deadline: Instant) -> Session {
        Session {
            socket,
            deadline,
            frames: FrameReader::new(),
            for_amiquip: Vec::new(),
            unsent: Vec::new(),
            state: State::Starting,
            connection_name: connection_name(program),
            server_properties: Table::new(),
            has_received: false,
            sent_at: None,
            round_trip: None,
        }
    }

    /// Reads bytes for amiquip.
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.for_amiquip.is_empty() {
            if !matches!(self.state, State::Starting) {
                return Err(Io::WouldBlock.into());
            }
            match self.take_frame() {
                Ok(true) => {}
                Ok(false) => match self.receive() {
                    Ok(1..) => {}
                    end => return end,
                },
                Err(fault) => {
                    let error = io::Error::other(fault.to_string());
                    self.state = State::Failed(Ending::Fault(fault));
                    return Err(error);
                }
            }
        }
        let length = out.len().min(self.for_amiquip.len());
        out[..length].copy_from_slice(&self.for_amiquip[..length]);
        self.for_amiquip.drain(..length);
        Ok(length)
    }

    /// Reads from the socket once.
    fn receive(&mut self) -> io::Result<usize> {
        let read = self.socket.read(self.frames.room());
        match &read {
            Err(error) if matches!(error.kind(), Io::WouldBlock | Io::Interrupted) => return read,
            Ok(length @ 1..) => {
                self.frames.add(*length);
                self.has_received = true;
            }
            Ok(_) => self.end_with(Ending::end_of_stream()),
            Err(error) => self.end_with(Ending::unreadable(error)),
        }
        if let Some(sent_at) = self.sent_at.take() {
            let taken = sent_at.elapsed();
            self.round_trip = Some(self.round_trip.map_or(taken, |least| least.min(taken)));
        }
        read
    }

    /// The last bytes of a peer may show that it is no broker.
    fn end_with(&mut self, ending: Ending) {
        let fault = self.frames.finish().err().map(Ending::Fault);
        self.state = State::Failed(fault.unwrap_or(ending));
    }

    /// Passes the next frame on to amiquip; returns whether there was one.
    fn take_frame(&mut self) -> Result<bool, Fault> {
        let (channel, id, arguments) = match self.frames.next()? {
            None => return Ok(false),
            Some(Frame::Heartbeat) => return Ok(true),
            Some(Frame::Method { channel, id, arguments }) => (channel, id, arguments),
            Some(_) => return Err(Fault::Frame("a message before the login".into())),
        };
        let unsound = || Fault::Frame(format!("method {}.{}", id[1], id[3]));
        let mut arguments = arguments.to_vec();
        match id {
            START => {
                let table = read_start(&arguments).ok_or_else(unsound)?;
                self.server_properties = table;
            }
            TUNE => {
                suggest_heartbeats(&mut arguments).ok_or_else(unsound)?;
                self.state = State::Tuned;
            }
            _ => match method::read(id, &arguments)? {
                method::Method::Close(close) => self.state = State::Failed(Ending::Closed(close)),
                _ => return Err(unsound()),
            },
        }
        push_frame(&mut self.for_amiquip, METHOD, channel, &[&id, &arguments]);
        Ok(true)
    }

    /// Sends the bytes of amiquip, which are whole frames, with additions to `connection.start-ok`. Those from
    /// `connection.tune-ok` on are kept to be sent with the next requests.
    fn write(&mut self, frames: &[u8]) -> io::Result<()> {
        let mut out = Vec::new();
        let mut rest = frames;
        // The protocol header is no frame, and is left as it is.
        while let Some(&[METHOD, _, _, ref size @ ..]) = rest.first_chunk::<HEADER>()
            && let Some((frame, after)) =
                rest.split_at_checked(HEADER + u32::from_be_bytes(*size) as usize + 1)
        {
            rest = after;
            match frame[HEADER..].first_chunk() {
                Some(&START_OK) => {
                    let extended = extend_start_ok(frame, &self.connection_name);
                    out.extend(extended.unwrap_or_else(|| frame.to_vec()));
                }
                Some(id) if matches!(*id, TUNE_OK | OPEN) => {
                    self.unsent.extend_from_slice(frame);
                    if *id == OPEN {
                        self.state = State::Opened(read_tune_ok(&self.unsent).unwrap_or(UNTUNED));
                        // amiquip ends by this error.
                        return Err(Io::BrokenPipe.into());
                    }
                }
                _ => out.extend_from_slice(frame),
            }
        }
        out.extend_from_slice(rest);
        if !out.is_empty() {
            self.sent_at = Some(Instant::now());
            if let Err(error) = Within::new(&mut self.socket, self.deadline).write_all(&out) {
                // The peer may have sent a reason, which is still to be read. The end of the stream follows it.
                log::debug!("write: {error}");
                self.socket.end_writing();
            }
        }
        Ok(())
    }
}

/// The properties of the server, which follow the version; `None` if they are not sound, as amiquip would fail on
/// them.
fn read_start(mut arguments: &[u8]) -> Option<Table> {
    take(&mut arguments, 2)?;
    let table = read_table(take_long(&mut arguments)?);
    (!table.is_repaired).then_some(table.value)
}

/// Suggests heartbeats for a broker that does not: amiquip then asks for those of the URI, and the
/// broker sends them.
fn suggest_heartbeats(arguments: &mut [u8]) -> Option<()> {
    // Channels, frame size, heartbeat in seconds.
    let heartbeat = arguments.get_mut(6..8)?;
    if heartbeat == [0, 0] {
        heartbeat.fill(0xff);
    }
    Some(())
}

const UNTUNED: Tuning = Tuning {
    channel_max: u16::MAX,
    max_payload: SMALLEST_FRAME_MAX as usize - HEADER - 1,
    heartbeat: Duration::ZERO,
};

/// The tuning in a frame of `connection.tune-ok`.
fn read_tune_ok(frame: &[u8]) -> Option<Tuning> {
    let mut arguments = frame.get(HEADER + size_of::<MethodId>()..)?;
    let bytes = &mut arguments;
    let channel_max = u16::from_be_bytes(number(bytes)?);
    // Zero means no limit.
    let frame_max = match u32::from_be_bytes(number(bytes)?) {
        0 => FRAME_MAX,
        limit => limit.clamp(SMALLEST_FRAME_MAX, FRAME_MAX),
    };
    let seconds = u16::from_be_bytes(number(bytes)?);
    Some(Tuning {
        channel_max: if channel_max == 0 { u16::MAX } else { channel_max },
        max_payload: frame_max as usize - HEADER - 1,
        heartbeat: Duration::from_secs(seconds.into()),
    })
}

/// The socket as amiquip sees it.
struct Lent {
    session: Arc<Mutex<Session>>,
    descriptor: RawFd,
}

impl Read for Lent {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        lock(&self.session).read(out)
    }
}

impl Write for Lent {
    fn write(&mut self, frames: &[u8]) -> io::Result<usize> {
        lock(&self.session).write(frames).map(|()| frames.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Evented for Lent {
    fn register(&self, poll: &Poll, token: Token, ready: Ready, opts: PollOpt) -> io::Result<()> {
        EventedFd(&self.descriptor).register(poll, token, ready, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, ready: Ready, opts: PollOpt) -> io::Result<()> {
        EventedFd(&self.descriptor).reregister(poll, token, ready, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        EventedFd(&self.descriptor).deregister(poll)
    }
}

impl amiquip::IoStream for Lent {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_are_suggested_for_a_broker_that_does_not() {
        let tuned = |heartbeat: [u8; 2]| {
            let mut arguments = [&[0, 0, 0, 2, 0, 0], &heartbeat[..]].concat();
            suggest_heartbeats(&mut arguments).unwrap();
            [arguments[6], arguments[7]]
        };
        assert_eq!(tuned([0, 60]), [0, 60]);
        assert_eq!(tuned([0, 0]), [0xff, 0xff]);
        assert_eq!(suggest_heartbeats(&mut [0; 7]), None);
    }

    #[test]
    fn properties_that_would_break_the_parser_are_refused() {
        let nested = (1..10_000).fold(vec![0; 4], |inner, _| {
            let entry = [&b"\x01kF"[..], &inner].concat();
            [&(entry.len() as u32).to_be_bytes(), &entry[..]].concat()
        });
        assert!(read_start(&[&[0, 9], &nested[..]].concat()).is_none());
        assert!(read_start(&[0, 9, 0, 0, 0, 0]).is_some());
    }

    #[test]
    fn the_tuning_is_read() {
        let mut frame = Vec::new();
        push_frame(&mut frame, METHOD, 0, &[&TUNE_OK, &[0, 0, 0, 0, 0, 0, 0, 9]]);
        let tuning = read_tune_ok(&frame).unwrap();
        assert_eq!(tuning.channel_max, u16::MAX);
        assert_eq!(tuning.max_payload, FRAME_MAX as usize - HEADER - 1);
        assert_eq!(tuning.heartbeat, Duration::from_secs(9));
        assert!(read_tune_ok(&frame[..HEADER + 7]).is_none());
    }

    #[test]
    fn an_error_of_amiquip_has_a_kind() {
        use AmiquipError as E;
        use ErrorKind as K;
        for (error, kind, text) in [
            (E::MalformedFrame, K::Protocol, "does not speak AMQP"),
            (E::InvalidCredentials, K::Unavailable, "without a word"),
            (E::FrameMaxTooSmall { min: 2, requested: 1 }, K::Protocol, "1"),
            (
                E::UnsupportedAuthMechanism {
                    available: "AMQPLAIN".into(),
                    requested: "PLAIN".into(),
                },
                K::Permission,
                "the broker offers AMQPLAIN, not PLAIN (list PLAIN",
            ),
            (
                E::ForkFailed { source: io::ErrorKind::WouldBlock.into() },
                K::Unavailable,
                "cannot start a thread",
            ),
            (
                E::CreatePollHandle { source: io::ErrorKind::OutOfMemory.into() },
                K::Unavailable,
                "memory",
            ),
            (E::UnexpectedSocketClose, K::Unavailable, "connection lost"),
        ] {
            let error = from_amiquip("try", error);
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().starts_with("try: "), "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
