//! What goes wrong between a client and a broker.

use std::fmt::{self, Display};
use std::io;

/// An error of an operation on a broker. Its text is one line that names what was tried, on what, the
/// broker's own words, and what to do next; it holds no password.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    text: String,
    is_reply: bool,
}

/// What happened, as far as it decides what can be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// No broker can be reached, or the connection to it is lost: a later attempt may succeed.
    Unavailable,
    /// What answers is not an AMQP 0-9-1 broker.
    Protocol,
    /// The login is refused, or a permission is missing.
    Permission,
    /// An exchange or a queue that is used as it is does not exist.
    NotFound,
    /// The exchange exists, and differs in nothing but its durability from the one declared.
    OtherDurability,
    /// The broker is set up otherwise than asked for, or a certificate is not right.
    Configuration,
    /// The broker does not take messages of this size.
    TooLarge,
    /// A file cannot be read.
    File,
    /// Anything else.
    Other,
}

impl Error {
    /// An error with the given line as its text.
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> Error {
        Error { kind, text: text.into(), is_reply: false }
    }

    /// An error that another attempt may cure.
    pub fn unavailable(text: impl Into<String>) -> Error {
        Error::new(ErrorKind::Unavailable, text)
    }

    /// The system has no thread for an `operation`: too many processes, or too little memory.
    pub fn no_thread(operation: impl Display, error: &io::Error) -> Error {
        Error::unavailable(format!("{operation}: cannot start a thread ({error})"))
    }

    /// A file that cannot be read.
    pub(crate) fn file(operation: impl Display, error: &io::Error) -> Error {
        Error::new(ErrorKind::File, format!("{operation}: {error}"))
    }

    /// What amiquip reports of an `operation` such as `declare exchange 'logs'`.
    pub(crate) fn from_amiquip(operation: impl Display, error: amiquip::Error) -> Error {
        use amiquip::Error as E;
        match error {
            E::ServerClosedChannel { code, message, .. }
            | E::ServerClosedConnection { code, message } => {
                Error::reply(operation, code, &message)
            }
            E::MalformedFrame | E::FrameUnexpected => Error::new(
                ErrorKind::Protocol,
                format!("{operation}: what answers does not speak AMQP 0-9-1 ({error})"),
            ),
            E::UnsupportedAuthMechanism { .. } => Error::new(
                ErrorKind::Permission,
                format!("{operation}: refused ({error}){LOGIN_HINT}"),
            ),
            // amiquip guesses that; a broker that refuses the login says so.
            E::InvalidCredentials => Error::unavailable(format!(
                "{operation}: connection closed without a word (if it stays so, check user and \
                 password)"
            )),
            E::FrameMaxTooSmall { .. } | E::UnsupportedLocale { .. } => {
                Error::new(ErrorKind::Protocol, format!("{operation}: {error}"))
            }
            E::ForkFailed { source } => Error::no_thread(operation, &source),
            E::CreatePollHandle { .. } | E::RegisterWithPollHandle { .. } => {
                Error::unavailable(format!("{operation}: {error}"))
            }
            // All others mean that the connection is gone, told in different ways.
            _ => Error::unavailable(format!("{operation}: connection lost ({error})")),
        }
    }

    /// What the broker replies to an `operation`: a reply code of AMQP, and a text.
    pub(crate) fn reply(operation: impl Display, code: u16, text: &str) -> Error {
        let (kind, hint) = classify_reply(code, text);
        Error { kind, text: format!("{operation}: {text}{hint}"), is_reply: true }
    }

    /// What happened.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether the same may succeed later: a broker that cannot be reached may come back; a refused
    /// login, a missing vhost or an exchange of another type will not mend itself.
    pub fn is_transient(&self) -> bool {
        self.kind == ErrorKind::Unavailable
    }

    /// Whether the text has the broker's own words, in a reply to what was tried.
    pub(crate) fn is_reply(&self) -> bool {
        self.is_reply
    }

    /// The same error of what has succeeded before: what is missing now may come back, and so may the
    /// broker, whatever answers in its place.
    pub fn after_success(mut self) -> Error {
        if matches!(self.kind, ErrorKind::NotFound | ErrorKind::Protocol) {
            self.kind = ErrorKind::Unavailable;
        }
        self
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

const LOGIN_HINT: &str =
    " (check user and password; guest may log in only on the broker's own machine)";

const SETTINGS_HINT: &str =
    " (it exists with other settings: use another --exchange, or --passive, or delete it)";

/// What a reply code of AMQP 0-9-1 means, and what to do about it. The text decides where RabbitMQ uses
/// one code for what a user mends in different places.
fn classify_reply(code: u16, text: &str) -> (ErrorKind, &'static str) {
    use ErrorKind as K;
    match code {
        // connection-forced, internal-error: an operator or a node going down ended it.
        320 | 541 => (K::Unavailable, ""),
        311 => (K::TooLarge, ""),
        403 if text.contains("Login was refused") => (K::Permission, LOGIN_HINT),
        403 => (K::Permission, " (give the user the permission: rabbitmqctl set_permissions)"),
        // The node of a queue may come back.
        404 if text.contains("down or inaccessible") => (K::Unavailable, ""),
        404 => (K::NotFound, " (create it, or leave out --passive so that it is declared)"),
        405 => (K::Configuration, " (another connection has it to itself: use another --queue)"),
        406 if text.contains("message size") => {
            (K::TooLarge, " (send less, or raise max_message_size of the broker)")
        }
        406 if text.contains("acknowledgement") => (
            K::Unavailable,
            " (the reader of the output is too slow, or was stopped: what the broker sends ahead took \
             longer than its consumer_timeout)",
        ),
        406 if !text.contains("inequivalent") => (K::Configuration, ""),
        406 if text.contains("arg 'durable' for exchange") => (K::OtherDurability, SETTINGS_HINT),
        406 if text.contains("for queue") => (
            K::Configuration,
            " (it exists with other settings: use its --queue-type and --max-backlog, --passive, \
             or another --queue, or delete it)",
        ),
        406 => (K::Configuration, SETTINGS_HINT),
        530 if text.contains("limit") => (K::Unavailable, ""),
        530 if text.contains("refused for user") => {
            (K::Permission, " (give the user access to the vhost: rabbitmqctl set_permissions)")
        }
        530 if text.contains("vhost  not found") => (
            K::Configuration,
            " (leave out the final '/' of the URI: amqp://host/ asks for the vhost with the empty \
             name, amqp://host or amqp://host/%2f for the default one)",
        ),
        530 => (
            K::Configuration,
            " (create the vhost: rabbitmqctl add_vhost; the default one is written %2f at the \
             end of the URI)",
        ),
        // syntax-error, command-invalid, channel-error, unexpected-frame
        501..=505 => (K::Protocol, ""),
        _ => (K::Other, ""),
    }
}

/// Names the operation in which amiquip failed: `channel.qos(..).during("set the prefetch")?`.
pub(crate) trait During<T> {
    /// Turns an error of amiquip into an [`Error`] of this operation.
    fn during(self, operation: impl Display) -> Result<T, Error>;
}

impl<T> During<T> for amiquip::Result<T> {
    fn during(self, operation: impl Display) -> Result<T, Error> {
        self.map_err(|error| Error::from_amiquip(operation, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_code_decides_the_kind() {
        use ErrorKind as K;
        for (code, text, kind) in [
            (320, "CONNECTION_FORCED - by operator", K::Unavailable),
            (403, "ACCESS_REFUSED - access to exchange 'logs'", K::Permission),
            (404, "NOT_FOUND - no exchange 'logs'", K::NotFound),
            (404, "NOT_FOUND - queue 'q' is down or inaccessible", K::Unavailable),
            (405, "RESOURCE_LOCKED - exclusive access to locked queue 'q'", K::Configuration),
            (406, "PRECONDITION_FAILED - inequivalent arg 'type'", K::Configuration),
            (
                406,
                "PRECONDITION_FAILED - inequivalent arg 'durable' for exchange 'logs'",
                K::OtherDurability,
            ),
            (406, "PRECONDITION_FAILED - message size 2 is larger", K::TooLarge),
            (530, "NOT_ALLOWED - vhost x not found", K::Configuration),
            (530, "NOT_ALLOWED - vhost  not found", K::Configuration),
            (530, "NOT_ALLOWED - access to vhost 'x' refused for user 'u'", K::Permission),
            (504, "CHANNEL_ERROR - expected 'channel.open'", K::Protocol),
            (999, "unheard of", K::Other),
        ] {
            let error = Error::reply("try", code, text);
            assert_eq!(error.kind(), kind, "{code} {text}");
            assert!(error.to_string().starts_with(&format!("try: {text}")));
        }
    }

    #[test]
    fn what_was_there_before_may_come_back() {
        use ErrorKind as K;
        let missing = Error::reply("bind", 404, "NOT_FOUND - no exchange 'logs'");
        assert_eq!(missing.after_success().kind(), K::Unavailable);
        let other = Error::new(K::Protocol, "log in: an HTTP server answers");
        assert_eq!(other.after_success().kind(), K::Unavailable);
        let refused = Error::reply("bind", 403, "ACCESS_REFUSED");
        assert_eq!(refused.after_success().kind(), K::Permission);
    }
}
