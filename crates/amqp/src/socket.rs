//! A connected socket, encrypted or not, which never blocks.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

use crate::tls::TlsStream;

/// Silence after which the kernel asks whether the peer is still there.
const IDLE: Duration = Duration::from_secs(30);

/// A connected socket.
pub(crate) enum Socket {
    Tcp(TcpStream),
    Tls(Box<TlsStream>),
}

impl Socket {
    fn tcp(&self) -> &TcpStream {
        match self {
            Socket::Tcp(socket) => socket,
            Socket::Tls(stream) => &stream.socket,
        }
    }

    /// Whether bytes of the peer have left the kernel, so that poll(2) does not report them.
    pub fn has_more(&self) -> bool {
        matches!(self, Socket::Tls(stream) if stream.has_more())
    }

    /// Ends the connection at once.
    pub fn end(&self) {
        // An error means that the peer has closed the connection already.
        let _ = self.tcp().shutdown(Shutdown::Both);
    }

    /// Ends the stream of our bytes. Those of the peer can still be read.
    pub fn end_writing(&self) {
        // An error means that the peer has closed the connection already.
        let _ = self.tcp().shutdown(Shutdown::Write);
    }
}

/// Sets the options that every connection has: no delay for small frames, and a limit for silence.
///
/// # Errors
///
/// When the kernel refuses one.
pub(crate) fn set_options(socket: &TcpStream, has_heartbeats: bool) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(IDLE).with_interval(IDLE / 3);
    SockRef::from(socket).set_tcp_keepalive(&keepalive)?;
    // Keep-alive has no effect while sent data is unacknowledged, which the kernel tolerates for a
    // quarter of an hour; heartbeats do. With heartbeats, this option would only cut the
    // connection to a broker that accepts no messages for a while.
    #[cfg(target_os = "linux")]
    if !has_heartbeats {
        SockRef::from(socket).set_tcp_user_timeout(Some(2 * IDLE))?;
    }
    Ok(())
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp().as_fd()
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
