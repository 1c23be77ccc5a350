//! The end of a file, by which to recognise the place again.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// Bytes before the end of a file that distinguish it from another file.
const CHECKED: u64 = 4096;

/// The identity of a file, and its end at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMark {
    device: u64,
    inode: u64,
    /// The number of an inode is used again; `None` where the file system does not know the time.
    created: Option<SystemTime>,
    length: u64,
    /// CRC-32 of the last [`CHECKED`] bytes before.
    checksum: u32,
}

impl FileMark {
    /// The end of the file at `path`; `None` unless this is the file that was `opened`.
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

    /// Whether the mark was made in the file of this metadata, at whatever length.
    fn has_file(&self, metadata: &Metadata) -> bool {
        FileMark { checksum: self.checksum, ..FileMark::new(metadata, self.length) } == *self
    }

    fn is_in(&self, file: &File) -> bool {
        file.metadata()
            .is_ok_and(|metadata| self.has_file(&metadata) && metadata.len() >= self.length)
    }

    /// Whether this file is the one, and has lost its end.
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

    /// Cuts a file off after the mark, which is in this file.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn cut(&self, path: &Path) -> io::Result<()> {
        OpenOptions::new().write(true).open(path)?.set_len(self.length)
    }
}

/// CRC-32 of the last bytes of the first `length` of a file.
fn checksum(file: &File, length: u64) -> io::Result<u32> {
    let checked = length.min(CHECKED);
    let mut bytes = vec![0; checked as usize];
    file.read_exact_at(&mut bytes, length - checked)?;
    Ok(crc32fast::hash(&bytes))
}
