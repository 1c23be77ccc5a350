//! The stream to read, where reading begins, and its declaration.

use std::sync::{Once, OnceLock};
use std::time::Duration;

use amqp::{Connection, Error, ErrorKind, Queue, Value};
use bytesize::ByteSize;
use logs_common::hints;
use logs_process::exit::{Failure, Status};

use super::place::{Origin, Place};
use crate::cli::{Cli, Keep};
use crate::environment::{Alert, Environment, StreamTimings};
use crate::resume::ResumeFile;

/// The limits of a stream without `--keep`.
const KEEP: [Keep; 2] =
    [Keep::Age(Duration::from_secs(24 * 60 * 60)), Keep::Size(ByteSize::gib(1))];

/// The size of a segment in bytes if `--keep` limits only the age, and the maximum. The broker removes whole
/// segments, and by default starts a new one only after 500 MB.
const SEGMENT: u64 = 50_000_000;
const MAX_SEGMENT: u64 = 500_000_000;

/// The names of the exchanges. RabbitMQ has no exchange with a line break in its name.
fn exchange_names(cli: &Cli) -> String {
    let names: Vec<_> = cli.exchanges().into_iter().map(|exchange| exchange.name).collect();
    names.join("\n")
}

/// The stream to read, and how.
pub struct StreamConfig {
    /// The name of the stream.
    pub name: String,
    /// Where to begin if no message is written yet.
    pub start: Place,
    keep: Vec<Keep>,
    pub(super) follow: bool,
    /// The identity of the stream. The cluster is empty until it is known.
    pub(super) origin: Origin,
    cluster: OnceLock<String>,
    /// The offset of the newest message when reading began; `None` if there was no message.
    pub(super) end: OnceLock<Option<u64>>,
    pub(super) timings: StreamTimings,
    pub(super) alert: Alert,
}

impl StreamConfig {
    /// Takes the options of the command line, and the position in the file of `--resume`. `None` without `--stream`.
    ///
    /// # Errors
    ///
    /// When the position belongs to another vhost, exchange or stream.
    pub fn new(
        cli: &Cli,
        vhost: &str,
        resume: Option<&ResumeFile>,
        environment: &Environment,
    ) -> Result<Option<StreamConfig>, Failure> {
        let options = &cli.stream;
        let Some(name) = options.name.clone() else {
            return Ok(None);
        };
        let mut origin = Origin {
            vhost: vhost.into(),
            exchange: exchange_names(cli),
            stream: name.clone(),
            cluster: String::new(),
        };
        if let Some(recorded) = resume.and_then(ResumeFile::origin) {
            origin.cluster.clone_from(&recorded.cluster);
            if origin != *recorded {
                return Err(Failure::new(Status::Config, foreign_position(recorded)));
            }
        }
        let place = resume.and_then(ResumeFile::place);
        Ok(Some(StreamConfig {
            name,
            origin,
            cluster: OnceLock::new(),
            start: match (place, options.since, options.tail) {
                (Some(place), ..) => place,
                (None, Some(time), _) => Place::Since(time),
                (None, None, Some(records)) => Place::Tail(records),
                (None, None, None) if options.from_start => Place::First,
                (None, None, None) => Place::Next,
            },
            keep: match options.keep.is_empty() {
                true => KEEP.to_vec(),
                false => options.keep.clone(),
            },
            follow: !options.no_follow,
            end: OnceLock::new(),
            timings: environment.stream,
            alert: environment.alert,
        }))
    }

    /// The identity of the stream, with the cluster if a broker was reached.
    pub fn origin(&self) -> Origin {
        let cluster = self.cluster.get().cloned().unwrap_or_default();
        Origin { cluster, ..self.origin.clone() }
    }

    /// Whether the stream should have messages already, so that a new stream suggests a wrong name.
    pub fn looks_back(&self) -> bool {
        self.start != Place::Next || !self.follow
    }

    /// The declaration of the stream.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::stream(&self.name);
        let mut segment = SEGMENT;
        for limit in &self.keep {
            queue = match limit {
                Keep::Age(age) => {
                    let seconds = format!("{}s", age.as_secs());
                    queue.argument("x-max-age", Value::LongString(seconds))
                }
                Keep::Size(size) => {
                    segment = (size.as_u64() / 10).clamp(1, MAX_SEGMENT);
                    queue.argument("x-max-length-bytes", integer(size.as_u64()))
                }
            };
        }
        queue.argument("x-stream-max-segment-size-bytes", integer(segment))
    }

    /// Checks that the broker has streams, and remembers the name of its cluster.
    ///
    /// # Errors
    ///
    /// When the broker is RabbitMQ before 3.9. Such a broker would create a queue of another type, or refuse with an
    /// error that does not mention streams.
    pub fn check_broker(&self, connection: &Connection) -> Result<(), Error> {
        let cluster = connection.server_property("cluster_name").unwrap_or_default();
        self.cluster.get_or_init(|| cluster);
        let version = connection.server_property("version").unwrap_or_default();
        let mut numbers = version.split('.').map_while(|number| number.parse::<u32>().ok());
        match (numbers.next(), numbers.next()) {
            (Some(major), Some(minor)) if (major, minor) < (3, 9) => Err(Error::new(
                ErrorKind::Configuration,
                format!(
                    "declare stream '{}': streams need RabbitMQ 3.9 or later, and this is {version}",
                    self.name
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Whether the position was recorded at a cluster of another name. Nodes of one cluster may report different
    /// names, so a recognised message has priority over the name.
    pub(super) fn has_moved(&self) -> bool {
        let recorded = &self.origin.cluster;
        !recorded.is_empty() && self.cluster.get().is_some_and(|cluster| cluster != recorded)
    }

    /// Logs, once per process, that the stream exists with other limits than those of `--keep`.
    pub fn log_other_limits(&self) {
        static LOGGED: Once = Once::new();
        let name = &self.name;
        LOGGED.call_once(|| {
            log::info!("stream '{name}' exists with other limits, and is used as it is (--keep)");
        });
    }
}

/// The options that can solve an error of an operation on a stream.
pub fn hint(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotAStream => {
            " (a queue of this name exists and is not a stream: use another --stream, or --queue)"
        }
        ErrorKind::NoReplica => {
            " (--uri or AMQP_URL takes several nodes of a cluster: name one with a replica)"
        }
        _ => hints::hint(kind),
    }
}

pub(super) fn foreign_position(origin: &Origin) -> String {
    let Origin { cluster, vhost, exchange, stream } = origin;
    format!(
        "resume: the position belongs to stream '{stream}' bound to exchange '{exchange}', vhost '{vhost}' \
         of '{cluster}' (use another file with --resume)"
    )
}

fn integer(number: u64) -> Value {
    Value::LongLongInt(i64::try_from(number).unwrap_or(i64::MAX))
}
