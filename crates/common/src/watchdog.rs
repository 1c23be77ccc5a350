//! Deadlines for calls that have none.
//!
//! Each call of amiquip waits for as long as the broker takes, but returns when the socket is
//! shut down. A thread that holds a second handle on the socket does that when the time is up.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Instant;

/// Watches over one connection. Dropped, it shuts the socket down.
pub struct Watchdog {
    deadlines: Sender<Option<Instant>>,
    expired: Arc<AtomicBool>,
}

/// The time is up, and the connection is cut.
#[derive(Debug, PartialEq, Eq)]
pub struct Expired;

impl Watchdog {
    /// Watches over `socket`, a second handle on it.
    ///
    /// # Errors
    ///
    /// When the system has no thread for it.
    pub fn new(socket: TcpStream) -> io::Result<Watchdog> {
        let (sender, deadlines) = mpsc::channel();
        let expired = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&expired);
        thread::Builder::new().spawn(move || {
            watch(&deadlines, &flag);
            // An error means that the peer has closed it already.
            let _ = socket.shutdown(Shutdown::Both);
        })?;
        Ok(Watchdog { deadlines: sender, expired })
    }

    /// Calls `work`, and cuts the connection if it has not returned by `deadline`.
    ///
    /// # Errors
    ///
    /// When it has not; whatever it returned then is void.
    pub fn limit<T>(&self, deadline: Instant, work: impl FnOnce() -> T) -> Result<T, Expired> {
        // Fails once the connection is cut, when nothing is left to be watched over.
        let _ = self.deadlines.send(Some(deadline));
        let outcome = work();
        let _ = self.deadlines.send(None);
        if self.expired.load(Ordering::Acquire) {
            return Err(Expired);
        }
        Ok(outcome)
    }
}

/// Takes deadlines, each in place of the one before, until one passes or nobody is left to send
/// another.
fn watch(deadlines: &Receiver<Option<Instant>>, expired: &AtomicBool) {
    let mut deadline = None::<Instant>;
    loop {
        let next = match deadline {
            None => deadlines.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(time) => deadlines.recv_timeout(time.saturating_duration_since(Instant::now())),
        };
        match next {
            Ok(next) => deadline = next,
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => return expired.store(true, Ordering::Release),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;
    use std::time::Duration;

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn a_blocked_read_returns_when_the_time_is_up() {
        let (mut near, _far) = connected();
        let watchdog = Watchdog::new(near.try_clone().unwrap()).unwrap();
        let deadline = Instant::now() + Duration::from_millis(50);
        let outcome = watchdog.limit(deadline, || near.read(&mut [0]));
        assert_eq!(outcome.map(Result::unwrap), Err(Expired));
        assert!(Instant::now() >= deadline);
    }

    #[test]
    fn work_in_time_is_left_alone_and_so_is_what_comes_after_it() {
        let (near, far) = connected();
        let watchdog = Watchdog::new(near.try_clone().unwrap()).unwrap();
        for milliseconds in [20, 40] {
            let deadline = Instant::now() + Duration::from_millis(milliseconds);
            assert_eq!(watchdog.limit(deadline, || 7), Ok(7));
        }
        far.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!((&far).read(&mut [0]).is_err(), "cut after the deadline");
        drop(watchdog);
        assert_eq!((&far).read(&mut [0]).unwrap(), 0);
    }
}
