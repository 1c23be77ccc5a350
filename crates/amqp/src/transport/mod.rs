//! The byte stream given to amiquip.
//!
//! amiquip would open a socket by itself, but then without TCP_NODELAY (a one-message run takes
//! ten times as long) and with a system call for every 4 KiB received.

use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use mio::event::Evented;
use mio::{Poll, PollOpt, Ready, Token};
use rustls::ClientConnection;
use socket2::{SockRef, TcpKeepalive};

pub(crate) mod backlog;
pub(crate) mod buffer;
pub(crate) mod coalescer;
pub(crate) mod frame_filter;
pub(crate) mod observed;
pub(crate) mod start_ok;
pub(crate) mod tls;

use buffer::Buffer;
use coalescer::Coalescer;
use observed::{Observed, Reason};
use start_ok::extend_start_ok;
use tls::TlsStream;

/// Silence after which the kernel asks whether the peer is still there.
const IDLE: Duration = Duration::from_secs(30);

/// While the backlog is large, how long the program has to take deliveries before the next read.
const MOMENT: Duration = Duration::from_millis(2);

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

    /// Whether bytes of the peer have left the kernel, which would not report them again.
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

/// A buffered, non-blocking stream, whose reader gets only the bytes that the filter lets through.
pub struct Stream {
    socket: Socket,
    buffer: Buffer,
    /// The last read found the socket empty.
    is_empty: bool,
    /// The last read got less than asked for: another would find the socket empty, at the price of a
    /// system call.
    is_drained: bool,
    coalescer: Coalescer,
    observed: Arc<Observed>,
    /// The name of the connection, until the broker has been told.
    name: Option<String>,
}

impl Stream {
    /// Takes over a connected socket, with the TLS session on it, if any. `heartbeat` is the time
    /// between two signs of life of the peer that amiquip watches for, or zero if there are none.
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
            buffer: Buffer::new(),
            is_empty: false,
            is_drained: false,
            coalescer: Coalescer::new(),
            observed: Arc::new(Observed::new(heartbeat)),
            name: Some(name),
        })
    }

    /// Facts about the stream, for as long as amiquip has it.
    pub fn observed(&self) -> Arc<Observed> {
        Arc::clone(&self.observed)
    }

    /// Reads from the socket, unless the backlog is full. Returns the number of bytes, 0 at the end of
    /// the stream.
    fn fill(&mut self) -> io::Result<usize> {
        let Observed { backlog, last_received, .. } = &*self.observed;
        if backlog.is_large() && !self.socket.has_more() {
            thread::sleep(MOMENT);
            if backlog.is_full() {
                return Err(ErrorKind::WouldBlock.into());
            }
        }
        if mem::take(&mut self.is_empty) {
            // amiquip reads again: the socket has become readable.
            self.coalescer.pause();
        }
        if mem::take(&mut self.is_drained) {
            self.is_empty = true;
            return Err(ErrorKind::WouldBlock.into());
        }
        let room = self.buffer.room();
        let read = self.socket.read(room);
        self.is_empty = read.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        if !self.is_empty {
            last_received.set(Instant::now());
        }
        match &read {
            Ok(length) => {
                backlog.add(*length);
                // A TLS session may hold more.
                let is_tcp = matches!(self.socket, Socket::Tcp(_));
                self.is_drained = is_tcp && (1..room.len()).contains(length);
            }
            Err(error) => {
                if let Some(failure) = tls::failure_of(error) {
                    self.observed.ends(Reason::Tls(failure));
                }
            }
        }
        read
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.buffer.is_empty() {
            let read = self.fill();
            if read.as_ref().is_err_and(is_passing) {
                return read;
            }
            // A reset is an end like any other.
            let checked = self.buffer.received(*read.as_ref().unwrap_or(&0));
            if let Some(close) = self.buffer.take_closed() {
                self.observed.ends(Reason::Closed(close));
            }
            if let Err(fault) = checked {
                let error = io::Error::other(fault.to_string());
                self.observed.ends(Reason::Fault(fault));
                return Err(error);
            }
            if read? == 0 {
                return Ok(0);
            }
        }
        Ok(self.buffer.read(out))
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
                // amiquip would give up at once, and lose the last words of the peer, which are still
                // to be read. The end of the stream comes after them.
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

/// Level-triggered whatever amiquip asks for: bytes that are left unread must be reported again.
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
