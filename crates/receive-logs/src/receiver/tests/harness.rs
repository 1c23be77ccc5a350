//! A receiver in a thread of its own, against a scripted broker.

use std::fs::{self, File};
use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use amqp::retry::Timings;
use amqp::{Mailbox, Sender};
use clap::Parser;
use logs_tests::{Message, PATIENCE, ScriptedBroker, ScriptedSession, wait_until};

use crate::cli::Cli;
use crate::environment::Environment;
use crate::output::Output;
use crate::readiness::Readiness;
use crate::receiver::Events;
use crate::receiver::Stop;
use crate::startup::Startup;
use crate::status::StatusLine;
use crate::testing::{Alerts, alert, environment};

/// A pause that is longer than any test.
pub const LONG: Timings = Timings {
    first_delay: Duration::from_secs(60),
    longest_delay: Duration::from_secs(60),
    time_to_subscribe: Duration::from_secs(1),
};

/// The time limit for a stop by a signal if neither broker nor output blocks.
pub const PROMPT: Duration = Duration::from_millis(900);

pub const DURABLE: &[&str] = &["--queue", "q", "--queue-type", "classic"];

pub const FORCED: &str = "CONNECTION_FORCED - broker forced connection closure";
pub const LOST: &str = "receive from BROKER: CONNECTION_FORCED - broker forced connection closure; \
                    subscribing again";
pub const AGAIN: &str =
    "Subscribed again after N s; messages in between are missing unless sent again";
pub const AGAIN_DURABLE: &str = "Subscribed again after N s; 0 messages wait in queue 'q', others sent in \
                          between may be missing (--durable keeps the exchange when the broker restarts)";

pub const WERE_WAITING: &str = "messages that were still waiting and ";

/// A receiver in a thread of its own.
pub struct Run {
    address: String,
    stop: Sender<i32>,
    reopen: Sender<()>,
    pub recorded: Alerts,
    pub status: Arc<StatusLine>,
    pub outcome: mpsc::Receiver<(Result<Stop, String>, String)>,
}

/// Where a receiver writes.
pub enum To {
    Path(std::path::PathBuf),
    File(File),
}

impl Run {
    /// Starts a receiver that writes the bytes of messages to `path`. Returns its session.
    pub fn start(broker: &ScriptedBroker, options: &[&str], path: &Path) -> (Run, ScriptedSession) {
        Run::start_with(environment().retry, broker, options, To::Path(path.into()))
    }

    /// A receiver that has written one message and lost its broker, and whose next attempt is far away.
    pub fn start_and_lose(broker: &ScriptedBroker, path: &Path) -> Run {
        let (run, session) = Run::start_with(LONG, broker, &[], To::Path(path.into()));
        session.deliver(&Message::new("a"));
        session.close(320, FORCED);
        wait_until("the loss is reported", || run.alerts() == [LOST]);
        run
    }

    pub fn start_with(
        retry: Timings,
        broker: &ScriptedBroker,
        options: &[&str],
        to: To,
    ) -> (Run, ScriptedSession) {
        let url = broker.url();
        let mut arguments = vec!["receive-logs", "--raw", "--uri", &url];
        if let To::Path(path) = &to {
            arguments.extend(["-o", path.to_str().unwrap()]);
        }
        let cli = Cli::parse_from(arguments.iter().chain(options));
        let (stop, stopped) = Mailbox::open().unwrap();
        let (reopen, reopened) = Mailbox::open().unwrap();
        let (sender, outcome) = mpsc::channel();
        let recorded = Alerts::default();
        let alerts = recorded.clone();
        let status = Arc::new(StatusLine::new(&cli));
        let line = Arc::clone(&status);
        let environment = Environment { retry, ..environment() };
        thread::spawn(move || {
            alerts.record();
            let startup = Startup::new(&cli, environment).unwrap();
            let (mut output, reader_gone) = match to {
                To::Path(_) => {
                    let output = Output::open(&cli, alert).unwrap();
                    let reader_gone = output.reader_gone().unwrap();
                    (output, reader_gone)
                }
                To::File(file) => (Output::new(&cli, file, None, alert).unwrap(), None),
            };
            let subscription = startup.subscribe(&mut output).unwrap();
            let events = Events { stop: stopped, reopen: Some(reopened), reader_gone };
            let readiness = Readiness::new(&cli).unwrap();
            let mut receiver = startup.receiver(output, events, readiness, line);
            let outcome = receiver.run(subscription).map_err(|error| format!("{error:#}"));
            let losses = receiver.loss_report.to_string();
            // Releases the position for the next receiver.
            drop(receiver);
            sender.send((outcome, losses))
        });
        let session = broker.accept();
        session.expect_consume();
        let (_, address) = url.split_once('@').unwrap();
        let address = address.split_once('/').unwrap().0.to_string();
        (Run { address, stop, reopen, recorded, status, outcome }, session)
    }

    /// Stops the receiver as SIGTERM does.
    pub fn stop(&self) {
        self.stop.send(15);
    }

    /// Reopens the output as SIGHUP does, and waits until that is done.
    pub fn reopen(&self) {
        self.reopen.send(());
        wait_until("the output is reopened", || self.reopen.is_empty());
    }

    /// Waits for the end. Asserts that it is `outcome`.
    pub fn ends_with(&self, outcome: Result<Stop, &str>) {
        let (ended, _) = self.outcome.recv_timeout(PATIENCE).expect("the receiver ends");
        let ended = ended.map_err(|error| error.replace(&self.address, "BROKER"));
        assert_eq!(ended, outcome.map_err(String::from));
    }

    pub fn stops(&self) {
        self.stop();
        self.ends_with(Ok(Stop::Signal));
    }

    /// The alerts, without the parts that differ between runs: the address of the broker, times, and whether the
    /// receiver had looked for a message after the last one.
    pub fn alerts(&self) -> Vec<String> {
        let alerts = self.recorded.all();
        let general = |alert_text: &String| {
            let alert_text = alert_text.replace(&self.address, "BROKER").replace(WERE_WAITING, "");
            match alert_text.split_once(" s; ") {
                Some((again, missing)) if again.starts_with("Subscribed again after ") => {
                    format!("Subscribed again after N s; {missing}")
                }
                _ => alert_text,
            }
        };
        alerts.iter().map(general).collect()
    }
}

/// Waits for this status line, without the address of the broker and the time since the loss.
pub fn wait_for_status(run: &Run, expected: &str) {
    wait_until(&format!("the status is {expected}"), || {
        let status = run.status.to_string().replace(&run.address, "BROKER");
        let parts = status.split_once(" for ").zip(status.split_once(" ("));
        let general = parts.map(|((none, _), (_, rest))| format!("{none} for N ({rest}"));
        general.unwrap_or(status) == expected
    });
}

pub fn wait_for_content(path: &Path, content: &str) {
    wait_until(&format!("the output is {content:?}"), || {
        fs::read_to_string(path).is_ok_and(|text| text == content)
    });
}

pub fn assert_content(path: &Path, content: &str) {
    assert_eq!(fs::read_to_string(path).unwrap(), content);
}

/// A message of a run of emit-log.
pub fn numbered(number: u64) -> Message {
    let message_id = Some(format!("emit-log/{:016x}/{number}", 1));
    Message { message_id, ..Message::new(number.to_string()) }
}

pub fn again(message: Message) -> Message {
    Message { redelivered: true, ..message }
}

/// A batch, the only message of its run of emit-log.
pub fn batch(body: &str) -> Message {
    static RUN: AtomicU64 = AtomicU64::new(1000);
    let run = RUN.fetch_add(1, Ordering::Relaxed);
    let message_id = Some(format!("emit-log/{run:016x}/1"));
    Message { message_type: Some("lines".into()), message_id, ..Message::new(body) }
}

/// A batch of lines that is larger than the buffer of the output and than a pipe.
pub fn large_batch() -> Message {
    let lines: Vec<String> = (0..40_000).map(|number| format!("line {number}")).collect();
    batch(&lines.join("\n"))
}

/// A pipe, and the path of its write end, which is open while the second value lives.
pub fn pipe() -> (PipeReader, impl Sized, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    (reader, writer, path)
}

pub fn read_exactly(reader: &mut PipeReader, length: usize) -> String {
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}
