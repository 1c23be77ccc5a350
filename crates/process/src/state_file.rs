//! A file in which a program keeps its state: locked against other processes, and replaced in one step.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::lock::{LOCK_WAIT, lock_by};
use crate::replace::Replacement;

/// An open and locked file. Other processes can open it after this value is dropped.
pub struct StateFile {
    path: PathBuf,
    file: File,
}

impl StateFile {
    /// Opens and locks a file, and creates a missing one. Returns its content, of at most `limit` bytes; `None` if the
    /// file is new.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened or is not a regular file. [`io::ErrorKind::WouldBlock`] when another process
    /// still uses it after [`LOCK_WAIT`].
    pub fn open(path: &Path, limit: u64) -> io::Result<(StateFile, Option<Vec<u8>>)> {
        let exists = path.exists();
        let file = lock(path)?;
        // Otherwise, a new file would replace a symbolic link instead of its target.
        let path = path.canonicalize()?;
        let mut content = Vec::new();
        (&file).take(limit).read_to_end(&mut content)?;
        let is_new = !exists && content.is_empty();
        Ok((StateFile { path, file }, (!is_new).then_some(content)))
    }

    /// The path, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces the content. With `must_sync`, a power cut leaves the old or the new content.
    ///
    /// # Errors
    ///
    /// When the file cannot be written. The content is then unchanged.
    pub fn replace(&mut self, content: &[u8], must_sync: bool) -> io::Result<()> {
        let mut new = Replacement::create(&self.path, ".new", 0o600)?;
        lock_by(&new.file, Instant::now() + LOCK_WAIT)?;
        new.file.write_all(content)?;
        if must_sync {
            new.file.sync_data()?;
        }
        self.file = new.finish()?;
        Ok(())
    }
}

/// Opens and locks the file at `path`. If the file is replaced before it is locked, opens the new one.
fn lock(path: &Path) -> io::Result<File> {
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        lock_by(&file, deadline)?;
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        if id(file.metadata()?) == id(fs::metadata(path)?) {
            return Ok(file);
        }
    }
}
