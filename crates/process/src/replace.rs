//! Replaces a file in one step, so that no program reads a part of it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A new file in the directory of another. [`finish`](Replacement::finish) replaces the other with it. A drop without
/// `finish` removes it.
pub struct Replacement {
    path: PathBuf,
    new_path: NewPath,
    /// The new file, to be written.
    pub file: File,
}

/// The path of the new file. A drop removes the file.
struct NewPath(PathBuf);

impl Replacement {
    /// Creates an empty file with the permissions `mode`, less the umask. Its name is that of `path` with `suffix`
    /// appended; a file of that name, which an earlier process may have left, is removed.
    ///
    /// # Errors
    ///
    /// When the file cannot be created.
    pub fn create(path: &Path, suffix: &str, mode: u32) -> io::Result<Replacement> {
        let mut new_path = path.as_os_str().to_owned();
        new_path.push(suffix);
        // If this fails, the new file cannot be created.
        let _ = fs::remove_file(&new_path);
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new_path)?;
        Ok(Replacement { path: path.into(), new_path: NewPath(new_path.into()), file })
    }

    /// Replaces the other file with the new one, and returns the new one.
    ///
    /// # Errors
    ///
    /// When the file cannot be renamed. The other file is then unchanged.
    pub fn finish(self) -> io::Result<File> {
        fs::rename(&self.new_path.0, &self.path)?;
        Ok(self.file)
    }
}

impl Drop for NewPath {
    fn drop(&mut self) {
        // After `finish`, the file does not exist.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::io::Write;
    use std::process;

    use super::*;

    /// A directory of this test with the file `a`.
    fn directory(name: &str) -> PathBuf {
        let directory = env::temp_dir().join(format!("replace-{name}-{}", process::id()));
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("a"), "old").unwrap();
        directory
    }

    fn files(directory: &Path) -> Vec<(String, String)> {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
        let name = |entry: &fs::DirEntry| entry.file_name().into_string().unwrap();
        entries.map(|entry| (name(&entry), fs::read_to_string(entry.path()).unwrap())).collect()
    }

    #[test]
    fn a_file_is_replaced_at_the_end() {
        let directory = directory("end");
        fs::write(directory.join("a.new"), "left by another process").unwrap();
        let mut new = Replacement::create(&directory.join("a"), ".new", 0o600).unwrap();
        new.file.write_all(b"new").unwrap();
        assert_eq!(fs::read(directory.join("a")).unwrap(), b"old");
        let mut file = new.finish().unwrap();
        file.write_all(b"er").unwrap();
        assert_eq!(files(&directory), [("a".into(), "newer".into())]);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_replacement_that_is_dropped_leaves_no_file() {
        let directory = directory("dropped");
        drop(Replacement::create(&directory.join("a"), ".new", 0o600).unwrap());
        assert_eq!(files(&directory), [("a".into(), "old".into())]);
        fs::remove_dir_all(directory).unwrap();
    }
}
