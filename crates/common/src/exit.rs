//! Errors, and the exit status each leads to.
//!
//! A [`Failure`] is made where the error happens, as only that place knows what was tried; the
//! rest of the program adds context with `anyhow` and never looks inside.

use std::fmt::Display;
use std::io;
use std::process::ExitCode;

use anyhow::Error;

use crate::notes::last_words;

/// Exit statuses, with the values of `sysexits.h`, so that scripts and service managers can tell
/// "try again" from "mend the configuration".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// All is done, or the program stopped as it was asked to.
    Ok = 0,
    /// An error that none of the others describes.
    Other = 1,
    /// The command line is wrong; the value that clap uses.
    Usage = 2,
    /// EX_DATAERR: a message that the broker does not take.
    Data = 65,
    /// EX_NOUSER: nobody listens, although somebody must.
    NoReceiver = 67,
    /// EX_UNAVAILABLE: no broker can be reached, or it was lost. The only status worth a retry.
    Unavailable = 69,
    /// EX_IOERR: input cannot be read or output cannot be written.
    Io = 74,
    /// EX_TEMPFAIL: a time limit passed first.
    TimeLimit = 75,
    /// EX_PROTOCOL: what answers is not an AMQP 0-9-1 broker.
    Protocol = 76,
    /// EX_NOPERM: login refused, or a permission is missing.
    Permission = 77,
    /// EX_CONFIG: the broker is set up otherwise than asked for.
    Config = 78,
}

/// An error that knows its exit status. Its text is one line that names what was tried, on what,
/// what came back, and what to do next; it holds no password.
#[derive(Debug)]
pub struct Failure {
    /// How the program ends if nothing can be done about it.
    pub status: Status,
    message: String,
    /// What the broker replied, if it did.
    code: Option<u16>,
}

impl Failure {
    /// A failure with the given line as its text.
    pub fn new(status: Status, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into(), code: None }
    }

    /// A failure that another attempt may cure.
    pub fn unavailable(message: impl Into<String>) -> Failure {
        Failure::new(Status::Unavailable, message)
    }

    /// What amiquip reports of an `operation` such as `declare exchange 'logs'`.
    pub fn amqp(operation: impl Display, error: amiquip::Error) -> Failure {
        use amiquip::Error as E;
        match error {
            E::ServerClosedChannel { code, message, .. }
            | E::ServerClosedConnection { code, message } => {
                Failure::reply(operation, code, &message)
            }
            E::MalformedFrame | E::FrameUnexpected => Failure::new(
                Status::Protocol,
                format!("{operation}: what answers does not speak AMQP 0-9-1 ({error})"),
            ),
            E::UnsupportedAuthMechanism { .. } => Failure::new(
                Status::Permission,
                format!("{operation}: refused ({error}){LOGIN_HINT}"),
            ),
            // amiquip's guess; a broker that refuses the login says so.
            E::InvalidCredentials => Failure::unavailable(format!(
                "{operation}: connection closed without a word (if it stays so, check user and \
                 password)"
            )),
            E::FrameMaxTooSmall { .. } | E::UnsupportedLocale { .. } => {
                Failure::new(Status::Protocol, format!("{operation}: {error}"))
            }
            E::ForkFailed { source } => Failure::no_thread(operation, &source),
            E::CreatePollHandle { .. } | E::RegisterWithPollHandle { .. } => {
                Failure::unavailable(format!("{operation}: {error}"))
            }
            // All that is left means that the connection is gone, told in different ways.
            _ => {
                Failure::new(Status::Unavailable, format!("{operation}: connection lost ({error})"))
            }
        }
    }

    /// The system has no thread for an `operation`: too many processes, or too little memory.
    pub fn no_thread(operation: impl Display, error: &io::Error) -> Failure {
        Failure::unavailable(format!("{operation}: cannot start a thread ({error})"))
    }

    /// What the broker replies to an `operation`: a reply code of AMQP, and a text.
    pub fn reply(operation: impl Display, code: u16, text: &str) -> Failure {
        let (status, hint) = judge(code, text);
        Failure { status, message: format!("{operation}: {text}{hint}"), code: Some(code) }
    }

    /// Whether the broker said it.
    pub fn is_reply(&self) -> bool {
        self.code.is_some()
    }

    /// Whether the broker refused to declare an exchange that differs in nothing but its durability.
    pub fn is_other_durability(&self) -> bool {
        self.code == Some(406) && self.message.contains("inequivalent arg 'durable' for exchange")
    }

    /// The same failure of something that went well before: what is missing now may come back, and
    /// so may the broker, whatever answers in its place.
    pub fn after_success(mut self) -> Failure {
        if self.code == Some(404) || self.status == Status::Protocol {
            self.status = Status::Unavailable;
        }
        self
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

const LOGIN_HINT: &str =
    " (check user and password; guest may log in only on the broker's own machine)";

/// The status of a reply code of AMQP 0-9-1, with what to do about it. The text is looked at
/// where RabbitMQ uses one code for things that a user mends in different places.
fn judge(code: u16, text: &str) -> (Status, &'static str) {
    match code {
        // connection-forced, internal-error: an operator or a node going down ended it.
        320 | 541 => (Status::Unavailable, ""),
        311 => (Status::Data, ""),
        403 if text.contains("Login was refused") => (Status::Permission, LOGIN_HINT),
        403 => (Status::Permission, " (give the user the permission: rabbitmqctl set_permissions)"),
        // The node of a queue may come back.
        404 if text.contains("down or inaccessible") => (Status::Unavailable, ""),
        404 => (Status::Config, " (create it, or leave out --passive so that it is declared)"),
        405 => (Status::Config, " (another connection has it to itself: use another --queue)"),
        406 if text.contains("message size") => {
            (Status::Data, " (send less, or raise max_message_size of the broker)")
        }
        406 if text.contains("acknowledgement") => (
            Status::Unavailable,
            " (the reader of the output is too slow, or was stopped: what the broker sends ahead took \
             longer than its consumer_timeout)",
        ),
        406 if !text.contains("inequivalent") => (Status::Config, ""),
        406 if text.contains("for queue") => (
            Status::Config,
            " (it exists with other settings: use its --queue-type and --max-backlog, --passive, \
             or another --queue, or delete it)",
        ),
        406 => (
            Status::Config,
            " (it exists with other settings: use another --exchange, or --passive, or delete it)",
        ),
        530 if text.contains("limit") => (Status::Unavailable, ""),
        530 if text.contains("refused for user") => (
            Status::Permission,
            " (give the user access to the vhost: rabbitmqctl set_permissions)",
        ),
        530 if text.contains("vhost  not found") => (
            Status::Config,
            " (leave out the final '/' of the URI: amqp://host/ asks for the vhost with the empty \
             name, amqp://host or amqp://host/%2f for the default one)",
        ),
        530 => (
            Status::Config,
            " (create the vhost: rabbitmqctl add_vhost; the default one is written %2f at the \
             end of the URI)",
        ),
        // syntax-error, command-invalid, channel-error, unexpected-frame
        501..=505 => (Status::Protocol, ""),
        _ => (Status::Other, ""),
    }
}

/// Names the operation in which amiquip failed: `channel.qos(..).during("set the prefetch")?`.
pub trait During<T> {
    /// Turns an error of amiquip into a [`Failure`] of this operation.
    fn during(self, operation: impl Display) -> Result<T, Failure>;
}

impl<T> During<T> for amiquip::Result<T> {
    fn during(self, operation: impl Display) -> Result<T, Failure> {
        self.map_err(|error| Failure::amqp(operation, error))
    }
}

/// The exit status that an error leads to.
pub fn status_of(error: &Error) -> Status {
    match error.downcast_ref::<Failure>() {
        Some(failure) => failure.status,
        None => Status::Other,
    }
}

/// Ends `program`: on an error, one line on stderr; in any case the exit status.
pub fn report(program: &str, outcome: Result<(), Error>) -> ExitCode {
    let status = match outcome {
        Ok(()) => Status::Ok,
        Err(error) => {
            last_words(format_args!("{program}: {error:#}"));
            status_of(&error)
        }
    };
    ExitCode::from(status as u8)
}

/// The text with line breaks and other control characters replaced, as much of it may come from
/// the network.
pub fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_code_decides_the_status() {
        for (code, text, status) in [
            (320, "CONNECTION_FORCED - by operator", Status::Unavailable),
            (403, "ACCESS_REFUSED - access to exchange 'logs'", Status::Permission),
            (404, "NOT_FOUND - no exchange 'logs'", Status::Config),
            (404, "NOT_FOUND - queue 'q' is down or inaccessible", Status::Unavailable),
            (405, "RESOURCE_LOCKED - exclusive access to locked queue 'q'", Status::Config),
            (406, "PRECONDITION_FAILED - inequivalent arg 'type'", Status::Config),
            (406, "PRECONDITION_FAILED - message size 2 is larger", Status::Data),
            (530, "NOT_ALLOWED - vhost x not found", Status::Config),
            (530, "NOT_ALLOWED - vhost  not found", Status::Config),
            (530, "NOT_ALLOWED - access to vhost 'x' refused for user 'u'", Status::Permission),
            (504, "CHANNEL_ERROR - expected 'channel.open'", Status::Protocol),
            (999, "unheard of", Status::Other),
        ] {
            let failure = Failure::reply("try", code, text);
            assert_eq!(failure.status, status, "{code} {text}");
            assert!(failure.to_string().starts_with(&format!("try: {text}")));
        }
    }

    #[test]
    fn what_was_there_before_may_come_back() {
        let missing = Failure::reply("bind", 404, "NOT_FOUND - no exchange 'logs'");
        assert_eq!(missing.after_success().status, Status::Unavailable);
        let other = Failure::new(Status::Protocol, "log in: an HTTP server answers");
        assert_eq!(other.after_success().status, Status::Unavailable);
        let refused = Failure::reply("bind", 403, "ACCESS_REFUSED");
        assert_eq!(refused.after_success().status, Status::Permission);
    }

    #[test]
    fn context_does_not_hide_the_status() {
        let error = Error::new(Failure::new(Status::Data, "too large")).context("line 7");
        assert_eq!(status_of(&error), Status::Data);
        assert_eq!(format!("{error:#}"), "line 7: too large");
    }

    #[test]
    fn what_the_network_says_stays_on_one_line() {
        assert_eq!(one_line("a\nb\x1b[31m"), "a b [31m");
    }
}
