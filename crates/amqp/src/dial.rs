//! From the host of a URI to a connected socket, within a deadline.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::socket::{Socket, set_options};
use crate::tls;
use crate::uri::Uri;

/// The deadline of the first of `parts` equal parts of the time until `deadline`.
pub(crate) fn share(deadline: Instant, parts: usize) -> Instant {
    Instant::now() + time_left(deadline) / parts.max(1) as u32
}

/// The time until a deadline that may have passed.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// The time left; never zero, which `connect_timeout` refuses.
fn time_left(deadline: Instant) -> Duration {
    left(deadline).max(Duration::from_millis(1))
}

/// The addresses of the host. The lookup runs in a thread, because the resolver of the system has no deadline.
pub(crate) fn resolve(uri: &Uri, deadline: Instant) -> Result<Vec<SocketAddr>, Error> {
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

/// Connects to one address, and opens a TLS session where the URI asks for one.
pub(crate) fn dial(uri: &Uri, address: SocketAddr, deadline: Instant) -> Result<Socket, Error> {
    log::debug!("connecting to {uri} ({})", address.ip());
    let socket = connect(&address, time_left(deadline))
        .map_err(|error| unreachable(uri, address, &error))?;
    let operation = || format!("connect to {uri}");
    set_options(&socket, uri.heartbeat > 0)
        .map_err(|error| Error::unavailable(format!("{}: {error}", operation())))?;
    let Some(settings) = &uri.tls else {
        return Ok(Socket::Tcp(socket));
    };
    let stream = tls::handshake(settings, &uri.host, socket, deadline)
        .map_err(|failure| failure.in_operation(operation()))?;
    log::info!("TLS with {uri}: {}", stream.describe());
    Ok(Socket::Tls(Box::new(stream)))
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
