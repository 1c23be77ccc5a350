//! `--follow`: publishes the records of files as they grow, and remembers how far the broker has confirmed them.
//!
//! Bottom up:
//!
//! - `source`: one file, read from an offset on, and its confirmed position
//! - `followed`: a path, and the files that have it one after another
//! - `position`: the file in which the positions are recorded
//! - `watcher`: changes in the file system

mod followed;
mod position;
mod source;
mod watcher;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use amqp::Mailbox;
use anyhow::{Context, Result};
use logs_common::wire::MAX_BATCH;
use logs_process::signals::StopSignals;
use logs_process::{Failure, Status};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use self::followed::{Begin, Followed, Options};
use self::position::{PositionFile, default_path};
use self::source::Position;
use self::watcher::Watcher;
use crate::cli::Cli;
use crate::cutter::Cutter;
use crate::lines::{GRACE, report_stop};
use crate::message::Message;
use crate::publisher::Publisher;

/// The longest time between two looks at all files.
const POLL: Duration = Duration::from_secs(1);

/// The part of the time in which many files may be looked at: one in this number.
const LOOK_SHARE: u32 = 10;

/// The interval at which confirmed records are forgotten.
const ADVANCE_INTERVAL: Duration = Duration::from_millis(100);

/// When to look at the files.
struct Looks {
    next: Instant,
    /// When to look at the paths too, even if no name is reported to have changed.
    names_at: Instant,
    /// When a change may lead to a look. Looks at many files take time.
    earliest: Instant,
}

impl Looks {
    fn new(now: Instant) -> Looks {
        Looks { next: now, names_at: now, earliest: now }
    }

    /// What reports changes, and when to look at the latest.
    fn wait_for<'a>(
        &self,
        changes: Option<BorrowedFd<'a>>,
        now: Instant,
    ) -> (Option<BorrowedFd<'a>>, Instant) {
        match changes {
            Some(_) if now < self.earliest => (None, self.earliest),
            changes => (changes, self.next),
        }
    }
}

/// Raises the limit on open files as far as the system allows.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::debug!("raise the limit on open files: {error}");
    }
}

/// The followed files, and their positions.
pub struct Follow {
    cutter: Cutter,
    followed: Vec<Followed>,
    file: PositionFile,
    /// The positions of paths that are not followed now.
    others: Vec<Position>,
    watcher: Watcher,
    /// Whether to stop at the end of the files.
    ends: bool,
    /// Whether all files are at their end, and their last records are complete.
    is_ending: bool,
    /// The index of the path to read from next.
    next: usize,
    buffer: Vec<u8>,
    advanced_at: Instant,
}

impl Follow {
    /// Opens the position file, and finds the files.
    ///
    /// # Errors
    ///
    /// When the position file cannot be used, or a routing key is invalid.
    pub fn open(cli: &Cli) -> Result<Follow, Failure> {
        let path = match &cli.position {
            Some(path) => path.clone(),
            None => default_path(&cli.follow[0])?,
        };
        let mut file = PositionFile::open(&path)?;
        raise_file_limit();
        log::info!("positions are in {path:?}");
        let (watcher, started_at) = (Watcher::new(), SystemTime::now());
        let begins_at_start = cli.from_start || cli.no_follow;
        let options = Options {
            begin: if begins_at_start { Begin::AtStart } else { Begin::AtEnd },
            separator: cli.separator(),
            reports_problems: !cli.no_follow,
        };
        if let Some(path) = cli.follow.iter().find(|path| path.to_str().is_none()) {
            let text = format!("--follow: the path {path:?} is not UTF-8");
            return Err(Failure::new(Status::Usage, text));
        }
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let mut paths: Vec<_> = cli.follow.iter().map(absolute).collect();
        paths.sort();
        paths.dedup();
        let mut followed = Vec::new();
        for path in paths {
            let keys = cli.keys(Some(&path))?;
            followed.push(Followed::new(path, keys, &file, options, &watcher));
        }
        let is_other =
            |position: &&Position| followed.iter().all(|one| one.path() != position.path);
        let others = file.positions().iter().filter(is_other).cloned().collect();
        file.looked_at = started_at;
        let mut follow = Follow {
            cutter: cli.cutter()?,
            followed,
            file,
            others,
            watcher,
            ends: cli.no_follow,
            is_ending: false,
            next: 0,
            buffer: Vec::new(),
            advanced_at: Instant::now(),
        };
        // After a kill, lines that are written from now on are not skipped.
        follow.record(true);
        Ok(follow)
    }

    /// Publishes records until a signal; with `--no-follow`, until the end of all files. Returns the signal.
    ///
    /// # Errors
    ///
    /// Those of the publisher. When a record is too large, after all earlier records are confirmed.
    pub fn publish(mut self, stop: StopSignals, mut publisher: Publisher) -> Result<Option<i32>> {
        let counts = publisher.counts();
        let counted = Arc::clone(&counts);
        let stop = stop.handle(GRACE, move |signal| report_stop(signal, &counted))?;
        let (published, read) = match self.run(&mut publisher, &stop) {
            Ok(read) => (Ok(()), read),
            Err(error) => (Err(error), Ok(())),
        };
        self.advance(&publisher);
        self.record(false);
        let finished = publisher.finish(published, Some(&stop));
        self.advance(&publisher);
        self.record(true);
        finished?;
        read.context(counts.to_string())?;
        self.file.check()?;
        let signal = stop.try_recv();
        match signal {
            Some(signal) => report_stop(signal, &counts),
            None => self.check_problems()?,
        }
        Ok(signal)
    }

    fn run(
        &mut self,
        publisher: &mut Publisher,
        stop: &Mailbox<i32>,
    ) -> Result<Result<(), Failure>> {
        let counts = publisher.counts();
        // Always readable: as long as there is more to read, the publisher waits only for room.
        let more = File::open("/dev/null").context("open /dev/null")?;
        let mut looks = Looks::new(Instant::now());
        while stop.is_empty() {
            if Instant::now() >= looks.next {
                self.look(&mut looks);
                counts.set_behind(self.followed.iter().map(Followed::behind).sum());
            }
            let now = Instant::now();
            self.cut(publisher, now);
            let is_dirty = self.followed.iter().any(Followed::is_dirty);
            if self.ends && !is_dirty {
                if self.is_finished() {
                    break;
                }
                self.followed.iter_mut().for_each(Followed::finish);
                self.is_ending = true;
                continue;
            }
            let (input, wake_at) = match is_dirty {
                true => (Some(more.as_fd()), looks.next),
                false => looks.wait_for(self.watcher.descriptor(), now),
            };
            let deadline = self.deadline().into_iter().chain([wake_at]).min();
            let is_ready = publisher.wait(input, Some(stop), deadline)?;
            let now = Instant::now();
            let (mut messages, mut outcome) = (Vec::new(), Ok(()));
            match is_dirty {
                true if is_ready => (messages, outcome) = self.read(now),
                false if is_ready => looks.next = now,
                _ => {}
            }
            counts.add_read(messages.iter().map(|message| message.records).sum());
            publisher.publish(messages)?;
            if outcome.is_err() {
                return Ok(outcome);
            }
            if now >= self.advanced_at + ADVANCE_INTERVAL {
                self.advance(publisher);
                if now >= self.file.next_time() {
                    self.record(true);
                }
            }
        }
        Ok(Ok(()))
    }

    /// Looks at the files, and once a second at their paths. At the end of a batch job, all are known.
    fn look(&mut self, looks: &mut Looks) {
        let now = Instant::now();
        let have_names_changed = self.watcher.drain() || now >= looks.names_at;
        if have_names_changed {
            self.file.looked_at = SystemTime::now();
            looks.names_at = now + POLL;
        }
        if !self.is_ending {
            for followed in &mut self.followed {
                followed.look(have_names_changed, &self.watcher, now);
            }
        }
        let took = now.elapsed();
        (looks.next, looks.earliest) = (now + took + POLL, now + took + LOOK_SHARE * took);
    }

    /// Reads once from each path that may have bytes to read, until the messages have many bytes. The next call continues
    /// with the next path, so that no file waits long for the others.
    fn read(&mut self, now: Instant) -> (Vec<Message>, Result<(), Failure>) {
        let (mut messages, mut bytes, mut outcome) = (Vec::new(), 0, Ok(()));
        let count = self.followed.len();
        for _ in 0..count {
            let followed = &mut self.followed[self.next];
            self.next = (self.next + 1) % count;
            if !followed.is_dirty() {
                continue;
            }
            match followed.read(&self.cutter, &mut self.buffer, now) {
                Ok(read) => {
                    bytes += read.iter().map(|message| message.body.len()).sum::<usize>();
                    messages.extend(read);
                }
                Err(failure) => outcome = Err(failure),
            }
            if outcome.is_err() || bytes >= MAX_BATCH {
                break;
            }
        }
        if self.followed.iter().any(Followed::is_unrecorded) {
            self.record(false);
        }
        (messages, outcome)
    }

    /// Cuts files where records have waited long enough, and records the cuts.
    fn cut(&mut self, publisher: &Publisher, now: Instant) {
        let is_all_confirmed = publisher.outbox.is_empty();
        let cutter = &self.cutter;
        let cuts = self.followed.iter_mut().map(|one| one.cut(cutter, now, is_all_confirmed));
        if cuts.fold(false, |any, cut| any | cut) {
            self.record(false);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.followed.iter().filter_map(|followed| followed.deadline(&self.cutter)).min()
    }

    /// Moves the positions behind all confirmed records.
    fn advance(&mut self, publisher: &Publisher) {
        self.advanced_at = Instant::now();
        if let Some(unconfirmed) = publisher.outbox.first_unconfirmed() {
            self.followed.iter_mut().for_each(|followed| followed.advance(&unconfirmed));
        }
    }

    /// Records all positions.
    fn record(&mut self, must_sync: bool) {
        let followed = self.followed.iter().flat_map(Followed::positions);
        self.file.record(followed.chain(&self.others).cloned().collect(), must_sync);
        self.followed.iter_mut().for_each(Followed::set_recorded);
    }

    /// Whether all files are read to their ends.
    fn is_finished(&self) -> bool {
        self.followed.iter().all(Followed::is_finished)
    }

    /// Fails if a file could not be read.
    fn check_problems(&self) -> Result<(), Failure> {
        match self.followed.iter().find(|followed| !followed.problem().is_empty()) {
            Some(followed) => {
                let text = format!("follow {:?}: {}", followed.path(), followed.problem());
                Err(Failure::new(Status::Io, text))
            }
            None => Ok(()),
        }
    }
}
