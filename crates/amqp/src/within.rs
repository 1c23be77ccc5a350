//! Reading and writing on a non-blocking socket, until a deadline.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};

use crate::poll::wait;

/// A non-blocking socket that blocks until the deadline, and then fails with [`ErrorKind::TimedOut`].
pub(crate) struct Within<S> {
    socket: S,
    deadline: Instant,
}

impl<S: AsFd> Within<S> {
    pub fn new(socket: S, deadline: Instant) -> Within<S> {
        Within { socket, deadline }
    }

    fn wait(
        &mut self,
        events: PollFlags,
        mut work: impl FnMut(&mut S) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            match work(&mut self.socket) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                outcome => return outcome,
            }
            if self.deadline <= Instant::now() {
                return Err(ErrorKind::TimedOut.into());
            }
            wait(vec![PollFd::new(&self.socket, events)], Some(self.deadline));
        }
    }
}

impl<S: AsFd + Read> Read for Within<S> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN, |socket| socket.read(out))
    }
}

impl<S: AsFd + Write> Write for Within<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::OUT, |socket| socket.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
