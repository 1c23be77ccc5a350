//! The file of `--position`: how far the followed files are confirmed.

use std::env;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use logs_process::logging::alert;
use logs_process::state_file::StateFile;
use logs_process::{Failure, Status};
use serde::{Deserialize, Serialize};

use super::source::Position;

/// The interval at which positions are recorded.
const INTERVAL: Duration = Duration::from_secs(1);

/// The maximum number of bytes to read from the file, which protects against a wrong file.
const MAX_FILE: u64 = 64 * 1024 * 1024;

/// The version of the format.
const VERSION: u32 = 1;

/// The content of the file, in JSON.
#[derive(Serialize, Deserialize)]
struct Content {
    version: u32,
    /// When all paths were last looked at. A later file may have had a path since, and another name by now.
    looked_at: SystemTime,
    /// CRC-32 of the positions in JSON.
    checksum: u32,
    positions: Vec<Position>,
}

/// The open file, locked to exclude other processes.
pub struct PositionFile {
    file: StateFile,
    recorded: Vec<Position>,
    /// When all paths were last looked at.
    pub looked_at: SystemTime,
    recorded_at: Instant,
    synced_at: Instant,
    /// Whether the file on the disk is the last one recorded.
    is_synced: bool,
    /// Whether the last attempt to record has failed.
    has_failed: bool,
}

impl PositionFile {
    /// Opens the file and creates a missing one. Returns it with the positions in it.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened, is in use, or is damaged.
    pub fn open(path: &Path) -> Result<PositionFile, Failure> {
        let operation = format!("read the positions in {path:?}");
        let io = |error: io::Error| match error.kind() {
            ErrorKind::WouldBlock => {
                Failure::new(Status::Config, format!("{operation}: another emit-log uses it"))
            }
            _ => Failure::io(&operation, &error),
        };
        let (file, content) = StateFile::open(path, MAX_FILE).map_err(io)?;
        let content = read(&content.unwrap_or_default());
        let Content { looked_at, positions: recorded, .. } = content.map_err(|reason| {
            let text = format!(
                "{operation}: {reason} (remove the file to begin at the end of the followed files, or with \
                 --from-start at their beginning)"
            );
            Failure::new(Status::Config, text)
        })?;
        let now = Instant::now();
        Ok(PositionFile {
            file,
            recorded,
            looked_at,
            recorded_at: now,
            synced_at: now,
            is_synced: true,
            has_failed: false,
        })
    }

    /// The positions at the start.
    pub fn positions(&self) -> &[Position] {
        &self.recorded
    }

    /// When the positions are to be recorded.
    pub fn next_time(&self) -> Instant {
        self.recorded_at + INTERVAL
    }

    /// Records positions. With `must_sync`, a power cut cannot undo this. Reports the first of several failures: lines
    /// are still sent, and are sent again after a restart.
    pub fn record(&mut self, positions: Vec<Position>, must_sync: bool) {
        self.recorded_at = Instant::now();
        let must_sync = must_sync || self.synced_at.elapsed() >= INTERVAL;
        let is_recorded = positions == self.recorded && !self.has_failed;
        if is_recorded && (self.is_synced || !must_sync) {
            return;
        }
        match self.file.replace(&write(&positions, self.looked_at), must_sync) {
            Ok(()) => {
                (self.recorded, self.has_failed, self.is_synced) = (positions, false, must_sync);
                if must_sync {
                    self.synced_at = self.recorded_at;
                }
            }
            Err(error) => {
                if !self.has_failed {
                    let path = self.file.path();
                    alert(format_args!(
                        "record the positions in {path:?}: {error}; lines sent from now on are repeated \
                         after a restart"
                    ));
                }
                self.has_failed = true;
            }
        }
    }

    /// The failure of the last attempt to record.
    ///
    /// # Errors
    ///
    /// When the positions of confirmed lines are not in the file.
    pub fn check(&self) -> Result<(), Failure> {
        match self.has_failed {
            true => {
                let text = format!("record the positions in {:?}: failed", self.file.path());
                Err(Failure::new(Status::Io, text))
            }
            false => Ok(()),
        }
    }
}

fn read(content: &[u8]) -> Result<Content, String> {
    // Nothing is sent before the first record.
    if content.is_empty() {
        let (looked_at, checksum, positions) = (SystemTime::now(), 0, Vec::new());
        return Ok(Content { version: VERSION, looked_at, checksum, positions });
    }
    let content: Content =
        serde_json::from_slice(content).map_err(|error| format!("it has no positions: {error}"))?;
    match content.version {
        VERSION if content.checksum == checksum(&content.positions) => Ok(content),
        VERSION => Err("it is damaged".into()),
        _ => Err("it was written by another version".into()),
    }
}

fn write(positions: &[Position], looked_at: SystemTime) -> Vec<u8> {
    let (checksum, positions) = (checksum(positions), positions.to_vec());
    let content = Content { version: VERSION, looked_at, checksum, positions };
    let mut text = serde_json::to_vec(&content).unwrap_or_default();
    text.push(b'\n');
    text
}

fn checksum(positions: &[Position]) -> u32 {
    crc32fast::hash(&serde_json::to_vec(positions).unwrap_or_default())
}

/// The default file: in the state directory of systemd or of the user, named after the first followed file.
///
/// # Errors
///
/// When there is no state directory.
pub fn default_path(first: &Path) -> Result<PathBuf, Failure> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let directory = set("STATE_DIRECTORY")
        .or_else(|| set("XDG_STATE_HOME").map(|home| home.join("emit-log")))
        .or_else(|| set("HOME").map(|home| home.join(".local/state/emit-log")));
    let Some(directory) = directory else {
        let text = "--follow: there is no home directory for the positions (use --position FILE)";
        return Err(Failure::new(Status::Usage, text));
    };
    fs::create_dir_all(&directory)
        .map_err(|error| Failure::io(format!("create {directory:?}"), &error))?;
    let path = std::path::absolute(first).unwrap_or_else(|_| first.into());
    let name = path.to_string_lossy().trim_start_matches('/').replace('/', "-");
    Ok(directory.join(format!("{name}.position")))
}
