//! From the command line to a receiver that is subscribed.

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

/// A receiver that knows what to subscribe to.
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
    /// When the file cannot be used, or a URI or the password file is not right.
    pub fn new(cli: &'a Cli, environment: Environment) -> Result<Startup<'a>, Failure> {
        let resume = ResumeFile::open(cli, environment.alert)?;
        let config = Arc::new(SubscriptionConfig::new(cli, resume.as_ref(), &environment)?);
        Ok(Startup { cli, environment, resume, config })
    }

    /// Subscribes, and gets the output ready to go on where it ended.
    ///
    /// # Errors
    ///
    /// When no broker can be subscribed to in time, or the output cannot be written.
    pub fn subscribe(self, mut output: Output) -> Result<Subscribed<'a>, Error> {
        let readiness = Readiness::new(self.cli)?;
        let attempt = || self.config.prepare()?.consume(None);
        let subscription = retry(self.cli.first_retry(), attempt)?;
        if let Some(resume) = &self.resume {
            let is_unbroken = subscription.queue.cursor().is_some_and(Cursor::is_unbroken);
            resume.take_back(self.cli.output(), is_unbroken)?;
        }
        // A logrotate that looks for the ready file may have renamed the output before the file is there.
        output.reopen().map_err(|error| output.failure(&error))?;
        Ok(Subscribed { startup: self, output, readiness, subscription })
    }
}

/// A receiver that is subscribed, and not ready to be stopped yet.
pub struct Subscribed<'a> {
    startup: Startup<'a>,
    output: Output,
    readiness: Readiness,
    subscription: Subscription,
}

impl Subscribed<'_> {
    /// Reports that messages are received. The time limits begin now.
    ///
    /// # Errors
    ///
    /// When the ready file cannot be created.
    pub fn begin(
        self,
        events: Events,
        status: Arc<StatusLine>,
    ) -> Result<(Receiver, Subscription), Failure> {
        let Subscribed { startup, output, readiness, subscription } = self;
        let Startup { cli, environment, resume, config } = startup;
        readiness.begin()?;
        let access = match cli.queue.name {
            None => Access::Exclusive,
            Some(_) => Access::Shared,
        };
        let runs = resume.as_ref().map_or(&[][..], ResumeFile::runs);
        let retry_for = cli.connection.retry.unwrap_or(RetryFor::Ever);
        let receiver = Receiver {
            loss_report: LossReport::new(access, runs, environment.alert),
            reconnector: Reconnector::new(config, retry_for, &environment),
            keeps_messages: cli.keeps_messages(),
            limits: Limits::new(cli),
            output,
            events,
            readiness,
            resume,
            status,
        };
        Ok((receiver, subscription))
    }
}
