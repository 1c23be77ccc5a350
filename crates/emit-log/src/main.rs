//! `emit-log`: publishes a log message to the fanout exchange.

mod cli;
mod counts;
mod input;
mod lines;
mod message;
mod packer;
mod progress;
mod publisher;
mod session;
mod window;

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use logs_common::cli::parse;
use logs_common::signals::StopSignals;
use logs_common::{Failure, Status, escape, exit, logging, signals, stdio};

use crate::cli::Cli;
use crate::counts::Counts;
use crate::message::Message;
use crate::publisher::Publisher;

fn main() -> ExitCode {
    let cli: Cli = match parse() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    logging::init("emit-log", &cli.verbosity);
    let outcome = match cli.lines {
        true => publish_lines(&cli),
        false => publish_words(&cli, io::stdout().lock()),
    };
    exit::report("emit-log", outcome)
}

fn publish_words(cli: &Cli, out: impl Write) -> Result<()> {
    let message = Message::from_words(&cli.words);
    StopSignals::listen_as_init().context("handle signals")?;
    let mut publisher = Publisher::connect(cli)?;
    publisher.publish(message.clone())?;
    publisher.finish()?;
    check_routed(cli, &publisher.counts())?;
    if !cli.verbosity.quiet {
        print_sent(&message.body, out)?;
    }
    Ok(())
}

fn publish_lines(cli: &Cli) -> Result<()> {
    if stdio::stdin_is_closed() {
        let text = "read standard input: it is closed (\"< /dev/null\" is an empty one)";
        return Err(Failure::new(Status::Io, text).into());
    }
    let stop = StopSignals::listen().context("handle signals")?;
    let publisher = Publisher::connect(cli)?;
    let counts = publisher.counts();
    if let Some(signal) = lines::publish(cli, stop, publisher)? {
        signals::die_by(signal);
    }
    check_routed(cli, &counts)
}

/// Fails if no queue has taken a record (known with `--mandatory` only).
fn check_routed(cli: &Cli, counts: &Counts) -> Result<()> {
    if counts.unroutable() == 0 {
        return Ok(());
    }
    let exchange = &cli.exchange.name;
    let mut text = format!("publish to exchange '{exchange}': nobody listens (NO_ROUTE)");
    if cli.lines {
        text = format!("{counts}: {text}");
    }
    Err(Failure::new(Status::NoReceiver, text).into())
}

/// ` [x] Sent "info: hi"`
fn print_sent(message: &[u8], mut out: impl Write) -> Result<()> {
    let mut line = b" [x] Sent ".to_vec();
    escape::push_quoted(&mut line, message);
    line.push(b'\n');
    match out.write_all(&line).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io("message sent, but write to stdout", &error).into())
        }
        _ => Ok(()),
    }
}
