//! Routing keys, and the run of each.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use amqp::check_length;
use logs_severity::Severity;
use serde::{Deserialize, Serialize};

use crate::message::Message;

/// The word for a record without a severity.
const NO_SEVERITY: &str = "none";

const SEVERITY: &str = "{severity}";
const TAG: &str = "{tag}";
const FILE: &str = "{file}";

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

impl Key {
    /// A key with a new run.
    fn new(text: Arc<str>) -> Key {
        // The keys of a hasher are from the operating system, because runs on all machines need different numbers.
        Key { text, run: RandomState::new().build_hasher().finish(), next: 1 }
    }
}

/// The run of a key, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    key: String,
    run: u64,
    /// The number of the next record.
    pub next: u64,
}

impl Keys {
    /// The keys of `--routing-key`, in which `{tag}`, `{file}` and `{severity}` are replaced.
    ///
    /// # Errors
    ///
    /// When the template has `{tag}` and there is no tag, or `{file}` and no file, or a key is longer than 255 bytes.
    pub fn new(template: &str, tag: Option<&str>, file: Option<&str>) -> Result<Keys, String> {
        let mut template = template.to_string();
        if template.contains(TAG) {
            let tag = tag.ok_or("{tag} requires --tag")?;
            template = template.replace(TAG, tag);
        }
        if template.contains(FILE) {
            let file = file.ok_or("{file} requires --follow")?;
            template = template.replace(FILE, file);
        }
        let severities = Severity::all().map(Severity::name);
        let words: Vec<_> = match template.contains(SEVERITY) {
            true => [NO_SEVERITY].into_iter().chain(severities).collect(),
            false => vec![""],
        };
        let keys = words.into_iter().map(|word| {
            let text = template.replace(SEVERITY, word);
            check_length(&text, "key")?;
            Ok(Key::new(text.into()))
        });
        Ok(Keys { keys: keys.collect::<Result<_, String>>()? })
    }

    /// The same keys with new runs.
    pub fn renewed(&self) -> Keys {
        let key = |Key { text, .. }: &Key| Key::new(Arc::clone(text));
        Keys { keys: self.keys.iter().map(key).collect() }
    }

    /// The run of each key.
    pub fn runs(&self) -> Vec<Run> {
        let run =
            |Key { text, run, next }: &Key| Run { key: text.to_string(), run: *run, next: *next };
        self.keys.iter().map(run).collect()
    }

    /// Continues earlier runs of these keys.
    pub fn restore(&mut self, runs: &[Run]) {
        for key in &mut self.keys {
            if let Some(Run { run, next, .. }) = runs.iter().find(|run| *run.key == *key.text) {
                (key.run, key.next) = (*run, *next);
            }
        }
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
        let mut keys = Keys::new("{tag}.{severity}", Some("web.1"), None).unwrap();
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
        let mut keys = Keys::new("kern.critical", None, None).unwrap();
        let (_, run, _) = key(&mut keys, "error: a");
        assert_eq!(key(&mut keys, "b"), ("kern.critical".into(), run, 2));
        assert!(!keys.vary());
    }

    #[test]
    fn a_template_is_checked() {
        let new = |template: &str| Keys::new(template, None, None);
        assert!(new("{tag}.x").is_err());
        assert!(new("{file}.x").is_err());
        assert!(new(&"k".repeat(255)).is_ok());
        assert!(new(&"k".repeat(256)).is_err());
        // The longest severity has 8 bytes.
        let long = |length| format!("{}{{severity}}", "k".repeat(length));
        assert!(new(&long(247)).is_ok());
        assert!(new(&long(248)).is_err());
    }

    #[test]
    fn runs_of_the_same_keys_are_continued() {
        let keys = || Keys::new("{file}.{severity}", None, Some("app")).unwrap();
        let mut first = keys();
        let (text, run, number) = key(&mut first, "error: a");
        assert_eq!((&*text, number), ("app.error", 1));
        let mut second = keys();
        second.restore(&first.runs());
        assert_eq!(key(&mut second, "error: b"), (text, run, 2));
        let mut other = Keys::new("{file}.{severity}", None, Some("web")).unwrap();
        other.restore(&first.runs());
        assert_eq!(key(&mut other, "error: c").2, 1);
    }
}
