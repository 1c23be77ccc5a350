//! What a receiver finds around it, and a test replaces.

use std::time::Duration;

use amqp::retry;
use logs_process::logging;

/// Prints a line about messages that may be lost or repeated.
pub type Alert = fn(String);

/// What a receiver gets from outside, apart from the command line.
#[derive(Clone, Copy)]
pub struct Environment {
    /// Where alerts go.
    pub alert: Alert,
    /// The pauses between attempts to connect again.
    pub retry: retry::Timings,
    /// How long to wait for the messages of a stream.
    pub stream: StreamTimings,
}

impl Default for Environment {
    /// Alerts go to stderr.
    fn default() -> Environment {
        Environment {
            alert: logging::alert,
            retry: retry::Timings::default(),
            stream: StreamTimings::default(),
        }
    }
}

/// How long to wait for the messages of a stream.
#[derive(Clone, Copy, Debug)]
pub struct StreamTimings {
    /// How long the replica on this node may lag behind the replica that was read before.
    pub catch_up: Duration,
    /// How long to wait for the first message of a stream that seems to be empty. RabbitMQ counts the messages of
    /// a stream every 5 seconds, and a busy one may not send any for seconds.
    pub empty_after: Duration,
}

impl Default for StreamTimings {
    fn default() -> StreamTimings {
        StreamTimings { catch_up: Duration::from_secs(5), empty_after: Duration::from_secs(6) }
    }
}
