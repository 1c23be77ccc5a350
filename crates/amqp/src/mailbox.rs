//! A queue between threads that can be waited for together with a socket.

use std::collections::VecDeque;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::Error;
use crate::lock::lock;

/// The receiving end. Its file descriptor is readable while a message is there.
#[derive(Debug)]
pub struct Mailbox<T> {
    queue: Queue<T>,
    /// Holds a byte for each message.
    waker: PipeReader,
    /// Without a writer, the descriptor would be ready forever once all senders are gone.
    _writer: Arc<PipeWriter>,
}

/// A sending end.
#[derive(Debug)]
pub struct Sender<T> {
    queue: Queue<T>,
    waker: Arc<PipeWriter>,
}

#[derive(Debug)]
struct Queue<T>(Arc<Mutex<VecDeque<T>>>);

impl<T> Queue<T> {
    fn lock(&self) -> MutexGuard<'_, VecDeque<T>> {
        lock(&self.0)
    }
}

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Queue<T> {
        Queue(Arc::clone(&self.0))
    }
}

impl<T> Mailbox<T> {
    /// An empty mailbox, and its first sending end.
    ///
    /// # Errors
    ///
    /// When the system has no file descriptors left.
    pub fn open() -> Result<(Sender<T>, Mailbox<T>), Error> {
        let queue = Queue(Arc::default());
        let (reader, writer) =
            io::pipe().map_err(|error| Error::unavailable(format!("open a pipe: {error}")))?;
        let writer = Arc::new(writer);
        let sender = Sender { queue: queue.clone(), waker: Arc::clone(&writer) };
        Ok((sender, Mailbox { queue, waker: reader, _writer: writer }))
    }

    /// Whether no message is there.
    pub fn is_empty(&self) -> bool {
        self.queue.lock().is_empty()
    }

    /// Takes the next message, if any is there.
    pub fn try_recv(&self) -> Option<T> {
        let message = self.queue.lock().pop_front()?;
        // The sender writes a byte right after it has added the message.
        let _ = (&self.waker).read(&mut [0]);
        Some(message)
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waker.as_fd()
    }
}

impl<T> Sender<T> {
    /// Whether no message is there that was not taken.
    pub fn is_empty(&self) -> bool {
        self.queue.lock().is_empty()
    }

    /// Adds a message. Without a mailbox, the message is lost.
    pub fn send(&self, message: T) {
        self.queue.lock().push_back(message);
        let _ = (&*self.waker).write(&[0]);
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        Sender { queue: self.queue.clone(), waker: Arc::clone(&self.waker) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wait_for;
    use std::time::Instant;

    fn is_ready(mailbox: &Mailbox<u8>) -> bool {
        wait_for(&[mailbox.as_fd()], Some(Instant::now())).by(0)
    }

    #[test]
    fn a_mailbox_is_ready_while_a_message_is_there() {
        let (sender, mailbox) = Mailbox::open().unwrap();
        assert!(!is_ready(&mailbox) && mailbox.is_empty());
        sender.clone().send(1);
        sender.send(2);
        assert!(is_ready(&mailbox) && !sender.is_empty());
        assert_eq!(
            (mailbox.try_recv(), mailbox.try_recv(), mailbox.try_recv()),
            (Some(1), Some(2), None)
        );
        drop(sender);
        assert!(!is_ready(&mailbox), "no sender is left");
    }
}
