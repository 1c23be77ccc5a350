//! `emit-log`: publishes a log message to the fanout exchange.

mod cli;
mod input;
mod lines;
mod packer;
mod progress;
mod publisher;
mod session;
mod tally;
mod window;

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use logs_common::cli::parse;
use logs_common::signals::StopSignals;
use logs_common::wire::Packing;
use logs_common::{Failure, Status, escape, exit, logging, signals, stdio};

use crate::cli::Cli;
use crate::publisher::Publisher;
use crate::tally::Tally;
use crate::window::Message;

fn main() -> ExitCode {
    let cli: Cli = match parse() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    logging::init("emit-log", &cli.verbosity);
    let outcome = match cli.lines {
        true => publish_lines(&cli),
        false => publish_words(&cli),
    };
    exit::report("emit-log", outcome)
}

fn publish_words(cli: &Cli) -> Result<()> {
    let message = input::message(&cli.words);
    StopSignals::listen_as_init().context("handle signals")?;
    let mut publisher = Publisher::connect(cli)?;
    publisher.publish(Message {
        body: message.clone().into(),
        packing: Packing::Single,
        records: 1,
        number: 1,
    })?;
    publisher.finish()?;
    check_heard(cli, &publisher.tally())?;
    if !cli.verbosity.quiet {
        say_sent(&message)?;
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
    let tally = publisher.tally();
    if let Some(signal) = lines::publish(cli, stop, publisher)? {
        signals::die_by(signal);
    }
    check_heard(cli, &tally)
}

/// Fails if nobody heard something (known with `--mandatory` only).
fn check_heard(cli: &Cli, tally: &Tally) -> Result<()> {
    if tally.unheard() == 0 {
        return Ok(());
    }
    let exchange = &cli.exchange.name;
    let mut text = format!("publish to exchange '{exchange}': nobody listens (NO_ROUTE)");
    if cli.lines {
        text = format!("{tally}: {text}");
    }
    Err(Failure::new(Status::NoReceiver, text).into())
}

/// ` [x] Sent "info: hi"`
fn say_sent(message: &[u8]) -> Result<()> {
    let mut line = b" [x] Sent ".to_vec();
    escape::push_quoted(&mut line, message);
    line.push(b'\n');
    let mut out = io::stdout().lock();
    match out.write_all(&line).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io("message sent, but write to stdout", &error).into())
        }
        _ => Ok(()),
    }
}
