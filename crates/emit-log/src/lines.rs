//! `--lines`: publishes the records of standard input as they arrive.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::Mailbox;
use anyhow::{Context, Result};
use logs_process::exit::{Failure, Status};
use logs_process::notes::last_note;
use logs_process::signals::{self, StopSignals};

use crate::cli::Cli;
use crate::counts::Counts;
use crate::input::{Chunk, InputError, Records, Step};
use crate::message::Message;
use crate::packer::Packer;
use crate::progress::Progress;
use crate::publisher::Publisher;

/// How long emit-log waits for the last confirms after a signal.
pub const GRACE: Duration = Duration::from_secs(5);

/// Publishes each record of standard input until its end or a signal, and waits until all are
/// confirmed. Returns the signal.
///
/// # Errors
///
/// Those of the publisher. When the input cannot be read or a record is too large, after all earlier
/// records are confirmed.
pub fn publish(
    cli: &Cli,
    packer: Packer,
    stop: StopSignals,
    publisher: Publisher,
) -> Result<Option<i32>> {
    let counts = publisher.counts();
    let counted = Arc::clone(&counts);
    let stop = stop.handle(GRACE, move |signal| report_stop(signal, &counted))?;
    // io::stdin has a buffer of its own, so it is not used.
    let stdin = io::stdin().as_fd().try_clone_to_owned().context("read standard input")?;
    publish_file(stdin.into(), cli, packer, &stop, publisher)?;
    let signal = stop.try_recv();
    if let Some(signal) = signal {
        report_stop(signal, &counts);
    }
    Ok(signal)
}

/// Publishes each record of a file until its end or a `stop`.
fn publish_file(
    file: File,
    cli: &Cli,
    mut packer: Packer,
    stop: &Mailbox<i32>,
    mut publisher: Publisher,
) -> Result<()> {
    let counts = publisher.counts();
    let max_record = cli.max_record.as_u64() as usize;
    let mut records = Records::new(file, cli.separator(), max_record, cli.skip_empty);
    let progress = Progress::start(cli, Arc::clone(&counts)).context("show the progress")?;

    let copied = copy(&mut records, stop, &progress, &mut packer, &mut publisher);
    let (published, read) = match copied {
        Ok(read) => (Ok(()), read),
        Err(error) => {
            // A spool keeps the records that are read. Later errors are ignored, because the first one is the cause.
            let _ = publisher.keep(take_all(&mut packer, &counts));
            let _ = take_partial(&mut records, &counts, &progress, &mut packer);
            let _ = publisher.keep(take_all(&mut packer, &counts));
            (Err(error), Ok(()))
        }
    };
    publisher.finish(published, Some(stop))?;
    if let Err(error) = read {
        return Err(describe(&error, cli)).context(counts.to_string());
    }
    if counts.spooled() == 0 {
        progress.finish();
    }
    Ok(())
}

/// Publishes records until the end of the input, an error of the input, or a signal, and then the partial record. While
/// the publisher accepts no messages, this reads nothing, so that the producer blocks on a full pipe.
fn copy(
    records: &mut Records<File>,
    stop: &Mailbox<i32>,
    progress: &Progress,
    packer: &mut Packer,
    publisher: &mut Publisher,
) -> Result<Result<(), InputError>> {
    let counts = publisher.counts();
    let mut outcome = Ok(());
    while stop.is_empty() {
        let sync_time = publisher.outbox.sync_time(packer.deadline().is_some());
        let deadline = packer.deadline().into_iter().chain(sync_time).min();
        let is_ready = !records.needs_input()
            || publisher.wait(Some(records.source().as_fd()), Some(stop), deadline)?;
        if is_ready {
            match records.read() {
                Ok(Step::Chunk(chunk)) => add(chunk, &counts, progress, packer),
                Ok(Step::Incomplete) => {}
                Ok(Step::End) => break,
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        let has_passed = |time: Option<Instant>| time.is_some_and(|time| time <= Instant::now());
        if has_passed(deadline) {
            packer.release();
        }
        if publisher.outbox.is_empty() {
            packer.release_waiting();
        }
        counts.set_partial(records.has_partial() || packer.has_partial());
        publisher.publish(count_joined(packer, &counts))?;
        if packer.deadline().is_none() && has_passed(publisher.outbox.sync_time(false)) {
            publisher.outbox.sync()?;
        }
    }
    let outcome = outcome.and(take_partial(records, &counts, progress, packer));
    publisher.publish(take_all(packer, &counts))?;
    Ok(outcome)
}

/// The messages that are ready. Joined lines count as read when their record is complete.
fn count_joined(packer: &mut Packer, counts: &Counts) -> impl Iterator<Item = Message> {
    let is_joined = packer.joins_lines();
    packer.inspect(move |message| counts.add_read(if is_joined { message.records } else { 0 }))
}

/// The messages of all records.
fn take_all(packer: &mut Packer, counts: &Counts) -> Vec<Message> {
    let messages = packer.take_all();
    if packer.joins_lines() {
        counts.add_read(messages.iter().map(|message| message.records).sum());
    }
    counts.set_partial(false);
    messages
}

/// Adds the partial record.
fn take_partial(
    records: &mut Records<File>,
    counts: &Counts,
    progress: &Progress,
    packer: &mut Packer,
) -> Result<(), InputError> {
    let rest = records.take_partial()?;
    counts.set_partial(false);
    rest.into_iter().for_each(|rest| add(rest, counts, progress, packer));
    Ok(())
}

fn add(chunk: Chunk, counts: &Counts, progress: &Progress, packer: &mut Packer) {
    if !packer.joins_lines() {
        counts.add_read(chunk.records);
    }
    progress.add(chunk.bytes.len());
    packer.add(chunk.bytes, chunk.read_at);
}

fn describe(error: &InputError, cli: &Cli) -> Failure {
    match error {
        InputError::Io(error) => Failure::io("read standard input", error),
        InputError::TooLarge(record) => Failure::new(
            Status::Data,
            format!("record {record} is larger than {} (--max-record)", cli.max_record),
        ),
    }
}

/// Reports the counts at a signal.
pub fn report_stop(signal: i32, counts: &Counts) {
    let name = signals::name(signal);
    last_note(format_args!("emit-log: stopped by {name}: {counts}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use amqp::Sender;
    use clap::Parser;
    use logs_process::exit::status_of;
    use logs_tests::{PATIENCE, PUBLISH, ScriptedBroker, ScriptedSession, wait_until};
    use std::io::{PipeWriter, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::sync::mpsc;
    use std::thread;

    /// `publish_file` in a thread of its own, with a pipe as its file.
    struct Run {
        broker: ScriptedBroker,
        pipe: Option<PipeWriter>,
        stop: Sender<i32>,
        outcome: mpsc::Receiver<Result<(), String>>,
    }

    impl Run {
        fn start(options: &[&str]) -> Run {
            let (reader, writer) = io::pipe().unwrap();
            let run = Run::start_with(OwnedFd::from(reader).into(), options);
            Run { pipe: Some(writer), ..run }
        }

        fn start_with(file: File, options: &[&str]) -> Run {
            let broker = ScriptedBroker::start();
            let url = broker.url();
            let args = ["emit-log", "--lines", "--quiet", "--uri", &url];
            let cli = Cli::parse_from([&args, options].concat());
            let packer = Packer::new(cli.cutter().unwrap(), cli.keys(None).unwrap());
            let publisher = crate::connect(&cli).unwrap();
            let (stop, stopped) = Mailbox::open().unwrap();
            let (sender, outcome) = mpsc::channel();
            thread::spawn(move || {
                let outcome = publish_file(file, &cli, packer, &stopped, publisher);
                sender.send(
                    outcome.map_err(|error| format!("{}: {error:#}", status_of(&error) as u8)),
                )
            });
            Run { broker, pipe: None, stop, outcome }
        }

        fn write(&mut self, bytes: &[u8]) {
            self.pipe.as_mut().unwrap().write_all(bytes).unwrap();
        }

        fn end_of_input(&mut self) {
            self.pipe = None;
        }

        fn outcome(&self) -> Result<(), String> {
            self.outcome.recv_timeout(PATIENCE).expect("it ends")
        }
    }

    fn expect(session: &ScriptedSession, bodies: &[&str]) {
        let published = session.expect_publishes(bodies.len()).into_iter();
        let published: Vec<_> = published.map(|m| String::from_utf8(m.body).unwrap()).collect();
        assert_eq!(published, bodies);
    }

    #[test]
    fn records_are_published_until_the_end_of_the_input() {
        let mut run = Run::start(&[]);
        let session = run.broker.accept();
        run.write(b"one\ntw");
        expect(&session, &["one"]);
        run.write(b"o\nthree");
        expect(&session, &["two"]);
        run.end_of_input();
        expect(&session, &["three"]);
        session.ack(3, true);
        session.expect_close();
        assert_eq!(run.outcome(), Ok(()));
    }

    #[test]
    fn records_that_are_read_together_are_a_batch() {
        let mut run = Run::start(&["--batch", "--null", "--skip-empty"]);
        let session = run.broker.accept();
        run.write(b"a\nb\0\0c\0");
        expect(&session, &["a\nb\0c"]);
        session.ack(1, false);
        run.end_of_input();
        assert_eq!(run.outcome(), Ok(()));
    }

    #[test]
    fn with_batch_a_record_waits_while_another_is_unconfirmed() {
        let mut run = Run::start(&["--batch"]);
        let session = run.broker.accept();
        let mut send = |body: &str| {
            let start = Instant::now();
            run.write(format!("{body}\n").as_bytes());
            expect(&session, &[body]);
            start.elapsed()
        };
        let wait = Duration::from_millis(5);
        let mut fastest = Duration::MAX;
        for tag in 1..=20 {
            fastest = fastest.min(send("idle"));
            session.ack(tag, false);
        }
        assert!(fastest < wait, "{fastest:?}");
        send("unconfirmed");
        let elapsed = send("waits");
        assert!(elapsed >= wait, "{elapsed:?}");
        session.ack(22, true);
        run.end_of_input();
        assert_eq!(run.outcome(), Ok(()));
    }

    #[test]
    fn with_linger_a_record_always_waits() {
        let mut run = Run::start(&["--batch", "--linger", "20ms"]);
        let session = run.broker.accept();
        let start = Instant::now();
        run.write(b"a\n");
        expect(&session, &["a"]);
        assert!(start.elapsed() >= Duration::from_millis(20));
        session.ack(1, false);
        run.end_of_input();
        assert_eq!(run.outcome(), Ok(()));
    }

    #[test]
    fn a_stop_ends_the_input_and_sends_a_partial_record() {
        for options in [&[][..], &["--batch"], &["--batch", "--linger", "1h"]] {
            let mut run = Run::start(options);
            let session = run.broker.accept();
            run.write(b"whole\nhalf");
            let pipe = run.pipe.as_ref().unwrap();
            wait_until("all is read", || rustix::io::ioctl_fionread(pipe).unwrap() == 0);
            run.stop.send(15);
            expect(&session, &["whole", "half"]);
            session.ack(2, true);
            session.expect_close();
            assert_eq!(run.outcome(), Ok(()));
            wait_until("the pipe is closed", || writeln!(run.pipe.as_ref().unwrap()).is_err());
        }
    }

    #[test]
    fn a_partial_record_before_an_error_is_sent() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        // A socket that closes with unread data resets the connection.
        client.write_all(b"x").unwrap();
        let run = Run::start_with(OwnedFd::from(client).into(), &[]);
        let session = run.broker.accept();
        server.write_all(b"whole\nhalf").unwrap();
        expect(&session, &["whole"]);
        drop(server);
        expect(&session, &["half"]);
        session.ack(2, true);
        let text = run.outcome().unwrap_err();
        let start = "74: 2 confirmed, 0 in doubt: read standard input: Connection reset";
        assert!(text.starts_with(start), "{text}");
    }

    #[test]
    fn a_partial_record_is_counted_when_the_broker_is_lost() {
        let mut run = Run::start(&["--retry", "0s"]);
        let session = run.broker.accept();
        run.write(b"whole\nhalf");
        expect(&session, &["whole"]);
        session.ack(1, false);
        run.broker.go_down();
        drop(session);
        let text = run.outcome().unwrap_err();
        let counts = "69: 1 confirmed, 0 in doubt, 1 read and not sent: ";
        assert!(text.starts_with(counts), "{text}");
    }

    #[test]
    fn a_partial_record_is_spooled_when_the_publisher_fails() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().to_str().unwrap();
        let mut run = Run::start(&["--spool", dir]);
        let session = run.broker.accept();
        run.write(b"whole\nhalf");
        expect(&session, &["whole"]);
        session.close_channel(403, "ACCESS_REFUSED - for a test", PUBLISH);
        let text = run.outcome().unwrap_err();
        let counts = format!("77: 0 confirmed, 0 in doubt, 2 left in the spool {dir}: ");
        assert!(text.starts_with(&counts), "{text}");
    }

    #[test]
    fn a_too_large_record_ends_it_after_all_earlier_confirms() {
        let mut run = Run::start(&["--max-record", "5B"]);
        let session = run.broker.accept();
        run.write(b"one\nlarger\nthree\n");
        expect(&session, &["one"]);
        session.ack(1, false);
        session.expect_close();
        let text = "65: 1 confirmed, 0 in doubt: record 2 is larger than 5 B (--max-record)";
        assert_eq!(run.outcome(), Err(text.to_string()));
    }

    #[test]
    fn an_unreadable_input_is_a_failure() {
        let run = Run::start_with(File::open("/").unwrap(), &[]);
        run.broker.accept().expect_close();
        let text = run.outcome().unwrap_err();
        let start = "74: 0 confirmed, 0 in doubt: read standard input: Is a directory";
        assert!(text.starts_with(start), "{text}");
    }

    #[test]
    fn a_closed_connection_ends_it_before_the_input_ends() {
        let mut run = Run::start(&["--no-confirm"]);
        let session = run.broker.accept();
        session.expect_question();
        run.write(b"one\n");
        expect(&session, &["one"]);
        session.close(320, "CONNECTION_FORCED - for a test");
        let text = run.outcome().unwrap_err();
        assert!(text.starts_with("69: 1 sent without confirmation, 1 in doubt: "), "{text}");
    }
}
