//! The end-to-end tests run the real binaries against a real RabbitMQ node, and wait for conditions with a deadline.
//! A failure shows the command, its status and all its output.

mod broker;
mod machine;
mod peer;
mod proxy;
pub mod raw;
mod scripted;
pub mod spool;
mod temp;
mod tool;

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

pub use broker::{Broker, rabbitmqctl, url, url_with};
pub use machine::{terminal, unshare};
pub use peer::Peer;
pub use proxy::{Proxy, Way};
pub use scripted::{
    CANCEL, CHANNEL_OPEN, CONSUME, EXCHANGE_DECLARE, Message, PUBLISH, Published, QUEUE_BIND,
    QUEUE_DECLARE, QueueCounts, ScriptedBroker, ScriptedSession, StreamMessage,
};
pub use temp::{TempFile, free_port, unique};
pub use tool::{Ended, Running, Tool, binary, emit_log, python, receive_logs};

/// A password that no program may print. Each finished program is searched for it.
pub const SECRET: &str = "s3cr3t-p4ss";

/// The deadline for all conditions, except in tests about time.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The banner of receive-logs.
pub const BANNER: &str = " [*] Waiting for logs. To exit press CTRL+C\n";

/// The top directory of the project.
pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the project")
}

/// Waits until `condition` holds.
///
/// # Panics
///
/// When it does not hold within [`PATIENCE`].
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "condition not met after {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Prints why a test does not apply to the broker. `cargo test` shows this even if the test passes.
pub fn skip(reason: &str) {
    let test = thread::current();
    writeln!(io::stderr(), "skipped {}: {reason}", test.name().unwrap_or("a test"))
        .expect("stderr");
}

/// Waits until the writer of a pipe or socket can write no more. Returns the number of bytes in it.
pub fn wait_until_full(reader: impl AsFd) -> u64 {
    let (mut held, mut since) = (0, Instant::now());
    wait_until("the pipe is full", || {
        let now = rustix::io::ioctl_fionread(&reader).expect("a pipe or a socket");
        if now != held {
            (held, since) = (now, Instant::now());
        }
        held > 0 && since.elapsed() > Duration::from_millis(500)
    });
    held
}
