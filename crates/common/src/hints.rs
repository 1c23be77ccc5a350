//! Options to suggest after an error of the broker.

use amqp::ErrorKind;

/// Text to append to an error of this kind: the options that solve it, or nothing.
pub fn hint(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Unreachable => " (is the broker running? --uri or AMQP_URL names another)",
        ErrorKind::NotFound => " (create it, or leave out --passive so that it is declared)",
        ErrorKind::Locked => " (another connection uses it exclusively: use another --queue)",
        ErrorKind::OtherExchangeType => {
            " (it exists with another type: set it with --exchange-type, or use another --exchange)"
        }
        ErrorKind::OtherDurability | ErrorKind::OtherExchange => {
            " (it exists with other settings: use another --exchange, or --passive, or delete it)"
        }
        ErrorKind::OtherQueue => {
            " (it exists with other settings: use its --queue-type and --max-backlog, --passive, \
             or another --queue, or delete it)"
        }
        ErrorKind::Untrusted => {
            " (--cacert names an authority, or the certificate of the broker, to trust)"
        }
        ErrorKind::ClientCertificate => " (--cert and --key name it)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_names_options_or_is_empty() {
        let with_remedy = [
            ErrorKind::Unreachable,
            ErrorKind::NotFound,
            ErrorKind::Locked,
            ErrorKind::OtherDurability,
            ErrorKind::OtherExchangeType,
            ErrorKind::OtherExchange,
            ErrorKind::OtherQueue,
        ];
        for kind in with_remedy {
            let text = hint(kind);
            assert!(text.starts_with(" (") && text.ends_with(')') && text.contains("--"), "{text}");
        }
        assert_eq!(hint(ErrorKind::Other), "");
    }
}
