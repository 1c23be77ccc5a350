//! Repeated attempts to connect: their duration, delays and threads.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::Error;

/// The pauses between attempts to connect. Tests have shorter pauses than the tools.
#[derive(Clone, Copy, Debug)]
pub struct Timings {
    /// The shortest pause between attempts to connect.
    pub first_delay: Duration,
    /// The longest pause: short, because a receiver misses messages between the broker's return and
    /// its own, and because a publisher waits for receivers to return.
    pub longest_delay: Duration,
    /// The time from a receiver's attempt to its bound queue, with room for a broker that is busy
    /// starting and for many receivers at once.
    pub time_to_subscribe: Duration,
}

impl Default for Timings {
    fn default() -> Timings {
        Timings {
            first_delay: Duration::from_millis(200),
            longest_delay: Duration::from_secs(2),
            time_to_subscribe: Duration::from_secs(1),
        }
    }
}

impl Timings {
    /// How long a publisher waits after a reconnect, so that the receivers can bind their queues: a queue that is bound
    /// later misses the held messages. `outage`: how long the broker was away, if known.
    pub fn time_to_return(self, outage: Option<Duration>) -> Duration {
        outage.map_or(self.longest_delay, |outage| self.longest_delay_after(outage))
            + self.time_to_subscribe
    }

    /// Half to all of the longest delay, at random.
    fn delay_after(self, passed: Duration) -> Duration {
        self.longest_delay_after(passed).mul_f64(0.5 + 0.5 * fastrand::f64())
    }

    fn longest_delay_after(self, passed: Duration) -> Duration {
        (passed / 10).clamp(self.first_delay, self.longest_delay)
    }
}

/// The longest time between the starts of two attempts. A network that swallowed the packets of one attempt may pass
/// those of the next.
const OVERDUE: Duration = Duration::from_millis(1500);

/// The most attempts at once. With the default `connection_timeout`, [`OVERDUE`] allows fewer; with a timeout of minutes,
/// this limits threads and sockets.
const MAX_RUNNING: usize = 8;

/// The time between two looks for the outcome of an attempt. A pipe would wake the program at once, but would need two
/// file descriptors more than the lost connection had, and the process may have none left.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// How long to keep trying, the shorter before the longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RetryFor {
    /// Give up when this much time has passed.
    AtMost(Duration),
    /// Never give up.
    Ever,
}

impl RetryFor {
    /// A single attempt.
    pub const NO_TIME: RetryFor = RetryFor::AtMost(Duration::ZERO);

    /// When to give up what began at `start`; `None` for never.
    pub fn end(self, start: Instant) -> Option<Instant> {
        match self {
            // An instant too far away to be expressed is as good as forever.
            RetryFor::AtMost(duration) => start.checked_add(duration),
            RetryFor::Ever => None,
        }
    }
}

/// Delays between attempts: a tenth of the time since the start, by default from 0.2 s to 2 s, so that no client stays
/// away much longer than the broker. Each delay is shortened at random by up to a half, so that the clients of a lost
/// broker return at different times.
#[derive(Debug)]
pub struct Backoff {
    start: Instant,
    end: Option<Instant>,
    timings: Timings,
    /// The last error that was logged, so that repeated attempts log each error once.
    last_logged: String,
}

impl Backoff {
    /// Starts now, and ends after `retry_for`.
    pub fn new(retry_for: RetryFor) -> Backoff {
        Backoff::since(Instant::now(), retry_for)
    }

    /// Like [`new`](Backoff::new) for a failure that began at `start`: delays and end count from there.
    pub fn since(start: Instant, retry_for: RetryFor) -> Backoff {
        Backoff {
            start,
            end: retry_for.end(start),
            timings: Timings::default(),
            last_logged: String::new(),
        }
    }

    /// Counts the delays from `start`, and keeps the end.
    pub fn with_delays_since(self, start: Instant) -> Backoff {
        Backoff { start, ..self }
    }

    /// Counts the end from now on, after a success. The delays stay as they are.
    pub fn extend(&mut self, retry_for: RetryFor) {
        self.end = retry_for.end(Instant::now());
    }

    /// Replaces the timings.
    pub fn with_timings(self, timings: Timings) -> Backoff {
        Backoff { timings, ..self }
    }

    /// Logs `error`, and waits until the next attempt is due.
    ///
    /// # Errors
    ///
    /// `error` itself, when it is not transient or the time is up.
    pub fn pause(&mut self, error: Error) -> Result<(), Error> {
        thread::sleep(self.after(error)?);
        Ok(())
    }

    /// Logs `error`, and returns the delay until the next attempt.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Backoff::pause).
    pub fn after(&mut self, error: Error) -> Result<Duration, Error> {
        self.after_at_least(Duration::ZERO, error)
    }

    /// The same, where the delay is at least `least` unless that is beyond the end.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Backoff::pause).
    pub fn after_at_least(&mut self, least: Duration, error: Error) -> Result<Duration, Error> {
        if !error.is_transient() || self.is_over() {
            return Err(error);
        }
        let text = error.to_string();
        if text != self.last_logged {
            log::warn!("{text}; trying again");
            self.last_logged = text;
        }
        Ok(self.delay(least))
    }

    /// The delay until the next attempt: at least `least`, but never beyond the end.
    fn delay(&self, least: Duration) -> Duration {
        let delay = self.timings.delay_after(self.start.elapsed()).max(least);
        let left = self.end.map(|end| end.saturating_duration_since(Instant::now()));
        left.map_or(delay, |left| delay.min(left))
    }

    fn is_over(&self) -> bool {
        self.end.is_some_and(|end| end <= Instant::now())
    }
}

/// Calls `attempt` until it succeeds, as long as `retry_for` lasts and its errors are transient; without
/// `retry_for`, once.
///
/// # Errors
///
/// The error of the last attempt.
pub fn retry<T>(
    retry_for: Option<RetryFor>,
    mut attempt: impl FnMut() -> Result<T, Error>,
) -> Result<T, Error> {
    let mut backoff = Backoff::new(retry_for.unwrap_or(RetryFor::NO_TIME));
    loop {
        match attempt() {
            Ok(outcome) => return Ok(outcome),
            Err(error) => backoff.pause(error)?,
        }
    }
}

/// Attempts to replace a lost connection. Each attempt runs in its own thread. The next begins when the last has failed
/// or is overdue, and fewer than eight are running.
pub struct Attempts<T> {
    connect: Arc<dyn Fn() -> Result<T, Error> + Send + Sync>,
    backoff: Backoff,
    /// When the next attempt begins; `None` after the last.
    next: Option<Instant>,
    running: usize,
    has_failed: bool,
    /// The first failure that is not transient.
    incurable: Option<Error>,
    sender: Sender<Result<T, Error>>,
    outcomes: Receiver<Result<T, Error>>,
}

impl<T: Send + 'static> Attempts<T> {
    /// The first attempt is due now.
    pub fn now(
        backoff: Backoff,
        connect: impl Fn() -> Result<T, Error> + Send + Sync + 'static,
    ) -> Attempts<T> {
        let (sender, outcomes) = mpsc::channel();
        Attempts {
            connect: Arc::new(connect),
            backoff,
            next: Some(Instant::now()),
            running: 0,
            has_failed: false,
            incurable: None,
            sender,
            outcomes,
        }
    }

    /// The first attempt is due after a pause, as `cause` has only just happened.
    ///
    /// # Errors
    ///
    /// `cause` itself, if it is not transient.
    pub fn new(
        cause: Error,
        backoff: Backoff,
        connect: impl Fn() -> Result<T, Error> + Send + Sync + 'static,
    ) -> Result<Attempts<T>, Error> {
        let mut attempts = Attempts::now(backoff, connect);
        attempts.backoff.last_logged = cause.to_string();
        attempts.next = Some(Instant::now() + attempts.backoff.after(cause)?);
        Ok(attempts)
    }

    /// Begins the next attempt when it is due, and returns the outcome of a successful attempt.
    ///
    /// # Errors
    ///
    /// As for [`fail`](Attempts::fail).
    pub fn poll(&mut self) -> Result<Option<T>, Error> {
        while let Ok(outcome) = self.outcomes.try_recv() {
            match outcome {
                Ok(success) => return Ok(Some(success)),
                Err(failure) => self.fail(failure)?,
            }
        }
        if self.next.is_some_and(|time| time <= Instant::now()) {
            match self.running < MAX_RUNNING {
                true => self.begin()?,
                // Those under way are the last.
                false if self.backoff.is_over() => self.next = None,
                false => {}
            }
        }
        Ok(None)
    }

    /// When attempts end, unless never.
    pub fn end(&self) -> Option<Instant> {
        self.backoff.end
    }

    /// Whether any attempt has failed.
    pub fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// When to [`poll`](Attempts::poll) at the latest: for the next attempt, or for the outcome of a running one.
    pub fn next(&self) -> Option<Instant> {
        let look = (self.running > 0).then(|| Instant::now() + LOOK_AGAIN);
        let next = self.next.filter(|_| self.running < MAX_RUNNING);
        next.into_iter().chain(look).min()
    }

    /// Begins another attempt.
    ///
    /// # Errors
    ///
    /// As for [`fail`](Attempts::fail), when the system has no thread for it.
    pub fn begin(&mut self) -> Result<(), Error> {
        let (connect, sender) = (Arc::clone(&self.connect), self.sender.clone());
        // Attempts that were given up miss no outcome.
        let attempt = move || drop(sender.send(connect()));
        let spawned = thread::Builder::new().spawn(attempt);
        self.running += 1;
        self.next = match self.backoff.is_over() {
            true => None,
            false => Some(Instant::now() + self.backoff.delay(OVERDUE)),
        };
        spawned
            .map(drop)
            .or_else(|error| self.fail(Error::unavailable(format!("start a thread: {error}"))))
    }

    /// Notes the failure of an attempt.
    ///
    /// # Errors
    ///
    /// When no other attempt is under way or due: the first failure that is not transient, or this one.
    pub fn fail(&mut self, failure: Error) -> Result<(), Error> {
        self.running -= 1;
        self.has_failed = true;
        if !failure.is_transient() {
            self.next = None;
            self.incurable.get_or_insert(failure);
        } else if let Some(next) = &mut self.next {
            if let Ok(delay) = self.backoff.after(failure) {
                *next = (*next).min(Instant::now() + delay);
            }
        } else if self.running == 0 && self.incurable.is_none() {
            return Err(failure);
        }
        match self.incurable.take_if(|_| self.running == 0) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::error::ErrorKind;

    fn error(kind: ErrorKind) -> Error {
        Error::new(kind, "down")
    }

    #[test]
    fn delays_grow_to_a_limit_and_differ() {
        for (passed, longest) in [(0, 200), (1_999, 200), (10_000, 1_000), (3_600_000, 2_000)] {
            let longest = Duration::from_millis(longest);
            let delays =
                [(); 20].map(|()| Timings::default().delay_after(Duration::from_millis(passed)));
            assert!(delays.iter().all(|delay| *delay >= longest / 2 && *delay <= longest));
            assert!(delays.iter().any(|delay| *delay != delays[0]));
        }
    }

    #[test]
    fn without_patience_there_is_one_attempt() {
        assert!(Backoff::new(RetryFor::NO_TIME).after(error(ErrorKind::Unavailable)).is_err());
    }

    #[test]
    fn no_delay_reaches_beyond_the_end() {
        let retry_for = Duration::from_millis(95);
        let delay = Backoff::new(RetryFor::AtMost(retry_for)).after(error(ErrorKind::Unavailable));
        assert!(delay.unwrap() <= retry_for);
    }

    #[test]
    fn what_succeeds_now_and_then_has_more_time() {
        let mut backoff = Backoff::new(RetryFor::NO_TIME);
        backoff.extend(RetryFor::AtMost(Duration::from_secs(60)));
        let second = Duration::from_secs(1);
        let delay = backoff.after_at_least(second, error(ErrorKind::Unavailable)).unwrap();
        assert_eq!(delay, second);
        let delay = backoff.after_at_least(100 * second, error(ErrorKind::Unavailable)).unwrap();
        assert!(delay <= 60 * second);
    }

    #[test]
    fn what_cannot_pass_is_not_tried_again() {
        let error = Backoff::new(RetryFor::Ever).after(error(ErrorKind::Permission)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);
        let refused = Error::new(ErrorKind::Permission, "no");
        let error = attempts(refused, RetryFor::Ever).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Permission);
    }

    fn attempts(cause: Error, retry_for: RetryFor) -> Result<Attempts<()>, Error> {
        Attempts::new(cause, Backoff::new(retry_for), || Ok(()))
    }

    #[test]
    fn what_cannot_pass_waits_for_the_attempts_that_are_under_way() {
        let down = || Error::unavailable("down");
        let mut attempts = attempts(down(), RetryFor::Ever).unwrap();
        for _ in 0..3 {
            attempts.begin().unwrap();
        }
        attempts.fail(Error::new(ErrorKind::Protocol, "what is this")).unwrap();
        assert!(attempts.next.is_none());
        attempts.fail(down()).unwrap();
        let error = attempts.fail(down()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol);
    }

    /// Attempts that hang until the sender is dropped, with the next one due.
    fn hanging(retry_for: RetryFor, running: usize) -> (Attempts<()>, Sender<()>) {
        let (sender, receiver) = mpsc::channel();
        let receiver = Mutex::new(receiver);
        let hang = move || {
            let _ = receiver.lock().unwrap().recv();
            Err(Error::unavailable("down"))
        };
        let mut attempts = Attempts::now(Backoff::new(retry_for), hang);
        for _ in 0..running {
            attempts.next = Some(Instant::now());
            attempts.poll().unwrap();
        }
        attempts.next = Some(Instant::now());
        (attempts, sender)
    }

    #[test]
    fn attempts_that_hang_are_limited_in_number() {
        let (mut attempts, sender) = hanging(RetryFor::Ever, 100);
        assert_eq!(attempts.running, MAX_RUNNING);
        assert!(attempts.next().unwrap() > Instant::now(), "no busy loop");
        drop(sender);
        let deadline = Instant::now() + Duration::from_secs(10);
        while attempts.running == MAX_RUNNING && Instant::now() < deadline {
            attempts.poll().unwrap();
        }
        assert!(attempts.next.is_some(), "another one follows");
    }

    #[test]
    fn no_attempt_begins_after_the_end_while_the_most_hang() {
        let (mut attempts, sender) = hanging(RetryFor::AtMost(Duration::ZERO), 0);
        for _ in 0..MAX_RUNNING {
            attempts.begin().unwrap();
        }
        attempts.next = Some(Instant::now());
        attempts.poll().unwrap();
        assert!(attempts.next.is_none(), "those that run are the last");
        drop(sender);
        let deadline = Instant::now() + Duration::from_secs(10);
        let ended = loop {
            match attempts.poll() {
                Ok(_) => assert!(Instant::now() < deadline, "no end"),
                Err(error) => break error,
            }
        };
        assert_eq!(ended.kind(), ErrorKind::Unavailable);
    }

    #[test]
    fn the_last_attempt_begins_when_the_time_is_up() {
        let down = || Error::unavailable("down");
        let mut attempts = attempts(down(), RetryFor::AtMost(Duration::from_millis(20))).unwrap();
        let mut begun = 0;
        while let Some(time) = attempts.next {
            thread::sleep(time.saturating_duration_since(Instant::now()));
            attempts.begin().unwrap();
            begun += 1;
        }
        assert_eq!(begun, 1);
        assert!(attempts.outcomes.recv().unwrap().is_ok());
        assert!(attempts.next().is_some(), "to poll for the outcome");
        assert_eq!(attempts.fail(down()).unwrap_err().kind(), ErrorKind::Unavailable);
    }
}
