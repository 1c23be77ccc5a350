//! A connection that is kept alive while its program is busy.
//!
//! The program's thread does all the work of a connection. But it may be busy for hours, as with an output that
//! takes no bytes: a terminal that is paused in the middle of a write, or a disk that hangs, which poll(2)
//! cannot foresee. Then another thread, one that the program has anyway, calls [`keep_alive`] from time to time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use crate::connection::Connection;

/// The connections of the process.
static CONNECTIONS: Mutex<Vec<Weak<Mutex<Connection>>>> = Mutex::new(Vec::new());

/// A connection, locked for each use.
pub(crate) struct Shared(Arc<Mutex<Connection>>);

impl Shared {
    pub fn new(connection: Connection) -> Shared {
        let connection = Arc::new(Mutex::new(connection));
        lock(&CONNECTIONS).push(Arc::downgrade(&connection));
        Shared(connection)
    }

    pub fn lock(&self) -> MutexGuard<'_, Connection> {
        lock(&self.0)
    }
}

/// Sends heartbeats and reads, as far as there is room, on the connections whose program is busy. Returns when to
/// call again.
pub fn keep_alive() -> Option<Instant> {
    let mut connections = lock(&CONNECTIONS);
    connections.retain(|connection| connection.strong_count() > 0);
    let next = connections.iter().filter_map(|connection| {
        let connection = connection.upgrade()?;
        // Otherwise the program is at work on the connection.
        let mut connection = connection.try_lock().ok()?;
        connection.keep_alive();
        connection.next_beat()
    });
    next.min()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
