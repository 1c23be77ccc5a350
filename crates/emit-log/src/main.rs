//! `emit-log`: publishes a log message to the fanout exchange.

mod batch;
mod cli;
mod counts;
mod cutter;
mod follow;
mod health;
mod input;
mod join;
mod keys;
mod lines;
mod manual;
mod memory;
mod message;
mod outbox;
mod packer;
mod progress;
mod publisher;
mod session;
mod spool;
mod unread;
mod window;

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;

use amqp::{KEEP_ALIVE, keep_alive};
use anyhow::{Context, Result};
use logs_process::args::parse;
use logs_process::background::every;
use logs_process::signals::{Hangup, StopSignals, survive_file_size_limit};
use logs_process::{Failure, Status, escape, exit, logging, signals, status, stdio};

use crate::cli::Cli;
use crate::counts::Counts;
use crate::follow::Follow;
use crate::manual::MANUAL;
use crate::memory::MemoryOutbox;
use crate::message::Message;
use crate::outbox::Outbox;
use crate::packer::Packer;
use crate::publisher::{DEFAULT_RETRY, Publisher};
use crate::session::SessionConfig;
use crate::spool::outbox::SpoolOutbox;
use crate::unread::Unread;

fn main() -> ExitCode {
    status::listen();
    if let Some(status) = logs_process::manual::generate::<Cli>(&MANUAL) {
        return status;
    }
    let cli: Cli = match parse() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    logging::init("emit-log", &cli.verbosity);
    let outcome = match cli.follow.is_empty() {
        true if cli.lines => publish_lines(&cli),
        true => publish_words(&cli, io::stdin(), io::stdout().lock()),
        false => publish_files(&cli),
    };
    exit::report("emit-log", outcome)
}

fn publish_words(cli: &Cli, input: impl AsFd, out: impl Write) -> Result<()> {
    let words = cli.words();
    let is_used = !words.is_empty() || cli.connection.password_is_stdin();
    let unread = || if is_used { Unread::Empty } else { Unread::of(&input) };
    let mut keys = cli.keys(None)?;
    let message = Message::from_words(words);
    let message = keys.assign(keys.index_of(&message.body), message);
    StopSignals::listen_as_init().context("handle signals")?;
    if unread() == Unread::Bytes {
        return Err(unread::failure("nothing is sent:").into());
    }
    let mut publisher = connect(cli)?;
    // The writer of a pipe may have been slower than the start of this program.
    if unread() == Unread::Bytes {
        publisher.finish(Ok(()), None)?;
        return Err(unread::failure("nothing is sent:").into());
    }
    let published = publisher.publish([message.clone()]);
    publisher.finish(published, None)?;
    check_routed(cli, &publisher.counts())?;
    if !cli.verbosity.quiet {
        print_sent(&message.body, out)?;
    }
    match unread() {
        Unread::Bytes => return Err(unread::failure("message sent, but").into()),
        // On a terminal, the user has probably typed the pipe.
        Unread::Silent if io::stderr().is_terminal() => {
            log::warn!("standard input was not read: --lines publishes each line of it");
        }
        Unread::Silent | Unread::Empty => {}
    }
    if publisher.counts().unroutable() > 0 {
        log::warn!("no receiver is running: the message has reached no queue");
    }
    Ok(())
}

fn publish_lines(cli: &Cli) -> Result<()> {
    if !cli.words().is_empty() {
        let text = "--lines reads the messages from standard input: remove the words";
        return Err(Failure::new(Status::Usage, text).into());
    }
    if cli.connection.password_is_stdin() {
        let text = "--password-file: with --lines, standard input has the messages: use another file for \
                    the password";
        return Err(Failure::new(Status::Usage, text).into());
    }
    if stdio::stdin_is_closed() {
        let text = "read standard input: it is closed (for an empty input, use < /dev/null)";
        return Err(Failure::new(Status::Io, text).into());
    }
    let packer = Packer::new(cli.cutter()?, cli.keys(None)?);
    publish_records(cli, |stop, publisher| lines::publish(cli, packer, stop, publisher))
}

fn publish_files(cli: &Cli) -> Result<()> {
    let follow = Follow::open(cli)?;
    publish_records(cli, |stop, publisher| follow.publish(stop, publisher))
}

/// Connects, and publishes the records of an input until its end or a signal, by which the process then ends.
fn publish_records(
    cli: &Cli,
    publish: impl FnOnce(StopSignals, Publisher) -> Result<Option<i32>>,
) -> Result<()> {
    let stop = StopSignals::listen(Hangup::Stops).context("handle signals")?;
    survive_file_size_limit().context("handle signals")?;
    // A write to the disk may block, and heartbeats must continue.
    let _keep_alive = every(KEEP_ALIVE, keep_alive).context("start a thread")?;
    let publisher = connect(cli)?;
    let counts = publisher.counts();
    if let Some(signal) = publish(stop, publisher)? {
        signals::die_by(signal);
    }
    check_routed(cli, &counts)
}

/// Creates a publisher, with its outbox in memory or on disk.
fn connect(cli: &Cli) -> Result<Publisher> {
    if let Some(warning) = cli.key_warning() {
        log::warn!("{warning}");
    }
    let config = Arc::new(SessionConfig::new(cli)?);
    let outbox = open_outbox(cli, &config)?;
    Publisher::connect(cli, config, outbox)
}

fn open_outbox(cli: &Cli, config: &Arc<SessionConfig>) -> Result<Box<dyn Outbox>> {
    let Some(dir) = &cli.spool else {
        return Ok(Box::new(MemoryOutbox::new(config)));
    };
    let retry_for = cli.connection.retry.unwrap_or(DEFAULT_RETRY);
    let outbox = SpoolOutbox::open(dir, cli.spool_size.as_u64(), cli.when_full, retry_for)?;
    Ok(Box::new(outbox))
}

/// Fails if a record was unroutable, and `--mandatory` is given.
fn check_routed(cli: &Cli, counts: &Counts) -> Result<()> {
    if counts.unroutable() == 0 || !cli.mandatory {
        return Ok(());
    }
    let exchange = cli.exchange().name;
    let mut text = format!("publish to exchange '{exchange}': not routed to any queue (NO_ROUTE)");
    if cli.has_records() {
        text = format!("{counts}: {text}");
    }
    Err(Failure::new(Status::NoReceiver, text).into())
}

/// ` [x] Sent "info: hi"`
fn print_sent(message: &[u8], mut out: impl Write) -> Result<()> {
    let mut line = b" [x] Sent ".to_vec();
    let printed = escape::write_quoted(&mut line, message).and_then(|()| {
        line.push(b'\n');
        out.write_all(&line)?;
        out.flush()
    });
    match printed {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io("message sent, but write to stdout", &error).into())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use logs_tests::ScriptedBroker;
    use std::fs::File;
    use std::thread;

    fn cli(broker: &ScriptedBroker, options: &[&str]) -> Cli {
        Cli::parse_from([&["emit-log", "--uri", &broker.url()], options].concat())
    }

    /// Publishes words to a broker that confirms them, and returns them before if they are not `is_routed`. Returns the
    /// output and the error.
    fn publish(options: &[&str], is_routed: bool) -> (String, Option<String>) {
        let broker = ScriptedBroker::start();
        let cli = cli(&broker, options);
        let mut out = Vec::new();
        let outcome = thread::scope(|scope| {
            scope.spawn(|| {
                let session = broker.accept();
                let published = session.expect_publishes(1);
                if !is_routed {
                    session.give_back(&published[0]);
                }
                session.ack(1, false);
                session.expect_close();
            });
            publish_words(&cli, File::open("/dev/null").expect("it is there"), &mut out)
        });
        let text = String::from_utf8(out).expect("UTF-8");
        (text, outcome.err().map(|error| format!("{error:#}")))
    }

    #[test]
    fn words_are_printed_once_they_are_confirmed() {
        let sent = |text: &str| (text.to_string(), None);
        assert_eq!(publish(&["two", "words"], true), sent(" [x] Sent \"two words\"\n"));
        assert_eq!(publish(&["-q", "quiet"], true), sent(""));
    }

    #[test]
    fn unroutable_words_are_a_failure_and_not_printed() {
        let text = "publish to exchange 'logs': not routed to any queue (NO_ROUTE)".to_string();
        assert_eq!(publish(&["-m", "words"], false), (String::new(), Some(text)));
    }

    #[test]
    fn unroutable_records_are_counted() {
        let broker = ScriptedBroker::start();
        let counts = Counts::new(true);
        let cli = cli(&broker, &["--lines", "-m", "-e", "x"]);
        assert!(check_routed(&cli, &counts).is_ok());
        counts.add_sent(2);
        counts.add_done(2);
        counts.add_unroutable(1);
        let failure = check_routed(&cli, &counts).unwrap_err();
        assert_eq!(exit::status_of(&failure), Status::NoReceiver);
        assert_eq!(
            failure.to_string(),
            "2 confirmed, 0 in doubt, 1 unroutable: publish to exchange 'x': not routed to any \
             queue (NO_ROUTE)"
        );
    }

    /// A stdout that fails when it is flushed.
    struct Out(ErrorKind);

    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(self.0.into())
        }
    }

    #[test]
    fn a_closed_reader_of_stdout_is_not_a_failure() {
        assert!(print_sent(b"hi", Out(ErrorKind::BrokenPipe)).is_ok());
        let failure = print_sent(b"hi", Out(ErrorKind::StorageFull)).unwrap_err();
        assert_eq!(exit::status_of(&failure), Status::Io);
        assert!(failure.to_string().starts_with("message sent, but write to stdout: "));
    }
}
