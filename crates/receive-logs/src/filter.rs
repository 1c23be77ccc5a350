//! `--grep`, `--exclude`, `--level` and `--from`: which records are written.

use logs_severity::Severity;
use regex::bytes::Regex;

use crate::cli::FilterArgs;
use crate::message::{Message, host};

impl FilterArgs {
    /// Whether the options select every record.
    pub fn select_all(&self) -> bool {
        let FilterArgs { grep, exclude, level, from } = self;
        grep.is_empty() && exclude.is_empty() && level.is_none() && from.is_empty()
    }
}

/// Selects the records to write, after the account of losses.
pub struct Filter {
    args: FilterArgs,
}

impl Filter {
    /// A filter from the options; `None` if they select every record.
    pub fn new(args: &FilterArgs) -> Option<Filter> {
        (!args.select_all()).then(|| Filter { args: args.clone() })
    }

    /// Whether the sender of a message is selected: its `app_id`, or its header `Host`.
    pub fn accepts_sender(&self, message: &Message) -> bool {
        let properties = &message.delivery.properties;
        let senders = [properties.app_id().as_deref(), host(properties)];
        let is_sender = |name: &String| senders.contains(&Some(name.as_str()));
        self.args.from.is_empty() || self.args.from.iter().any(is_sender)
    }

    /// Whether a record is selected.
    pub fn accepts(&self, record: &[u8]) -> bool {
        let FilterArgs { grep, exclude, level, .. } = &self.args;
        let is_match = |pattern: &Regex| pattern.is_match(record);
        (grep.is_empty() || grep.iter().any(is_match))
            && !exclude.iter().any(is_match)
            && level.is_none_or(|level| severity(record) >= Some(level))
    }
}

fn severity(record: &[u8]) -> Option<Severity> {
    logs_severity::find(record).map(|(_, severity)| severity)
}

#[cfg(test)]
mod tests {
    use amqp::{Properties, Value};
    use clap::Parser;
    use logs_common::wire::HOST;

    use super::*;
    use crate::cli::Cli;
    use crate::testing::delivery;

    fn filter(options: &[&str]) -> Option<Filter> {
        Filter::new(&Cli::parse_from([&["receive-logs"], options].concat()).filter)
    }

    #[test]
    fn records_are_selected_by_patterns_and_severity() {
        assert!(filter(&[]).is_none());
        for (options, accepted, rejected) in [
            (&["--grep", "time.?out|refused"][..], &["a timeout", "refused"][..], &["ok"][..]),
            (&["--grep", "a", "--grep", "b"], &["a", "xb"], &["c"]),
            (&["--grep", "(?i)error"], &["ERROR"], &["warning"]),
            (&["--exclude", "health", "--exclude", "ping"], &["GET /"], &["GET /health", "ping"]),
            (&["--grep", "GET", "--exclude", "health"], &["GET /"], &["GET /health", "POST /"]),
            (&["--level", "warning"], &["warn: a", "[ERROR] b", "fatal: c"], &["info: d", "e", ""]),
            (&["--level", "err"], &["error: a"], &["warning: b"]),
        ] {
            let filter = filter(options).unwrap();
            for record in accepted {
                assert!(filter.accepts(record.as_bytes()), "{options:?} {record}");
            }
            for record in rejected {
                assert!(!filter.accepts(record.as_bytes()), "{options:?} {record}");
            }
        }
        assert!(filter(&["--grep", "\\xff"]).unwrap().accepts("ÿ".as_bytes()));
        assert!(filter(&["--grep", "(?-u)\\xff"]).unwrap().accepts(b"\xff"), "bytes");
    }

    #[test]
    fn a_sender_is_an_app_id_or_a_host() {
        let with = |app_id: Option<&str>, host: Option<&str>| {
            let mut delivery = delivery(logs_tests::Message::new("a"));
            let mut properties = Properties::default();
            if let Some(app_id) = app_id {
                properties = properties.with_app_id(app_id.into());
            }
            if let Some(host) = host {
                let headers = [(HOST.to_string(), Value::LongString(host.into()))];
                properties = properties.with_headers(headers.into());
            }
            delivery.properties = properties;
            Message::new(delivery)
        };
        let filter = filter(&["--from", "backup", "--from", "web1"]).unwrap();
        assert!(filter.accepts_sender(&with(Some("backup"), Some("db1"))));
        assert!(filter.accepts_sender(&with(Some("app"), Some("web1"))));
        assert!(filter.accepts_sender(&with(None, Some("web1"))));
        for (app_id, host) in [(None, None), (Some("app"), None), (Some("backup2"), Some("web11"))]
        {
            assert!(!filter.accepts_sender(&with(app_id, host)));
        }
    }
}
