//! A connection that is kept alive while its program is busy.
//!
//! The program's thread does all the work of a connection. An output may block it for hours: a terminal that is paused in
//! the middle of a write, or a disk that hangs. poll(2) cannot foresee either. So the program's background thread calls
//! [`keep_alive`] from time to time.

use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use crate::connection::Connection;
use crate::lock::lock;

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

/// How often to call [`keep_alive`]: heartbeats are at least a second apart, and two may be missed.
pub const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// Sends heartbeats and reads, as far as there is room, on the connections whose program is busy.
pub fn keep_alive() {
    let mut connections = lock(&CONNECTIONS);
    connections.retain(|connection| connection.strong_count() > 0);
    for connection in connections.iter().filter_map(Weak::upgrade) {
        // Otherwise the program is at work on the connection.
        if let Ok(mut connection) = connection.try_lock() {
            connection.keep_alive();
        }
    }
}
