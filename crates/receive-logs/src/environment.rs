//! The surroundings of a receiver, which tests replace.

use std::time::Duration;

use amqp::retry;
use logs_process::logging;

/// Prints a line about messages that may be lost or repeated.
pub type Alert = fn(String);

/// What a receiver uses besides the command line.
#[derive(Clone, Copy)]
pub struct Environment {
    /// Receives the alerts.
    pub alert: Alert,
    /// The pauses between attempts to reconnect.
    pub retry: retry::Timings,
    /// Time limits for the messages of a stream.
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

/// Time limits for the messages of a stream.
#[derive(Clone, Copy, Debug)]
pub struct StreamTimings {
    /// How long the replica on this node may lag behind the replica that was read before.
    pub catch_up: Duration,
    /// How long to wait for the first message of a stream that seems to be empty. RabbitMQ counts the messages of a
    /// stream every 5 seconds, and a busy broker may send nothing for seconds.
    pub empty_after: Duration,
}

impl Default for StreamTimings {
    fn default() -> StreamTimings {
        StreamTimings { catch_up: Duration::from_secs(5), empty_after: Duration::from_secs(6) }
    }
}
