//! Tells people, scripts and service managers whether messages are being received.

use std::fs;
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
    pub fn new(cli: &Cli) -> Readiness {
        let readiness = Readiness { file: cli.ready_file.clone(), quiet: cli.verbosity.quiet };
        readiness.remove_file();
        readiness
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

    /// Nothing more will be received.
    pub fn end(&self) {
        notify(&[NotifyState::Stopping]);
    }

    fn remove_file(&self) {
        self.file.as_deref().map(remove);
    }
}

impl Drop for Readiness {
    fn drop(&mut self) {
        self.remove_file();
    }
}

/// Removes a ready file, if there is one.
pub fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("remove ready file {path:?}: {error}");
    }
}

/// Creates a file with the number of this process in it, which nobody sees without.
fn create(path: &Path) -> io::Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".new");
    fs::write(&unfinished, format!("{}\n", process::id()))?;
    fs::rename(&unfinished, path)
}

/// Tells systemd, if that has started us.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("notify systemd: {error}");
    }
}
