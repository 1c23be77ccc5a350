//! For unit tests: the notes to a person, deliveries without a receiver, and a disk that gets full.

use std::cell::RefCell;
use std::fmt::Display;
use std::fs::File;
use std::iter;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use amqp::{Connection, Delivery, Queue, Uri};
use logs_tests::{Message, ScriptedBroker, wait_until};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// Notes recorded in place of being written to stderr.
#[derive(Clone, Default)]
pub struct Notes(Arc<Mutex<Vec<String>>>);

thread_local! {
    static NOTES: RefCell<Notes> = RefCell::default();
}

impl Notes {
    /// Records the notes of this thread from now on.
    pub fn record(&self) {
        NOTES.set(self.clone());
    }

    /// The notes recorded so far.
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    /// The notes of this thread during `work`.
    pub fn during(work: impl FnOnce()) -> Vec<String> {
        let notes = Notes::default();
        notes.record();
        work();
        notes.all()
    }
}

/// Takes the place of [`logs_process::logging::alert`].
pub fn alert(text: impl Display) {
    NOTES.with_borrow(|notes| notes.0.lock().unwrap().push(text.to_string()));
}

/// Messages as a broker delivers them: only a connection can make a delivery.
pub fn deliveries(messages: &[Message]) -> Vec<Delivery> {
    let broker = ScriptedBroker::start();
    let mut connection =
        Connection::open(&[Uri::parse(&broker.url()).unwrap()], "test", |_| "").unwrap();
    let queue = connection.declare_queue(&Queue::exclusive()).unwrap();
    let mut received = connection.consume(&queue.name, None).unwrap();
    let session = broker.accept();
    for message in messages {
        session.deliver(message);
    }
    let next = || {
        let mut next = None;
        wait_until("a message comes", || {
            received.wait(&[], Some(Instant::now()));
            next = received.try_next().unwrap();
            next.is_some()
        });
        next
    };
    iter::from_fn(next).take(messages.len()).collect()
}

/// A file that takes no more than so many bytes, as on a disk that is full then.
pub fn limited_file(size: u64) -> File {
    let file = File::from(memfd_create("limited", MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len(size).unwrap();
    fcntl_add_seals(&file, SealFlags::GROW).unwrap();
    file
}
