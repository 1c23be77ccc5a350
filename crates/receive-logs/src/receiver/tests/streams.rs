//! Streams with a recorded position.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::retry::Timings;
use clap::Parser;
use logs_tests::{
    CONSUME, Message, PATIENCE, ScriptedBroker, ScriptedSession, StreamMessage, TempFile,
    wait_until, wait_until_full,
};

use super::harness::{
    FORCED, LONG, LOST, PROMPT, Run, To, assert_content, batch, large_batch, pipe, wait_for_content,
};
use crate::cli::Cli;
use crate::prepare::SubscriptionConfig;
use crate::receiver::Stop;
use crate::resume::ResumeFile;
use crate::testing::{alert, environment, limited_file};

pub const CONTINUED: &str = "Subscribed again after N s; reading of stream 's' continues where it stopped, messages \
                         sent in between may be missing in it (--durable keeps the exchange when the broker restarts)";

/// A message of a stream, sent in the second of its offset.
pub fn in_stream(offset: u64, message: Message) -> StreamMessage {
    let message = Message { timestamp: Some(offset), ..message };
    StreamMessage { offset, arrived: offset, message }
}

/// Messages of a stream whose text is their offset.
pub fn stream(offsets: std::ops::RangeInclusive<u64>) -> Vec<StreamMessage> {
    offsets.map(|offset| in_stream(offset, Message::new(offset.to_string()))).collect()
}

pub fn lines(numbers: std::ops::RangeInclusive<u64>) -> String {
    numbers.map(|number| format!("{number}\n")).collect()
}

/// A stream on a broker, an output, and a position.
pub struct Files {
    pub broker: ScriptedBroker,
    file: TempFile,
    position: TempFile,
}

impl Files {
    pub fn new(messages: Vec<StreamMessage>) -> Files {
        let broker = ScriptedBroker::start();
        broker.set_stream(messages);
        Files { broker, file: TempFile::new("log"), position: TempFile::new("pos") }
    }

    /// The output of a receiver up to the message `last`, and the content of the position file when message 3 was
    /// recorded.
    fn written_after_position(last: u64) -> (Files, Vec<u8>) {
        let files = Files::new(stream(0..=3));
        let (run, _session) = files.run(&["--from-start"]);
        files.wait_for_lines(0..=3);
        files.wait_for_recorded("\"offset\":3");
        let recorded = files.position.read().unwrap();
        files.broker.set_stream(stream(0..=last));
        files.wait_for_lines(0..=last);
        run.stops();
        (files, recorded)
    }

    pub fn run(&self, options: &[&str]) -> (Run, ScriptedSession) {
        self.run_to(environment().retry, options, To::Path(self.file.path().into()))
    }

    fn run_to(&self, timings: Timings, options: &[&str], to: To) -> (Run, ScriptedSession) {
        let position = self.position.path().to_str().unwrap();
        let options = [&["--stream", "s", "--resume", position], options].concat();
        self.broker.forget_sessions();
        let started = Run::start_with(timings, &self.broker, &options, to);
        // The sessions that looked for the end of the stream are closed.
        self.broker.forget_sessions();
        started
    }

    fn wait_for_lines(&self, numbers: std::ops::RangeInclusive<u64>) {
        wait_for_content(self.file.path(), &lines(numbers));
    }

    fn recorded_text(&self) -> String {
        String::from_utf8(self.position.read().unwrap()).unwrap()
    }

    fn wait_for_recorded(&self, part: &str) {
        wait_until(&format!("{part} is recorded"), || self.recorded_text().contains(part));
    }
}

#[test]
fn a_stream_continues_exactly_after_a_loss() {
    let files = Files::new(stream(0..=3));
    let (run, session) = files.run(&["--from-start"]);
    files.wait_for_lines(0..=3);
    files.broker.set_stream(stream(0..=6));
    session.close(320, FORCED);
    files.wait_for_lines(0..=6);
    files.broker.set_stream(stream(0..=9));
    files.wait_for_lines(0..=9);
    run.stops();
    assert_eq!(run.alerts(), [LOST, CONTINUED]);
    assert!(files.recorded_text().contains("\"is_complete\":true"), "{}", files.recorded_text());
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
    let other = "Subscribed again after N s; stream 's' was deleted and created again, and is read from its \
                 beginning; messages sent in between may be missing";
    assert_eq!(run.alerts(), [LOST, other]);
}

#[test]
fn the_first_message_is_recorded_before_it_is_written() {
    let since = ["--since", "1970-01-01T00:00:02Z"];
    for (options, too_old) in [(&[][..], 0), (&["--from-start"], 0), (&since, 2)] {
        let messages = |large| {
            let old = (0..too_old).map(|offset| in_stream(offset, Message::new("too old")));
            let large = (too_old..too_old + large).map(|offset| in_stream(offset, large_batch()));
            old.chain(large).collect::<Vec<_>>()
        };
        let files = Files::new(messages(0));
        let (reader, _writer, path) = pipe();
        let (run, _session) = files.run_to(environment().retry, options, To::Path(path.into()));
        files.broker.set_stream(messages(2));
        wait_until_full(&reader);
        let first = format!("\"at\":{{\"position\":{{\"offset\":{too_old},");
        assert!(files.recorded_text().contains(&first), "{}", files.recorded_text());
        drop(reader);
        run.ends_with(Ok(Stop::ReaderGone));
    }
}

#[test]
fn a_kill_at_any_byte_leaves_each_message_once() {
    let (files, recorded) = Files::written_after_position(9);
    // As if the receiver was killed before it recorded the position, at any byte of its output.
    let whole = files.file.read().unwrap();
    let before = lines(0..=3).len();
    for length in [before, before + 1, whole.len() - 1, whole.len()] {
        fs::write(files.position.path(), &recorded).unwrap();
        fs::write(files.file.path(), &whole[..length]).unwrap();
        let (run, _session) = files.run(&[]);
        files.wait_for_lines(0..=9);
        run.stops();
        assert_eq!(run.alerts().len(), usize::from(length > before), "{:?}", run.alerts());
    }
}

#[test]
fn lines_removed_from_the_stream_stay_in_the_file() {
    let (files, recorded) = Files::written_after_position(6);
    fs::write(files.position.path(), recorded).unwrap();
    files.broker.set_stream(stream(6..=8));
    let (run, _session) = files.run(&[]);
    wait_for_content(files.file.path(), &[lines(0..=6), lines(6..=8)].concat());
    run.stops();
    let [repeated, missed] = &run.alerts()[..] else { panic!("{:?}", run.alerts()) };
    assert!(repeated.starts_with("the messages of the last second may be repeated"), "{repeated}");
    assert!(
        missed.starts_with("missed up to 2 messages of stream 's' (offsets 4 to 5)"),
        "{missed}"
    );
}

#[test]
fn a_count_ends_with_a_whole_batch_of_a_stream() {
    let batches = [batch("a\nb"), batch("c\nd\ne"), batch("f")];
    let messages: Vec<_> = (0..).zip(batches).map(|(at, batch)| in_stream(at, batch)).collect();
    let files = Files::new(messages);
    let (run, _session) = files.run(&["--from-start", "-n", "3"]);
    run.ends_with(Ok(Stop::Count));
    assert_content(files.file.path(), "a\nb\nc\nd\ne\n");
    let (run, _session) = files.run(&["--no-follow"]);
    run.ends_with(Ok(Stop::End));
    assert_content(files.file.path(), "a\nb\nc\nd\ne\nf\n");
    assert_eq!(run.alerts(), [""; 0]);
}

#[test]
fn the_largest_count_works_with_a_tail_inside_a_batch() {
    let files = Files::new(vec![in_stream(0, batch("a\nb\nc"))]);
    let options = ["--stream", "s", "--tail", "2", "--no-follow", "-n", "18446744073709551615"];
    let (run, _session) = Run::start(&files.broker, &options, files.file.path());
    run.ends_with(Ok(Stop::End));
    assert_content(files.file.path(), "b\nc\n");
}

#[test]
fn a_batch_cut_by_a_full_disk_is_written_again() {
    let messages = vec![in_stream(0, batch("a\nb")), in_stream(1, large_batch())];
    let files = Files::new(messages[..1].to_vec());
    let disk = limited_file(8192);
    let to = To::File(disk.try_clone().unwrap());
    let (run, _session) = files.run_to(environment().retry, &["--from-start"], to);
    files.wait_for_recorded("\"after\"");
    let recorded = files.recorded_text();
    files.broker.set_stream(messages);
    run.ends_with(Err("write to stdout: Operation not permitted (os error 1)"));
    assert_eq!(files.recorded_text(), recorded);
    let mut text = String::new();
    (&disk).seek(SeekFrom::Start(0)).unwrap();
    (&disk).read_to_string(&mut text).unwrap();
    assert_eq!(text, "a\nb\n");
    let (run, _session) = files.run(&["--no-follow"]);
    run.ends_with(Ok(Stop::End));
    assert_eq!(fs::read(files.file.path()).unwrap(), [&large_batch().body[..], b"\n"].concat());
}

#[test]
fn a_receiver_can_be_stopped_during_its_search() {
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
        assert!(
            files.recorded_text().contains("\"is_complete\":true"),
            "{}",
            files.recorded_text()
        );
    }
}

#[test]
fn a_receiver_can_be_stopped_before_it_consumes() {
    let files = Files::new(stream(0..=3));
    let (run, session) = files.run(&["--from-start", "-n", "9"]);
    files.wait_for_lines(0..=3);
    let asked = files.broker.count_requests(CONSUME);
    // Two look-ups are answered: for the end of the stream, and for the last written message.
    files.broker.withhold_after(CONSUME, 2);
    session.close(320, FORCED);
    files.broker.wait_for_requests(CONSUME, asked + 3);
    let start = Instant::now();
    run.stops();
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
}

#[test]
fn a_lost_broker_leaves_a_complete_position() {
    let files = Files::new(stream(0..=3));
    let (run, session) = files.run(&["--from-start", "--retry", "50ms"]);
    files.wait_for_lines(0..=3);
    files.broker.go_down();
    session.close(320, FORCED);
    assert!(run.outcome.recv_timeout(PATIENCE).unwrap().0.is_err());
    assert!(files.recorded_text().contains("\"is_complete\":true"), "{}", files.recorded_text());
    files.broker.come_back();
    let (run, _session) = files.run(&["--no-follow"]);
    run.ends_with(Ok(Stop::End));
    assert_eq!(run.alerts(), [""; 0]);
}

#[test]
fn a_node_without_a_replica_is_retried_after_a_loss() {
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
fn a_position_refers_to_the_reopened_output() {
    let files = Files::new(stream(0..=3));
    let to = To::Path(files.file.path().into());
    let (run, session) = files.run_to(LONG, &["--from-start"], to);
    files.wait_for_lines(0..=3);
    session.close(320, FORCED);
    wait_until("the loss is reported", || run.alerts() == [LOST]);
    let before = files.recorded_text();
    fs::rename(files.file.path(), files.file.path().with_extension("1")).unwrap();
    run.reopen();
    wait_until("the new mark is recorded", || files.recorded_text() != before);
    let recorded = files.position.read().unwrap();
    run.stops();
    fs::write(files.position.path(), recorded).unwrap();
    files.broker.set_stream(stream(0..=5));
    let (run, _session) = files.run(&["--no-follow"]);
    run.ends_with(Ok(Stop::End));
    assert_content(files.file.path(), "4\n5\n");
    assert_eq!(run.alerts(), [""; 0]);
}

#[test]
fn the_position_of_another_broker_or_exchange_is_an_error() {
    let files = Files::new(stream(0..=3));
    files.broker.set_properties(&[("cluster_name", "one")]);
    let (run, _session) = files.run(&["--from-start", "--no-follow"]);
    run.ends_with(Ok(Stop::End));
    let (url, position) = (files.broker.url(), files.position.path().to_str().unwrap());
    let outcome = |options: &[&str]| {
        let arguments = ["receive-logs", "-u", &url, "--resume", position];
        let cli = Cli::parse_from([&arguments, options].concat());
        let resume = ResumeFile::open(&cli, alert).unwrap();
        let config = SubscriptionConfig::new(&cli, resume.as_ref(), &environment());
        config
            .map(Arc::new)
            .map(|config| config.prepare().map(drop).map_err(|error| error.to_string()))
    };
    let foreign = "resume: the position belongs to stream 's' bound to exchange 'logs', vhost '/' of 'one' \
                   (use another file with --resume)";
    for options in [&["--stream", "t"][..], &["--stream", "s", "-e", "other"]] {
        assert_eq!(outcome(options).unwrap_err().to_string(), foreign);
    }
    assert_eq!(outcome(&["--stream", "s"]).unwrap(), Ok(()));
    // A node of the same cluster may report another name. The message identifies the stream.
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
    let other = "read stream 's': the position belongs to another stream of this name (remove the file of \
                 --resume to start over, or use another)";
    assert_eq!(outcome(&["--stream", "s"]).unwrap(), Err(other.into()));
}
