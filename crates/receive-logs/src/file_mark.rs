//! A mark at the end of a file, which a later receiver can find again.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// Bytes before the end of a file that distinguish it from another file.
const CHECKED: u64 = 4096;

/// The identity of a file, and its end at a point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMark {
    device: u64,
    inode: u64,
    /// The file system may give the inode of a deleted file to a new file, so the time of creation belongs to the
    /// identity. `None` if the file system does not record it.
    created: Option<SystemTime>,
    length: u64,
    /// CRC-32 of the last [`CHECKED`] bytes before the mark.
    checksum: u32,
}

impl FileMark {
    /// A mark at the end of the file at `path`; `None` if this is not the file that is `opened`.
    pub fn at_end_of(opened: &File, path: &Path) -> Option<FileMark> {
        let metadata = opened.metadata().ok()?;
        let mark = FileMark::new(&metadata, metadata.len());
        let file = File::open(path).ok()?;
        mark.is_in(&file).then_some(())?;
        Some(FileMark { checksum: checksum(&file, mark.length).ok()?, ..mark })
    }

    fn new(metadata: &Metadata, length: u64) -> FileMark {
        let created = metadata.created().ok();
        FileMark { device: metadata.dev(), inode: metadata.ino(), created, length, checksum: 0 }
    }

    /// Whether the mark is in the file of this metadata. The length does not matter.
    fn has_file(&self, metadata: &Metadata) -> bool {
        FileMark { checksum: self.checksum, ..FileMark::new(metadata, self.length) } == *self
    }

    fn is_in(&self, file: &File) -> bool {
        file.metadata()
            .is_ok_and(|metadata| self.has_file(&metadata) && metadata.len() >= self.length)
    }

    /// Whether the file at `path` is the marked file and is shorter than the mark.
    pub fn is_beyond_end_of(&self, path: &Path) -> bool {
        fs::metadata(path)
            .is_ok_and(|metadata| self.has_file(&metadata) && metadata.len() < self.length)
    }

    /// How many bytes a file has after the mark; `None` if the mark is not in this file.
    ///
    /// # Errors
    ///
    /// When the file exists and cannot be read.
    pub fn bytes_after(&self, path: &Path) -> io::Result<Option<u64>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        if !self.is_in(&file) || checksum(&file, self.length)? != self.checksum {
            return Ok(None);
        }
        Ok(Some(file.metadata()?.len() - self.length))
    }

    /// Truncates the file at the mark, which must be in this file.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn truncate(&self, path: &Path) -> io::Result<()> {
        OpenOptions::new().write(true).open(path)?.set_len(self.length)
    }
}

/// CRC-32 of the last bytes before `length`.
fn checksum(file: &File, length: u64) -> io::Result<u32> {
    let checked = length.min(CHECKED);
    let mut bytes = vec![0; checked as usize];
    file.read_exact_at(&mut bytes, length - checked)?;
    Ok(crc32fast::hash(&bytes))
}
