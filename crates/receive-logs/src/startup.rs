//! From the command line to a subscribed receiver.

use std::sync::Arc;

use amqp::retry::{RetryFor, retry};
use anyhow::Error;
use logs_process::Failure;

use crate::cli::Cli;
use crate::environment::Environment;
use crate::limits::Limits;
use crate::loss_report::{Access, LossReport};
use crate::output::Output;
use crate::prepare::SubscriptionConfig;
use crate::readiness::Readiness;
use crate::receiver::{Events, Receiver};
use crate::reconnect::Reconnector;
use crate::resume::ResumeFile;
use crate::status::StatusLine;
use crate::stream::cursor::Cursor;
use crate::subscription::Subscription;

/// The configuration of a receiver before it subscribes.
pub struct Startup<'a> {
    cli: &'a Cli,
    environment: Environment,
    resume: Option<ResumeFile>,
    config: Arc<SubscriptionConfig>,
}

impl<'a> Startup<'a> {
    /// Opens the file of `--resume`, and takes the other options.
    ///
    /// # Errors
    ///
    /// When the file cannot be used, or a URI or the password file is invalid.
    pub fn new(cli: &'a Cli, environment: Environment) -> Result<Startup<'a>, Failure> {
        let resume = ResumeFile::open(cli, environment.alert)?;
        let config = Arc::new(SubscriptionConfig::new(cli, resume.as_ref(), &environment)?);
        Ok(Startup { cli, environment, resume, config })
    }

    /// Subscribes, and prepares the output to continue at the recorded position.
    ///
    /// # Errors
    ///
    /// When no subscription succeeds in time, or the output cannot be written.
    pub fn subscribe(&self, output: &mut Output) -> Result<Subscription, Error> {
        let attempt = || self.config.prepare()?.consume(None);
        let subscription = retry(self.cli.first_retry(), attempt)?;
        if let Some(resume) = &self.resume {
            let is_unbroken = subscription.queue.cursor().is_some_and(Cursor::is_unbroken);
            resume.truncate_output(self.cli.output(), is_unbroken)?;
        }
        // The ready file does not exist yet. A logrotate that sends SIGHUP only if it exists may have renamed the
        // output.
        output.reopen().map_err(|error| output.failure(&error))?;
        Ok(subscription)
    }

    /// A receiver, whose time limits start now.
    pub fn receiver(
        self,
        output: Output,
        events: Events,
        readiness: Readiness,
        status: Arc<StatusLine>,
    ) -> Receiver {
        let Startup { cli, environment, resume, config } = self;
        let access = match cli.queue.name {
            None => Access::Exclusive,
            Some(_) => Access::Shared,
        };
        let runs = resume.as_ref().map_or(&[][..], ResumeFile::runs);
        let retry_for = cli.connection.retry.unwrap_or(RetryFor::Ever);
        Receiver {
            loss_report: LossReport::new(access, runs, environment.alert),
            reconnector: Reconnector::new(config, retry_for, &environment),
            limits: Limits::new(cli),
            output,
            events,
            readiness,
            resume,
            status,
        }
    }
}
