//! `receive-logs`: writes every message of the fanout exchange to standard output or a file.
//!
//! - [`cli`]: the command line
//! - `environment`: alerts and timings, which tests replace
//! - `startup`: from the command line to a subscribed receiver
//! - `receiver`: the loop between a subscription and the output, and its end
//! - `limits`: `--count` and the time limits
//! - `prepare`, `queue`: a queue that is bound to the exchange
//! - [`subscription`]: its consumer, and the acknowledgements
//! - `stream`, `resume`: where reading a stream begins, ends, and continues after a restart
//! - `reconnect`: from a lost subscription to the next
//! - [`message`]: a delivery, and which of its records to write
//! - `loss_report`, `sequence`: missed and repeated messages
//! - `filter`: which records are written
//! - `format`: from records to bytes, one file for each format
//! - [`output`], `sink`, `written`, `file_mark`: from bytes to a file, and the whole records in it
//! - `signals`: SIGHUP, which reopens the output
//! - `readiness`: reports whether messages are being received
//! - `status`: the status line
//!
//! The crate is a library as well as a program, so that the documentation of [`subscription::Subscription`] can show
//! in tests that no message is acknowledged before it is written.

pub mod cli;
mod environment;
mod file_mark;
mod filter;
mod format;
mod limits;
mod loss_report;
pub mod message;
pub mod output;
mod prepare;
mod queue;
mod readiness;
mod receiver;
mod reconnect;
mod resume;
mod sequence;
mod signals;
mod sink;
mod startup;
mod status;
mod stream;
pub mod subscription;
#[cfg(test)]
mod testing;
mod written;

use std::sync::Arc;
use std::time::Duration;

use amqp::{KEEP_ALIVE, keep_alive};
use anyhow::{Context, Result};
use logs_process::background::every;
use logs_process::metrics::Metrics;
use logs_process::signals::{Hangup, StopSignals, die_by, survive_file_size_limit};
use logs_process::status::answer;
use logs_process::{Failure, Status};
use signal_hook::consts::SIGHUP;

use crate::cli::Cli;
use crate::environment::Environment;
use crate::output::Output;
use crate::readiness::Readiness;
use crate::receiver::{Events, Stop};
use crate::startup::Startup;
use crate::status::StatusLine;

/// How long the process may run after a signal. Without this limit, a stopped reader of the output would block the
/// receiver forever.
const GRACE: Duration = Duration::from_millis(1800);

/// Receives and writes messages until a condition of the command line ends the receiver.
///
/// # Errors
///
/// When the receiver cannot subscribe, the output cannot be written, or a time limit passes before `--count` is
/// reached.
pub fn run(cli: &Cli) -> Result<()> {
    cli.check()?;
    if let Some(warning) = cli.format_warning() {
        log::warn!("{warning}");
    }
    let environment = Environment::default();
    let startup = Startup::new(cli, environment)?;
    let hangup = match cli.output() {
        Some(_) => Hangup::HasHandler,
        None => Hangup::Stops,
    };
    let stop = StopSignals::listen(hangup).context("handle signals")?;
    survive_file_size_limit().context("handle signals")?;
    let status = Arc::new(StatusLine::new(cli));
    let line = Arc::clone(&status);
    answer("receive-logs", cli.verbosity.status_interval, move || line.to_string());
    let counts = Arc::clone(&status);
    let describe = move |metrics: &mut Metrics| counts.describe(metrics);
    let metrics = cli.verbosity.start_metrics("receive-logs", describe)?;
    // A write to the output may block for hours; this thread sends the heartbeats meanwhile.
    let _keep_alive = every(KEEP_ALIVE, keep_alive).context("start a thread")?;
    let reopen = match cli.output() {
        Some(_) => Some(signals::reopen_signal().context("handle signals")?),
        None => None,
    };
    let mut output = Output::open(cli, environment.alert)?;
    let reader_gone = output.reader_gone().with_context(|| output.name())?;
    if reader_gone.as_ref().is_some_and(|gone| !gone.is_empty()) {
        return Ok(());
    }
    let readiness = Readiness::new(cli)?;
    let subscription = startup.subscribe(&mut output)?;
    // From here on, a signal lets the receiver write its messages before it ends the process.
    let (ready_file, unwritten) = (cli.ready_file.clone(), Arc::clone(&status));
    let stop = stop.handle(GRACE, move |_| {
        let unwritten = unwritten.unwritten();
        log::warn!(
            "stopped before all received messages could be written; messages not written: {unwritten}"
        );
        ready_file.as_deref().map(readiness::remove_own);
    })?;
    let events = Events { stop, reopen, reader_gone };
    readiness.begin()?;
    let mut receiver = startup.receiver(output, events, readiness, status);
    let outcome = receiver.run(subscription);
    let written = receiver.output.written();
    log::info!("{written} messages written, {}", receiver.loss_report);
    match (outcome?, cli.count) {
        (Stop::TimeLimit, Some(count)) => {
            let text = format!("{written} of {count} records within the time limit");
            Err(Failure::new(Status::TimeLimit, text).into())
        }
        _ => {
            let signal = receiver.events.stop.try_recv();
            drop(receiver);
            drop(metrics);
            // SIGINT and SIGTERM are the regular end of a receiver. A hangup is not.
            if signal == Some(SIGHUP) {
                die_by(SIGHUP);
            }
            Ok(())
        }
    }
}
