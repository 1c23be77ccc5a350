//! How a connection, or the channel on it, came to its end.

use std::fmt::Display;
use std::io;

use crate::error::{Error, ErrorKind};
use crate::frame::Fault;
use crate::method::Close;
use crate::tls;

/// The first reason for the end.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The broker has closed the channel of messages; the connection is open.
    ChannelClosed(Close),
    /// The broker has closed the connection.
    Closed(Close),
    /// The peer is not a broker, or a broken one.
    Fault(Fault),
    /// TLS has failed after the handshake.
    Tls(Error),
    /// The network or this program has ended the connection.
    Lost(String),
}

impl Ending {
    /// The peer has closed the socket without a word.
    pub fn end_of_stream() -> Ending {
        Ending::Lost("underlying socket closed unexpectedly".into())
    }

    /// The end that an error of reading means.
    pub fn unreadable(error: &io::Error) -> Ending {
        match tls::failure_of(error) {
            Some(failure) => Ending::Tls(failure),
            None => Ending::Lost(format!("I/O error while reading socket: {error}")),
        }
    }

    /// How the broker has closed the connection or the channel.
    pub fn close(&self) -> Option<&Close> {
        match self {
            Ending::ChannelClosed(close) | Ending::Closed(close) => Some(close),
            _ => None,
        }
    }

    /// The error of an `operation` that could not be completed.
    pub fn error(&self, operation: impl Display) -> Error {
        match self {
            Ending::ChannelClosed(close) | Ending::Closed(close) => {
                Error::reply(operation, close.code, &close.text)
            }
            Ending::Fault(fault) => {
                Error::unavailable(format!("{operation}: connection lost ({fault})"))
            }
            Ending::Tls(failure) => {
                Error::unavailable(format!("{operation}: connection lost ({failure})"))
            }
            Ending::Lost(reason) => {
                Error::unavailable(format!("{operation}: connection lost ({reason})"))
            }
        }
    }

    /// The error of a login, where the bytes of the peer are no AMQP, or no TLS.
    pub fn failure_of_login(&self, login: impl Display) -> Option<Error> {
        match self {
            Ending::Fault(fault) => {
                Some(Error::new(ErrorKind::Protocol, format!("{login}: {fault}")))
            }
            Ending::Tls(failure) => Some(Error::new(failure.kind(), format!("{login}: {failure}"))),
            _ => None,
        }
    }
}
