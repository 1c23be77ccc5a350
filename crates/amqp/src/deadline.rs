//! Deadlines for calls that have none.
//!
//! Each call of amiquip waits for as long as the broker takes, but returns when the socket is
//! shut down. A thread with a second handle on the socket shuts it down when the time is up.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// Watches over a connection. Dropped, the watchdog shuts the socket down.
pub struct Watchdog {
    watch: Arc<Watch>,
}

/// The time is up, and the connection is cut.
#[derive(Debug, PartialEq, Eq)]
pub struct Expired;

struct Watch {
    socket: TcpStream,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    deadline: Option<Instant>,
    /// When the thread looks at the deadline next, unless woken.
    looks_at: Option<Instant>,
    expired: bool,
    ended: bool,
}

impl Watchdog {
    /// Watches over `socket`, a second handle on it.
    ///
    /// # Errors
    ///
    /// When the system has no thread left.
    pub fn new(socket: TcpStream) -> io::Result<Watchdog> {
        let watch = Watch { socket, state: Mutex::default(), changed: Condvar::new() };
        let watch = Arc::new(watch);
        let watching = Arc::clone(&watch);
        thread::Builder::new().spawn(move || watching.run())?;
        Ok(Watchdog { watch })
    }

    /// Calls `work`, and cuts the connection if `work` has not returned by the `deadline`.
    ///
    /// # Errors
    ///
    /// When the connection was cut; the outcome of `work` is dropped then.
    pub fn within<T>(&self, deadline: Instant, work: impl FnOnce() -> T) -> Result<T, Expired> {
        let mut state = self.watch.lock();
        state.deadline = Some(deadline);
        // To wake a thread takes long, compared to most of the calls.
        if state.looks_at.is_none_or(|time| time > deadline) {
            self.watch.changed.notify_one();
        }
        drop(state);
        let outcome = work();
        let mut state = self.watch.lock();
        state.deadline = None;
        match state.expired {
            true => Err(Expired),
            false => Ok(outcome),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.watch.lock().ended = true;
        self.watch.changed.notify_one();
        self.watch.cut();
    }
}

impl Watch {
    /// Waits for the deadline, which may change meanwhile.
    fn run(&self) {
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            if state.deadline.is_some_and(|deadline| deadline <= now) {
                state.expired = true;
                return self.cut();
            }
            state.looks_at = state.deadline;
            state = match state.deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let waited = self.changed.wait_timeout(state, deadline - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn cut(&self) {
        // An error means that the peer has closed the connection already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No holder of the lock panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let outcome = watchdog.within(deadline, || near.read(&mut [0]));
        assert_eq!(outcome.map(Result::unwrap), Err(Expired));
        assert!(Instant::now() >= deadline);
    }

    #[test]
    fn work_in_time_is_left_alone_and_so_is_what_comes_after_it() {
        let (near, far) = connected();
        let watchdog = Watchdog::new(near.try_clone().unwrap()).unwrap();
        for milliseconds in [200, 400] {
            let deadline = Instant::now() + Duration::from_millis(milliseconds);
            assert_eq!(watchdog.within(deadline, || 7), Ok(7));
        }
        far.set_read_timeout(Some(Duration::from_millis(600))).unwrap();
        assert!((&far).read(&mut [0]).is_err(), "cut after the deadline");
        drop(watchdog);
        assert_eq!((&far).read(&mut [0]).unwrap(), 0);
    }
}
