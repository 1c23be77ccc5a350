//! The byte stream given to amiquip.
//!
//! amiquip would open a socket by itself, but then without TCP_NODELAY (a one-message run takes
//! ten times as long) and with a system call for every 4 KiB received.

use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mio::event::Evented;
use mio::{Poll, PollOpt, Ready, Token};
use rustls::ClientConnection;
use socket2::{SockRef, TcpKeepalive};

use crate::error::Error;

pub(crate) mod backlog;
pub(crate) mod coalescer;
pub(crate) mod frame_filter;
mod start_ok;
pub(crate) mod tls;

use backlog::Backlog;
pub use coalescer::Coalescer;
use frame_filter::{Close, FRAME_MAX, Fault, FrameFilter};
use start_ok::extend_start_ok;
use tls::TlsStream;

/// Bytes asked of the kernel at a time, at most.
const READ_BUFFER: usize = 64 * 1024;

/// Silence after which the kernel asks whether the peer is still there.
const IDLE: Duration = Duration::from_secs(30);

/// While the backlog is large, how long to leave it to the program before the next read.
const MOMENT: Duration = Duration::from_millis(2);

/// How long it takes at most to read what a socket holds.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Why the connection, or the channel on it, came to its end: the first reason, once there is one.
/// amiquip has no words for some, and loses others.
pub type Ending = Arc<OnceLock<Reason>>;

/// What the broker said, or what is wrong with it.
#[derive(Debug)]
pub enum Reason {
    /// It has closed the connection or a channel.
    Closed(Close),
    /// It is none, or a broken one.
    Fault(Fault),
    /// TLS went wrong after the handshake.
    Tls(Error),
}

/// The socket, encrypted or not.
enum Socket {
    Tcp(mio::net::TcpStream),
    Tls(TlsStream),
}

impl Socket {
    fn tcp(&self) -> &mio::net::TcpStream {
        match self {
            Socket::Tcp(socket) => socket,
            Socket::Tls(stream) => &stream.socket,
        }
    }

    fn has_more(&self) -> bool {
        matches!(self, Socket::Tls(stream) if stream.has_more())
    }
}

impl Read for Socket {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => socket.read(out),
            Socket::Tls(stream) => stream.read(out),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(socket) => socket.write(bytes),
            Socket::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Socket::Tcp(socket) => socket.flush(),
            Socket::Tls(stream) => stream.flush(),
        }
    }
}

/// A buffered, non-blocking TCP stream, whose reader gets only what the filter lets through.
pub struct Stream {
    socket: Socket,
    filter: FrameFilter,
    buffer: Vec<u8>,
    /// What of `buffer` may be read is from `start` to `checked`; up to `end` it is filled.
    start: usize,
    checked: usize,
    end: usize,
    /// Nothing was left to be read.
    is_empty: bool,
    /// Less came than was asked for: another read would find nothing, and cost a system call.
    is_drained: bool,
    coalescer: Coalescer,
    backlog: Arc<Backlog>,
    last_received: LastReceived,
    ending: Ending,
    /// The name of the connection, until the broker has been told.
    name: Option<String>,
}

/// When the peer gave a sign of life. Shared by its clones.
#[derive(Clone, Debug)]
pub struct LastReceived(Arc<Mutex<SignsOfLife>>);

#[derive(Debug)]
struct SignsOfLife {
    /// The time between two of them, or zero if none are agreed on.
    heartbeat: Duration,
    last: Instant,
    /// The latest silence that was longer than that: when it began, and when it ended.
    silence: Option<(Instant, Instant)>,
}

impl LastReceived {
    fn now(heartbeat: Duration) -> LastReceived {
        LastReceived(Arc::new(Mutex::new(SignsOfLife {
            heartbeat,
            last: Instant::now(),
            silence: None,
        })))
    }

    fn set(&self) {
        let (mut signs, now) = (self.lock(), Instant::now());
        if !signs.heartbeat.is_zero() && now - signs.last > signs.heartbeat {
            signs.silence = Some((signs.last, now));
        }
        signs.last = now;
    }

    /// The time. A process that was stopped finds in its socket what came meanwhile, and then the
    /// end: where the last sign follows a long silence at once, the time before that counts.
    pub fn get(&self) -> Instant {
        let signs = self.lock();
        match signs.silence {
            Some((began, ended)) if signs.last - ended < AT_ONCE => began,
            _ => signs.last,
        }
    }

    fn lock(&self) -> MutexGuard<'_, SignsOfLife> {
        // Whoever panicked has not left half a time behind.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream {
    /// Takes over a connected socket, with the TLS session on it, if any. `heartbeat` is the time
    /// between two signs of life of the peer that amiquip watches for, or zero if it does not.
    ///
    /// # Errors
    ///
    /// When the kernel refuses one of the socket options.
    pub fn new(
        socket: TcpStream,
        tls: Option<ClientConnection>,
        heartbeat: Duration,
        name: String,
    ) -> io::Result<Stream> {
        socket.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new().with_time(IDLE).with_interval(IDLE / 3);
        SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
        // Keep-alive does not help while sent data is unacknowledged, which the kernel would
        // tolerate for a quarter of an hour; heartbeats do. Where there are heartbeats, this
        // option would only cut the connection to a broker that takes no messages for a while.
        #[cfg(target_os = "linux")]
        if heartbeat.is_zero() {
            SockRef::from(&socket).set_tcp_user_timeout(Some(2 * IDLE))?;
        }
        let socket = mio::net::TcpStream::from_stream(socket)?;
        Ok(Stream {
            socket: match tls {
                None => Socket::Tcp(socket),
                Some(session) => Socket::Tls(TlsStream::new(session, socket)),
            },
            filter: FrameFilter::default(),
            buffer: vec![0; READ_BUFFER],
            start: 0,
            checked: 0,
            end: 0,
            is_empty: false,
            is_drained: false,
            coalescer: Coalescer::new(),
            backlog: Arc::default(),
            last_received: LastReceived::now(heartbeat),
            ending: Ending::default(),
            name: Some(name),
        })
    }

    /// Where the reason of the end is noted.
    pub fn ending(&self) -> Ending {
        Arc::clone(&self.ending)
    }

    /// Counts what is read.
    pub fn backlog(&self) -> Arc<Backlog> {
        Arc::clone(&self.backlog)
    }

    /// Notes when something is read.
    pub fn last_received(&self) -> LastReceived {
        self.last_received.clone()
    }

    /// Reads what the socket has, unless the backlog is full. Returns how much that is: nothing at
    /// the end of the stream.
    fn fill(&mut self) -> io::Result<usize> {
        // What is not in the kernel any more would not be reported again.
        if self.backlog.is_large() && !self.socket.has_more() {
            thread::sleep(MOMENT);
            if self.backlog.is_full() {
                return Err(ErrorKind::WouldBlock.into());
            }
        }
        // What is left begins a frame that is longer than what has come of it.
        self.buffer.copy_within(self.checked..self.end, 0);
        (self.start, self.checked, self.end) = (0, 0, self.end - self.checked);
        if self.end == self.buffer.len() {
            self.buffer.resize(FRAME_MAX as usize, 0);
        }
        if mem::take(&mut self.is_empty) {
            // By now there is something again.
            self.coalescer.pause();
        }
        let read = self.read_socket();
        self.is_empty = is_would_block(&read);
        if !self.is_empty {
            self.last_received.set();
        }
        if let Err(error) = &read
            && let Some(failure) = tls::failure_of(error)
        {
            self.ends(Reason::Tls(failure));
        }
        let read = read?;
        self.end += read;
        self.backlog.add(read);
        Ok(read)
    }

    fn read_socket(&mut self) -> io::Result<usize> {
        if mem::take(&mut self.is_drained) {
            return Err(ErrorKind::WouldBlock.into());
        }
        let out = &mut self.buffer[self.end..];
        let read = self.socket.read(out)?;
        // A session of TLS may hold more.
        let is_tcp = matches!(self.socket, Socket::Tcp(_));
        self.is_drained = is_tcp && read > 0 && read < out.len();
        Ok(read)
    }

    fn check(&mut self) -> Result<(), Fault> {
        let sanitized = self.filter.sanitized;
        let checked = self.filter.check(&mut self.buffer[..self.end]);
        if sanitized == 0 && self.filter.sanitized > 0 {
            log::warn!("a message has properties that cannot be read; they are left out");
        }
        if let Some(close) = self.filter.closed.take() {
            self.ends(Reason::Closed(close));
        }
        self.checked = checked?;
        Ok(())
    }

    fn ends(&self, reason: Reason) {
        // Only the first reason counts, and only that can be set.
        let _ = self.ending.set(reason);
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.start == self.checked {
            let read = self.fill();
            let checked = match &read {
                Err(error) if is_passing(error) => return read,
                // Whether it is closed or reset, no more is to come.
                Ok(0) | Err(_) => self.filter.end(&self.buffer[..self.end]),
                Ok(_) => self.check(),
            };
            if let Err(fault) = checked {
                let error = io::Error::other(fault.to_string());
                self.ends(Reason::Fault(fault));
                return Err(error);
            }
            if read? == 0 {
                return Ok(0);
            }
        }
        let length = out.len().min(self.checked - self.start);
        out[..length].copy_from_slice(&self.buffer[self.start..self.start + length]);
        self.start += length;
        Ok(length)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(name) = &self.name
            && let Some(extended) = extend_start_ok(bytes, name)
        {
            self.name = None;
            // A few hundred bytes into an empty send buffer: the kernel takes them whole.
            return self.socket.write_all(&extended).map(|()| bytes.len());
        }
        match self.socket.write(bytes) {
            Err(error) if !is_passing(&error) => {
                // amiquip would give up at once, and with it what the peer sent before it went.
                // The end of that tells it soon enough.
                log::debug!("write: {error}");
                let _ = self.socket.tcp().shutdown(Shutdown::Write);
                Ok(bytes.len())
            }
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn is_would_block(read: &io::Result<usize>) -> bool {
    read.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

/// Level-triggered whatever amiquip asks for: what is left unread must be reported again.
impl Evented for Stream {
    fn register(&self, poll: &Poll, token: Token, ready: Ready, _: PollOpt) -> io::Result<()> {
        self.socket.tcp().register(poll, token, ready, PollOpt::level())
    }

    fn reregister(&self, poll: &Poll, token: Token, ready: Ready, _: PollOpt) -> io::Result<()> {
        self.socket.tcp().reregister(poll, token, ready, PollOpt::level())
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        self.socket.tcp().deregister(poll)
    }
}

impl amiquip::IoStream for Stream {}
