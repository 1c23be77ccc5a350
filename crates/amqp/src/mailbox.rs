//! A channel between threads that can be waited for along with a socket.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};

use crate::Error;

/// The receiving end. Its file descriptor is readable while a message is there, and once all senders are gone.
#[derive(Debug)]
pub struct Mailbox<T> {
    messages: Receiver<T>,
    /// Holds a byte for each message.
    bell: PipeReader,
}

/// A sending end.
#[derive(Debug)]
pub struct Letterbox<T> {
    messages: Sender<T>,
    bell: Arc<PipeWriter>,
}

impl<T> Mailbox<T> {
    /// An empty mailbox, and its first sending end.
    ///
    /// # Errors
    ///
    /// When the system has no file descriptors left.
    pub fn open() -> Result<(Letterbox<T>, Mailbox<T>), Error> {
        let (sender, receiver) = unbounded();
        let pipe = io::pipe();
        let (reader, writer) =
            pipe.map_err(|error| Error::unavailable(format!("open a pipe: {error}")))?;
        let sender = Letterbox { messages: sender, bell: Arc::new(writer) };
        Ok((sender, Mailbox { messages: receiver, bell: reader }))
    }

    /// Whether no message is there.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Takes the next message, if any is there.
    ///
    /// # Errors
    ///
    /// When no message is there; and when none will come, as all senders are gone.
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        let message = self.messages.try_recv()?;
        // The sender rings right after it has put the message in.
        let _ = (&self.bell).read(&mut [0]);
        Ok(message)
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl<T> Letterbox<T> {
    /// Whether no message is there that was not taken.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Puts a message in. A mailbox that is gone misses nothing.
    pub fn send(&self, message: T) {
        if self.messages.send(message).is_ok() {
            let _ = (&*self.bell).write(&[0]);
        }
    }
}

impl<T> Clone for Letterbox<T> {
    fn clone(&self) -> Letterbox<T> {
        Letterbox { messages: self.messages.clone(), bell: Arc::clone(&self.bell) }
    }
}
