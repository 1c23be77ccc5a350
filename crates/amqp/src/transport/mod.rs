//! The byte stream given to amiquip.
//!
//! amiquip would open a socket by itself, but then without TCP_NODELAY (a one-message run takes
//! ten times as long) and with a system call for every 4 KiB received.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use mio::event::Evented;
use mio::{Poll, PollOpt, Ready, Registration, Token};
use rustls::ClientConnection;
use socket2::{SockRef, TcpKeepalive};

pub(crate) mod buffer;
pub(crate) mod decoder;
pub(crate) mod encoder;
pub(crate) mod frame_filter;
pub(crate) mod observed;
pub(crate) mod properties;
pub(crate) mod start_ok;
pub(crate) mod tls;
mod verifier;
pub(crate) mod wire;

use tls::TlsStream;
use wire::Wire;

/// Silence after which the kernel asks whether the peer is still there.
const IDLE: Duration = Duration::from_secs(30);

/// The socket, encrypted or not.
pub(crate) enum Socket {
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

/// The end of a [`Wire`] that amiquip reads and writes.
pub struct Stream {
    wire: Arc<Wire>,
    /// Ready when bytes for amiquip are there, or amiquip has bytes to write.
    registration: Registration,
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
        let handle = socket.try_clone()?;
        let socket = mio::net::TcpStream::from_stream(socket)?;
        let socket = match tls {
            None => Socket::Tcp(socket),
            Some(session) => Socket::Tls(TlsStream::new(session, socket)),
        };
        let (wire, registration) = Wire::new(socket, handle, heartbeat, name)?;
        Ok(Stream { wire: Arc::new(wire), registration })
    }

    /// The wire, which the program uses while amiquip has the stream.
    pub fn wire(&self) -> Arc<Wire> {
        Arc::clone(&self.wire)
    }
}

impl Drop for Stream {
    /// amiquip's I/O thread has ended, perhaps because the broker sends no heartbeats: the program must not wait
    /// on.
    fn drop(&mut self) {
        self.wire.cut();
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.wire.read(out)
    }
}

impl Write for Stream {
    fn write(&mut self, frames: &[u8]) -> io::Result<usize> {
        self.wire.write(frames)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The socket is level-triggered, so that bytes which are left unread are reported again; the registration is
/// edge-triggered, and is told of all bytes anew.
impl Evented for Stream {
    fn register(&self, poll: &Poll, token: Token, ready: Ready, _: PollOpt) -> io::Result<()> {
        self.registration.register(poll, token, ready, PollOpt::edge())?;
        self.wire.register(poll, token)
    }

    fn reregister(&self, poll: &Poll, token: Token, ready: Ready, _: PollOpt) -> io::Result<()> {
        self.registration.reregister(poll, token, ready, PollOpt::edge())
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        Evented::deregister(&self.registration, poll)?;
        self.wire.deregister(poll)
    }
}

impl amiquip::IoStream for Stream {}
