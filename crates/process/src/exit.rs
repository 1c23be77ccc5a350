//! Errors and their exit statuses.
//!
//! A [`Failure`] or an [`amqp::Error`] is created where the error occurs, because only that place knows the operation.
//! The rest of the program adds context with `anyhow`. No decision depends on a status.

use std::fmt::Display;
use std::io;
use std::process::ExitCode;

use amqp::ErrorKind;
use anyhow::Error;

use crate::notes::last_note;

/// Exit statuses with the values of `sysexits.h`, so that scripts and service managers know whether to retry or to ask
/// for another configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The work is done, or the program was stopped by the user.
    Ok = 0,
    /// Any other error.
    Other = 1,
    /// The command line is wrong; the value that clap uses.
    Usage = 2,
    /// EX_DATAERR: the broker rejects a message, or a record is too large.
    Data = 65,
    /// EX_NOUSER: a mandatory message is not routed to any queue.
    NoReceiver = 67,
    /// EX_UNAVAILABLE: no broker can be reached, or the connection was lost.
    Unavailable = 69,
    /// EX_IOERR: input cannot be read or output cannot be written.
    Io = 74,
    /// EX_TEMPFAIL: a time limit passed first.
    TimeLimit = 75,
    /// EX_PROTOCOL: the peer is not an AMQP 0-9-1 broker.
    Protocol = 76,
    /// EX_NOPERM: login refused, or a permission is missing.
    Permission = 77,
    /// EX_CONFIG: the broker or a file is not set up as the command line requires.
    Config = 78,
}

/// An error outside of AMQP, with its exit status. The text is a single line that names the operation, the object, the
/// answer, and the next step for the user. It never contains a password.
#[derive(Debug)]
pub struct Failure {
    /// The exit status of the program.
    pub status: Status,
    message: String,
}

impl Failure {
    /// A failure with the given line as its text.
    pub fn new(status: Status, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into() }
    }

    /// An input or output error.
    pub fn io(operation: impl Display, error: &io::Error) -> Failure {
        Failure::new(Status::Io, format!("{operation}: {error}"))
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The exit status of a broker's error.
impl From<ErrorKind> for Status {
    fn from(kind: ErrorKind) -> Status {
        match kind {
            ErrorKind::Unreachable | ErrorKind::Unavailable | ErrorKind::NoReplica => {
                Status::Unavailable
            }
            ErrorKind::Protocol => Status::Protocol,
            ErrorKind::Permission => Status::Permission,
            ErrorKind::NotFound | ErrorKind::Locked => Status::Config,
            ErrorKind::NoVhost
            | ErrorKind::Configuration
            | ErrorKind::Untrusted
            | ErrorKind::ClientCertificate => Status::Config,
            ErrorKind::OtherDurability
            | ErrorKind::Deprecated
            | ErrorKind::OtherExchangeType
            | ErrorKind::OtherExchange => Status::Config,
            ErrorKind::OtherQueue | ErrorKind::NotAStream => Status::Config,
            ErrorKind::TooLarge => Status::Data,
            ErrorKind::File => Status::Io,
            ErrorKind::Other => Status::Other,
        }
    }
}

/// The exit status of an error.
pub fn status_of(error: &Error) -> Status {
    let amqp = error.downcast_ref::<amqp::Error>().map(|error| error.kind().into());
    let failure = error.downcast_ref::<Failure>().map(|failure| failure.status);
    amqp.or(failure).unwrap_or(Status::Other)
}

/// Prints an error of `program` as a single line on stderr, and returns the exit status.
pub fn report(program: &str, outcome: Result<(), Error>) -> ExitCode {
    let status = match outcome {
        Ok(()) => Status::Ok,
        Err(error) => {
            last_note(format_args!("{program}: {error:#}"));
            status_of(&error)
        }
    };
    ExitCode::from(status as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_does_not_hide_the_status() {
        let error = Error::new(Failure::new(Status::Data, "too large")).context("line 7");
        assert_eq!(status_of(&error), Status::Data);
        assert_eq!(format!("{error:#}"), "line 7: too large");
        let error = Error::new(amqp::Error::unavailable("gone")).context("5 confirmed");
        assert_eq!(status_of(&error), Status::Unavailable);
    }

    #[test]
    fn each_kind_of_error_of_the_broker_has_its_status() {
        for (kind, status) in [
            (ErrorKind::Unreachable, Status::Unavailable),
            (ErrorKind::Unavailable, Status::Unavailable),
            (ErrorKind::NoReplica, Status::Unavailable),
            (ErrorKind::Protocol, Status::Protocol),
            (ErrorKind::Permission, Status::Permission),
            (ErrorKind::NotFound, Status::Config),
            (ErrorKind::NoVhost, Status::Config),
            (ErrorKind::OtherExchangeType, Status::Config),
            (ErrorKind::OtherExchange, Status::Config),
            (ErrorKind::NotAStream, Status::Config),
            (ErrorKind::TooLarge, Status::Data),
            (ErrorKind::File, Status::Io),
            (ErrorKind::Other, Status::Other),
        ] {
            assert_eq!(Status::from(kind), status, "{kind:?}");
        }
        assert_eq!(status_of(&Error::msg("anything else")), Status::Other);
    }

    #[test]
    fn an_outcome_becomes_the_status_of_the_process() {
        let code = |status: Status| format!("{:?}", ExitCode::from(status as u8));
        let ended = |outcome| format!("{:?}", report("test", outcome));
        assert_eq!(ended(Ok(())), code(Status::Ok));
        let failure = Failure::io("write to stdout", &io::Error::other("full"));
        assert_eq!(ended(Err(failure.into())), code(Status::Io));
    }
}
