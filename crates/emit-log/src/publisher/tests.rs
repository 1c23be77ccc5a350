//! The states of a publisher, and the counts that a person is told, against a scripted broker.

use std::ops::RangeInclusive;
use std::sync::LazyLock;
use std::sync::mpsc;

use clap::Parser;
use crossbeam_channel::bounded;
use logs_tests::wait_until;
use logs_tests::{PATIENCE, PUBLISH, Published, ScriptedBroker, ScriptedSession};

use super::*;

const QUICK: Timings = Timings {
    first_delay: Duration::from_millis(2),
    longest_delay: Duration::from_millis(10),
    time_to_subscribe: Duration::from_millis(5),
};

const NO_EXCHANGE: &str = "NOT_FOUND - no exchange 'logs' in vhost '/'";

/// A publisher at work in a thread of its own: it publishes messages, and waits until all are confirmed.
struct Run {
    tally: Arc<Tally>,
    outcome: mpsc::Receiver<Result<(), String>>,
}

impl Run {
    fn start(broker: &ScriptedBroker, options: &[&str], messages: Vec<Message>) -> Run {
        Run::start_with(QUICK, broker, options, messages)
    }

    fn start_with(
        timings: Timings,
        broker: &ScriptedBroker,
        options: &[&str],
        messages: Vec<Message>,
    ) -> Run {
        let mut publisher = connect(timings, broker, &[&["--lines"], options].concat());
        publisher.number_messages();
        Run::publish(publisher, messages)
    }

    fn publish(mut publisher: Publisher, messages: Vec<Message>) -> Run {
        let tally = publisher.tally();
        tally.add_read(messages.iter().map(|message| message.records).sum());
        let (sender, outcome) = mpsc::channel();
        thread::spawn(move || {
            let mut messages = messages.into_iter();
            let published = messages.try_for_each(|message| publisher.publish(message));
            let outcome = published.and_then(|()| publisher.finish());
            sender.send(outcome.map_err(|error| format!("{error:#}")))
        });
        Run { tally, outcome }
    }

    /// Waits until the counts are these.
    fn comes_to(&self, counts: &str) {
        wait_until(&format!("{} is {counts}", self.tally), || self.tally.to_string() == counts);
    }

    fn succeeds_with(self, counts: &str) {
        assert_eq!(self.outcome(), Ok(()));
        assert_eq!(self.tally.to_string(), counts);
    }

    fn fails_with(self, text: &str) {
        assert_eq!(self.outcome(), Err(text.to_string()));
    }

    fn outcome(&self) -> Result<(), String> {
        self.outcome.recv_timeout(PATIENCE).expect("the publisher ends")
    }
}

fn connect(timings: Timings, broker: &ScriptedBroker, options: &[&str]) -> Publisher {
    let url = broker.url();
    let cli = Cli::parse_from([&["emit-log", "--uri", &url], options].concat());
    Publisher::connect_with(&cli, timings).expect("connect")
}

fn single(number: u64, body: &str) -> Message {
    let body = body.to_string().into();
    Message { body, packing: Packing::Single, records: 1, number }
}

fn batch(number: u64, body: &str) -> Message {
    let records = Packing::Lines.count(body.as_bytes());
    Message { packing: Packing::Lines, records, ..single(number, body) }
}

/// Messages with their numbers as bodies.
fn numbered(numbers: RangeInclusive<u64>) -> Vec<Message> {
    numbers.map(|number| single(number, &number.to_string())).collect()
}

fn bodies(published: &[Published]) -> Vec<String> {
    published.iter().map(|message| String::from_utf8_lossy(&message.body).into()).collect()
}

/// Waits until the session has got these bodies, and nothing before them.
fn expect(session: &ScriptedSession, expected: &[&str]) -> Vec<Published> {
    let published = session.expect_publishes(expected.len());
    assert_eq!(bodies(&published), expected);
    published
}

fn too_large(session: &ScriptedSession, size: usize, limit: usize) {
    session.close_channel(406, &too_large_text(size, limit), PUBLISH);
}

fn too_large_text(size: usize, limit: usize) -> String {
    format!("PRECONDITION_FAILED - message size {size} is larger than configured max size {limit}")
}

const TOO_LARGE_HINT: &str = " (send less, or raise max_message_size of the broker)";

#[test]
fn the_largest_size_is_that_in_the_words_of_the_broker() {
    let text = "publish to exchange 'max size 7': PRECONDITION_FAILED - message size 1001 is \
                larger than configured max size 1000 (send less)";
    assert_eq!(max_size_in(text), Some(1000));
    assert_eq!(max_size_in("PRECONDITION_FAILED - message size"), None);
}

#[test]
fn messages_carry_their_exchange_numbers_and_packing() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["-e", "x", "-m"], vec![single(1, "a"), batch(2, "b\nc")]);
    let session = broker.accept();
    let published = expect(&session, &["a", "b\nc"]);
    let [first, second] = &published[..] else { panic!("{published:?}") };
    assert_eq!((&*first.exchange, first.mandatory), ("x", true));
    let number = |message: &Published| MessageId::parse(message.message_id.as_ref()?);
    assert_eq!(number(first).map(|id| id.number), Some(1));
    assert_eq!(number(second).map(|id| id.number), Some(2));
    assert_eq!((&first.message_type, second.message_type.as_deref()), (&None, Some("lines")));
    session.ack(2, true);
    run.succeeds_with("3 confirmed, 0 in doubt");
}

#[test]
fn confirmations_count_one_by_one_and_many_at_a_time() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], numbered(1..=5));
    let session = broker.accept();
    expect(&session, &["1", "2", "3", "4", "5"]);
    run.comes_to("0 confirmed, 5 in doubt");
    session.ack(1, false);
    run.comes_to("1 confirmed, 4 in doubt");
    session.ack(4, true);
    run.comes_to("4 confirmed, 1 in doubt");
    session.ack(5, false);
    session.expect_close();
    run.succeeds_with("5 confirmed, 0 in doubt");
}

#[test]
fn a_refused_message_is_sent_again_wherever_it_stands() {
    for refused in 1..=3 {
        let broker = ScriptedBroker::start();
        let run = Run::start(&broker, &[], numbered(1..=3));
        let session = broker.accept();
        expect(&session, &["1", "2", "3"]);
        session.nack(refused, false);
        for tag in (1..=3).filter(|tag| *tag != refused) {
            session.ack(tag, false);
        }
        run.comes_to("2 confirmed, 1 in doubt");
        expect(&session, &[&refused.to_string()]);
        session.ack(4, false);
        session.expect_close();
        run.succeeds_with("3 confirmed, 0 in doubt");
    }
}

#[test]
fn a_queue_that_refuses_for_too_long_ends_the_publisher() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["--retry", "50ms"], numbered(1..=3));
    let session = broker.accept();
    expect(&session, &["1", "2", "3"]);
    session.ack(1, false);
    session.nack(2, false);
    session.ack(3, false);
    for (_, tag) in session.publishes().zip(4..) {
        session.nack(tag, false);
    }
    run.fails_with(
        "2 confirmed, 1 in doubt: record 2: publish to exchange 'logs': refused by a queue",
    );
}

#[test]
fn a_message_that_is_returned_is_told_of_once_it_is_confirmed() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["--mandatory"], numbered(1..=4));
    let session = broker.accept();
    let published = expect(&session, &["1", "2", "3", "4"]);
    session.give_back(&published[1]);
    session.give_back(&published[3]);
    session.ack(4, false);
    session.ack(3, true);
    session.expect_close();
    run.succeeds_with("4 confirmed, 0 in doubt, 2 heard by nobody");
}

#[test]
fn a_message_that_is_refused_and_then_returned_counts_as_returned() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["--mandatory"], numbered(1..=2));
    let session = broker.accept();
    expect(&session, &["1", "2"]);
    session.nack(2, false);
    let again = expect(&session, &["2"]);
    session.give_back(&again[0]);
    session.ack(3, false);
    session.ack(1, false);
    run.succeeds_with("2 confirmed, 0 in doubt, 1 heard by nobody");
}

/// The ways in which a session ends that a publisher survives.
const ENDS: [fn(ScriptedSession); 4] = [
    |session| session.close(320, "CONNECTION_FORCED - broker forced connection closure"),
    |session| session.close_channel(404, NO_EXCHANGE, PUBLISH),
    |session| session.cut(),
    |session| drop(session),
];

#[test]
fn a_session_may_be_lost_again_and_again_while_messages_are_sent_again() {
    for end in ENDS {
        let broker = ScriptedBroker::start();
        let run = Run::start(&broker, &[], numbered(1..=3));
        for confirmed in 0..3 {
            let session = broker.accept();
            let left: Vec<_> = (1 + confirmed..=3).map(|number| number.to_string()).collect();
            expect(&session, &left.iter().map(String::as_str).collect::<Vec<_>>());
            session.ack(1, false);
            run.comes_to(&format!("{} confirmed, {} in doubt", confirmed + 1, 2 - confirmed));
            end(session);
        }
        run.succeeds_with("3 confirmed, 0 in doubt");
    }
}

#[test]
fn a_publisher_tries_until_the_broker_is_back() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["--retry", "forever"], numbered(1..=2));
    let session = broker.accept();
    expect(&session, &["1", "2"]);
    broker.go_down();
    session.cut();
    broker.wait_for_attempts(3);
    broker.come_back();
    let session = broker.accept();
    expect(&session, &["1", "2"]);
    session.ack(2, true);
    run.succeeds_with("2 confirmed, 0 in doubt");
}

#[test]
fn a_broker_that_does_not_come_back_in_time_ends_the_publisher() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["--retry", "50ms"], numbered(1..=3));
    let session = broker.accept();
    expect(&session, &["1", "2", "3"]);
    session.ack(1, false);
    run.comes_to("1 confirmed, 2 in doubt");
    broker.go_down();
    session.cut();
    let text = run.outcome().unwrap_err();
    assert!(text.starts_with("1 confirmed, 2 in doubt: log in to "), "{text}");
}

#[test]
fn a_queue_that_refuses_what_is_sent_again_after_a_loss_gets_no_more_time() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["--retry", "100ms"], numbered(1..=2));
    let session = broker.accept();
    expect(&session, &["1", "2"]);
    session.nack(1, false);
    session.cut();
    let session = broker.accept();
    for (_, tag) in session.publishes().zip(1..) {
        session.nack(tag, false);
    }
    run.fails_with(
        "0 confirmed, 2 in doubt: record 1: publish to exchange 'logs': refused by a queue",
    );
}

#[test]
fn one_message_that_is_too_large_is_told_without_counts() {
    let broker = ScriptedBroker::start();
    let run = Run::publish(connect(QUICK, &broker, &[]), vec![single(1, "large")]);
    let session = broker.accept();
    expect(&session, &["large"]);
    too_large(&session, 5, 4);
    let text = too_large_text(5, 4);
    run.fails_with(&format!("publish to exchange 'logs': {text}{TOO_LARGE_HINT}"));
}

#[test]
fn an_earlier_record_that_is_too_large_for_a_lower_limit_takes_the_place_of_a_later_one() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], vec![single(1, "a"), single(2, "bbb"), single(3, "large")]);
    let session = broker.accept();
    expect(&session, &["a", "bbb", "large"]);
    too_large(&session, 5, 4);
    let session = broker.accept();
    expect(&session, &["a", "bbb"]);
    too_large(&session, 3, 2);
    let session = broker.accept();
    expect(&session, &["a"]);
    session.ack(1, false);
    run.fails_with(&format!(
        "1 confirmed, 0 in doubt, 2 read and not sent: record 2: publish to exchange 'logs': {}\
         {TOO_LARGE_HINT}",
        too_large_text(3, 2)
    ));
}

#[test]
fn a_broker_lost_before_all_ahead_of_a_record_too_large_is_confirmed_is_tried_again() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], vec![single(1, "a"), single(2, "large")]);
    let session = broker.accept();
    expect(&session, &["a", "large"]);
    too_large(&session, 5, 4);
    let session = broker.accept();
    expect(&session, &["a"]);
    session.cut();
    let session = broker.accept();
    expect(&session, &["a"]);
    session.ack(1, false);
    run.fails_with(&format!(
        "1 confirmed, 0 in doubt, 1 read and not sent: record 2: publish to exchange 'logs': {}\
         {TOO_LARGE_HINT}",
        too_large_text(5, 4)
    ));
}

#[test]
fn an_exchange_of_the_other_durability_is_found_without_confirmations_too() {
    let broker = ScriptedBroker::start();
    broker.set_exchange(true);
    let run = Run::start(&broker, &["--no-confirm"], numbered(1..=2));
    broker.accept();
    let session = broker.accept();
    session.expect_question();
    expect(&session, &["1", "2"]);
    session.expect_question();
    session.expect_close();
    run.succeeds_with("2 sent without confirmation, 0 in doubt");
    assert_eq!(broker.declarations(), [false, true]);
}

#[test]
fn an_exchange_that_is_gone_and_not_ours_to_declare_ends_the_publisher() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["--passive"], numbered(1..=3));
    let session = broker.accept();
    expect(&session, &["1", "2", "3"]);
    session.ack(1, false);
    run.comes_to("1 confirmed, 2 in doubt");
    session.close_channel(404, NO_EXCHANGE, PUBLISH);
    run.fails_with(&format!(
        "1 confirmed, 2 in doubt: publish to exchange 'logs': {NO_EXCHANGE} (create it, or leave out \
         --passive so that it is declared)"
    ));
}

#[test]
fn a_permission_that_is_gone_ends_the_publisher() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], numbered(1..=2));
    let session = broker.accept();
    expect(&session, &["1", "2"]);
    let text = "ACCESS_REFUSED - access to exchange 'logs' in vhost '/' refused for user 'guest'";
    session.close_channel(403, text, PUBLISH);
    run.fails_with(&format!(
        "0 confirmed, 2 in doubt: publish to exchange 'logs': {text} (give the user the permission: \
         rabbitmqctl set_permissions)"
    ));
}

#[test]
fn a_blocked_connection_goes_on_where_it_was() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], numbered(1..=2));
    let session = broker.accept();
    session.block("low on memory");
    expect(&session, &["1", "2"]);
    session.ack(1, false);
    run.comes_to("1 confirmed, 1 in doubt");
    session.unblock();
    session.ack(2, false);
    run.succeeds_with("2 confirmed, 0 in doubt");
}

#[test]
fn without_confirmations_all_that_is_sent_is_in_doubt_when_the_connection_is_lost() {
    for end in ENDS {
        let broker = ScriptedBroker::start();
        let mut publisher = connect(QUICK, &broker, &["--lines", "--no-confirm"]);
        publisher.number_messages();
        let session = broker.accept();
        session.expect_question();
        for message in numbered(1..=3) {
            publisher.publish(message).expect("publish");
        }
        expect(&session, &["1", "2", "3"]);
        end(session);
        let lost = publisher.wait(&never::<()>(), &DEADLINE);
        let text = format!("{:#}", lost.unwrap_err());
        assert!(text.starts_with("3 sent without confirmation, 3 in doubt: "), "{text}");
    }
}

#[test]
fn without_confirmations_a_refusal_shows_when_the_broker_is_asked() {
    let broker = ScriptedBroker::start();
    let mut publisher = connect(QUICK, &broker, &["--lines", "--no-confirm"]);
    publisher.number_messages();
    let session = broker.accept();
    session.expect_question();
    publisher.publish(single(1, "1")).expect("publish");
    expect(&session, &["1"]);
    session.go_silent();
    let run = Run::publish(publisher, Vec::new());
    session.close_channel(404, NO_EXCHANGE, PUBLISH);
    run.fails_with(&format!(
        "1 sent without confirmation, 1 in doubt: publish to exchange 'logs': {NO_EXCHANGE}"
    ));
}

#[test]
fn a_stop_is_heard_while_the_broker_is_away() {
    let broker = ScriptedBroker::start();
    let hour = Duration::from_secs(3600);
    let pausing = Timings { first_delay: hour, longest_delay: hour, ..QUICK };
    let mut publisher = connect(pausing, &broker, &["--lines", "--retry", "forever"]);
    publisher.number_messages();
    publisher.publish(single(1, "1")).expect("publish");
    let session = broker.accept();
    expect(&session, &["1"]);
    session.cut();
    act_until(&mut publisher, |publisher| publisher.tally().away().is_some());
    let (sender, stop) = bounded(1);
    let stopping = thread::spawn(move || sender.send(15));
    publisher.wait(&never::<()>(), &stop).expect("a stop");
    assert_eq!(stop.try_recv(), Ok(15));
    stopping.join().expect("no panic").expect("sent");
    assert_eq!(publisher.tally().to_string(), "0 confirmed, 1 in doubt");
    assert!(!publisher.is_ready());
}

/// Long enough for all tests of this file together; a publisher that waits for what does not come is
/// stopped by it.
static DEADLINE: LazyLock<Receiver<i32>> = LazyLock::new(|| {
    let (sender, deadline) = bounded(1);
    thread::spawn(move || {
        thread::sleep(3 * PATIENCE);
        sender.send(0)
    });
    deadline
});

/// Lets the publisher act on what comes until a condition holds.
fn act_until(publisher: &mut Publisher, condition: impl Fn(&Publisher) -> bool) {
    while !condition(publisher) {
        assert!(DEADLINE.is_empty(), "waited in vain");
        publisher.wait(&never::<()>(), &DEADLINE).expect("no end");
    }
}
