//! The states of a receiver against a scripted broker: the output, the acknowledgements, and the notes to
//! a person.

use std::fs::{self, File};
use std::io::{PipeReader, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use amqp::retry::Timings;
use amqp::{Letterbox, Mailbox};
use clap::Parser;
use logs_tests::{
    CANCEL, CONSUME, Message, PATIENCE, QUEUE_DECLARE, QueueCounts, ScriptedBroker,
    ScriptedSession, StreamMessage, TempFile, wait_until, wait_until_full,
};

use super::*;
use crate::testing::{Notes, limited_file};

const QUICK: Timings = Timings {
    first_delay: Duration::from_millis(2),
    longest_delay: Duration::from_millis(10),
    time_to_subscribe: Duration::from_millis(5),
};

/// A pause that no test outlasts.
const LONG: Timings = Timings {
    first_delay: Duration::from_secs(60),
    longest_delay: Duration::from_secs(60),
    time_to_subscribe: Duration::from_secs(1),
};

/// A stop by a signal may take this long, where nobody keeps the receiver waiting.
const PROMPT: Duration = Duration::from_millis(900);

const KEPT: &[&str] = &["--queue", "q", "--queue-type", "classic"];

const FORCED: &str = "CONNECTION_FORCED - broker forced connection closure";
const LOST: &str = "receive from BROKER: CONNECTION_FORCED - broker forced connection closure; \
                    subscribing again";
const AGAIN: &str = "Subscribed again after N s; messages in between are missing unless sent again";
const AGAIN_KEPT: &str = "Subscribed again after N s; 0 messages wait in queue 'q', others sent in \
                          between may be missing (--durable keeps the exchange when the broker restarts)";

const STILL_WAITED: &str = "messages that still waited and ";

/// A receiver at work in a thread of its own.
struct Run {
    address: String,
    stop: Letterbox<i32>,
    reopen: Letterbox<()>,
    told: Notes,
    status: Arc<StatusLine>,
    outcome: mpsc::Receiver<(Result<Stop, String>, String)>,
}

/// Where a receiver writes.
enum To {
    Path(std::path::PathBuf),
    File(File),
}

impl Run {
    /// Starts a receiver that writes the bytes of messages to `path`, and returns its session.
    fn start(broker: &ScriptedBroker, options: &[&str], path: &Path) -> (Run, ScriptedSession) {
        Run::start_with(QUICK, broker, options, To::Path(path.into()))
    }

    fn start_with(
        timings: Timings,
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
        let told = Notes::default();
        let notes = told.clone();
        let shared = Arc::new(StatusLine::new(&cli));
        let status = Arc::clone(&shared);
        thread::spawn(move || {
            notes.record();
            let resume = ResumeFile::open(&cli).unwrap();
            let config = Arc::new(SubscriptionConfig::new(&cli, resume.as_ref()).unwrap());
            let (mut output, reader_gone) = match to {
                To::Path(_) => {
                    let output = Output::open(&cli).unwrap();
                    let reader_gone = output.reader_gone().unwrap();
                    (output, reader_gone)
                }
                To::File(file) => (Output::new(&cli, file, None), None),
            };
            let subscription = config.prepare().unwrap().consume(None).unwrap();
            if let Some(resume) = &resume {
                resume.take_back(cli.output(), subscription.is_unbroken()).unwrap();
            }
            output.reopen().unwrap();
            let events = Events { stop: stopped, reopen: Some(reopened), reader_gone };
            let readiness = Readiness::new(&cli).unwrap();
            let mut receiver =
                Receiver::new(&cli, config, output, events, readiness, resume, status);
            receiver.reconnector.timings = timings;
            let outcome = receiver.run(subscription).map_err(|error| format!("{error:#}"));
            let losses = receiver.loss_report.to_string();
            // The position is free for the next receiver.
            drop(receiver);
            sender.send((outcome, losses))
        });
        let session = broker.accept();
        session.expect_consume();
        let (_, address) = url.split_once('@').unwrap();
        let address = address.split_once('/').unwrap().0.to_string();
        (Run { address, stop, reopen, told, status: shared, outcome }, session)
    }

    /// Sends SIGTERM, so to speak.
    fn stop(&self) {
        self.stop.send(15);
    }

    /// Sends SIGHUP, and waits until the receiver has noticed.
    fn reopen(&self) {
        self.reopen.send(());
        wait_until("the output is reopened", || self.reopen.is_empty());
    }

    /// Waits for the end, which must be this one.
    fn ends_with(&self, outcome: Result<Stop, &str>) {
        let (ended, _) = self.outcome.recv_timeout(PATIENCE).expect("the receiver ends");
        let ended = ended.map_err(|error| error.replace(&self.address, "BROKER"));
        assert_eq!(ended, outcome.map_err(String::from));
    }

    fn stops(&self) {
        self.stop();
        self.ends_with(Ok(Stop::Signal));
    }

    /// What a person was told, without what differs from run to run: the address of the broker, times, and
    /// whether the receiver had looked for a message after the last one.
    fn told(&self) -> Vec<String> {
        let told = self.told.all();
        let general = |note: &String| {
            let note = note.replace(&self.address, "BROKER").replace(STILL_WAITED, "");
            match note.split_once(" s; ") {
                Some((again, missing)) if again.starts_with("Subscribed again after ") => {
                    format!("Subscribed again after N s; {missing}")
                }
                _ => note,
            }
        };
        told.iter().map(general).collect()
    }
}

/// Waits until those who ask for the status are told this; without the address of the broker, and without the
/// time since there is none.
fn wait_for_status(run: &Run, expected: &str) {
    wait_until(&format!("the status is {expected}"), || {
        let status = run.status.to_string().replace(&run.address, "BROKER");
        let parts = status.split_once(" for ").zip(status.split_once(" ("));
        let general = parts.map(|((none, _), (_, rest))| format!("{none} for N ({rest}"));
        general.unwrap_or(status) == expected
    });
}

fn wait_for_content(path: &Path, content: &str) {
    wait_until(&format!("the output is {content:?}"), || {
        fs::read_to_string(path).is_ok_and(|text| text == content)
    });
}

fn assert_content(path: &Path, content: &str) {
    assert_eq!(fs::read_to_string(path).unwrap(), content);
}

/// A message of a run of emit-log.
fn numbered(number: u64) -> Message {
    let message_id = Some(format!("emit-log/{:016x}/{number}", 1));
    Message { message_id, ..Message::new(number.to_string()) }
}

fn again(message: Message) -> Message {
    Message { redelivered: true, ..message }
}

/// A batch, the only message of its run of emit-log.
fn batch(body: &str) -> Message {
    static RUN: AtomicU64 = AtomicU64::new(1000);
    let run = RUN.fetch_add(1, Ordering::Relaxed);
    let message_id = Some(format!("emit-log/{run:016x}/1"));
    Message { message_type: Some("lines".into()), message_id, ..Message::new(body) }
}

/// A batch of lines that is larger than the buffer of the output and than a pipe.
fn large_batch() -> Message {
    let lines: Vec<String> = (0..40_000).map(|number| format!("line {number}")).collect();
    batch(&lines.join("\n"))
}

/// A pipe, and the path of its end for writing, which stays open as long as the pipe.
fn pipe() -> (PipeReader, impl Sized, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    (reader, writer, path)
}

fn read_exactly(reader: &mut PipeReader, length: usize) -> String {
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn an_exclusive_queue_is_written_and_never_acknowledged() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    session.deliver(&Message::new("a"));
    session.deliver(&batch("b\nc"));
    wait_for_content(file.path(), "a\nb\nc\n");
    run.stop();
    session.expect_close();
    run.ends_with(Ok(Stop::Signal));
    assert_eq!(run.told(), [""; 0]);
}

#[test]
fn under_load_a_thousand_messages_are_acknowledged_together() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    let deliver = |session: &ScriptedSession, count| {
        session.in_one_piece(|session| {
            for _ in 0..count {
                session.deliver(&Message::new("a"));
            }
        });
    };
    deliver(&session, 1500);
    assert_eq!(session.expect_ack(), 1000);
    deliver(&session, 500);
    assert_eq!(session.expect_ack(), 2000);
    run.stops();
    assert_eq!(session.acks_to_the_end(), [0; 0]);
    assert_content(file.path(), &"a\n".repeat(2000));
}

#[test]
fn a_few_messages_are_acknowledged_within_a_second() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    let start = Instant::now();
    session.deliver(&Message::new("a"));
    session.deliver(&Message::new("b"));
    assert_eq!(session.expect_ack(), 2);
    assert!(start.elapsed() >= Duration::from_millis(990), "they wait for more to come");
    run.stops();
}

#[test]
fn messages_under_way_at_a_cancellation_are_written_and_acknowledged() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    broker.withhold(CANCEL);
    session.deliver(&Message::new("a"));
    wait_for_content(file.path(), "a\n");
    run.stop();
    assert_eq!(session.expect_ack(), 1);
    session.expect_cancel();
    session.deliver(&Message::new("b"));
    session.deliver(&Message::new("c"));
    session.confirm_cancel();
    assert_eq!(session.expect_ack(), 3);
    session.expect_question();
    session.expect_close();
    run.ends_with(Ok(Stop::Signal));
    assert_content(file.path(), "a\nb\nc\n");
    assert_eq!(run.told(), [""; 0]);
}

#[test]
fn a_quorum_queue_is_left_once_it_has_forgotten_the_consumer() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--queue", "q"], file.path());
    let counts = |consumers| QueueCounts { exists: true, messages: 0, consumers };
    broker.set_queue(counts(1));
    broker.withhold(CANCEL);
    run.stop();
    session.expect_cancel();
    session.deliver(&Message::new("a"));
    session.confirm_cancel();
    assert_eq!(session.expect_ack(), 1);
    let asked = broker.count_requests(QUEUE_DECLARE);
    broker.wait_for_requests(QUEUE_DECLARE, asked + 3);
    assert!(run.outcome.try_recv().is_err(), "the consumer is still there");
    broker.set_queue(counts(0));
    session.expect_close();
    run.ends_with(Ok(Stop::Signal));
    assert_content(file.path(), "a\n");
}

#[test]
fn a_cancellation_that_is_not_confirmed_does_not_delay_the_end_beyond_its_time() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    broker.withhold(CANCEL);
    session.deliver(&Message::new("a"));
    wait_for_content(file.path(), "a\n");
    let start = Instant::now();
    run.stops();
    assert!(start.elapsed() < Duration::from_millis(1900), "{:?}", start.elapsed());
    assert_eq!(session.acks_to_the_end(), [1]);
}

#[test]
fn a_consumer_that_the_broker_cancels_is_replaced_once_all_is_written() {
    for (exists, reason) in [
        (false, "the queue was deleted"),
        (true, "the broker cancelled the consumer, and keeps the queue"),
    ] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let (run, session) = Run::start(&broker, &[], file.path());
        broker.set_queue(QueueCounts { exists, ..QueueCounts::default() });
        session.in_one_piece(|session| {
            session.deliver(&Message::new("a"));
            session.deliver(&Message::new("b"));
            session.cancel_consumer();
        });
        let next = broker.accept();
        next.expect_consume();
        next.deliver(&Message::new("c"));
        wait_for_content(file.path(), "a\nb\nc\n");
        run.stops();
        let lost = format!("receive from BROKER: {reason}; subscribing again");
        assert_eq!(run.told(), [&*lost, AGAIN]);
    }
}

#[test]
fn a_kept_queue_that_is_deleted_is_made_anew() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    broker.set_queue(QueueCounts::default());
    session.cancel_consumer();
    let _without_queue = broker.accept();
    let next = broker.accept();
    next.expect_consume();
    run.stops();
    assert_eq!(
        run.told(),
        [
            "receive from BROKER: the queue was deleted; subscribing again",
            "Subscribed again after N s; queue 'q' was gone and is made anew: what waited in it and \
             messages sent in between are missing unless sent again",
        ]
    );
}

/// A message of another run than those of [`numbered`].
fn of_another_run(number: u64) -> Message {
    let message_id = Some(format!("emit-log/{:016x}/{number}", 2));
    Message { message_id, ..numbered(number) }
}

#[test]
fn a_run_first_received_after_an_outage_counts_as_missed_before() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    session.deliver(&numbered(700));
    wait_for_content(file.path(), "700\n");
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    next.deliver(&numbered(701));
    next.deliver(&of_another_run(801));
    wait_for_content(file.path(), "700\n701\n801\n");
    let missed = "missed up to 800 messages from run 0000000000000002 (1 to 800), sent while disconnected \
                  or before this receiver began";
    wait_until("the loss is reported", || run.told() == [LOST, AGAIN, missed]);
    wait_for_status(&run, "broker BROKER, written 3, missed 800, reconnections 1");
    run.stops();
}

#[test]
fn a_durable_queue_that_was_bound_all_along_has_missed_no_beginning() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[KEPT, &["--durable"]].concat(), file.path());
    broker.set_queue(QueueCounts { exists: true, ..QueueCounts::default() });
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    next.deliver(&of_another_run(801));
    wait_for_content(file.path(), "801\n");
    run.stops();
    assert_eq!(run.told(), [LOST, "Subscribed again after N s; 0 messages wait in queue 'q'"]);
}

#[test]
fn behind_a_durable_exchange_a_kept_queue_has_missed_no_message() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let options = [KEPT, &["--durable", "--max-backlog", "1MB"]].concat();
    let (run, session) = Run::start(&broker, &options, file.path());
    broker.set_queue(QueueCounts { exists: true, messages: 7, consumers: 0 });
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    run.stops();
    assert_eq!(run.told(), [LOST, "Subscribed again after N s; 7 messages wait in queue 'q'"]);
    assert_eq!(broker.declarations(), [true, true]);
}

#[test]
fn messages_that_may_be_repeated_are_told_within_a_second_or_two() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    session.deliver(&again(Message::new("a")));
    session.deliver(&again(batch("b\nc")));
    let repeated = "3 messages may be repeated: delivered before, and not acknowledged";
    wait_until("that is told", || run.told() == [repeated]);
    run.stops();
    assert_eq!(run.told(), [repeated]);
}

#[test]
fn a_batch_that_is_half_received_at_a_loss_is_written_only_when_it_comes_again() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    let message = batch("b\nc\nd");
    session.in_one_piece(|session| {
        session.deliver(&Message::new("a"));
        session.deliver_part(&message, 3);
        session.close(320, FORCED);
    });
    let next = broker.accept();
    next.expect_consume();
    assert_eq!(session.acks_to_the_end(), [0; 0]);
    assert_content(file.path(), "a\n");
    next.deliver(&again(Message::new("a")));
    next.deliver(&again(message));
    wait_for_content(file.path(), "a\na\nb\nc\nd\n");
    run.stop();
    assert_eq!(next.expect_ack(), 2);
    run.ends_with(Ok(Stop::Signal));
    let repeated = "4 messages may be repeated: delivered before, and not acknowledged";
    assert_eq!(run.told(), [LOST, AGAIN_KEPT, repeated]);
}

#[test]
fn a_batch_that_is_half_written_at_a_loss_is_written_to_its_end() {
    const TIMED_OUT: &str = "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out";
    type Loss = fn(ScriptedSession);
    let losses: [(Loss, &str); 3] = [
        (|session| session.close(320, FORCED), "receive from BROKER: CONNECTION_FORCED"),
        (
            |session| session.close_channel(406, TIMED_OUT, (0, 0)),
            "receive from BROKER: PRECONDITION_FAILED",
        ),
        (ScriptedSession::cut, "connection to BROKER: connection lost ("),
    ];
    for (lose, reason) in losses {
        let broker = ScriptedBroker::start();
        let (mut reader, _writer, path) = pipe();
        let (run, session) = Run::start(&broker, KEPT, Path::new(&path));
        session.deliver(&large_batch());
        wait_until_full(&reader);
        lose(session);
        let text = String::from_utf8(large_batch().body).unwrap() + "\n";
        assert_eq!(read_exactly(&mut reader, text.len()), text);
        let next = broker.accept();
        next.expect_consume();
        next.deliver(&Message::new("after"));
        assert_eq!(read_exactly(&mut reader, 6), "after\n");
        run.stop();
        assert_eq!(next.expect_ack(), 1);
        run.ends_with(Ok(Stop::Signal));
        let told = run.told();
        assert!(told[0].starts_with(reason), "{told:?}");
        assert_eq!(told[1..], [AGAIN_KEPT]);
    }
}

#[test]
fn whether_messages_still_waited_at_a_loss_is_told() {
    let told_last = |run: &Run| run.told.all().pop().unwrap();
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    session.deliver(&Message::new("a"));
    wait_for_content(file.path(), "a\n");
    // The receiver notices that only after it has looked for another message.
    run.reopen();
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    run.stops();
    assert!(!told_last(&run).contains(STILL_WAITED), "{}", told_last(&run));

    let broker = ScriptedBroker::start();
    let (mut reader, _writer, path) = pipe();
    let (run, session) = Run::start(&broker, &[], Path::new(&path));
    session.deliver(&large_batch());
    wait_until_full(&reader);
    session.close(320, FORCED);
    read_exactly(&mut reader, large_batch().body.len() + 1);
    let next = broker.accept();
    next.expect_consume();
    run.stops();
    assert!(told_last(&run).contains(STILL_WAITED), "{}", told_last(&run));
}

#[test]
fn a_loss_that_no_attempt_can_cure_ends_the_receiver_once_all_is_written() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    session.in_one_piece(|session| {
        session.deliver(&numbered(1));
        session.deliver(&numbered(3));
        session.close_channel(406, "PRECONDITION_FAILED - unknown delivery tag 7", CONSUME);
    });
    run.ends_with(Err("receive from BROKER: PRECONDITION_FAILED - unknown delivery tag 7"));
    assert_content(file.path(), "1\n3\n");
    assert_eq!(run.told(), ["missed 1 message from run 0000000000000001 (2)"]);
}

#[test]
fn without_time_to_retry_a_loss_ends_the_receiver() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--retry", "0s"], file.path());
    session.close(320, FORCED);
    run.ends_with(Err(&format!("receive from BROKER: {FORCED}")));
    assert_eq!(run.told(), [""; 0]);
}

#[test]
fn a_stop_is_heard_before_the_first_attempt() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let to = To::Path(file.path().into());
    let (run, session) = Run::start_with(LONG, &broker, &[], to);
    session.deliver(&Message::new("a"));
    session.close(320, FORCED);
    wait_until("the loss is told", || run.told() == [LOST]);
    let start = Instant::now();
    run.stops();
    assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
    assert_content(file.path(), "a\n");
}

#[test]
fn a_stop_is_heard_while_the_broker_is_away() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    broker.go_down();
    session.close(320, FORCED);
    broker.wait_for_attempts(2);
    let start = Instant::now();
    run.stops();
    assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
    assert_eq!(run.told(), [LOST]);
}

#[test]
fn a_stop_is_heard_while_an_attempt_waits_for_an_answer() {
    // While the new queue is to be consumed, the receiver is deaf for a second.
    for (request, limit) in [(QUEUE_DECLARE, PROMPT), (CONSUME, Duration::from_millis(1500))] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let (run, session) = Run::start(&broker, &[], file.path());
        let before = broker.count_requests(request);
        broker.withhold(request);
        session.close(320, FORCED);
        broker.wait_for_requests(request, before + 1);
        let start = Instant::now();
        run.stops();
        assert!(start.elapsed() < limit, "{request:?}: {:?}", start.elapsed());
        assert_eq!(run.told(), [LOST], "{request:?}");
    }
}

#[test]
fn a_stop_right_after_a_reconnect_ends_the_new_subscription_in_order() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    broker.withhold(CONSUME);
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    run.stop();
    broker.withhold(CANCEL);
    next.confirm_consume();
    next.expect_cancel();
    next.deliver(&Message::new("a"));
    next.confirm_cancel();
    assert_eq!(next.expect_ack(), 1);
    run.ends_with(Ok(Stop::Signal));
    assert_content(file.path(), "a\n");
    assert_eq!(run.told(), [LOST, AGAIN_KEPT]);
}

#[test]
fn a_queue_that_may_not_be_consumed_for_now_is_tried_again() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--retry", "forever"], file.path());
    broker.withhold(CONSUME);
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    broker.withhold_nothing();
    next.close_channel(403, "ACCESS_REFUSED", CONSUME);
    let again = broker.accept();
    again.expect_consume();
    run.stops();
    assert_eq!(run.told(), [LOST, AGAIN]);
}

#[test]
fn a_queue_that_may_not_be_consumed_in_time_ends_the_receiver() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--retry", "200ms"], file.path());
    broker.refuse(CONSUME, 403, "ACCESS_REFUSED");
    session.close(320, FORCED);
    run.ends_with(Err("consume queue 'amq.gen-scripted': ACCESS_REFUSED (give the user the \
                       permission: rabbitmqctl set_permissions)"));
    assert_eq!(run.told(), [LOST]);
}

#[test]
fn a_queue_that_is_gone_before_it_is_consumed_is_tried_again() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    broker.withhold(CONSUME);
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    broker.withhold_nothing();
    next.close_channel(404, "NOT_FOUND - no queue", CONSUME);
    let last = broker.accept();
    last.expect_consume();
    run.stops();
    assert_eq!(run.told(), [LOST, AGAIN]);
}

#[test]
fn a_second_loss_right_after_the_first_is_told_and_cured_too() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    session.deliver(&numbered(1));
    wait_for_content(file.path(), "1\n");
    session.close(320, FORCED);
    let second = broker.accept();
    second.expect_consume();
    second.in_one_piece(|second| {
        second.deliver(&again(numbered(1)));
        second.deliver(&numbered(2));
        second.close(320, FORCED);
    });
    let third = broker.accept();
    third.expect_consume();
    for message in [again(numbered(1)), again(numbered(2)), numbered(3)] {
        third.deliver(&message);
    }
    wait_for_content(file.path(), "1\n2\n3\n");
    run.stop();
    assert_eq!(third.expect_ack(), 3);
    run.ends_with(Ok(Stop::Signal));
    assert_eq!(run.told(), [LOST, AGAIN_KEPT, LOST, AGAIN_KEPT]);
}

#[test]
fn the_count_is_exact_for_an_exclusive_queue_and_a_whole_batch_for_a_kept_one() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--count", "3"], file.path());
    session.deliver(&Message::new("a"));
    session.deliver(&batch("b\nc\nd\ne"));
    session.expect_close();
    run.ends_with(Ok(Stop::Count));
    assert_content(file.path(), "a\nb\nc\n");

    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[KEPT, &["--count", "3"]].concat(), file.path());
    session.in_one_piece(|session| {
        session.deliver(&Message::new("a"));
        session.deliver(&batch("b\nc\nd\ne"));
        session.deliver(&Message::new("f"));
    });
    // Before the acknowledgement, which would make the broker send more.
    session.expect_cancel();
    assert_eq!(session.expect_ack(), 2);
    run.ends_with(Ok(Stop::Count));
    assert_content(file.path(), "a\nb\nc\nd\ne\n");
}

#[test]
fn repeats_do_not_use_up_what_the_count_lets_the_broker_send() {
    for kind in [&[][..], KEPT] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        // Sooner than messages are acknowledged for their age.
        let options = [kind, &["--count", "3", "--idle-timeout", "900ms"]].concat();
        let (run, session) = Run::start(&broker, &options, file.path());
        for _ in 0..3 {
            session.deliver(&numbered(1));
        }
        // The prefetch count is that of --count: without this the broker sends no more.
        assert_eq!(session.expect_ack(), 3);
        session.deliver(&numbered(2));
        session.deliver(&numbered(3));
        run.ends_with(Ok(Stop::Count));
        assert_content(file.path(), "1\n2\n3\n");
    }
}

#[test]
fn a_reader_that_goes_while_no_message_comes_ends_the_receiver() {
    let broker = ScriptedBroker::start();
    let (mut reader, _writer, path) = pipe();
    let (run, session) = Run::start(&broker, KEPT, Path::new(&path));
    session.deliver(&Message::new("a"));
    assert_eq!(read_exactly(&mut reader, 2), "a\n");
    drop(reader);
    run.ends_with(Ok(Stop::ReaderGone));
    assert_eq!(session.acks_to_the_end(), [1]);
}

#[test]
fn messages_that_a_reader_has_left_in_the_pipe_are_not_acknowledged() {
    let broker = ScriptedBroker::start();
    let (reader, _writer, path) = pipe();
    let (run, session) = Run::start(&broker, KEPT, Path::new(&path));
    session.deliver(&large_batch());
    wait_until_full(&reader);
    drop(reader);
    run.ends_with(Ok(Stop::ReaderGone));
    assert_eq!(session.acks_to_the_end(), [0; 0]);
}

#[test]
fn a_full_disk_ends_the_receiver_which_acknowledges_what_is_in_the_file() {
    let (broker, file, link) =
        (ScriptedBroker::start(), TempFile::with("log", b""), TempFile::new("link"));
    symlink(file.path(), link.path()).unwrap();
    let (run, session) = Run::start(&broker, KEPT, link.path());
    session.deliver(&Message::new("a"));
    session.deliver(&batch("b\nc"));
    wait_for_content(file.path(), "a\nb\nc\n");
    fs::remove_file(link.path()).unwrap();
    symlink("/dev/full", link.path()).unwrap();
    run.reopen();
    session.deliver(&Message::new("d"));
    let text = format!("write to {:?}: No space left on device (os error 28)", link.path());
    run.ends_with(Err(&text));
    assert_eq!(session.acks_to_the_end(), [2]);
    assert_content(file.path(), "a\nb\nc\n");
    assert_eq!(run.told(), [""; 0]);
}

#[test]
fn a_disk_that_is_full_in_the_middle_of_a_batch_keeps_the_messages_before_it() {
    let broker = ScriptedBroker::start();
    let file = limited_file(2 * 4096);
    let to = To::File(file.try_clone().unwrap());
    let (run, session) = Run::start_with(QUICK, &broker, KEPT, to);
    // Deliveries that come with a cancellation are written together.
    broker.withhold(CANCEL);
    run.stop();
    session.expect_cancel();
    session.deliver(&batch("a\nb"));
    session.deliver(&large_batch());
    session.confirm_cancel();
    run.ends_with(Err("write to stdout: Operation not permitted (os error 1)"));
    assert_eq!(session.acks_to_the_end(), [1]);
    let mut text = String::new();
    (&file).seek(SeekFrom::Start(0)).unwrap();
    (&file).read_to_string(&mut text).unwrap();
    assert_eq!(text, "a\nb\n");
}

#[test]
fn a_disk_that_is_full_when_the_connection_is_lost_ends_the_receiver() {
    let broker = ScriptedBroker::start();
    let (run, session) = Run::start(&broker, &[], Path::new("/dev/full"));
    session.in_one_piece(|session| {
        session.deliver(&Message::new("a"));
        session.close(320, FORCED);
    });
    run.ends_with(Err("write to \"/dev/full\": No space left on device (os error 28)"));
    assert_eq!(run.told(), [""; 0]);
}

#[test]
fn gaps_late_and_repeated_messages_of_an_exclusive_queue_are_told_over_a_reconnect() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[], file.path());
    session.deliver(&numbered(1));
    wait_for_content(file.path(), "1\n");
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    next.deliver(&numbered(1));
    next.deliver(&numbered(5));
    wait_until("the gap is told", || run.told().len() == 3);
    next.deliver(&numbered(3));
    next.deliver(&numbered(3));
    next.deliver(&numbered(6));
    wait_for_content(file.path(), "1\n5\n3\n6\n");
    run.stop();
    let (ended, losses) = run.outcome.recv_timeout(PATIENCE).unwrap();
    assert_eq!((ended, &*losses), (Ok(Stop::Signal), "2 missed, 2 repeated and left out"));
    let missed = "missed 3 messages from run 0000000000000001 (2 to 4)";
    let late = "1 message reported as missed came late";
    assert_eq!(run.told(), [LOST, AGAIN, missed, late]);
}

#[test]
fn the_status_tells_what_is_written_and_missed_and_whether_there_is_a_broker() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--retry", "forever"], file.path());
    wait_for_status(&run, "broker BROKER, written 0, missed 0, reconnections 0");
    session.deliver(&numbered(1));
    session.deliver(&batch("a\nb"));
    session.deliver(&numbered(4));
    wait_for_status(&run, "broker BROKER, written 4, missed 2, reconnections 0");
    broker.go_down();
    session.close(320, FORCED);
    let none = "broker none for N (trying until there is one)";
    wait_for_status(&run, &format!("{none}, written 4, missed 2, reconnections 0"));
    broker.come_back();
    let next = broker.accept();
    next.expect_consume();
    wait_for_status(&run, "broker BROKER, written 4, missed 2, reconnections 1");
    next.deliver(&numbered(6));
    wait_for_status(&run, "broker BROKER, written 5, missed 3, reconnections 1");
    next.deliver(&numbered(5));
    wait_for_status(&run, "broker BROKER, written 6, missed 2, reconnections 1");
    run.stops();
}

#[test]
fn the_status_tells_what_a_reader_that_has_stopped_has_taken() {
    let broker = ScriptedBroker::start();
    let (mut reader, _writer, path) = pipe();
    let (run, session) = Run::start(&broker, &[], Path::new(&path));
    session.deliver(&Message::new("before"));
    wait_for_status(&run, "broker BROKER, written 1, missed 0, reconnections 0");
    session.deliver(&large_batch());
    wait_until_full(&reader);
    wait_for_status(&run, "broker BROKER, written 1, missed 0, reconnections 0");
    read_exactly(&mut reader, 7 + large_batch().body.len() + 1);
    wait_for_status(&run, "broker BROKER, written 40001, missed 0, reconnections 0");
    run.stops();
}

#[test]
fn the_status_tells_the_offset_of_a_stream() {
    let files = Files::new(Vec::new());
    let (run, _session) = files.run(&["--from-start"]);
    wait_for_status(&run, "broker BROKER, written 0, offset none, missed 0, reconnections 0");
    files.broker.set_stream(stream(0..=3));
    wait_for_status(&run, "broker BROKER, written 4, offset 3, missed 0, reconnections 0");
    run.stops();
}

#[test]
fn a_gap_that_a_kept_queue_fills_after_a_reconnect_is_not_told() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    session.deliver(&numbered(1));
    session.deliver(&numbered(3));
    wait_for_content(file.path(), "1\n3\n");
    session.close(320, FORCED);
    let next = broker.accept();
    next.expect_consume();
    for message in [again(numbered(3)), again(numbered(1)), numbered(2), numbered(4)] {
        next.deliver(&message);
    }
    wait_for_content(file.path(), "1\n3\n2\n4\n");
    run.stop();
    assert_eq!(next.expect_ack(), 4);
    run.ends_with(Ok(Stop::Signal));
    assert_eq!(run.told(), [LOST, AGAIN_KEPT]);
}

#[test]
fn a_gap_of_a_kept_queue_is_told_at_the_end_unless_others_consume_the_queue() {
    let missed = "missed 1 message from run 0000000000000001 (2), unless another receiver of the \
                  queue has written them";
    for (others, told) in [(0, vec![missed]), (1, vec![])] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let (run, session) = Run::start(&broker, KEPT, file.path());
        session.deliver(&numbered(1));
        wait_for_content(file.path(), "1\n");
        broker.set_queue(QueueCounts { exists: true, messages: 0, consumers: others });
        session.deliver(&numbered(3));
        wait_for_content(file.path(), "1\n3\n");
        run.stop();
        run.ends_with(Ok(Stop::Signal));
        assert_eq!(run.told(), told, "{others}");
        assert_eq!(session.acks_to_the_end(), [2]);
    }
}

#[test]
fn a_stop_while_the_broker_is_away_tells_the_gaps_of_a_queue_unless_it_is_shared() {
    let missed = "missed 1 message from run 0000000000000001 (2), unless another receiver of the \
                  queue has written them";
    for (others, told) in [(0, vec![LOST, missed]), (1, vec![LOST])] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        broker.set_queue(QueueCounts { exists: true, messages: 7, consumers: others });
        let (run, session) = Run::start(&broker, KEPT, file.path());
        session.deliver(&numbered(1));
        session.deliver(&numbered(3));
        wait_for_content(file.path(), "1\n3\n");
        broker.go_down();
        session.close(320, FORCED);
        broker.wait_for_attempts(1);
        run.stops();
        assert_eq!(run.told(), told, "{others}");
    }
}

#[test]
fn a_question_about_consumers_that_is_never_answered_does_not_keep_the_receiver() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    let asked = broker.count_requests(QUEUE_DECLARE);
    broker.withhold(QUEUE_DECLARE);
    session.deliver(&numbered(1));
    session.deliver(&numbered(3));
    broker.wait_for_requests(QUEUE_DECLARE, asked + 1);
    session.deliver(&numbered(4));
    wait_for_content(file.path(), "1\n3\n4\n");
    let start = Instant::now();
    run.stops();
    assert!(start.elapsed() < Duration::from_millis(1900), "{:?}", start.elapsed());
    assert_eq!(session.acks_to_the_end(), [3]);
    let [told] = &run.told()[..] else { panic!("{:?}", run.told()) };
    assert!(told.starts_with("missed 1 message"), "{told}");
}

#[test]
fn of_two_words_of_the_broker_neither_is_lost_in_either_order() {
    type Script = fn(&ScriptedSession);
    let cancel: Script = ScriptedSession::cancel_consumer;
    let close: Script = |session| session.close(320, FORCED);
    let close_channel: Script = |session| session.close_channel(541, "INTERNAL_ERROR", (0, 0));
    let cancelled = "receive from BROKER: the broker cancelled the consumer, and keeps the queue; subscribing again";
    let broken = "receive from BROKER: INTERNAL_ERROR; subscribing again";
    for (first, second, reason) in [
        (cancel, close, cancelled),
        (close, cancel, LOST),
        (cancel, close_channel, cancelled),
        (close_channel, cancel, broken),
        (close_channel, close, broken),
        (close, close_channel, LOST),
    ] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let (run, session) = Run::start(&broker, KEPT, file.path());
        session.in_one_piece(|session| {
            session.deliver(&Message::new("a"));
            first(session);
            second(session);
        });
        let next = broker.accept();
        next.expect_consume();
        next.deliver(&Message::new("b"));
        wait_for_content(file.path(), "a\nb\n");
        run.stop();
        assert_eq!(next.expect_ack(), 1);
        run.ends_with(Ok(Stop::Signal));
        assert_eq!(run.told(), [reason, AGAIN_KEPT]);
    }
}

#[test]
fn a_delivery_after_the_end_of_its_channel_is_not_written() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, KEPT, file.path());
    session.in_one_piece(|session| {
        session.close(320, FORCED);
        session.deliver(&Message::new("a"));
    });
    let next = broker.accept();
    next.expect_consume();
    next.deliver(&again(Message::new("a")));
    wait_for_content(file.path(), "a\n");
    run.stops();
    let repeated = "1 message may be repeated: delivered before, and not acknowledged";
    assert_eq!(run.told(), [LOST, AGAIN_KEPT, repeated]);
}

#[test]
fn time_limits_stop_a_receiver() {
    for limit in ["--idle-timeout", "--timeout"] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let (run, session) = Run::start(&broker, &[KEPT, &[limit, "100ms"]].concat(), file.path());
        session.deliver(&Message::new("a"));
        assert_eq!(session.expect_ack(), 1);
        run.ends_with(Ok(Stop::TimeLimit));
        assert_content(file.path(), "a\n");
    }
}

#[test]
fn a_time_limit_while_the_broker_is_away_is_an_error_unless_it_is_that_of_a_count() {
    let late = format!("receive from BROKER: {FORCED}; not back within the time limit");
    for (options, outcome) in [(&[][..], Err(&*late)), (&["-n", "2"], Ok(Stop::TimeLimit))] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let options = [&["--idle-timeout", "100ms"], options].concat();
        let (run, session) = Run::start(&broker, &options, file.path());
        broker.go_down();
        session.close(320, FORCED);
        run.ends_with(outcome);
        assert_eq!(run.told(), [LOST]);
    }
}

#[test]
fn the_output_is_opened_anew_while_the_broker_is_away() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let to = To::Path(file.path().into());
    let (run, session) = Run::start_with(LONG, &broker, &[], to);
    session.deliver(&Message::new("a"));
    session.close(320, FORCED);
    wait_until("the loss is told", || run.told() == [LOST]);
    let renamed = file.path().with_extension("1");
    fs::rename(file.path(), &renamed).unwrap();
    run.reopen();
    wait_for_content(file.path(), "");
    assert_content(&renamed, "a\n");
    run.stops();
}

const READ_ON: &str = "Subscribed again after N s; stream 's' is read on where it was left, messages sent in \
                       between may be missing in it (--durable keeps the exchange when the broker restarts)";

/// A message of a stream, sent in the second of its offset.
fn in_stream(offset: u64, message: Message) -> StreamMessage {
    let message = Message { timestamp: Some(offset), ..message };
    StreamMessage { offset, arrived: offset, message }
}

/// Messages of a stream whose texts are their offsets.
fn stream(offsets: std::ops::RangeInclusive<u64>) -> Vec<StreamMessage> {
    offsets.map(|offset| in_stream(offset, Message::new(offset.to_string()))).collect()
}

fn lines(numbers: std::ops::RangeInclusive<u64>) -> String {
    numbers.map(|number| format!("{number}\n")).collect()
}

/// A stream on a broker, an output, and a position.
struct Files {
    broker: ScriptedBroker,
    file: TempFile,
    position: TempFile,
}

impl Files {
    fn new(messages: Vec<StreamMessage>) -> Files {
        let broker = ScriptedBroker::start();
        broker.set_stream(messages);
        Files { broker, file: TempFile::new("log"), position: TempFile::new("pos") }
    }

    /// What a receiver of a stream has written up to the message `last`, and the position that was noted
    /// after message 3.
    fn written_beyond_the_note(last: u64) -> (Files, Vec<u8>) {
        let files = Files::new(stream(0..=3));
        let (run, _session) = files.run(&["--from-start"]);
        files.wait_for_lines(0..=3);
        files.wait_for_note("\"offset\":3");
        let noted = files.position.read().unwrap();
        files.broker.set_stream(stream(0..=last));
        files.wait_for_lines(0..=last);
        run.stops();
        (files, noted)
    }

    fn run(&self, options: &[&str]) -> (Run, ScriptedSession) {
        self.run_to(QUICK, options, To::Path(self.file.path().into()))
    }

    fn run_to(&self, timings: Timings, options: &[&str], to: To) -> (Run, ScriptedSession) {
        let position = self.position.path().to_str().unwrap();
        let options = [&["--stream", "s", "--resume", position], options].concat();
        self.broker.forget_sessions();
        let started = Run::start_with(timings, &self.broker, &options, to);
        // The sessions that have looked for the end of the stream are over.
        self.broker.forget_sessions();
        started
    }

    fn wait_for_lines(&self, numbers: std::ops::RangeInclusive<u64>) {
        wait_for_content(self.file.path(), &lines(numbers));
    }

    fn note(&self) -> String {
        String::from_utf8(self.position.read().unwrap()).unwrap()
    }

    fn wait_for_note(&self, part: &str) {
        wait_until(&format!("{part} is noted"), || self.note().contains(part));
    }
}

#[test]
fn a_stream_is_read_on_after_a_loss_without_a_hole_and_nothing_comes_twice() {
    let files = Files::new(stream(0..=3));
    let (run, session) = files.run(&["--from-start"]);
    files.wait_for_lines(0..=3);
    files.broker.set_stream(stream(0..=6));
    session.close(320, FORCED);
    files.wait_for_lines(0..=6);
    files.broker.set_stream(stream(0..=9));
    files.wait_for_lines(0..=9);
    run.stops();
    assert_eq!(run.told(), [LOST, READ_ON]);
    assert!(files.note().contains("\"is_complete\":true"), "{}", files.note());
}

#[test]
fn a_stream_that_is_deleted_is_reported_once() {
    let files = Files::new(stream(0..=3));
    let (run, session) = files.run(&["--from-start"]);
    files.wait_for_lines(0..=3);
    files.broker.set_stream(stream(0..=1));
    session.close(320, FORCED);
    wait_for_content(files.file.path(), &[lines(0..=3), lines(0..=1)].concat());
    run.stops();
    let other = "Subscribed again after N s; stream 's' was deleted, was made anew, and is read from its \
                 beginning; messages sent in between may be missing";
    assert_eq!(run.told(), [LOST, other]);
}

#[test]
fn the_first_message_is_noted_before_it_is_written() {
    let since = ["--since", "1970-01-01T00:00:02Z"];
    for (options, too_old) in [(&[][..], 0), (&["--from-start"], 0), (&since, 2)] {
        let messages = |large| {
            let old = (0..too_old).map(|offset| in_stream(offset, Message::new("too old")));
            let large = (too_old..too_old + large).map(|offset| in_stream(offset, large_batch()));
            old.chain(large).collect::<Vec<_>>()
        };
        let files = Files::new(messages(0));
        let (reader, _writer, path) = pipe();
        let (run, _session) = files.run_to(QUICK, options, To::Path(path.into()));
        files.broker.set_stream(messages(2));
        wait_until_full(&reader);
        let first = format!("\"at\":{{\"position\":{{\"offset\":{too_old},");
        assert!(files.note().contains(&first), "{}", files.note());
        drop(reader);
        run.ends_with(Ok(Stop::ReaderGone));
    }
}

#[test]
fn a_receiver_that_is_killed_at_any_point_is_followed_by_one_that_writes_each_message_once() {
    let (files, noted) = Files::written_beyond_the_note(9);
    // As if it had been killed before it noted the position, while it wrote any byte.
    let whole = files.file.read().unwrap();
    let before = lines(0..=3).len();
    for length in [before, before + 1, whole.len() - 1, whole.len()] {
        fs::write(files.position.path(), &noted).unwrap();
        fs::write(files.file.path(), &whole[..length]).unwrap();
        let (run, _session) = files.run(&[]);
        files.wait_for_lines(0..=9);
        run.stops();
        assert_eq!(run.told().len(), usize::from(length > before), "{:?}", run.told());
    }
}

#[test]
fn lines_that_the_limits_have_removed_from_the_stream_stay_in_the_file() {
    let (files, noted) = Files::written_beyond_the_note(6);
    fs::write(files.position.path(), noted).unwrap();
    files.broker.set_stream(stream(6..=8));
    let (run, _session) = files.run(&[]);
    wait_for_content(files.file.path(), &[lines(0..=6), lines(6..=8)].concat());
    run.stops();
    let [repeated, missed] = &run.told()[..] else { panic!("{:?}", run.told()) };
    assert!(repeated.starts_with("the messages of a second may be repeated"), "{repeated}");
    assert!(
        missed.starts_with("missed up to 2 messages of stream 's' (offsets 4 to 5)"),
        "{missed}"
    );
}

#[test]
fn a_count_is_reached_with_a_whole_batch_where_the_position_is_noted() {
    let batches = [batch("a\nb"), batch("c\nd\ne"), batch("f")];
    let messages: Vec<_> = (0..).zip(batches).map(|(at, batch)| in_stream(at, batch)).collect();
    let files = Files::new(messages);
    let (run, _session) = files.run(&["--from-start", "-n", "3"]);
    run.ends_with(Ok(Stop::Count));
    assert_content(files.file.path(), "a\nb\nc\nd\ne\n");
    let (run, _session) = files.run(&["--no-follow"]);
    run.ends_with(Ok(Stop::End));
    assert_content(files.file.path(), "a\nb\nc\nd\ne\nf\n");
    assert_eq!(run.told(), [""; 0]);
}

#[test]
fn the_greatest_count_goes_with_a_tail_in_the_middle_of_a_batch() {
    let files = Files::new(vec![in_stream(0, batch("a\nb\nc"))]);
    let options = ["--stream", "s", "--tail", "2", "--no-follow", "-n", "18446744073709551615"];
    let (run, _session) = Run::start(&files.broker, &options, files.file.path());
    run.ends_with(Ok(Stop::End));
    assert_content(files.file.path(), "b\nc\n");
}

#[test]
fn a_batch_that_a_full_disk_has_cut_is_written_as_a_whole_by_the_next_receiver() {
    let messages = vec![in_stream(0, batch("a\nb")), in_stream(1, large_batch())];
    let files = Files::new(messages[..1].to_vec());
    let disk = limited_file(8192);
    let to = To::File(disk.try_clone().unwrap());
    let (run, _session) = files.run_to(QUICK, &["--from-start"], to);
    files.wait_for_note("\"after\"");
    let noted = files.note();
    files.broker.set_stream(messages);
    run.ends_with(Err("write to stdout: Operation not permitted (os error 1)"));
    assert_eq!(files.note(), noted);
    let mut text = String::new();
    (&disk).seek(SeekFrom::Start(0)).unwrap();
    (&disk).read_to_string(&mut text).unwrap();
    assert_eq!(text, "a\nb\n");
    let (run, _session) = files.run(&["--no-follow"]);
    run.ends_with(Ok(Stop::End));
    assert_eq!(fs::read(files.file.path()).unwrap(), [&large_batch().body[..], b"\n"].concat());
}

#[test]
fn a_stop_and_a_time_limit_end_a_receiver_that_looks_for_its_place() {
    for (options, outcome) in [
        (&[][..], Ok(Stop::Signal)),
        (&["--timeout", "300ms"], Err("not back within the time limit")),
    ] {
        let files = Files::new(stream(0..=3));
        let (run, session) = files.run(&[&["--from-start"], options].concat());
        files.wait_for_lines(0..=3);
        let asked = files.broker.count_requests(CONSUME);
        files.broker.withhold(CONSUME);
        session.close(320, FORCED);
        files.broker.wait_for_requests(CONSUME, asked + 1);
        let start = Instant::now();
        if options.is_empty() {
            run.stop();
        }
        let (ended, _) = run.outcome.recv_timeout(PATIENCE).unwrap();
        match (ended, outcome) {
            (Err(error), Err(part)) => assert!(error.ends_with(part), "{error}"),
            (ended, expected) => assert_eq!(ended, expected.map_err(String::from)),
        }
        assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
        assert!(files.note().contains("\"is_complete\":true"), "{}", files.note());
    }
}

#[test]
fn a_broker_that_does_not_let_a_stream_be_consumed_leaves_time_to_stop() {
    let files = Files::new(stream(0..=3));
    let (run, session) = files.run(&["--from-start", "-n", "9"]);
    files.wait_for_lines(0..=3);
    let asked = files.broker.count_requests(CONSUME);
    // Two look-ups are answered: for the end, and for the message written last.
    files.broker.withhold_after(CONSUME, 2);
    session.close(320, FORCED);
    files.broker.wait_for_requests(CONSUME, asked + 3);
    let start = Instant::now();
    run.stops();
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
}

#[test]
fn a_broker_that_stays_away_leaves_a_complete_position() {
    let files = Files::new(stream(0..=3));
    let (run, session) = files.run(&["--from-start", "--retry", "50ms"]);
    files.wait_for_lines(0..=3);
    files.broker.go_down();
    session.close(320, FORCED);
    assert!(run.outcome.recv_timeout(PATIENCE).unwrap().0.is_err());
    assert!(files.note().contains("\"is_complete\":true"), "{}", files.note());
    files.broker.come_back();
    let (run, _session) = files.run(&["--no-follow"]);
    run.ends_with(Ok(Stop::End));
    assert_eq!(run.told(), [""; 0]);
}

#[test]
fn a_node_without_a_replica_is_tried_again_after_a_loss() {
    let files = Files::new(stream(0..=3));
    let (run, session) = files.run(&["--from-start"]);
    files.wait_for_lines(0..=3);
    let text = "PRECONDITION_FAILED - queue 's' does not have a replica on the local node";
    files.broker.refuse(CONSUME, 406, text);
    let asked = files.broker.count_requests(CONSUME);
    session.close(320, FORCED);
    files.broker.wait_for_requests(CONSUME, asked + 3);
    files.broker.refuse_nothing();
    files.broker.set_stream(stream(0..=5));
    files.wait_for_lines(0..=5);
    run.stops();
}

#[test]
fn a_position_noted_while_the_broker_is_away_has_the_new_output() {
    let files = Files::new(stream(0..=3));
    let to = To::Path(files.file.path().into());
    let (run, session) = files.run_to(LONG, &["--from-start"], to);
    files.wait_for_lines(0..=3);
    session.close(320, FORCED);
    wait_until("the loss is told", || run.told() == [LOST]);
    let before = files.note();
    fs::rename(files.file.path(), files.file.path().with_extension("1")).unwrap();
    run.reopen();
    wait_until("the mark is another", || files.note() != before);
    let noted = files.position.read().unwrap();
    run.stops();
    fs::write(files.position.path(), noted).unwrap();
    files.broker.set_stream(stream(0..=5));
    let (run, _session) = files.run(&["--no-follow"]);
    run.ends_with(Ok(Stop::End));
    assert_content(files.file.path(), "4\n5\n");
    assert_eq!(run.told(), [""; 0]);
}

#[test]
fn the_position_of_another_broker_or_exchange_is_refused() {
    let files = Files::new(stream(0..=3));
    files.broker.set_properties(&[("cluster_name", "one")]);
    let (run, _session) = files.run(&["--from-start", "--no-follow"]);
    run.ends_with(Ok(Stop::End));
    let (url, position) = (files.broker.url(), files.position.path().to_str().unwrap());
    let outcome = |options: &[&str]| {
        let arguments = ["receive-logs", "-u", &url, "--resume", position];
        let cli = Cli::parse_from([&arguments, options].concat());
        let resume = ResumeFile::open(&cli).unwrap();
        let config = SubscriptionConfig::new(&cli, resume.as_ref());
        config
            .map(Arc::new)
            .map(|config| config.prepare().map(drop).map_err(|error| error.to_string()))
    };
    let foreign = "resume: the position is that of stream 's' bound to exchange 'logs', vhost '/' of 'one' \
                   (use another file with --resume)";
    for options in [&["--stream", "t"][..], &["--stream", "s", "-e", "other"]] {
        assert_eq!(outcome(options).unwrap_err().to_string(), foreign);
    }
    assert_eq!(outcome(&["--stream", "s"]).unwrap(), Ok(()));
    // A node of the same cluster may have another name, and is recognised by the message.
    files.broker.set_properties(&[("cluster_name", "two")]);
    assert_eq!(outcome(&["--stream", "s"]).unwrap(), Ok(()));
    for unproven in [stream(4..=9), stream(0..=1)] {
        files.broker.set_stream(unproven);
        assert_eq!(outcome(&["--stream", "s"]).unwrap(), Err(foreign.into()));
    }
    files.broker.set_properties(&[("cluster_name", "one")]);
    files.broker.set_stream(stream(4..=9));
    assert_eq!(outcome(&["--stream", "s"]).unwrap(), Ok(()));
    files.broker.set_stream(stream(0..=1));
    let other = "read stream 's': the position is that of another stream of this name (remove the file of \
                 --resume to begin anew, or use another)";
    assert_eq!(outcome(&["--stream", "s"]).unwrap(), Err(other.into()));
}
