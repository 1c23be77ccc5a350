//! The time at the start of a record.

use std::time::SystemTime;

use amqp::{Properties, Value};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use logs_common::wire::TIMESTAMP_IN_MS;
use logs_process::exit::{Failure, Status};
use logs_process::time::{self, Precision};

use crate::cli::{Cli, RecordTime};

/// Which time a record begins with, and how it is written.
#[derive(Clone, Debug)]
pub struct Clock {
    time: RecordTime,
    /// The local time zone; `None` is UTC.
    zone: Option<TimeZone>,
}

impl Clock {
    /// Takes the options of the command line; `None` if records begin with no time.
    ///
    /// # Errors
    ///
    /// [`Status::Config`] when the local time zone is unknown.
    pub fn new(cli: &Cli) -> Result<Option<Clock>, Failure> {
        let Some(time) = cli.timestamp else {
            return Ok(None);
        };
        let zone = cli.local_time.then(TimeZone::try_system).transpose().map_err(|error| {
            let text = format!("--local-time: {error} (set TZ to a name such as Europe/Berlin)");
            Failure::new(Status::Config, text)
        })?;
        Ok(Some(Clock { time, zone }))
    }

    /// The time of a record that is written now, as text.
    pub fn time(&self, properties: &Properties) -> String {
        match self.time {
            RecordTime::Arrival => self.format(now(), Precision::Millis),
            RecordTime::Sent => match sent(properties) {
                Some((millis, precision)) => self.format(millis, precision),
                None => "-".into(),
            },
        }
    }

    fn format(&self, millis: i128, precision: Precision) -> String {
        let zoned = self.zone.as_ref().and_then(|zone| {
            let time = Timestamp::from_millisecond(i64::try_from(millis).ok()?).ok()?;
            Some(time.to_zoned_datetime(zone.clone()))
        });
        match (zoned, precision) {
            (None, _) => time::format(millis, precision),
            (Some(time), Precision::Seconds) => time.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string(),
            (Some(time), Precision::Millis) => {
                time.strftime("%Y-%m-%dT%H:%M:%S.%3f%:z").to_string()
            }
        }
    }
}

/// Now, in UTC with milliseconds.
pub fn time_of_arrival() -> String {
    time::format(now(), Precision::Millis)
}

fn now() -> i128 {
    time::millis(SystemTime::now())
}

/// When a message was sent, in milliseconds since 1970, and how exact this is.
fn sent(properties: &Properties) -> Option<(i128, Precision)> {
    let header = properties.headers().as_ref().and_then(|headers| headers.get(TIMESTAMP_IN_MS));
    match header {
        Some(Value::LongLongInt(millis)) => Some((i128::from(*millis), Precision::Millis)),
        _ => properties.timestamp().map(|seconds| (i128::from(seconds) * 1000, Precision::Seconds)),
    }
}
