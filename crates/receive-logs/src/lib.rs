//! `receive-logs`: writes every message of the fanout exchange to standard output or a file.
//!
//! - [`cli`]: the command line
//! - [`subscription`]: a queue bound to the exchange, its consumer, and the acknowledgements
//! - `stream`, `resume`: where in a stream to begin and to end, and to go on after a restart
//! - `receiver`: the loop between a subscription and the output, and how it stops
//! - `reconnect`: from a lost subscription to the next
//! - `loss_report`, `sequence`: which messages were missed, and which came twice
//! - [`output`], `record`, `json`, `severity`: from messages to bytes in a file
//! - `signals`: SIGHUP, which concerns the output
//! - `readiness`: tells others whether messages are being received
//! - `status`: what SIGUSR1 asks for
//!
//! A library beside the program, so that the documentation of [`subscription::Subscription`] can show, in
//! tests, that no message is acknowledged before it is written.

pub mod cli;
mod json;
mod loss_report;
pub mod output;
mod readiness;
mod receiver;
mod reconnect;
mod record;
mod resume;
mod sequence;
mod severity;
mod signals;
mod sink;
mod status;
mod stream;
pub mod subscription;
#[cfg(test)]
mod testing;

#[cfg(not(test))]
use logs_process::logging::alert;
#[cfg(test)]
use testing::alert;

use std::sync::Arc;
use std::time::Duration;

use amqp::retry::retry;
use anyhow::{Context, Result};
use logs_process::signals::{StopSignals, survive_file_size_limit};
use logs_process::status::answer;
use logs_process::{Failure, Status};

use crate::cli::Cli;
use crate::output::Output;
use crate::readiness::Readiness;
use crate::receiver::{Events, Receiver, Stop};
use crate::resume::ResumeFile;
use crate::status::StatusLine;
use crate::subscription::SubscriptionConfig;

/// How long after a signal the process may go on, as a stopped reader of the output would keep the
/// receiver for ever.
const GRACE: Duration = Duration::from_millis(1800);

/// Receives and writes messages, as the command line asks for.
///
/// # Errors
///
/// When no broker lets the receiver in, the output cannot be written, or a time limit passes before
/// `--count` is reached.
pub fn run(cli: &Cli) -> Result<()> {
    cli.check()?;
    if let Some(remark) = cli.remark() {
        log::warn!("{remark}");
    }
    let resume = ResumeFile::open(cli)?;
    let config = Arc::new(SubscriptionConfig::new(cli, resume.as_ref())?);
    let stop = StopSignals::listen().context("handle signals")?;
    survive_file_size_limit().context("handle signals")?;
    let status = Arc::new(StatusLine::new(cli));
    let told = Arc::clone(&status);
    answer("receive-logs", cli.verbosity.status_interval, move || told.to_string());
    keep_alive().context("start a thread")?;
    let reopen = match cli.output() {
        Some(_) => Some(signals::reopen_signal().context("handle signals")?),
        None => None,
    };
    let mut output = Output::open(cli)?;
    let reader_gone = output.reader_gone().with_context(|| output.name())?;
    if reader_gone.as_ref().is_some_and(|gone| !gone.is_empty()) {
        return Ok(());
    }
    let readiness = Readiness::new(cli)?;

    let subscription = retry(cli.first_retry(), || config.prepare()?.consume(None))?;
    if let Some(resume) = &resume {
        resume.take_back(cli.output(), subscription.is_unbroken())?;
    }
    // A logrotate that looks for the ready file may have renamed the output before the file is there.
    output.reopen().map_err(|error| output.failure(&error))?;
    // From here on there are messages to write before a signal may end the process.
    let (ready_file, unwritten) = (cli.ready_file.clone(), Arc::clone(&status));
    let stop = stop.handle(GRACE, move |_| {
        let unwritten = unwritten.unwritten();
        log::warn!(
            "stopped before all that was received could be written; messages not written: {unwritten}"
        );
        ready_file.as_deref().map(readiness::remove_own);
    })?;
    let events = Events { stop, reopen, reader_gone };
    readiness.begin()?;
    let mut receiver = Receiver::new(cli, config, output, events, readiness, resume, status);
    let outcome = receiver.run(subscription);
    let written = receiver.output.written;
    log::info!("{written} messages written, {}", receiver.loss_report);
    match (outcome?, cli.count) {
        (Stop::TimeLimit, Some(count)) => {
            let text = format!("{written} of {count} messages within the time limit");
            Err(Failure::new(Status::TimeLimit, text).into())
        }
        _ => Ok(()),
    }
}

/// Keeps the connection alive while the output takes no bytes.
fn keep_alive() -> std::io::Result<()> {
    const LONGEST: Duration = Duration::from_millis(500);
    let run = || loop {
        let next = amqp::keep_alive();
        let left = next.map(|next| next.saturating_duration_since(std::time::Instant::now()));
        std::thread::sleep(left.map_or(LONGEST, |left| left.min(LONGEST)));
    };
    std::thread::Builder::new().spawn(run).map(drop)
}
