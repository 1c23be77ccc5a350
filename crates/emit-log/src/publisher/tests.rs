//! The states of a publisher, and the counts that a person is told, against a scripted broker.

use std::ops::RangeInclusive;
use std::sync::LazyLock;
use std::sync::mpsc;

use clap::Parser;
use crossbeam_channel::bounded;
use logs_tests::wait_until;
use logs_tests::{EXCHANGE_DECLARE, PATIENCE, PUBLISH, Published, ScriptedBroker, ScriptedSession};

use super::*;

const QUICK: Timings = Timings {
    first_delay: Duration::from_millis(2),
    longest_delay: Duration::from_millis(10),
    time_to_subscribe: Duration::from_millis(5),
};

const NO_EXCHANGE: &str = "NOT_FOUND - no exchange 'logs' in vhost '/'";

/// A publisher at work in a thread of its own: it publishes messages, and waits until all are confirmed.
struct Run {
    counts: Arc<Counts>,
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
        let counts = publisher.counts();
        counts.add_read(messages.iter().map(|message| message.records).sum());
        let (sender, outcome) = mpsc::channel();
        thread::spawn(move || {
            let mut messages = messages.into_iter();
            let published = messages.try_for_each(|message| publisher.publish(message));
            let outcome = published.and_then(|()| publisher.finish());
            sender.send(outcome.map_err(|error| format!("{error:#}")))
        });
        Run { counts, outcome }
    }

    /// Waits until the counts are these.
    fn comes_to(&self, counts: &str) {
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

fn connect(timings: Timings, broker: &ScriptedBroker, options: &[&str]) -> Publisher {
    let url = broker.url();
    let cli = Cli::parse_from([&["emit-log", "--uri", &url], options].concat());
    Publisher::connect_with(&cli, timings).expect("connect")
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
    act_until(&mut publisher, |publisher| publisher.counts().outage().is_some());
    let (sender, stop) = bounded(1);
    let stopping = thread::spawn(move || sender.send(15));
    publisher.wait(&never::<()>(), &stop).expect("a stop");
    assert_eq!(stop.try_recv(), Ok(15));
    stopping.join().expect("no panic").expect("sent");
    assert_eq!(publisher.counts().to_string(), "0 confirmed, 1 in doubt");
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

fn other_durability(session: &ScriptedSession, declared: bool) {
    let text = format!(
        "PRECONDITION_FAILED - inequivalent arg 'durable' for exchange 'logs' in vhost '/': received \
         '{declared}' but current is '{}'",
        !declared
    );
    session.close_channel(406, &text, EXCHANGE_DECLARE);
}

#[test]
fn what_is_confirmed_before_an_earlier_message_is_not_in_doubt() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], numbered(1..=4));
    let session = broker.accept();
    expect(&session, &["1", "2", "3", "4"]);
    session.ack(3, false);
    session.ack(2, false);
    run.comes_to("2 confirmed, 2 in doubt");
    session.ack(4, true);
    run.succeeds_with("4 confirmed, 0 in doubt");
}

#[test]
fn confirmations_of_messages_that_were_never_sent_change_nothing() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], numbered(1..=2));
    let session = broker.accept();
    expect(&session, &["1", "2"]);
    for tag in [0, 3, u64::MAX] {
        session.ack(tag, false);
        session.nack(tag, false);
    }
    session.ack(1, false);
    run.comes_to("1 confirmed, 1 in doubt");
    session.ack(1, true);
    session.ack(2, false);
    session.expect_close();
    run.succeeds_with("2 confirmed, 0 in doubt");
}

#[test]
fn messages_refused_in_another_order_are_sent_again_in_theirs() {
    let broker = ScriptedBroker::start();
    let pausing = Timings { first_delay: Duration::from_millis(200), ..Timings::default() };
    let run = Run::start_with(pausing, &broker, &[], numbered(1..=4));
    let session = broker.accept();
    expect(&session, &["1", "2", "3", "4"]);
    session.nack(3, false);
    session.nack(2, true);
    session.ack(4, false);
    expect(&session, &["1", "2", "3"]);
    session.ack(7, true);
    run.succeeds_with("4 confirmed, 0 in doubt");
}

#[test]
fn a_queue_that_refuses_the_last_of_what_is_sent_again_gets_no_more_time() {
    let broker = ScriptedBroker::start();
    let mut publisher = connect(QUICK, &broker, &["--lines"]);
    publisher.number_messages();
    for message in numbered(1..=2) {
        publisher.publish(message).expect("publish");
    }
    let session = broker.accept();
    expect(&session, &["1", "2"]);
    session.nack(2, true);
    let is_sent_again = |publisher: &Publisher| publisher.window.last_tag() == 4;
    act_until(&mut publisher, is_sent_again);
    expect(&session, &["1", "2"]);
    publisher.act_on(Event::Refused { tag: 4, multiple: false });
    publisher.act_on(Event::Confirmed { tag: 3, multiple: false });
    assert!(publisher.refusal.is_some(), "--retry counts from the first refusal");
    session.nack(4, false);
    session.ack(3, false);
    act_until(&mut publisher, |publisher| publisher.window.last_tag() == 5);
    session.ack(5, false);
    act_until(&mut publisher, |publisher| publisher.refusal.is_none());
}

#[test]
fn a_batch_that_is_returned_counts_with_all_its_records() {
    for (options, counts) in [
        (&["-m"][..], "3 confirmed, 0 in doubt, 3 heard by nobody"),
        (&["-m", "--no-confirm"], "3 sent without confirmation, 0 in doubt, 3 heard by nobody"),
    ] {
        let broker = ScriptedBroker::start();
        let mut publisher = connect(QUICK, &broker, &[&["--lines"], options].concat());
        publisher.number_messages();
        let session = broker.accept();
        if options.len() == 2 {
            session.expect_question();
        }
        publisher.publish(batch(1, "a\nb\nc")).expect("publish");
        let published = expect(&session, &["a\nb\nc"]);
        session.give_back(&published[0]);
        session.ack(1, false);
        Run::publish(publisher, Vec::new()).succeeds_with(counts);
    }
}

#[test]
fn a_return_counts_no_more_when_the_message_is_sent_again() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &["--mandatory"], numbered(1..=2));
    let session = broker.accept();
    let published = expect(&session, &["1", "2"]);
    session.give_back(&published[0]);
    session.give_back(&published[1]);
    session.ack(1, false);
    run.comes_to("1 confirmed, 1 in doubt, 1 heard by nobody");
    session.cut();
    let session = broker.accept();
    expect(&session, &["2"]);
    session.ack(1, false);
    run.succeeds_with("2 confirmed, 0 in doubt, 1 heard by nobody");
}

#[test]
fn what_is_unconfirmed_when_the_session_ends_is_sent_again_in_order() {
    for end in ENDS {
        let broker = ScriptedBroker::start();
        let run = Run::start(&broker, &[], numbered(1..=4));
        let session = broker.accept();
        expect(&session, &["1", "2", "3", "4"]);
        session.ack(3, false);
        session.ack(1, false);
        run.comes_to("2 confirmed, 2 in doubt");
        end(session);
        let session = broker.accept();
        expect(&session, &["2", "4"]);
        run.comes_to("2 confirmed, 2 in doubt");
        session.ack(2, true);
        session.expect_close();
        run.succeeds_with("4 confirmed, 0 in doubt");
    }
}

#[test]
fn nothing_is_sent_in_a_session_that_is_lost_while_it_is_held_back() {
    for end in ENDS {
        let broker = ScriptedBroker::start();
        let holding = Timings { time_to_subscribe: Duration::from_millis(300), ..QUICK };
        let run = Run::start_with(holding, &broker, &[], numbered(1..=2));
        let session = broker.accept();
        expect(&session, &["1", "2"]);
        session.cut();
        let (session, connected) = (broker.accept(), Instant::now());
        end(session);
        let session = broker.accept();
        expect(&session, &["1", "2"]);
        assert!(connected.elapsed() > holding.time_to_subscribe);
        session.ack(2, true);
        run.succeeds_with("2 confirmed, 0 in doubt");
    }
}

#[test]
fn a_message_refused_before_the_connection_is_lost_is_sent_again_in_its_place() {
    let broker = ScriptedBroker::start();
    // Pauses so long that the refused message waits when the connection is lost.
    let pause = Duration::from_millis(1500);
    let pausing = Timings { first_delay: pause, longest_delay: pause, ..QUICK };
    let run = Run::start_with(pausing, &broker, &[], numbered(1..=3));
    let session = broker.accept();
    expect(&session, &["1", "2", "3"]);
    session.nack(1, false);
    session.ack(2, false);
    run.comes_to("1 confirmed, 2 in doubt");
    session.cut();
    let session = broker.accept();
    expect(&session, &["1", "3"]);
    session.nack(2, false);
    session.ack(1, false);
    run.comes_to("2 confirmed, 1 in doubt");
    expect(&session, &["3"]);
    session.ack(3, false);
    run.succeeds_with("3 confirmed, 0 in doubt");
}

#[test]
fn a_record_that_is_too_large_ends_the_publisher_after_all_before_it_is_confirmed() {
    for position in 1..=3 {
        let broker = ScriptedBroker::start();
        let mut messages = numbered(1..=3);
        messages[position - 1] = single(position as u64, "large");
        let run = Run::start(&broker, &[], messages);
        let session = broker.accept();
        session.expect_publishes(3);
        too_large(&session, 5, 4);
        let _session = (position > 1).then(|| {
            let session = broker.accept();
            expect(&session, &["1", "2"][..position - 1]);
            session.ack(position as u64 - 1, true);
            session
        });
        let (confirmed, not_sent) = (position - 1, 4 - position);
        run.fails_with(&format!(
            "{confirmed} confirmed, 0 in doubt, {not_sent} read and not sent: record {position}: \
             publish to exchange 'logs': {}{TOO_LARGE_HINT}",
            too_large_text(5, 4)
        ));
    }
}

#[test]
fn a_batch_that_is_too_large_goes_in_pieces_and_later_ones_with_it() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], vec![batch(1, "a\nb\nc\nd"), batch(5, "e\nf\ng")]);
    let session = broker.accept();
    expect(&session, &["a\nb\nc\nd", "e\nf\ng"]);
    too_large(&session, 7, 3);
    let session = broker.accept();
    let published = expect(&session, &["a\nb", "c\nd", "e\nf", "g"]);
    assert_eq!(published[3].message_type, None);
    session.ack(4, true);
    session.expect_close();
    run.succeeds_with("7 confirmed, 0 in doubt");
}

#[test]
fn a_record_too_large_inside_a_batch_ends_the_publisher_after_those_before_it() {
    for (body, before, record) in
        [("large\nb\nc", None, 1), ("a\nlarge\nc", Some("a"), 2), ("a\nb\nlarge", Some("a\nb"), 3)]
    {
        let broker = ScriptedBroker::start();
        let run = Run::start(&broker, &[], vec![batch(1, body), single(4, "d")]);
        let session = broker.accept();
        expect(&session, &[body, "d"]);
        too_large(&session, 9, 4);
        let _session = before.map(|before| {
            let session = broker.accept();
            expect(&session, &[before]);
            session.ack(1, false);
            session
        });
        run.fails_with(&format!(
            "{} confirmed, 0 in doubt, {} read and not sent: record {record}: publish to exchange \
             'logs': {}{TOO_LARGE_HINT}",
            record - 1,
            5 - record,
            too_large_text(9, 4)
        ));
    }
}

#[test]
fn the_broker_may_lower_its_limit() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], vec![batch(1, "a\nb\ncccc"), batch(4, "d\ne")]);
    let session = broker.accept();
    expect(&session, &["a\nb\ncccc", "d\ne"]);
    too_large(&session, 8, 4);
    let session = broker.accept();
    expect(&session, &["a\nb", "cccc", "d\ne"]);
    session.ack(1, false);
    run.comes_to("2 confirmed, 3 in doubt");
    too_large(&session, 4, 2);
    run.fails_with(&format!(
        "2 confirmed, 0 in doubt, 3 read and not sent: record 3: publish to exchange 'logs': {}\
         {TOO_LARGE_HINT}",
        too_large_text(4, 2)
    ));
}

#[test]
fn a_limit_that_every_message_keeps_to_ends_the_publisher() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], vec![single(1, "a"), batch(2, "b\nc")]);
    let session = broker.accept();
    expect(&session, &["a", "b\nc"]);
    session.ack(1, false);
    run.comes_to("1 confirmed, 2 in doubt");
    too_large(&session, 9, 8);
    run.fails_with(&format!(
        "1 confirmed, 2 in doubt: publish to exchange 'logs': {}{TOO_LARGE_HINT}",
        too_large_text(9, 8)
    ));
}

#[test]
fn an_exchange_of_the_other_durability_is_declared_as_it_is() {
    for (options, declared) in [(&[][..], [false, true]), (&["--durable"], [true, false])] {
        let broker = ScriptedBroker::start();
        broker.set_exchange(declared[1]);
        let run = Run::start(&broker, options, numbered(1..=2));
        let [_refused, session] = [(); 2].map(|()| broker.accept());
        expect(&session, &["1", "2"]);
        session.ack(2, true);
        session.expect_close();
        run.succeeds_with("2 confirmed, 0 in doubt");
        assert_eq!(broker.declarations(), declared);
    }
}

#[test]
fn an_exchange_of_the_other_durability_is_found_again_after_a_loss() {
    let broker = ScriptedBroker::start();
    broker.set_exchange(true);
    let run = Run::start(&broker, &[], numbered(1..=2));
    let [_refused, session] = [(); 2].map(|()| broker.accept());
    expect(&session, &["1", "2"]);
    session.cut();
    let [_refused, session] = [(); 2].map(|()| broker.accept());
    expect(&session, &["1", "2"]);
    session.ack(2, true);
    run.succeeds_with("2 confirmed, 0 in doubt");
    assert_eq!(broker.declarations(), [false, true, false, true]);
}

#[test]
fn an_exchange_that_changes_its_durability_meanwhile_is_declared_as_it_is_then() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], numbered(1..=2));
    for declared in [false, true] {
        let session = broker.accept();
        expect(&session, &["1", "2"]);
        other_durability(&session, declared);
    }
    let session = broker.accept();
    expect(&session, &["1", "2"]);
    session.ack(2, true);
    run.succeeds_with("2 confirmed, 0 in doubt");
    assert_eq!(broker.declarations(), [false, true, false]);
}

#[test]
fn a_connection_that_is_lost_is_not_blocked_any_more() {
    let broker = ScriptedBroker::start();
    let mut publisher = connect(QUICK, &broker, &["--lines"]);
    publisher.number_messages();
    publisher.publish(single(1, "1")).expect("publish");
    let session = broker.accept();
    expect(&session, &["1"]);
    session.block("low on disk");
    act_until(&mut publisher, is_blocked);
    session.cut();
    act_until(&mut publisher, |publisher| !is_blocked(publisher));
    let run = Run::publish(publisher, Vec::new());
    let session = broker.accept();
    expect(&session, &["1"]);
    session.ack(1, false);
    run.succeeds_with("1 confirmed, 0 in doubt");
}

#[test]
fn without_confirmations_what_is_sent_while_blocked_is_not_done_with() {
    let broker = ScriptedBroker::start();
    let mut publisher = connect(QUICK, &broker, &["--lines", "--no-confirm"]);
    publisher.number_messages();
    let session = broker.accept();
    session.expect_question();
    publisher.publish(single(1, "1")).expect("publish");
    session.block("low on memory");
    act_until(&mut publisher, is_blocked);
    publisher.publish(single(2, "2")).expect("publish");
    expect(&session, &["1", "2"]);
    assert_eq!(publisher.counts().to_string(), "2 sent without confirmation, 2 in doubt");
    assert_eq!(publisher.counts().done(), 1);
    let run = Run::publish(publisher, Vec::new());
    session.unblock();
    session.expect_question();
    run.succeeds_with("2 sent without confirmation, 0 in doubt");
}

#[test]
fn a_publisher_that_had_to_look_for_its_first_broker_leaves_receivers_time_to_come_back() {
    let broker = ScriptedBroker::start();
    broker.go_down();
    let holding = Timings { time_to_subscribe: Duration::from_millis(200), ..QUICK };
    let options = &["--retry", "forever"];
    let (run, back) = thread::scope(|scope| {
        let run = scope.spawn(|| Run::start_with(holding, &broker, options, numbered(1..=1)));
        broker.wait_for_attempts(1);
        let back = Instant::now();
        broker.come_back();
        (run.join().expect("no panic"), back)
    });
    let session = broker.accept();
    expect(&session, &["1"]);
    assert!(back.elapsed() > holding.time_to_subscribe);
    session.ack(1, false);
    run.succeeds_with("1 confirmed, 0 in doubt");
}

#[test]
fn without_confirmations_a_channel_closed_while_nothing_is_sent_ends_the_publisher() {
    for options in [&["--lines", "--no-confirm"][..], &["--lines", "--no-confirm", "--mandatory"]] {
        let broker = ScriptedBroker::start();
        let mut publisher = connect(QUICK, &broker, options);
        publisher.number_messages();
        let session = broker.accept();
        session.expect_question();
        publisher.publish(single(1, "1")).expect("publish");
        expect(&session, &["1"]);
        session.close_channel(404, NO_EXCHANGE, PUBLISH);
        let ends = (0..1000).find_map(|_| publisher.wait(&never::<()>(), &DEADLINE).err());
        assert_eq!(
            format!("{:#}", ends.expect("an end, not an endless loop")),
            format!(
                "1 sent without confirmation, 1 in doubt: publish to exchange 'logs': {NO_EXCHANGE}"
            )
        );
    }
}

fn is_blocked(publisher: &Publisher) -> bool {
    publisher.session().is_some_and(|session| session.blocked.is_some())
}
