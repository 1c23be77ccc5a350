//! `emit-log`: publishes a log message to the fanout exchange.

mod cli;
mod input;
mod publisher;

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use logs_common::{Failure, Status, exit, logging, text};

use crate::cli::Cli;
use crate::publisher::Publisher;

fn main() -> ExitCode {
    let cli = Cli::parse();
    logging::init("emit-log", &cli.verbosity);
    exit::report("emit-log", run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    let message = input::message(&cli.words);
    let mut publisher = Publisher::connect(cli)?;
    publisher.publish(message.clone())?;
    let summary = publisher.finish()?;
    if summary.unheard > 0 {
        let text = format!(
            "publish to exchange '{}': nobody listens (NO_ROUTE)",
            cli.exchange.name
        );
        return Err(Failure::new(Status::NoReceiver, text).into());
    }
    if !cli.verbosity.quiet {
        say_sent(&message)?;
    }
    Ok(())
}

/// ` [x] Sent "info: hi"`
fn say_sent(message: &[u8]) -> Result<()> {
    let mut line = b" [x] Sent ".to_vec();
    text::push_quoted(&mut line, message);
    line.push(b'\n');
    let mut out = io::stdout().lock();
    match out.write_all(&line).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io("message sent, but write to stdout", &error).into())
        }
        _ => Ok(()),
    }
}
