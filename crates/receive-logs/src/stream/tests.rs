//! Where reading begins, continues and ends, against a scripted broker with a stream.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::thread;

use amqp::{Error, ErrorKind};
use clap::Parser;
use logs_tests::{
    CONSUME, EXCHANGE_DECLARE, Message as Sent, QUEUE_DECLARE, QueueCounts, ScriptedBroker,
    StreamMessage, wait_until,
};

use super::cursor::{Cursor, time};
use super::place::{Fingerprint, Place};
use crate::cli::Cli;
use crate::message::Message;
use crate::prepare::SubscriptionConfig;
use crate::subscription::Subscription;
use crate::testing::{Alerts, environment};

/// A message whose text and time of arrival are its offset.
fn message(offset: u64) -> StreamMessage {
    let message = Sent { timestamp: Some(offset), ..Sent::new(offset.to_string()) };
    StreamMessage { offset, arrived: offset, message }
}

fn messages(offsets: RangeInclusive<u64>) -> Vec<StreamMessage> {
    offsets.map(message).collect()
}

fn sent_at(timestamp: Option<u64>, known: StreamMessage) -> StreamMessage {
    StreamMessage { message: Sent { timestamp, ..known.message }, ..known }
}

/// A batch of the lines `OFFSET.0`, `OFFSET.1` and so on.
fn batch(offset: u64, records: u64) -> StreamMessage {
    let lines: Vec<_> = (0..records).map(|record| format!("{offset}.{record}")).collect();
    let known = message(offset);
    let body = lines.join("\n").into_bytes();
    // Each batch has a run of its own.
    let message_id = Some(format!("emit-log/{offset:016x}/1"));
    let message_type = Some("lines".into());
    let message = Sent { message_id, message_type, body, ..known.message };
    StreamMessage { message, ..known }
}

/// A message of a run of emit-log, with this number.
fn numbered(offset: u64, number: u64) -> StreamMessage {
    let message_id = Some(format!("emit-log/{:016x}/{number}", 1));
    StreamMessage { message: Sent { message_id, ..message(offset).message }, ..message(offset) }
}

fn broker(messages: Vec<StreamMessage>) -> ScriptedBroker {
    let broker = ScriptedBroker::start();
    broker.set_stream(messages);
    broker
}

fn config_with(uris: &str, options: &[&str]) -> Arc<SubscriptionConfig> {
    let arguments = ["receive-logs", "--uri", uris, "--stream", "s"];
    let cli = Cli::parse_from([&arguments, options].concat());
    Arc::new(SubscriptionConfig::new(&cli, None, &environment()).unwrap())
}

fn config(broker: &ScriptedBroker, options: &[&str]) -> Arc<SubscriptionConfig> {
    config_with(&broker.url(), options)
}

fn subscribe(config: &Arc<SubscriptionConfig>) -> Result<Subscription, Error> {
    config.prepare()?.consume(None)
}

/// Subscribes again at the place of a lost subscription.
fn subscribe_again(config: &Arc<SubscriptionConfig>, place: Place) -> Result<Subscription, Error> {
    config.prepare_again(Some(place))?.consume(None)
}

/// Waits for the next message and returns its records; `None` at the end of the stream.
fn next(subscription: &mut Subscription) -> Option<String> {
    let mut next = None;
    wait_until("a message or the end", || {
        next = subscription.next_arrived().unwrap();
        next.is_some() || is_at_end(subscription)
    });
    let mut message = Message::new(next?);
    let cursor = subscription.queue.cursor_mut().unwrap();
    if cursor.is_too_old(&message.delivery) {
        message.skip_all();
    }
    cursor.select(&mut message);
    cursor.record_written(message.delivery.tag);
    let text = |(_, record)| str::from_utf8(record).unwrap();
    Some(message.selected().map(text).collect::<Vec<_>>().join(" "))
}

fn is_at_end(subscription: &Subscription) -> bool {
    subscription.queue.cursor().is_some_and(Cursor::is_at_end)
}

fn is_unbroken(subscription: &Subscription) -> bool {
    subscription.queue.cursor().is_some_and(Cursor::is_unbroken)
}

/// The next `count` records.
fn take(subscription: &mut Subscription, count: usize) -> String {
    let mut records = Vec::new();
    while records.len() < count {
        let text = next(subscription).expect("a message");
        records.extend(text.split_whitespace().map(String::from));
    }
    records.join(" ")
}

/// The remaining records before the end.
fn rest(subscription: &mut Subscription) -> String {
    let mut records = Vec::new();
    while let Some(text) = next(subscription) {
        records.extend((!text.is_empty()).then_some(text));
    }
    records.join(" ")
}

/// The records that `--no-follow` and these options read.
fn read(broker: &ScriptedBroker, options: &[&str]) -> String {
    let config = config(broker, &[options, &["--no-follow"]].concat());
    rest(&mut subscribe(&config).unwrap())
}

fn time_of(seconds: u64) -> String {
    time(Some(seconds)).to_string()
}

fn failure(outcome: Result<Subscription, Error>) -> (ErrorKind, String) {
    let error = outcome.err().expect("an error");
    (error.kind(), error.to_string())
}

#[test]
fn by_default_reading_begins_with_the_next_message() {
    let broker = broker(messages(1..=3));
    let config = config(&broker, &[]);
    let mut subscription = subscribe(&config).unwrap();
    broker.set_stream(messages(1..=5));
    assert_eq!(take(&mut subscription, 2), "4 5");
}

#[test]
fn the_first_message_of_an_empty_stream_may_arrive_offline() {
    let broker = broker(vec![]);
    let config = config(&broker, &[]);
    let subscription = subscribe(&config).unwrap();
    broker.set_stream(messages(0..=2));
    let mut again = subscribe_again(&config, subscription.queue.place().unwrap()).unwrap();
    assert_eq!(take(&mut again, 3), "0 1 2");
}

#[test]
fn a_loss_before_the_first_message_skips_nothing() {
    let broker = broker(messages(1..=3));
    let config = config(&broker, &[]);
    let subscription = subscribe(&config).unwrap();
    broker.set_stream(messages(1..=5));
    let mut again = subscribe_again(&config, subscription.queue.place().unwrap()).unwrap();
    assert_eq!(take(&mut again, 2), "4 5");
}

#[test]
fn no_follow_ends_at_the_last_message_of_the_start() {
    let broker = broker(messages(1..=3));
    let config = config(&broker, &["--from-start", "--no-follow"]);
    let mut subscription = subscribe(&config).unwrap();
    broker.set_stream(messages(1..=9));
    assert_eq!(rest(&mut subscription), "1 2 3");
    // Another connection does not move the end.
    let mut again = subscribe_again(&config, Place::First).unwrap();
    assert_eq!(rest(&mut again), "1 2 3");
    let mut after = subscribe_again(&config, subscription.queue.place().unwrap()).unwrap();
    assert_eq!(rest(&mut after), "");
}

#[test]
fn a_new_stream_is_not_searched() {
    for options in [&[][..], &["--tail", "5"], &["--since", "5m", "--no-follow"]] {
        let broker = ScriptedBroker::start();
        let _subscription = subscribe(&config(&broker, options)).unwrap();
        assert_eq!(broker.count_requests(CONSUME), 1, "{options:?}");
    }
}

#[test]
fn an_empty_stream_is_at_its_end() {
    let broker = broker(vec![]);
    for options in [&["--from-start"][..], &["--tail", "5"], &["--since", "5m"]] {
        assert_eq!(read(&broker, options), "");
    }
}

#[test]
fn a_slow_stream_does_not_count_as_empty() {
    let broker = broker(vec![]);
    broker.set_queue(QueueCounts { exists: true, messages: 3, ..QueueCounts::default() });
    let config = config(&broker, &["--from-start", "--no-follow"]);
    thread::scope(|scope| {
        scope.spawn(|| {
            broker.wait_for_requests(CONSUME, 2);
            broker.set_stream(messages(1..=3));
        });
        assert_eq!(rest(&mut subscribe(&config).unwrap()), "1 2 3");
    });
}

#[test]
fn a_stream_that_sends_nothing_is_an_error() {
    let broker = broker(vec![]);
    broker.set_queue(QueueCounts { exists: true, messages: 3, ..QueueCounts::default() });
    let config = config(&broker, &["--from-start", "--no-follow"]);
    let (kind, text) = failure(subscribe(&config));
    assert_eq!(
        (kind, &*text),
        (ErrorKind::Unavailable, "read stream 's': the broker sends nothing")
    );
}

#[test]
fn since_skips_earlier_messages() {
    let mut stream = messages(100..=120);
    // Messages of other programs, and of a publisher whose clock is behind.
    stream[12] = sent_at(None, message(112));
    stream[13] = sent_at(Some(50), message(113));
    let broker = broker(stream);
    let since = ["--since", &time_of(111)];
    assert_eq!(read(&broker, &since), "111 112 114 115 116 117 118 119 120");
    assert_eq!(read(&broker, &["--since", &time_of(200)]), "");
}

#[test]
fn new_messages_are_written_despite_a_wrong_clock() {
    let broker = broker(messages(100..=112));
    let config = config(&broker, &["--since", &time_of(111)]);
    let mut subscription = subscribe(&config).unwrap();
    assert_eq!(take(&mut subscription, 2), "111 112");
    let mut stream = messages(100..=112);
    stream.push(sent_at(Some(50), message(113)));
    broker.set_stream(stream);
    assert_eq!(take(&mut subscription, 1), "113");
}

#[test]
fn a_loss_before_the_time_of_since_skips_the_rest() {
    let broker = broker(messages(100..=112));
    let config = config(&broker, &["--since", &time_of(111), "--no-follow"]);
    let mut subscription = subscribe(&config).unwrap();
    assert_eq!(next(&mut subscription), Some(String::new()), "message 106");
    let place = subscription.queue.place().unwrap();
    assert_eq!(place, Place::Since(111));
    assert_eq!(rest(&mut subscribe_again(&config, place).unwrap()), "111 112");
    // The same after a message without a time.
    let mut stream = messages(100..=112);
    stream[7] = sent_at(None, message(107));
    broker.set_stream(stream);
    let mut subscription = subscribe(&config).unwrap();
    assert_eq!(take(&mut subscription, 1), "107");
    let mut again = subscribe_again(&config, subscription.queue.place().unwrap()).unwrap();
    assert_eq!(rest(&mut again), "111 112");
}

#[test]
fn a_tail_counts_records_across_missing_offsets() {
    let mut stream = messages(0..=9);
    stream.extend([batch(11, 4), batch(12, 3), message(14)]);
    let broker = broker(stream);
    for (tail, expected) in [
        ("1", "14"),
        ("2", "12.2 14"),
        ("5", "11.3 12.0 12.1 12.2 14"),
        ("9", "9 11.0 11.1 11.2 11.3 12.0 12.1 12.2 14"),
        ("18", "0 1 2 3 4 5 6 7 8 9 11.0 11.1 11.2 11.3 12.0 12.1 12.2 14"),
        ("19", "0 1 2 3 4 5 6 7 8 9 11.0 11.1 11.2 11.3 12.0 12.1 12.2 14"),
    ] {
        assert_eq!(read(&broker, &["--tail", tail]), expected);
    }
}

#[test]
fn a_tail_longer_than_the_sample_has_all_its_records() {
    let broker = broker(messages(0..=4999));
    let config = config(&broker, &["--tail", "3500", "--no-follow"]);
    let mut subscription = subscribe(&config).unwrap();
    assert_eq!(take(&mut subscription, 2), "1500 1501");
}

#[test]
fn a_tail_counts_duplicates_once() {
    let repeat = StreamMessage { offset: 3, ..numbered(2, 2) };
    let broker = broker(vec![numbered(1, 1), numbered(2, 2), repeat, numbered(4, 3)]);
    let config = config(&broker, &["--tail", "2", "--no-follow"]);
    let subscription = subscribe(&config).unwrap();
    let place = subscription.queue.place().unwrap();
    assert!(
        matches!(place, Place::At { message: Fingerprint { offset: 2, .. }, skip: 0 }),
        "{place:?}"
    );
}

#[test]
fn a_tail_continues_after_a_loss() {
    let broker = broker(vec![batch(1, 4), batch(2, 4), batch(3, 4)]);
    let config = config(&broker, &["--tail", "3", "--no-follow"]);
    let mut subscription = subscribe(&config).unwrap();
    let first = subscription.queue.place().unwrap();
    // The connection is lost after a message of which no record is written.
    assert_eq!(next(&mut subscription), Some(String::new()));
    let second = subscription.queue.place().unwrap();
    assert_ne!(first, second);
    for place in [first, second] {
        assert_eq!(rest(&mut subscribe_again(&config, place).unwrap()), "3.1 3.2 3.3");
    }
}

#[test]
fn messages_removed_before_they_are_read_are_reported() {
    let broker = broker(messages(1..=3));
    let config = config(&broker, &["--from-start"]);
    let mut subscription = subscribe(&config).unwrap();
    let alerts = Alerts::during(|| {
        assert_eq!(take(&mut subscription, 3), "1 2 3");
        // The end of a segment, and messages 7 to 10.
        broker.set_stream(messages(5..=6));
        assert_eq!(take(&mut subscription, 2), "5 6");
        broker.set_stream(messages(11..=12));
        assert_eq!(take(&mut subscription, 2), "11 12");
    });
    let missed = "missed up to 4 messages of stream 's' (offsets 7 to 10), sent between \
                  1970-01-01T00:00:06Z and 1970-01-01T00:00:11Z: its limits have removed them";
    assert_eq!(alerts, [missed]);
}

#[test]
fn messages_removed_during_an_outage_are_reported() {
    let broker = broker(messages(1..=3));
    let config = config(&broker, &["--tail", "2"]);
    let mut subscription = subscribe(&config).unwrap();
    let place = subscription.queue.place().unwrap();
    assert_eq!(take(&mut subscription, 2), "2 3");
    broker.set_stream([sent_at(None, message(9))]);
    for (place, missed) in [
        (
            subscription.queue.place().unwrap(),
            "5 messages of stream 's' (offsets 4 to 8), sent between \
                                         1970-01-01T00:00:03Z and an unknown time",
        ),
        (
            place,
            "8 messages of stream 's' (offsets 1 to 8), sent between an unknown time and an \
                 unknown time",
        ),
    ] {
        let alerts = Alerts::during(|| {
            let mut again = subscribe_again(&config, place).unwrap();
            assert!(!is_unbroken(&again));
            assert_eq!(take(&mut again, 1), "9");
        });
        assert_eq!(alerts, [format!("missed up to {missed}: its limits have removed them")]);
    }
}

#[test]
fn removed_messages_before_the_end_are_reported() {
    for (options, read_before, missed) in [
        (&["--from-start"][..], 2, "4 messages of stream 's' (offsets 3 to 6)"),
        (&["--from-start"], 5, "1 messages of stream 's' (offsets 6 to 6)"),
        (&["--from-start"], 0, "7 messages of stream 's' (offsets 0 to 6)"),
        (&["--tail", "4"], 0, "5 messages of stream 's' (offsets 2 to 6)"),
    ] {
        let broker = broker(messages(1..=6));
        let config = config(&broker, &[options, &["--no-follow"]].concat());
        let mut subscription = subscribe(&config).unwrap();
        take(&mut subscription, read_before);
        let place = subscription.queue.place().unwrap();
        broker.set_stream(messages(8..=9));
        let mut again = subscribe_again(&config, place).unwrap();
        let alerts = Alerts::during(|| assert_eq!(rest(&mut again), ""));
        let [text] = &alerts[..] else { panic!("{alerts:?}") };
        assert!(text.starts_with(&format!("missed up to {missed}, sent between")), "{text}");
    }
}

#[test]
fn a_recreated_stream_is_read_from_its_beginning() {
    let broker = broker(messages(0..=3));
    let config = config(&broker, &["--tail", "1"]);
    let mut subscription = subscribe(&config).unwrap();
    let at = subscription.queue.place().unwrap();
    assert_eq!(take(&mut subscription, 1), "3");
    let after = subscription.queue.place().unwrap();
    let changed: Vec<_> = messages(0..=4).into_iter().map(|old| sent_at(Some(99), old)).collect();
    for stream in [vec![], messages(0..=1), changed] {
        broker.set_stream(stream.clone());
        for place in [at, after] {
            let alerts = Alerts::during(|| {
                let mut again = subscribe_again(&config, place).unwrap();
                assert!(again.queue.cursor().unwrap().is_new());
                broker.set_stream([stream.clone(), vec![message(20)]].concat());
                let first = stream.first().map_or(20, |first| first.offset);
                assert_eq!(take(&mut again, 1), first.to_string());
            });
            // The receiver reports it once for all attempts.
            assert_eq!(alerts, [""; 0]);
            broker.set_stream(stream.clone());
        }
    }
}

#[test]
fn a_recreated_stream_is_an_error_with_no_follow() {
    for options in [&["--from-start"][..], &["--tail", "3"], &["--since", "2026-01-01T00:00:00Z"]] {
        let broker = broker(messages(1..=3));
        let config = config(&broker, &[options, &["--no-follow"]].concat());
        let subscription = subscribe(&config).unwrap();
        broker.set_stream(messages(0..=1));
        let (kind, text) = failure(subscribe_again(&config, subscription.queue.place().unwrap()));
        assert_eq!(kind, ErrorKind::Configuration);
        let expected = "read stream 's': the stream was deleted and created again before its end was read \
                        (--no-follow)";
        assert_eq!(text, expected);
    }
}

#[test]
fn a_lagging_replica_has_time_to_catch_up() {
    let broker = broker(messages(1..=5));
    let config = config(&broker, &["--tail", "1"]);
    let mut subscription = subscribe(&config).unwrap();
    assert_eq!(take(&mut subscription, 1), "5");
    let place = subscription.queue.place().unwrap();
    broker.set_stream(messages(1..=3));
    let before = broker.count_requests(CONSUME);
    let alerts = Alerts::during(|| {
        let mut again = thread::scope(|scope| {
            scope.spawn(|| {
                broker.wait_for_requests(CONSUME, before + 1);
                broker.set_stream(messages(1..=6));
            });
            subscribe_again(&config, place).unwrap()
        });
        assert!(is_unbroken(&again));
        assert_eq!(take(&mut again, 1), "6");
    });
    assert_eq!(alerts, [""; 0]);
}

#[test]
fn reading_continues_after_a_message_without_an_offset() {
    let broker = broker(messages(1..=3));
    let config = config(&broker, &["--from-start"]);
    let mut subscription = subscribe(&config).unwrap();
    let session = broker.accept();
    assert_eq!(take(&mut subscription, 3), "1 2 3");
    session.deliver(&message(4).message);
    assert_eq!(take(&mut subscription, 1), "4");
    broker.set_stream(messages(1..=5));
    let mut again = subscribe_again(&config, subscription.queue.place().unwrap()).unwrap();
    assert_eq!(take(&mut again, 1), "5");
}

#[test]
fn a_count_does_not_limit_skipped_messages() {
    let mut stream = messages(1..=5000);
    stream.iter_mut().for_each(|message| message.arrived = 5000);
    let broker = broker(stream);
    let config = config(&broker, &["-n", "1", "--since", &time_of(5000)]);
    let mut subscription = subscribe(&config).unwrap();
    let mut passed = 0;
    while next(&mut subscription).unwrap().is_empty() {
        passed += 1;
        assert!(passed < 1000 || subscription.wants_acknowledgement());
        if passed == 1000 {
            return;
        }
    }
}

#[test]
fn a_broker_without_streams_is_known_by_its_version() {
    for (version, is_right) in [("3.8.34", false), ("3.9.0", true), ("4.1", true), ("", true)] {
        let broker = broker(vec![]);
        broker.set_properties(&[("version", version)]);
        let outcome = subscribe(&config(&broker, &["--from-start"]));
        assert_eq!(outcome.is_ok(), is_right, "{version}");
        if let Err(error) = outcome {
            let text = format!(
                "declare stream 's': streams need RabbitMQ 3.9 or later, and this is {version}"
            );
            assert_eq!((error.kind(), error.to_string()), (ErrorKind::Configuration, text));
            assert_eq!(broker.count_requests(QUEUE_DECLARE), 0);
        }
    }
}

#[test]
fn a_queue_that_is_not_a_stream_is_an_error() {
    let broker = broker(vec![]);
    broker.refuse(
        CONSUME,
        406,
        "PRECONDITION_FAILED - invalid arg 'x-stream-offset' for queue 's'",
    );
    let (kind, text) = failure(subscribe(&config(&broker, &["--from-start"])));
    assert_eq!(kind, ErrorKind::NotAStream);
    assert!(
        text.ends_with(
            "(a queue of this name exists and is not a stream: use another --stream, or --queue)"
        ),
        "{text}"
    );
}

#[test]
fn another_node_is_tried_if_the_first_has_no_replica() {
    let (without, with) = (broker(vec![]), broker(messages(1..=3)));
    without.refuse(
        CONSUME,
        406,
        "PRECONDITION_FAILED - queue 's' does not have a replica on the local node",
    );
    let options = ["--from-start", "--no-follow"];
    let both = format!("{} {}", without.url(), with.url());
    assert_eq!(rest(&mut subscribe(&config_with(&both, &options)).unwrap()), "1 2 3");
    let (kind, text) = failure(subscribe(&config_with(&without.url(), &options)));
    assert_eq!(kind, ErrorKind::NoReplica);
    assert!(
        text.ends_with(
            "(--uri or AMQP_URL takes several nodes of a cluster: name one with a replica)"
        ),
        "{text}"
    );
}

#[test]
fn a_stream_with_other_limits_is_used_as_it_is() {
    let broker = broker(messages(1..=3));
    broker.set_queue(QueueCounts { exists: true, ..QueueCounts::default() });
    broker.refuse(
        QUEUE_DECLARE,
        406,
        "PRECONDITION_FAILED - inequivalent arg 'x-max-age' for queue 's' in vhost '/'",
    );
    assert_eq!(read(&broker, &["--from-start"]), "1 2 3");
    assert_eq!(broker.count_requests(EXCHANGE_DECLARE), 2);
}

#[test]
fn a_segment_is_a_tenth_of_the_size_limit() {
    let limits = |options: &[&str]| {
        let config = config_with("amqp://localhost", options);
        format!("{:?}", config.stream.as_ref().unwrap().queue())
    };
    for (options, parts) in [
        (&[][..], ["\"86400s\"", "LongLongInt(1073741824)", "LongLongInt(107374182)"]),
        (
            &["--keep", "2h", "--keep", "20MB"],
            ["\"7200s\"", "LongLongInt(20000000)", "LongLongInt(2000000)"],
        ),
        (&["--keep", "7d"], ["\"604800s\"", "x-max-age", "LongLongInt(50000000)"]),
        (
            &["--keep", "1TB"],
            ["x-max-length-bytes", "LongLongInt(1000000000000)", "LongLongInt(500000000)"],
        ),
    ] {
        let limits = limits(options);
        for part in parts {
            assert!(limits.contains(part), "{part}: {limits}");
        }
    }
}

#[test]
fn removed_messages_may_be_sent_after_the_year_9999() {
    let sent = |offset, timestamp| sent_at(Some(timestamp), message(offset));
    let broker = broker(vec![sent(1, 1_700_000_000_000)]);
    let config = config(&broker, &["--from-start"]);
    let mut subscription = subscribe(&config).unwrap();
    let alerts = Alerts::during(|| {
        assert_eq!(take(&mut subscription, 1), "1");
        broker.set_stream([sent(9, u64::MAX)]);
        assert_eq!(take(&mut subscription, 1), "9");
    });
    let missed = "missed up to 7 messages of stream 's' (offsets 2 to 8), sent between \
                  @1700000000000 and @18446744073709551615: its limits have removed them";
    assert_eq!(alerts, [missed]);
}
