//! Wakes the program when a followed file changes.
//!
//! Linux reports changes by inotify, on a descriptor that is polled like the socket. A look at all files every second
//! covers other systems, network file systems, and more files than inotify can watch.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Watches directories and files.
pub struct Watcher {
    descriptor: Option<OwnedFd>,
}

#[cfg(target_os = "linux")]
mod system {
    use std::fs::File;
    use std::mem::MaybeUninit;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::path::Path;

    use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};

    /// Changes of the names in a directory.
    const NAMES: WatchFlags = WatchFlags::CREATE
        .union(WatchFlags::MOVED_TO)
        .union(WatchFlags::MOVED_FROM)
        .union(WatchFlags::DELETE);

    pub fn open() -> Option<OwnedFd> {
        let opened = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        opened.inspect_err(|error| log::debug!("inotify: {error}")).ok()
    }

    pub fn watch_directory(descriptor: &OwnedFd, path: &Path) {
        watch(descriptor, path, NAMES);
    }

    pub fn watch_file(descriptor: &OwnedFd, file: &File) {
        // The path may name another file by now.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        watch(descriptor, Path::new(&path), WatchFlags::MODIFY);
    }

    fn watch(descriptor: &OwnedFd, path: &Path, events: WatchFlags) {
        if let Err(error) = add_watch(descriptor, path, events) {
            log::debug!("watch {path:?}: {error}");
        }
    }

    /// Reads all events. Returns whether names have changed.
    pub fn drain(descriptor: &OwnedFd) -> bool {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(descriptor, &mut buffer);
        let mut have_names_changed = false;
        while let Ok(event) = reader.next() {
            have_names_changed |= event.events() != ReadFlags::MODIFY;
        }
        have_names_changed
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::path::Path;

    pub fn open() -> Option<OwnedFd> {
        None
    }

    pub fn watch_directory(_: &OwnedFd, _: &Path) {}

    pub fn watch_file(_: &OwnedFd, _: &File) {}

    pub fn drain(_: &OwnedFd) -> bool {
        true
    }
}

impl Watcher {
    pub fn new() -> Watcher {
        Watcher { descriptor: system::open() }
    }

    /// Reports new, renamed and deleted names in the directory of a file from now on.
    pub fn watch_directory(&self, file: &Path) {
        if let (Some(descriptor), Some(directory)) = (&self.descriptor, file.parent()) {
            system::watch_directory(descriptor, directory);
        }
    }

    /// Reports new bytes in a file from now on.
    pub fn watch_file(&self, file: &File) {
        self.descriptor.iter().for_each(|descriptor| system::watch_file(descriptor, file));
    }

    /// Readable when something has changed; `None` if this system reports nothing.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.descriptor.as_ref().map(AsFd::as_fd)
    }

    /// Forgets the reported changes. Returns whether names may have changed.
    pub fn drain(&self) -> bool {
        self.descriptor.as_ref().is_none_or(system::drain)
    }
}
