//! Unique names, ports and files for a test.

use std::fs;
use std::io::{self, Write};
use std::iter;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

/// A name that no other test uses.
pub fn unique(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{name}-{}-{count}", process::id())
}

/// A port that no other program uses. It is below those of `scripts/broker` and those of the system.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + (process::id() % 9_000) as u16;
    let mut ports = iter::from_fn(|| Some(first + NEXT.fetch_add(1, Ordering::Relaxed)));
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}

/// A file in a temporary directory. Dropping it removes both.
pub struct TempFile {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl TempFile {
    /// A path without a file.
    pub fn new(name: &str) -> TempFile {
        let directory = tempfile::tempdir().expect("a temporary directory");
        TempFile { path: directory.path().join(name), _directory: directory }
    }

    /// A file with this content.
    pub fn with(name: &str, content: &[u8]) -> TempFile {
        let file = TempFile::new(name);
        file.create().write_all(content).expect("write");
        file
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates the file.
    pub fn create(&self) -> fs::File {
        fs::File::create(&self.path).expect("create")
    }

    /// The content of the file.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        fs::read(&self.path)
    }
}
