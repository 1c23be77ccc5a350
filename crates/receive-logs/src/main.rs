//! `receive-logs`: writes every message of the fanout exchange to standard output.

mod cli;
mod output;
mod reader;
mod receiver;
mod subscription;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use logs_common::cli::parse;
use logs_common::retry::retry;
use logs_common::{Failure, Status, exit, logging, signals};

use crate::cli::{Cli, Format};
use crate::output::{Output, Record};
use crate::receiver::{Receiver, Stop};
use crate::subscription::Subscription;

/// How long a receiver that was told to stop may take to write what it has: a reader that takes
/// nothing would keep it for ever.
const GRACE: Duration = Duration::from_millis(1800);

const BANNER: &str = " [*] Waiting for logs. To exit press CTRL+C";

fn main() -> ExitCode {
    let cli: Cli = match parse() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    logging::init("receive-logs", &cli.verbosity);
    exit::report("receive-logs", run(&cli))
}

fn run(cli: &Cli) -> Result<()> {
    if cli.null && cli.format() != Format::Raw {
        return Err(Failure::new(Status::Usage, "--null goes with --raw only").into());
    }
    let stdout = io::stdout();
    let record = Record::new(cli, stdout.is_terminal());
    // Not through io::stdout, which would write line by line.
    let sink = stdout.as_fd().try_clone_to_owned().context("open stdout")?;
    let watched = sink.try_clone().context("open stdout")?;
    let output = Output::new(record, File::from(sink));

    let uris = cli.connection.uris()?;
    let subscription = retry(cli.connection.retry, || Subscription::open(&uris, &cli.exchange))?;
    // From here on a signal must not end the process before all is written.
    let signal = signals::stop_signal(GRACE, |_| {
        log::warn!("stopped before all that was received could be written");
    });
    let signal = signal.context("handle signals")?;
    let reader_gone = reader::gone(watched);
    let mut receiver = Receiver::new(cli, output, signal, reader_gone);
    if !cli.verbosity.quiet {
        // Nobody is waiting for it if stderr is gone.
        let _ = writeln!(io::stderr(), "{BANNER}");
    }
    let stop = receiver.run(subscription)?;
    log::info!("{} messages written ({stop:?})", receiver.written);
    match (stop, cli.count) {
        (Stop::TimeLimit, Some(wanted)) => {
            let text = format!("{} of {wanted} messages within the time limit", receiver.written);
            Err(Failure::new(Status::TimeLimit, text).into())
        }
        _ => Ok(()),
    }
}
