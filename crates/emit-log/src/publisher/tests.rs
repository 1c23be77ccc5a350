//! The states and the counts of a publisher, against a scripted broker.

mod confirms;
mod exchanges;
mod nacks;
mod no_confirms;
mod outages;
mod sizes;
mod spool;
mod status;
mod words;

use std::ops::RangeInclusive;
use std::sync::{LazyLock, mpsc};

use clap::Parser;
use logs_common::wire::Packing;
use logs_tests::wait_until;
use logs_tests::{
    CHANNEL_OPEN, EXCHANGE_DECLARE, PATIENCE, PUBLISH, Published, ScriptedBroker, ScriptedSession,
};

use super::*;
use crate::open_outbox;

/// Short pauses, so that a test takes milliseconds.
pub const QUICK: Timings = Timings {
    first_delay: Duration::from_millis(2),
    longest_delay: Duration::from_millis(10),
    time_to_subscribe: Duration::from_millis(5),
};

const HOUR: Duration = Duration::from_secs(3600);

const NO_EXCHANGE: &str = "NOT_FOUND - no exchange 'logs' in vhost '/'";

/// A publisher that, in a thread, publishes messages and waits until all are confirmed.
struct Run {
    counts: Arc<Counts>,
    outcome: mpsc::Receiver<Result<(), String>>,
}

impl Run {
    /// Starts a publisher with `--lines` and these options.
    fn start(broker: &ScriptedBroker, options: &[&str], messages: Vec<Message>) -> Run {
        Run::start_with(QUICK, broker, options, messages)
    }

    fn start_with(
        timings: Timings,
        broker: &ScriptedBroker,
        options: &[&str],
        messages: Vec<Message>,
    ) -> Run {
        Run::publish(lines_publisher(timings, broker, options), messages)
    }

    fn publish(mut publisher: Publisher, messages: Vec<Message>) -> Run {
        let counts = publisher.counts();
        counts.add_read(messages.iter().map(|message| message.records).sum());
        let (sender, outcome) = mpsc::channel();
        thread::spawn(move || {
            let published = publisher.publish(messages);
            let outcome = publisher.finish(published, None);
            sender.send(outcome.map_err(|error| format!("{error:#}")))
        });
        Run { counts, outcome }
    }

    /// Waits in a thread until all messages of a publisher are confirmed.
    fn finish(publisher: Publisher) -> Run {
        Run::publish(publisher, Vec::new())
    }

    /// Waits until the counts are these.
    fn reaches(&self, counts: &str) {
        wait_until(&format!("{} is {counts}", self.counts), || self.counts.to_string() == counts);
    }

    fn succeeds_with(self, counts: &str) {
        assert_eq!(self.outcome(), Ok(()));
        assert_eq!(self.counts.to_string(), counts);
    }

    fn fails_with(self, text: &str) {
        assert_eq!(self.outcome(), Err(text.to_string()));
    }

    fn outcome(&self) -> Result<(), String> {
        self.outcome.recv_timeout(PATIENCE).expect("the publisher ends")
    }
}

/// Starts a publisher with `--lines` and these options. The broker has received its messages in a first session.
fn send(options: &[&str], messages: Vec<Message>) -> (ScriptedBroker, ScriptedSession, Run) {
    let broker = ScriptedBroker::start();
    let bodies: Vec<_> = messages.iter().map(|message| text(&message.body)).collect();
    let run = Run::start(&broker, options, messages);
    let session = accept(&broker, &bodies);
    (broker, session, run)
}

/// The same in the thread of the test, which runs the publisher with [`act_until`].
fn send_here(timings: Timings, options: &[&str], count: u64) -> Here {
    let broker = ScriptedBroker::start();
    let mut publisher = lines_publisher(timings, &broker, options);
    publisher.publish(numbered(1..=count)).expect("publish");
    let session = broker.accept();
    if !publisher.config.confirms {
        session.expect_question();
    }
    expect(&session, &numbered(1..=count).iter().map(|m| text(&m.body)).collect::<Vec<_>>());
    Here { broker, session, publisher }
}

struct Here {
    broker: ScriptedBroker,
    session: ScriptedSession,
    publisher: Publisher,
}

pub fn connect(timings: Timings, broker: &ScriptedBroker, options: &[&str]) -> Publisher {
    let url = broker.url();
    let cli = Cli::parse_from([&["emit-log", "--uri", &url], options].concat());
    let mut config = SessionConfig::new(&cli).expect("a configuration");
    config.timings = timings;
    let config = Arc::new(config);
    let outbox = open_outbox(&cli, &config).expect("an outbox");
    Publisher::connect(&cli, config, outbox).expect("connect")
}

fn lines_publisher(timings: Timings, broker: &ScriptedBroker, options: &[&str]) -> Publisher {
    connect(timings, broker, &[&["--lines"], options].concat())
}

/// Stops a publisher that waits for too long. The time suffices for all tests of this module together.
static DEADLINE: LazyLock<Mailbox<i32>> = LazyLock::new(|| {
    let (sender, deadline) = Mailbox::open().unwrap();
    thread::spawn(move || {
        thread::sleep(3 * PATIENCE);
        sender.send(0)
    });
    deadline
});

/// Runs the publisher until a condition is true.
fn act_until(publisher: &mut Publisher, condition: impl Fn(&Publisher) -> bool) {
    while !condition(publisher) {
        assert!(DEADLINE.is_empty(), "the condition is not true in time");
        publisher.wait(None, Some(&DEADLINE), None).expect("no end");
    }
}

/// Runs the publisher until an error ends it.
fn act_until_end(mut publisher: Publisher) -> String {
    let ends = (0..1000).find_map(|_| publisher.wait(None, Some(&DEADLINE), None).err());
    text_of(&mut publisher, ends.expect("an end, not an endless loop"))
}

/// The text of an error with which a publisher ends.
fn text_of(publisher: &mut Publisher, error: Error) -> String {
    format!("{:#}", publisher.finish(Err(error), None).expect_err("the error"))
}

fn single(number: u64, body: &str) -> Message {
    Message::single(body.to_string(), number)
}

fn batch(number: u64, body: &str) -> Message {
    Message::joined(body.to_string().into(), Packing::Lines, number)
}

/// Messages with their numbers as bodies.
fn numbered(numbers: RangeInclusive<u64>) -> Vec<Message> {
    numbers.map(|number| single(number, &number.to_string())).collect()
}

fn text(body: &[u8]) -> String {
    String::from_utf8_lossy(body).into()
}

/// Waits until the session has received these bodies, and no others before.
fn expect(session: &ScriptedSession, expected: &[impl AsRef<str>]) -> Vec<Published> {
    let published = session.expect_publishes(expected.len());
    let bodies: Vec<_> = published.iter().map(|message| text(&message.body)).collect();
    assert_eq!(bodies, expected.iter().map(AsRef::as_ref).collect::<Vec<_>>());
    published
}

/// Waits for the next session, and for these bodies in the session.
fn accept(broker: &ScriptedBroker, expected: &[impl AsRef<str>]) -> ScriptedSession {
    let session = broker.accept();
    expect(&session, expected);
    session
}

/// The ways to end a session after which a publisher reconnects.
const ENDS: [fn(ScriptedSession); 4] = [
    |session| session.close(320, "CONNECTION_FORCED - broker forced connection closure"),
    |session| session.close_channel(404, NO_EXCHANGE, PUBLISH),
    |session| session.cut(),
    |session| drop(session),
];

fn too_large(session: &ScriptedSession, size: usize, limit: usize) {
    session.close_channel(406, &too_large_text(size, limit), PUBLISH);
}

fn too_large_text(size: usize, limit: usize) -> String {
    format!("PRECONDITION_FAILED - message size {size} is larger than configured max size {limit}")
}

const TOO_LARGE_HINT: &str = " (send less, or raise max_message_size of the broker)";

fn other_durability(session: &ScriptedSession, declared: bool) {
    let text = format!(
        "PRECONDITION_FAILED - inequivalent arg 'durable' for exchange 'logs' in vhost '/': received \
         '{declared}' but current is '{}'",
        !declared
    );
    session.close_channel(406, &text, EXCHANGE_DECLARE);
}

/// Until when the publisher holds messages.
fn hold(publisher: &Publisher) -> Option<Instant> {
    match publisher.state {
        State::Holding { until, .. } => Some(until),
        _ => None,
    }
}

fn max_body(publisher: &Publisher) -> usize {
    publisher.outbox.window().max_body
}

/// The health that the publisher has recorded.
fn health(publisher: &Publisher) -> &Health {
    match &publisher.state {
        State::Reconnecting { health, .. } => health,
        _ => &publisher.session().expect("a session").health,
    }
}

fn is_blocked(publisher: &Publisher) -> bool {
    publisher.session().is_some_and(|session| session.blocked.is_some())
}
