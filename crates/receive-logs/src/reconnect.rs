//! Replaces a lost subscription: the attempts, their end, and the alerts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::Error;
use amqp::retry::{Attempts, Backoff, RetryFor, Timings};

use crate::environment::{Alert, Environment};
use crate::prepare::{Prepared, SubscriptionConfig};
use crate::queue::{DurableQueue, Source};
use crate::subscription::Subscription;

/// How long the broker may take to start the new consumer. The receiver does not react to signals meanwhile.
const CONSUME: Duration = Duration::from_secs(1);

/// A subscription that ends within this time counts as a failed attempt. The pauses continue to grow if a broker
/// accepts receivers and drops them again.
const SHORT_LIVED: Duration = Duration::from_secs(2);

/// Whether messages waited in the queue when its subscription was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lag {
    /// The receiver had received all messages.
    CaughtUp,
    /// More messages were waiting.
    Behind,
}

/// Replaces lost subscriptions while the program runs.
pub struct Reconnector {
    config: Arc<SubscriptionConfig>,
    retry_for: RetryFor,
    /// How long to pause between attempts.
    timings: Timings,
    alert: Alert,
    /// When the present series of failures and short subscriptions started.
    failing_since: Instant,
}

impl Reconnector {
    /// Retries for `retry_for` after each loss.
    pub fn new(
        config: Arc<SubscriptionConfig>,
        retry_for: RetryFor,
        environment: &Environment,
    ) -> Reconnector {
        let Environment { alert, retry: timings, .. } = *environment;
        Reconnector { config, retry_for, timings, alert, failing_since: Instant::now() }
    }

    /// Starts to replace a subscription that was lost because of `cause`.
    ///
    /// # Errors
    ///
    /// `cause`, if no attempt can help, or no attempt is allowed.
    pub fn begin(
        &mut self,
        lost: Subscription,
        lag: Lag,
        cause: Error,
    ) -> Result<Reconnection, Error> {
        if lost.started_at.elapsed() > SHORT_LIVED {
            self.failing_since = Instant::now();
        }
        let cause = cause.after_success();
        let reason = cause.to_string();
        let config = Arc::clone(&self.config);
        let (place, lost_at) = (lost.queue.place(), lost.last_received());
        // The next connection may need its file descriptors.
        drop(lost);
        let prepare = move || config.prepare_again(place).map_err(Error::after_success);
        let backoff = Backoff::new(self.retry_for)
            .with_delays_since(self.failing_since)
            .with_timings(self.timings);
        let attempts = Attempts::new(cause, backoff, prepare)?;
        (self.alert)(format!("{reason}; subscribing again"));
        Ok(Reconnection { attempts, reason, lost_at, lag, alert: self.alert })
    }
}

/// The attempts to replace one lost subscription. Dropping it ends the attempts.
pub struct Reconnection {
    attempts: Attempts<Prepared>,
    reason: String,
    lost_at: Instant,
    lag: Lag,
    alert: Alert,
}

impl Reconnection {
    /// Why the subscription was lost.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// When the broker last sent anything.
    pub fn lost_at(&self) -> Instant {
        self.lost_at
    }

    /// When the attempts end; `None` for no limit.
    pub fn end(&self) -> Option<Instant> {
        self.attempts.end()
    }

    /// Starts the next attempt when it is due. Returns the subscription of an attempt that has succeeded.
    ///
    /// # Errors
    ///
    /// The last failure, if there is no further attempt.
    pub fn poll(&mut self) -> Result<Option<Subscription>, Error> {
        let Some(prepared) = self.attempts.poll()? else {
            return Ok(None);
        };
        match prepared.consume(Some(CONSUME)) {
            Ok(subscription) => {
                let seconds = self.lost_at.elapsed().as_secs_f64();
                let missing = missing_since(&subscription, self.lag);
                (self.alert)(format!("Subscribed again after {seconds:.1} s; {missing}"));
                Ok(Some(subscription))
            }
            Err(failure) => self.attempts.fail(failure.after_success()).map(|()| None),
        }
    }

    /// When to call [`poll`](Reconnection::poll) at the latest; `None` for no limit.
    pub fn next_timer(&self) -> Option<Instant> {
        self.attempts.next()
    }

    /// The error of a time limit that passes before the subscription is replaced.
    pub fn out_of_time(&self) -> Error {
        Error::unavailable(format!("{}; not back within the time limit", self.reason))
    }
}

/// Which messages are missing when `subscription` replaces a lost subscription. Their sender may send them again, or
/// may have kept them until now, as emit-log does.
fn missing_since(subscription: &Subscription, lag: Lag) -> String {
    let name = &subscription.queue.name;
    match (&subscription.queue.source, lag) {
        (Source::Exclusive, Lag::Behind) => {
            "messages that were still waiting and messages in between are missing unless sent again"
                .into()
        }
        (Source::Exclusive, Lag::CaughtUp) => {
            "messages in between are missing unless sent again".into()
        }
        (Source::Durable(DurableQueue { is_new: true, .. }), _) => format!(
            "queue '{name}' was deleted and is created again: the messages in it and messages sent in \
             between are missing unless sent again"
        ),
        (Source::Durable(DurableQueue { queued, .. }), _)
            if subscription.queue.has_durable_binding() =>
        {
            format!("{queued} messages wait in queue '{name}'")
        }
        (Source::Durable(DurableQueue { queued, .. }), _) => format!(
            "{queued} messages wait in queue '{name}', others sent in between may be missing \
             (--durable keeps the exchange when the broker restarts)"
        ),
        (Source::Stream(cursor), _) if cursor.is_new() => format!(
            "stream '{name}' was deleted and created again, and is read from its beginning; messages sent in \
             between may be missing"
        ),
        (Source::Stream(_), _) if subscription.queue.has_durable_binding() => {
            format!("reading of stream '{name}' continues where it stopped")
        }
        (Source::Stream(_), _) => format!(
            "reading of stream '{name}' continues where it stopped, messages sent in between may be missing in \
             it (--durable keeps the exchange when the broker restarts)"
        ),
    }
}
