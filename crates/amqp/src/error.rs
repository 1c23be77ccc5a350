//! Errors of operations on a broker.

use std::fmt::{self, Display};
use std::io;

use crate::declare::Exchange;

/// An error of an operation on a broker. Its text is a line that names the operation, its object, the
/// broker's own words and a remedy; the text holds no password.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    text: String,
    /// The operation that the broker has refused.
    refused: Option<String>,
    /// The largest body that the broker takes, in bytes, where it has refused a larger one.
    size_limit: Option<usize>,
    /// Whether the refused operation has succeeded before.
    has_succeeded: bool,
}

/// The cause of an error, as far as it decides about a remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// No broker can be reached: a later attempt may succeed.
    Unreachable,
    /// The broker is going down, the connection is lost, or this machine lacks resources for another one: a later attempt
    /// may succeed.
    Unavailable,
    /// The peer is not an AMQP 0-9-1 broker.
    Protocol,
    /// The login is refused, or a permission is missing.
    Permission,
    /// An exchange or a queue that is used without a declaration does not exist.
    NotFound,
    /// The queue is exclusive to another connection.
    Locked,
    /// The exchange exists, and differs from the declaration in its durability alone.
    OtherDurability,
    /// The broker no longer permits something, such as a transient exchange.
    Deprecated,
    /// The exchange exists with another type.
    OtherExchangeType,
    /// The exchange exists with other settings.
    OtherExchange,
    /// The queue exists with other settings.
    OtherQueue,
    /// The queue exists and is no stream.
    NotAStream,
    /// The stream has no replica on this node of the cluster.
    NoReplica,
    /// The vhost does not exist.
    NoVhost,
    /// A certificate is wrong, or the broker refuses an argument.
    Configuration,
    /// No trusted authority has signed the certificate of the broker.
    Untrusted,
    /// The broker refuses the TLS handshake: it may require a client certificate.
    ClientCertificate,
    /// The broker does not take messages of this size.
    TooLarge,
    /// A file cannot be read.
    File,
    /// Any other cause.
    Other,
}

/// A remedy for an error of this kind that names options of the program. It ends the text of the error, so it begins
/// with a space unless it is empty.
pub type Hint = fn(ErrorKind) -> &'static str;

impl Error {
    /// An error with the given line as its text.
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> Error {
        let text = text.into();
        Error { kind, text, refused: None, size_limit: None, has_succeeded: false }
    }

    /// An error after which another attempt may succeed.
    pub fn unavailable(text: impl Into<String>) -> Error {
        Error::new(ErrorKind::Unavailable, text)
    }

    /// No broker can be reached.
    pub(crate) fn unreachable(text: impl Into<String>) -> Error {
        Error::new(ErrorKind::Unreachable, text)
    }

    /// The system has no thread for an `operation`: too many processes, or too little memory.
    pub(crate) fn no_thread(operation: impl Display, error: &io::Error) -> Error {
        Error::unavailable(format!("{operation}: cannot start a thread ({error})"))
    }

    /// The broker's reply to an `operation`: a reply code of AMQP, and a text.
    pub(crate) fn reply(operation: impl Display, code: u16, text: &str) -> Error {
        let (kind, hint) = classify_reply(code, text);
        // The reply about a deprecated feature has several lines, and says in the first which it is.
        let text = text.lines().next().unwrap_or_default();
        let error = Error::new(kind, format!("{operation}: {text}{hint}"));
        let refused = Some(operation.to_string());
        Error { refused, size_limit: size_limit(kind, text), ..error }
    }

    /// The same error, as an error of the operation that contains the failed step.
    pub(crate) fn in_operation(self, operation: impl Display) -> Error {
        Error { text: format!("{operation}: {}", self.text), ..self }
    }

    /// The same error with the program's remedy at the end of the text.
    pub(crate) fn with_hint(mut self, hint: Hint) -> Error {
        self.text.push_str(hint(self.kind));
        self
    }

    /// The cause.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether the broker has refused to declare this exchange.
    pub fn refuses(&self, exchange: &Exchange) -> bool {
        self.refused.as_ref().is_some_and(|operation| *operation == exchange.declaring())
    }

    /// The largest body that the broker takes, in bytes, if it has refused a larger one with its limit.
    pub fn size_limit(&self) -> Option<usize> {
        self.size_limit
    }

    /// Whether the same may succeed later. A broker that cannot be reached may come back, and the replica of a stream
    /// starts some time after its node. An exchange of another type stays, and so does a refused login, unless that
    /// login has succeeded before.
    pub fn is_transient(&self) -> bool {
        use ErrorKind::{NoReplica, Unavailable, Unreachable};
        matches!(self.kind, Unreachable | Unavailable | NoReplica) || self.is_revoked()
    }

    /// Whether the broker refuses a login, a permission or a vhost that it has granted before.
    fn is_revoked(&self) -> bool {
        self.has_succeeded && matches!(self.kind, ErrorKind::Permission | ErrorKind::NoVhost)
    }

    /// The same error of an operation that has succeeded before. A missing exchange, the replica of a stream, or a broker
    /// whose port is taken by another program may come back. A revoked login or permission may be granted again; it
    /// keeps its kind.
    pub fn after_success(mut self) -> Error {
        self.has_succeeded = true;
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

/// The kind of a reply code of AMQP 0-9-1, and a remedy on the broker's side. The text
/// decides where RabbitMQ has a single code for causes with different remedies.
///
/// RabbitMQ (3.10 to 4.3) repeats names that users choose, quoted or not, and a name may contain any words.
/// Only words before the first name decide, or words after the quote that ends the last name.
fn classify_reply(code: u16, text: &str) -> (ErrorKind, &'static str) {
    use ErrorKind as K;
    // The reason in `NOT_FOUND - no exchange 'logs' in vhost '/'`.
    let reason = text.split_once(" - ").map_or("", |(_, reason)| reason);
    let begins = |words| reason.starts_with(words);
    let ends = |words| reason.ends_with(words);
    match code {
        541 if begins("Feature `") => (K::Deprecated, ""),
        // connection-forced, internal-error: an operator, or a node that is going down.
        320 | 541 => (K::Unavailable, ""),
        311 => (K::TooLarge, ""),
        403 if begins("Login was refused") => (K::Permission, LOGIN_HINT),
        403 if ends("' contains reserved prefix 'amq.*'") => {
            (K::Configuration, " (only the broker makes what begins with amq.: use another name)")
        }
        403 => (K::Permission, " (give the user the permission: rabbitmqctl set_permissions)"),
        // The node of a queue may come back, and the process of a queue may restart.
        404 if begins("home node '")
            || begins("failed to perform operation on ")
            || ends("' process is stopped by supervisor") =>
        {
            (K::Unavailable, "")
        }
        404 if begins("no exchange 'amq.") => (
            K::Configuration,
            " (amq. is a reserved prefix: only the broker and its plugins create such an exchange; use \
             another name)",
        ),
        404 => (K::NotFound, ""),
        405 => (K::Locked, ""),
        406 if begins("message size ") => {
            (K::TooLarge, " (send less, or raise max_message_size of the broker)")
        }
        406 if begins("delivery acknowledgement ") => (
            K::Unavailable,
            " (the reader of the output is too slow, or was stopped: what the broker sends ahead took \
             longer than its consumer_timeout)",
        ),
        // A limit on the number of queues or exchanges.
        406 if begins("cannot declare ") => (K::Unavailable, ""),
        406 if begins("invalid arg 'x-stream-offset'") => (K::NotAStream, ""),
        406 if begins("inequivalent arg 'durable' for exchange ") => (K::OtherDurability, ""),
        406 if begins("inequivalent arg 'type' for exchange ") => (K::OtherExchangeType, ""),
        406 if begins("inequivalent arg '") => match reason.split_once("' for ") {
            Some((_, object)) if object.starts_with("queue ") => (K::OtherQueue, ""),
            _ => (K::OtherExchange, ""),
        },
        406 if ends(" replica on the local node") => (K::NoReplica, ""),
        406 => (K::Configuration, ""),
        // Limits on the connections and channels of the node, the user and the vhost.
        530 if begins("connection refused") || begins("number of channels opened ") => {
            (K::Unavailable, "")
        }
        530 if begins("access to vhost '") => {
            if ends(") is reached") || ends(": connection limit cannot be queried, timeout") {
                return (K::Unavailable, "");
            }
            (K::Permission, " (give the user access to the vhost: rabbitmqctl set_permissions)")
        }
        530 if reason == "vhost  not found" => (
            K::NoVhost,
            " (leave out the final '/' of the URI: amqp://host/ asks for the vhost with the empty \
             name, amqp://host or amqp://host/%2f for the default one; in a crontab, write % as \\%)",
        ),
        530 => (
            K::NoVhost,
            " (create the vhost: rabbitmqctl add_vhost; the default one is written %2f at the \
             end of the URI)",
        ),
        // The replica of the node starts, after the node or a new leader.
        506 if ends(" running local replica") => (K::NoReplica, ""),
        // resource-error: the broker has not enough of something now.
        506 => (K::Unavailable, ""),
        // syntax-error, command-invalid, channel-error, unexpected-frame
        501..=505 => (K::Protocol, ""),
        _ => (K::Other, ""),
    }
}

/// The limit in RabbitMQ's words for a body that is too large: `... max size 1000`.
fn size_limit(kind: ErrorKind, text: &str) -> Option<usize> {
    let (_, limit) = text.rsplit_once("max size ").filter(|_| kind == ErrorKind::TooLarge)?;
    let digits = limit.find(|c: char| !c.is_ascii_digit()).unwrap_or(limit.len());
    limit[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The replies of RabbitMQ 3.10 to 4.3 to the operations of the tools, by the name of the objects.
    #[rustfmt::skip]
    fn replies(name: &str) -> Vec<(u16, String, ErrorKind)> {
        use ErrorKind as K;
        let exchange = format!("exchange '{name}' in vhost '{name}'");
        let queue = format!("queue '{name}' in vhost '{name}'");
        let refused = format!("refused for user '{name}'");
        let replies = [
            (320, format!("CONNECTION_FORCED - vhost '{name}' is deleted"), K::Unavailable),
            (403, "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN.".into(), K::Permission),
            (403, format!("ACCESS_REFUSED - access to {exchange} {refused}"), K::Permission),
            (403, format!("ACCESS_REFUSED - write access to {exchange} {refused}"), K::Permission),
            (403, format!("ACCESS_REFUSED - {queue} in exclusive use"), K::Permission),
            (403, format!("ACCESS_REFUSED - exchange name 'amq.{name}' contains reserved prefix 'amq.*'"), K::Configuration),
            (404, format!("NOT_FOUND - no {exchange}"), K::NotFound),
            (404, format!("NOT_FOUND - no {queue}"), K::NotFound),
            (404, format!("NOT_FOUND - home node 'rabbit@{name}' of durable {queue} is down or inaccessible"), K::Unavailable),
            (404, format!("NOT_FOUND - {queue} process is stopped by supervisor"), K::Unavailable),
            (404, format!("NOT_FOUND - {queue} has crashed and failed to restart"), K::NotFound),
            (404, format!("NOT_FOUND - failed to perform operation on {queue} due to timeout"), K::Unavailable),
            (405, format!("RESOURCE_LOCKED - cannot obtain exclusive access to locked {queue}. It could be"), K::Locked),
            (406, "PRECONDITION_FAILED - message size 2 is larger than configured max size 1".into(), K::TooLarge),
            (406, "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out.".into(), K::Unavailable),
            (406, format!("PRECONDITION_FAILED - cannot declare queue '{name}': queue limit in vhost '{name}' (1) is reached"), K::Unavailable),
            (406, format!("PRECONDITION_FAILED - cannot declare {exchange}: exchange limit of 1 is reached"), K::Unavailable),
            (406, format!("PRECONDITION_FAILED - inequivalent arg 'type' for {exchange}: received 'fanout'"), K::OtherExchangeType),
            (406, format!("PRECONDITION_FAILED - inequivalent arg 'auto_delete' for {exchange}: received 'false'"), K::OtherExchange),
            (406, format!("PRECONDITION_FAILED - inequivalent arg 'durable' for {exchange}: received"), K::OtherDurability),
            (406, format!("PRECONDITION_FAILED - inequivalent arg 'durable' for {queue}: received"), K::OtherQueue),
            (406, format!("PRECONDITION_FAILED - inequivalent arg 'x-max-age' for {queue}: received none but current is the value '{name}' of type 'longstr'"), K::OtherQueue),
            (406, format!("PRECONDITION_FAILED - invalid arg 'x-stream-offset' for {queue} of queue type rabbit_classic_queue"), K::NotAStream),
            (406, format!("PRECONDITION_FAILED - invalid property 'exclusive-owner' for {queue}"), K::Configuration),
            (406, format!("PRECONDITION_FAILED - queue '{queue}' does not have a replica on the local node"), K::NoReplica),
            (406, format!("PRECONDITION_FAILED - stream {queue} does not have a running replica on the local node"), K::NoReplica),
            (406, "PRECONDITION_FAILED - unknown delivery tag 1".into(), K::Configuration),
            (506, format!("RESOURCE_ERROR - {queue} does not have a running local replica"), K::NoReplica),
            (506, format!("RESOURCE_ERROR - {queue} is too large"), K::Unavailable),
            (530, format!("NOT_ALLOWED - vhost {name} not found"), K::NoVhost),
            (530, format!("NOT_ALLOWED - access to vhost '{name}' {refused}"), K::Permission),
            (530, format!("NOT_ALLOWED - access to vhost '{name}' {refused}, backend rabbit_auth_backend_http returned an error: timeout"), K::Permission),
            (530, format!("NOT_ALLOWED - access to vhost '{name}' {refused}: connection limit (1) is reached"), K::Unavailable),
            (530, format!("NOT_ALLOWED - access to vhost '{name}' {refused}: connection limit cannot be queried, timeout"), K::Unavailable),
            (530, format!("NOT_ALLOWED - connection {refused}: user connection limit (1) is reached"), K::Unavailable),
            (530, "NOT_ALLOWED - connection refused: node connection limit (1) is reached".into(), K::Unavailable),
            (530, format!("NOT_ALLOWED - number of channels opened for user '{name}' has reached the maximum"), K::Unavailable),
            (541, "INTERNAL_ERROR - Feature `transient_exchanges` is deprecated.".into(), K::Deprecated),
            (541, format!("INTERNAL_ERROR - access to vhost '{name}' {refused}: vhost '{name}' is down"), K::Unavailable),
        ];
        replies.into()
    }

    #[test]
    fn no_name_changes_the_kind_of_a_reply() {
        for name in [
            "logs",
            "",
            "limits",
            "acknowledgements",
            "message size",
            "not found - ",
            "a' - vhost ",
            "Login was refused",
            "it is down or inaccessible",
            "' process is stopped by supervisor",
            "x replica on the local node",
            " running local replica",
            "invalid arg 'x-stream-offset'",
            "inequivalent arg 'durable' for exchange ",
            "' contains reserved prefix 'amq.*'",
            "' for queue 'q",
            "' for exchange 'e",
            "u': connection limit (1) is reached",
            "': connection limit cannot be queried, timeout",
            "a' refused for user 'b",
            "Feature `",
            "connection refused",
        ] {
            for (code, text, kind) in replies(name) {
                let error = Error::reply("try", code, &text);
                assert_eq!(error.kind(), kind, "{code} {text}");
                assert!(error.to_string().starts_with(&format!("try: {text}")));
            }
        }
    }

    #[test]
    fn a_reply_code_without_a_known_reason_decides_the_kind() {
        use ErrorKind as K;
        for (code, text, kind) in [
            (311, "CONTENT_TOO_LARGE", K::TooLarge),
            (403, "ACCESS_REFUSED", K::Permission),
            (404, "NOT_FOUND", K::NotFound),
            (406, "PRECONDITION_FAILED", K::Configuration),
            (504, "CHANNEL_ERROR - expected 'channel.open'", K::Protocol),
            (530, "NOT_ALLOWED", K::NoVhost),
            (999, "unknown", K::Other),
        ] {
            assert_eq!(Error::reply("try", code, text).kind(), kind, "{code} {text}");
        }
    }

    #[test]
    fn a_size_limit_is_read_from_the_reply() {
        let text =
            "PRECONDITION_FAILED - message size 1001 is larger than configured max size 1000";
        let limit = |code, text| Error::reply("publish to 'max size 7'", code, text).size_limit();
        assert_eq!(limit(406, text), Some(1000));
        assert_eq!(limit(406, "PRECONDITION_FAILED - message size"), None);
        assert_eq!(limit(404, "NOT_FOUND - no exchange 'max size 5'"), None);
    }

    #[test]
    fn an_object_that_was_there_before_may_come_back() {
        use ErrorKind as K;
        let missing = Error::reply("bind", 404, "NOT_FOUND - no exchange 'logs'");
        assert_eq!(missing.after_success().kind(), K::Unavailable);
        let other = Error::new(K::Protocol, "log in: an HTTP server answers");
        assert_eq!(other.after_success().kind(), K::Unavailable);
    }

    #[test]
    fn what_was_granted_before_may_be_granted_again() {
        use ErrorKind as K;
        for (code, text, kind) in [
            (403, "ACCESS_REFUSED - Login was refused", K::Permission),
            (530, "NOT_ALLOWED - vhost v not found", K::NoVhost),
            (530, "NOT_ALLOWED - access to vhost 'v' refused for user 'u'", K::Permission),
        ] {
            let error = Error::reply("log in", code, text);
            assert!(!error.is_transient(), "{text}");
            let error = error.after_success();
            assert!(error.is_transient(), "{text}");
            assert_eq!(error.kind(), kind, "for the exit status");
        }
        let other = Error::new(K::OtherExchange, "another type").after_success();
        assert!(!other.is_transient());
    }
}
