//! Reports to users, scripts and service managers whether messages are received.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;

use logs_process::Failure;
use logs_process::escape::one_line;
use logs_process::live_line::LiveLine;
use logs_process::notes::note;
use logs_process::replace::Replacement;
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use sd_notify::NotifyState;

use crate::cli::Cli;
use crate::status::StatusLine;

const WAITING: NotifyState<'_> = NotifyState::Status("waiting for logs");

/// The maximum size of a ready file, which contains a number.
const MAX_FILE: u64 = 32;

const BANNER: &str = " [*] Waiting for logs. To exit press CTRL+C";

/// The signs of readiness: a file, lines on stderr, notifications to systemd. Dropping it removes the file and notifies
/// systemd of the end.
pub struct Readiness {
    file: Option<PathBuf>,
    quiet: bool,
    /// Counts the seconds on the terminal during an outage.
    outage: Option<LiveLine>,
}

impl Readiness {
    /// Starts as not ready. Removes a ready file of an earlier process.
    ///
    /// # Errors
    ///
    /// When the path is a file of another kind, or no file can be created there.
    pub fn new(cli: &Cli) -> Result<Readiness, Failure> {
        if let Some(path) = &cli.ready_file {
            // An error must occur before any message is received.
            let prepared = remove_stale(path).and_then(|()| write_beside(path).map(drop));
            prepared.map_err(|error| Failure::io(format!("create ready file {path:?}"), &error))?;
        }
        let (file, quiet) = (cli.ready_file.clone(), cli.verbosity.quiet);
        Ok(Readiness { file, quiet, outage: None })
    }

    /// Reports that all messages are received from now on.
    ///
    /// # Errors
    ///
    /// When the file cannot be created.
    pub fn begin(&self) -> Result<(), Failure> {
        if let Some(path) = &self.file {
            let created = write_beside(path).and_then(Replacement::finish);
            created.map_err(|error| Failure::io(format!("create ready file {path:?}"), &error))?;
        }
        notify(&[NotifyState::Ready, WAITING]);
        if !self.quiet {
            note(BANNER);
        }
        Ok(())
    }

    /// Messages are missed until [`resume`](Readiness::resume). `status` has the time of the outage.
    pub fn interrupt(&mut self, reason: &str, status: &Arc<StatusLine>) {
        // A line break would start another notification.
        notify(&[NotifyState::Status(&one_line(reason))]);
        if LiveLine::is_possible() && !self.quiet {
            let status = Arc::clone(status);
            // Without a thread, there is no line.
            self.outage = LiveLine::start(move || status.broker.outage()).ok();
        }
    }

    /// All messages are received again.
    pub fn resume(&mut self) {
        self.outage = None;
        notify(&[WAITING]);
    }

    /// Notifies systemd that the output is reopened.
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

/// Removes the ready file of an earlier process. Keeps any other file.
fn remove_stale(path: &Path) -> io::Result<()> {
    match process_in(path) {
        Some(id) if id != process::id() && is_receiver(id) => {
            log::warn!(
                "ready file {path:?} belongs to process {id}; it is replaced when this receiver is ready"
            );
            Ok(())
        }
        Some(_) => fs::remove_file(path),
        None if path.exists() => Err(io::Error::other("it exists and is not a ready file")),
        None => Ok(()),
    }
}

/// The process id in a ready file; 0 if the file is empty, as after a crash of the system.
fn process_in(path: &Path) -> Option<u32> {
    let metadata = fs::metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return None;
    }
    match fs::read_to_string(path).ok()?.as_str() {
        "" => Some(0),
        text => text.strip_suffix('\n')?.parse().ok(),
    }
}

/// Whether the process runs. Where the system has `/proc`, the process must also run this program.
fn is_receiver(id: u32) -> bool {
    let process = i32::try_from(id).ok().and_then(Pid::from_raw);
    let signalled = process.map(test_kill_process);
    let name = |id: &str| fs::read(format!("/proc/{id}/comm"));
    let is_other = name("self").is_ok_and(|own| name(&id.to_string()).is_ok_and(|it| it != own));
    matches!(signalled, Some(Ok(()) | Err(Errno::PERM))) && !is_other
}

/// Writes the id of this process to a temporary file beside the path.
fn write_beside(path: &Path) -> io::Result<Replacement> {
    let id = process::id();
    let mut new = Replacement::create(path, &format!(".{id}"), 0o666)?;
    writeln!(new.file, "{id}")?;
    Ok(new)
}

/// Notifies systemd if it is the service manager of this process.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::warn!("notify systemd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use logs_tests::TempFile;

    use super::*;

    fn readiness(path: &Path) -> Result<Readiness, Failure> {
        Readiness::new(&Cli::parse_from([
            "receive-logs",
            "-q",
            "--ready-file",
            path.to_str().unwrap(),
        ]))
    }

    #[test]
    fn the_ready_file_exists_while_messages_are_received() {
        let file = TempFile::new("ready");
        let mut readiness = readiness(file.path()).unwrap();
        assert!(!file.path().exists());
        readiness.begin().unwrap();
        assert_eq!(file.read().unwrap(), format!("{}\n", process::id()).into_bytes());
        assert_eq!(fs::read_dir(file.path().parent().unwrap()).unwrap().count(), 1);
        let status = Arc::new(StatusLine::new(&Cli::parse_from(["receive-logs"])));
        readiness.interrupt("no broker", &status);
        readiness.resume();
        assert!(file.path().exists());
        drop(readiness);
        assert!(!file.path().exists());
    }

    #[test]
    fn the_ready_file_of_another_process_is_kept() {
        let file = TempFile::new("ready");
        let readiness = readiness(file.path()).unwrap();
        readiness.begin().unwrap();
        fs::write(file.path(), "1\n").unwrap();
        drop(readiness);
        assert_eq!(file.read().unwrap(), b"1\n");
    }

    #[test]
    fn a_stale_ready_file_is_removed() {
        // Of another program, of no process, and empty.
        for content in ["1\n", "4194304\n", ""] {
            let file = TempFile::with("ready", content.as_bytes());
            let _readiness = readiness(file.path()).unwrap();
            assert!(!file.path().exists(), "{content:?}");
        }
    }

    #[test]
    fn a_file_that_is_not_a_ready_file_is_kept() {
        for content in ["precious\n", "1"] {
            let file = TempFile::with("ready", content.as_bytes());
            let failure = readiness(file.path()).err().unwrap();
            let text =
                format!("create ready file {:?}: it exists and is not a ready file", file.path());
            assert_eq!(failure.to_string(), text);
            assert_eq!(file.read().unwrap(), content.as_bytes());
        }
        let directory = TempFile::new("ready");
        fs::create_dir(directory.path()).unwrap();
        assert!(readiness(directory.path()).is_err());
    }

    #[test]
    fn a_missing_directory_is_reported_before_receiving() {
        let failure = readiness(Path::new("/nonexistent/ready")).err().unwrap();
        let text =
            "create ready file \"/nonexistent/ready\": No such file or directory (os error 2)";
        assert_eq!(failure.to_string(), text);
    }
}
