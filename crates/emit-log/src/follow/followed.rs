//! A path that is followed, through rotations: the file that has the path now, and those that had it before.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use logs_process::{Failure, Status};
use memchr::memrchr;

use super::position::PositionFile;
use super::source::{Position, ReadError, Source};
use super::watcher::Watcher;
use crate::cutter::Cutter;
use crate::keys::Keys;
use crate::message::Message;

/// Bytes to read at a time when the start of the last line is searched.
const SEARCHED: u64 = 64 * 1024;

/// The endings of compressed files.
const COMPRESSED: [&[u8]; 6] = [b".gz", b".bz2", b".xz", b".zst", b".lz4", b".Z"];

/// How far the time of creation of a file may be behind the clock.
const CLOCK_TICK: Duration = Duration::from_millis(20);

/// Where to begin in a file that has no position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// At the first line.
    AtStart,
    /// Behind the last line that is complete.
    AtEnd,
}

/// What holds for all paths.
#[derive(Clone, Copy)]
pub struct Options {
    /// Where to begin in the files that are there at the start.
    pub begin: Begin,
    /// The byte that ends a line.
    pub separator: u8,
    /// Whether problems are reported when they appear.
    pub reports_problems: bool,
}

/// A path and its files.
pub struct Followed {
    path: PathBuf,
    keys: Keys,
    /// The files, in the order in which they had the path.
    sources: VecDeque<Source>,
    /// Whether the last of them has the path.
    has_current: bool,
    /// Positions in files that are not there, but may come back.
    absent: Vec<Position>,
    /// Where to begin in the next file.
    begin: Begin,
    /// The last problem with the path, which is reported once.
    problem: String,
    /// The last error of a read, which is reported once.
    read_problem: String,
    options: Options,
    /// When the path was last looked at and had the last file.
    looked_at: SystemTime,
    /// Whether the last file was truncated, so that a new file beside it is its copy.
    was_truncated: bool,
}

impl Followed {
    /// Follows a path from the positions in the file on, and looks which file has it now.
    pub fn new(
        path: PathBuf,
        keys: Keys,
        file: &PositionFile,
        options: Options,
        watcher: &Watcher,
    ) -> Followed {
        watcher.watch_directory(&path);
        let own = file.positions().iter().filter(|position| position.path == path);
        let absent: Vec<_> = own.cloned().collect();
        // With a position in another file, this one is new.
        let begin = if absent.is_empty() { options.begin } else { Begin::AtStart };
        let mut followed = Followed {
            path,
            keys,
            sources: VecDeque::new(),
            has_current: false,
            absent,
            begin,
            problem: String::new(),
            read_problem: String::new(),
            options,
            looked_at: file.looked_at,
            was_truncated: false,
        };
        followed.find_absent(watcher);
        followed.look(true, watcher, Instant::now());
        // A file that has the path from now on is new.
        followed.begin = Begin::AtStart;
        followed
    }

    /// Finds the files of earlier positions.
    fn find_absent(&mut self, watcher: &Watcher) {
        self.absent.retain(|position| match find(position) {
            Some(file) => {
                watcher.watch_directory(&position.real);
                watcher.watch_file(&file);
                let source = Source::at(file, position.clone(), self.keys.renewed());
                self.sources.push_back(source);
                false
            }
            None => true,
        });
    }

    /// Reports that files of earlier positions will not come back, because another file has the path.
    fn give_up_absent(&mut self) {
        for position in self.absent.drain(..).filter(|position| position.offset > 0) {
            log::warn!(
                "follow {:?}: the file that was read up to byte {} is gone; lines after that byte may be missing",
                self.path,
                position.offset
            );
        }
    }

    /// Looks which file has the path, if names may have changed, and which files have grown.
    pub fn look(&mut self, have_names_changed: bool, watcher: &Watcher, now: Instant) {
        let count = self.sources.len();
        for (index, source) in self.sources.iter_mut().enumerate() {
            if source.look(now) {
                continue;
            }
            let copy = find_copy(&source.end());
            if index + 1 == count && self.has_current {
                let rest = match copy {
                    Some(_) => "the rest is read from its copy",
                    None => "lines that were not read yet are missing",
                };
                log::warn!("follow {:?}: the file was truncated; {rest}", self.path);
                (self.has_current, self.was_truncated) = (false, true);
            }
            source.move_to(copy, now);
        }
        if have_names_changed || !self.has_current {
            let looked = self.look_at_path(watcher, now);
            self.report(looked);
        }
        self.sources.iter_mut().for_each(|source| source.finish_if_quiet(now));
    }

    fn look_at_path(&mut self, watcher: &Watcher, now: Instant) -> io::Result<()> {
        let looking_at = SystemTime::now();
        let metadata = match fs::metadata(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.rotate(now);
                return Err(error);
            }
            metadata => metadata?,
        };
        if !self.absent.is_empty() {
            self.find_absent(watcher);
        }
        let has_path = |source: &Source| source.is(&metadata);
        if self.has_current && self.sources.back().is_some_and(has_path) {
            self.looked_at = looking_at;
            return Ok(());
        }
        // At the start, or when a renamed file has its earlier name again.
        if let Some(index) = self.sources.iter().position(has_path)
            && let Some(mut source) = self.sources.remove(index)
        {
            self.rotate(now);
            source.restore();
            self.sources.push_back(source);
            self.has_current = true;
            self.looked_at = looking_at;
            return Ok(());
        }
        let file = open(&self.path, &metadata)?;
        self.rotate(now);
        if !std::mem::take(&mut self.was_truncated) {
            self.add_missed(watcher, now)?;
        }
        self.give_up_absent();
        let offset = match self.begin {
            Begin::AtStart => 0,
            Begin::AtEnd => start_of_last_line(&file, self.options.separator)?,
        };
        let real = self.path.canonicalize()?;
        watcher.watch_directory(&real);
        watcher.watch_file(&file);
        log::info!("following {:?} from byte {offset}", self.path);
        self.sources.push_back(Source::new(file, &self.path, real, self.keys.renewed(), offset)?);
        self.has_current = true;
        self.looked_at = looking_at;
        Ok(())
    }

    /// Adds files that had the path between two looks: they were created since, and renamed by a rotation.
    fn add_missed(&mut self, watcher: &Watcher, now: Instant) -> io::Result<()> {
        let is_known = |metadata: &Metadata| self.sources.iter().any(|source| source.is(metadata));
        // The names of a link's files are in the directory of its target.
        let real = self.sources.back().map_or(&self.path, |last| &last.position().real);
        let found = rotated_names(real).filter_map(|path| {
            let metadata = fs::symlink_metadata(&path).ok()?;
            let created = metadata.created().ok()?;
            let is_new = created + CLOCK_TICK > self.looked_at;
            let is_missed = metadata.is_file() && is_new && !is_known(&metadata);
            is_missed.then(|| Some((created, File::open(&path).ok()?, path)))?
        });
        let mut found: Vec<_> = found.collect();
        found.sort_by_key(|(created, ..)| *created);
        for (_, file, real) in found {
            log::info!("following {real:?}, which was {:?} for a short time", self.path);
            watcher.watch_file(&file);
            let mut source = Source::new(file, &self.path, real, self.keys.renewed(), 0)?;
            source.rotate(now);
            self.sources.push_back(source);
        }
        Ok(())
    }

    /// Records that the path has no file, or another one.
    fn rotate(&mut self, now: Instant) {
        if std::mem::take(&mut self.has_current)
            && let Some(last) = self.sources.back_mut()
        {
            last.rotate(now);
        }
    }

    /// Reports a problem once.
    fn report(&mut self, outcome: io::Result<()>) {
        let Err(error) = outcome else {
            self.problem.clear();
            return;
        };
        let problem = error.to_string();
        if problem != self.problem {
            let path = &self.path;
            match error.kind() {
                // After a rotation, the next file has the path soon.
                ErrorKind::NotFound
                    if !self.sources.is_empty() || !self.options.reports_problems => {}
                ErrorKind::NotFound => log::warn!("follow {path:?}: {problem}; waiting for it"),
                _ if !self.options.reports_problems => {}
                _ => log::warn!("follow {path:?}: {problem}; trying again every second"),
            }
            self.problem = problem;
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The problem with the path; empty without one.
    pub fn problem(&self) -> &str {
        if self.problem.is_empty() { &self.read_problem } else { &self.problem }
    }

    /// Whether there may be bytes to read.
    pub fn is_dirty(&self) -> bool {
        self.next_source().is_some()
    }

    /// The index of the first file that may have bytes to read. A file is read after the lines of those before it.
    fn next_source(&self) -> Option<usize> {
        let next =
            self.sources.iter().position(|source| source.is_dirty() || source.has_lines())?;
        self.sources[next].is_dirty().then_some(next)
    }

    /// Whether all files are read to their ends.
    pub fn is_finished(&self) -> bool {
        self.sources.iter().all(Source::is_read)
    }

    /// Records that no file will grow any more.
    pub fn finish(&mut self) {
        self.sources.iter_mut().for_each(Source::finish);
    }

    /// Bytes that are not confirmed.
    pub fn behind(&self) -> u64 {
        self.sources.iter().map(Source::behind).sum()
    }

    /// Reads once from the first file that may have bytes to read.
    ///
    /// # Errors
    ///
    /// [`Status::Data`] when a record is too large.
    pub fn read(
        &mut self,
        cutter: &Cutter,
        buffer: &mut Vec<u8>,
        now: Instant,
    ) -> Result<Vec<Message>, Failure> {
        let Some(next) = self.next_source() else {
            return Ok(Vec::new());
        };
        match self.sources[next].read(cutter, buffer, now) {
            Ok(messages) => {
                self.read_problem.clear();
                Ok(messages)
            }
            Err(ReadError::TooLarge(offset)) => {
                let (path, limit) = (&self.path, bytesize::ByteSize::b(cutter.max_record as u64));
                let text = format!(
                    "{path:?}: the record at byte {offset} is larger than {limit} (--max-record)"
                );
                Err(Failure::new(Status::Data, text))
            }
            Err(ReadError::Io(error)) => {
                let problem = error.to_string();
                if problem != self.read_problem {
                    log::warn!("read {:?}: {problem}; trying again every second", self.path);
                    self.read_problem = problem;
                }
                Ok(Vec::new())
            }
        }
    }

    /// Whether the positions must be recorded before messages are sent.
    pub fn is_unrecorded(&self) -> bool {
        self.sources.iter().any(|source| source.is_unrecorded)
    }

    /// Notices that the positions are recorded.
    pub fn set_recorded(&mut self) {
        self.sources.iter_mut().for_each(|source| source.is_unrecorded = false);
    }

    /// When [`cut`](Followed::cut) has something to do.
    pub fn deadline(&self, cutter: &Cutter) -> Option<Instant> {
        self.sources.iter().filter_map(|source| source.deadline(cutter)).min()
    }

    /// Cuts files where records have waited long enough. Returns whether there are new cuts, which must be recorded
    /// before the next read.
    pub fn cut(&mut self, cutter: &Cutter, now: Instant, is_all_confirmed: bool) -> bool {
        let cuts = self.sources.iter_mut().map(|source| source.cut(cutter, now, is_all_confirmed));
        // Without a shortcut: all sources are cut.
        cuts.fold(false, |any, cut| any | cut)
    }

    /// Moves the positions behind the confirmed records, and closes the files that are done.
    pub fn advance(&mut self, unconfirmed: &BTreeMap<u64, u64>) {
        self.sources.iter_mut().for_each(|source| source.advance(unconfirmed));
        let last = self.sources.len().saturating_sub(1);
        let mut index = 0;
        self.sources.retain(|source| {
            index += 1;
            let is_last = index - 1 == last;
            // If no other file has the path, this one may come back.
            if is_last && !self.has_current && source.is_closable() {
                self.absent.push(source.position().clone());
            }
            is_last && self.has_current || !source.is_closable()
        });
    }

    /// The confirmed positions in all files.
    pub fn positions(&self) -> impl Iterator<Item = &Position> {
        self.absent.iter().chain(self.sources.iter().map(Source::position))
    }
}

/// Opens a regular file. A FIFO would block, and reading from a device may have effects.
fn open(path: &Path, metadata: &Metadata) -> io::Result<File> {
    match metadata.is_file() {
        true => File::open(path),
        false if metadata.is_dir() => Err(io::Error::other("it is a directory, not a file")),
        false => Err(io::Error::other("it is not a regular file (use --lines < FILE)")),
    }
}

/// Finds the file of a position: by its path or another name in the directory where it was, or as a copy.
fn find(position: &Position) -> Option<File> {
    // A power cut may have shortened the file.
    let is_same = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        position.identity.has_inode(&metadata).then(|| open_same(path, position))?
    };
    let renamed = || {
        let entries = fs::read_dir(position.real.parent()?).ok()?;
        entries.filter_map(|entry| is_same(&entry.ok()?.path())).next()
    };
    is_same(&position.path)
        .or_else(|| is_same(&position.real))
        .or_else(renamed)
        .or_else(|| find_copy(position))
        // The numbers of devices and inodes may change when a file system is mounted again or copied.
        .or_else(|| {
            open_beyond(&position.path, position).filter(|_| position.identity.can_find_copy())
        })
}

/// Finds the copy that a rotation has made before it truncated the file of a position.
fn find_copy(position: &Position) -> Option<File> {
    if !position.identity.can_find_copy() {
        return None;
    }
    rotated_names(&position.real).find_map(|path| open_beyond(&path, position))
}

/// Opens a file if it begins like that of a position and is not shorter.
fn open_beyond(path: &Path, position: &Position) -> Option<File> {
    let is_long = fs::metadata(path).ok()?.len() >= position.offset;
    is_long.then(|| open_same(path, position))?
}

/// Opens a file if it begins like that of a position.
fn open_same(path: &Path, position: &Position) -> Option<File> {
    let is_file = fs::metadata(path).ok()?.is_file();
    let file = is_file.then(|| File::open(path).ok())??;
    position.identity.has_beginning(&file).then_some(file)
}

/// The names in the directory of a file that a rotation has made from its name, such as `app.log.1` and
/// `app.log-20260131`. Compressed files are left out.
fn rotated_names(path: &Path) -> impl Iterator<Item = PathBuf> {
    let name = path.file_name().map(OsStr::as_bytes).unwrap_or_default().to_vec();
    let is_rotated = move |entry: &PathBuf| {
        let entry = entry.file_name().map(OsStr::as_bytes).unwrap_or_default();
        let suffix = entry.strip_prefix(&*name).unwrap_or_default();
        let is_compressed = COMPRESSED.iter().any(|ending| suffix.ends_with(ending));
        matches!(suffix, [b'.' | b'-', b'0'..=b'9', ..]) && !is_compressed
    };
    let entries = path.parent().and_then(|directory| fs::read_dir(directory).ok());
    let paths = entries.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    paths.filter(is_rotated)
}

/// The start of the last line if it is not complete, else the end of the file.
fn start_of_last_line(file: &File, separator: u8) -> io::Result<u64> {
    let size = file.metadata()?.len();
    let mut end = size;
    let mut bytes = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(SEARCHED);
        bytes.resize((end - start) as usize, 0);
        file.read_exact_at(&mut bytes, start)?;
        if let Some(last) = memrchr(separator, &bytes) {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}
