//! Tells people, scripts and service managers whether messages are being received.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process;

use logs_common::exit::Failure;
use sd_notify::NotifyState;

use crate::cli::Cli;

const WAITING: NotifyState<'_> = NotifyState::Status("waiting for logs");

const BANNER: &str = " [*] Waiting for logs. To exit press CTRL+C";

/// Dropped, it takes back that anything is received.
pub struct Readiness {
    file: Option<PathBuf>,
    quiet: bool,
}

impl Readiness {
    /// Not ready. A file that an earlier process has left says nothing about this one.
    ///
    /// # Errors
    ///
    /// When something else is there.
    pub fn new(cli: &Cli) -> Result<Readiness, Failure> {
        if let Some(path) = &cli.ready_file {
            let removed = remove_stale(path);
            removed.map_err(|error| Failure::io(format!("create ready file {path:?}"), &error))?;
        }
        Ok(Readiness { file: cli.ready_file.clone(), quiet: cli.verbosity.quiet })
    }

    /// From now on nothing is missed.
    ///
    /// # Errors
    ///
    /// When the file cannot be created.
    pub fn begin(&self) -> Result<(), Failure> {
        if let Some(path) = &self.file {
            let created = create(path);
            created.map_err(|error| Failure::io(format!("create ready file {path:?}"), &error))?;
        }
        notify(&[NotifyState::Ready, WAITING]);
        if !self.quiet {
            // Nobody is waiting for it if stderr is gone.
            let _ = writeln!(io::stderr(), "{BANNER}");
        }
        Ok(())
    }

    /// Messages are missed until it [resumes](Readiness::resume).
    pub fn interrupt(&self, reason: &str) {
        notify(&[NotifyState::Status(reason)]);
    }

    /// From now on nothing is missed, again.
    pub fn resume(&self) {
        notify(&[WAITING]);
    }

    /// The output is opened anew, while nothing is missed.
    pub fn reload(&self) {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            notify(&[NotifyState::Reloading, now]);
            notify(&[NotifyState::Ready]);
        }
    }
}

impl Drop for Readiness {
    fn drop(&mut self) {
        notify(&[NotifyState::Stopping]);
        self.file.as_deref().map(remove_own);
    }
}

/// Removes the ready file of this process.
pub fn remove_own(path: &Path) {
    if process_in(path) == Some(process::id())
        && let Err(error) = fs::remove_file(path)
    {
        log::warn!("remove ready file {path:?}: {error}");
    }
}

/// Removes what an earlier process has left; anything else is somebody's.
fn remove_stale(path: &Path) -> io::Result<()> {
    match process_in(path) {
        Some(_) => fs::remove_file(path),
        None if path.exists() => Err(io::Error::other("it exists, and is no ready file")),
        None => Ok(()),
    }
}

fn process_in(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.strip_suffix('\n')?.parse().ok()
}

/// Creates a file with the number of this process in it, which nobody sees without.
fn create(path: &Path) -> io::Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{}", process::id()));
    let mut file = File::create_new(&unfinished)?;
    let created = writeln!(file, "{}", process::id()).and_then(|()| fs::rename(&unfinished, path));
    created.inspect_err(|_| drop(fs::remove_file(&unfinished)))
}

/// Tells systemd, if that has started us.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("notify systemd: {error}");
    }
}
