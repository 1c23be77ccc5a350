//! Routing keys, and the run of each.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use amqp::check_length;
use logs_severity::Severity;

use crate::message::Message;

/// The word for a record without a severity.
const NO_SEVERITY: &str = "none";

const SEVERITY: &str = "{severity}";
const TAG: &str = "{tag}";

/// The routing keys of this process: one, or one for each severity.
///
/// Each key has its own run, numbered from 1. A receiver that is bound to some of the keys then gets all messages of a
/// run or none, so its reports of gaps are exact.
pub struct Keys {
    /// Without `{severity}`, one key. Otherwise the key of records without a severity, and one for each severity.
    keys: Vec<Key>,
}

struct Key {
    text: Arc<str>,
    run: u64,
    /// The number of the next record.
    next: u64,
}

impl Keys {
    /// The keys of `--routing-key`, in which `{tag}` and `{severity}` are replaced.
    ///
    /// # Errors
    ///
    /// When the template has `{tag}` and there is no tag, or a key is longer than 255 bytes.
    pub fn new(template: &str, tag: Option<&str>) -> Result<Keys, String> {
        let mut template = template.to_string();
        if template.contains(TAG) {
            let tag = tag.ok_or("{tag} requires --tag")?;
            template = template.replace(TAG, tag);
        }
        let severities = Severity::all().map(Severity::name);
        let words: Vec<_> = match template.contains(SEVERITY) {
            true => [NO_SEVERITY].into_iter().chain(severities).collect(),
            false => vec![""],
        };
        let keys = words.into_iter().map(|word| {
            let text = template.replace(SEVERITY, word);
            check_length(&text, "key")?;
            // The keys of a hasher are from the operating system, because runs on all machines need different numbers.
            let run = RandomState::new().build_hasher().finish();
            Ok(Key { text: text.into(), run, next: 1 })
        });
        Ok(Keys { keys: keys.collect::<Result<_, String>>()? })
    }

    /// Whether records may have different keys.
    pub fn vary(&self) -> bool {
        self.keys.len() > 1
    }

    /// The index of the key of a record.
    pub fn index_of(&self, record: &[u8]) -> usize {
        if !self.vary() {
            return 0;
        }
        logs_severity::find(record).map_or(0, |(_, severity)| 1 + severity as usize)
    }

    /// Gives a message a key, and the next numbers of its run.
    pub fn assign(&mut self, index: usize, message: Message) -> Message {
        let Key { text, run, next } = &mut self.keys[index];
        let number = *next;
        *next += message.records;
        Message { key: Arc::clone(text), run: *run, number, ..message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(keys: &mut Keys, record: &'static str) -> (String, u64, u64) {
        let message = keys.assign(keys.index_of(record.as_bytes()), Message::single(record, 0));
        (message.key.to_string(), message.run, message.number)
    }

    #[test]
    fn each_key_has_its_own_run() {
        let mut keys = Keys::new("{tag}.{severity}", Some("web.1")).unwrap();
        let (first, run, number) = key(&mut keys, "error: a");
        assert_eq!((&*first, number), ("web.1.error", 1));
        let (none, other, number) = key(&mut keys, "hello");
        assert_eq!((&*none, number), ("web.1.none", 1));
        assert_ne!(run, other);
        assert_eq!(key(&mut keys, "[ERROR] b"), ("web.1.error".into(), run, 2));
        assert_eq!(key(&mut keys, "fatal: c").0, "web.1.critical");
        assert_eq!(key(&mut keys, "trace: d").0, "web.1.trace");
    }

    #[test]
    fn a_fixed_key_has_one_run() {
        let mut keys = Keys::new("kern.critical", None).unwrap();
        let (_, run, _) = key(&mut keys, "error: a");
        assert_eq!(key(&mut keys, "b"), ("kern.critical".into(), run, 2));
        assert!(!keys.vary());
    }

    #[test]
    fn a_template_is_checked() {
        assert!(Keys::new("{tag}.x", None).is_err());
        assert!(Keys::new(&"k".repeat(255), None).is_ok());
        assert!(Keys::new(&"k".repeat(256), None).is_err());
        // The longest severity has 8 bytes.
        let long = |length| format!("{}{{severity}}", "k".repeat(length));
        assert!(Keys::new(&long(247), None).is_ok());
        assert!(Keys::new(&long(248), None).is_err());
    }
}
