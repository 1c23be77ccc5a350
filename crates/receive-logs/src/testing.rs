//! Helpers of unit tests: recorded alerts, deliveries without a broker, and a disk that becomes full.

use std::cell::RefCell;
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use amqp::retry::Timings;
use amqp::{Delivery, Properties};
use logs_tests::Message;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::environment::{Environment, StreamTimings};

/// Alerts that are recorded instead of printed.
#[derive(Clone, Default)]
pub struct Alerts(Arc<Mutex<Vec<String>>>);

thread_local! {
    static ALERTS: RefCell<Alerts> = RefCell::default();
}

impl Alerts {
    /// Records the alerts of this thread from now on.
    pub fn record(&self) {
        ALERTS.set(self.clone());
    }

    /// The alerts recorded so far.
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    /// The alerts of this thread while `work` runs.
    pub fn during(work: impl FnOnce()) -> Vec<String> {
        let alerts = Alerts::default();
        alerts.record();
        work();
        alerts.all()
    }
}

/// Records an alert.
pub fn alert(text: String) {
    ALERTS.with_borrow(|alerts| alerts.0.lock().unwrap().push(text));
}

/// Records alerts. All timings are short.
pub fn environment() -> Environment {
    Environment {
        alert,
        retry: Timings {
            first_delay: Duration::from_millis(2),
            longest_delay: Duration::from_millis(10),
            time_to_subscribe: Duration::from_millis(5),
        },
        stream: StreamTimings {
            catch_up: Duration::from_millis(600),
            empty_after: Duration::from_millis(200),
        },
    }
}

/// A message as a broker delivers it.
pub fn delivery(message: Message) -> Box<Delivery> {
    let mut properties = Properties::default();
    if let Some(id) = message.message_id {
        properties = properties.with_message_id(id);
    }
    if let Some(kind) = message.message_type {
        properties = properties.with_type_(kind);
    }
    let mut delivery = Box::<Delivery>::default();
    (delivery.properties, delivery.body) = (properties, message.body);
    delivery.redelivered = message.redelivered;
    delivery
}

/// Messages as a broker delivers them, one after another.
pub fn messages(messages: &[Message]) -> Vec<crate::message::Message> {
    let with_tag = |(tag, message): (u64, &Message)| {
        let mut delivery = delivery(message.clone());
        delivery.tag = tag;
        crate::message::Message::new(delivery)
    };
    (1..).zip(messages).map(with_tag).collect()
}

/// A batch with `count` copies of a line.
pub fn lines(count: usize, line: &str) -> Message {
    let body = vec![line; count].join("\n");
    let message_id = Some("emit-log/0000000000000001/1".into());
    Message { message_type: Some("lines".into()), message_id, ..Message::new(body) }
}

/// A file with a maximum size in bytes, as on a full disk.
pub fn limited_file(size: u64) -> File {
    let file = File::from(memfd_create("limited", MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len(size).unwrap();
    fcntl_add_seals(&file, SealFlags::GROW).unwrap();
    file
}
