//! Signals that concern the output alone.

use std::io::{self, Read};
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGHUP, SIGXFSZ};
use signal_hook::{flag, low_level::pipe};

/// Reports each SIGHUP, several at once as a single report. A SIGHUP that was ignored at the start, as
/// under `nohup`, is reported as well: `nohup` only asks that SIGHUP end no process.
///
/// # Errors
///
/// When the handler cannot be installed, or the system has no thread for it.
pub fn reopen_signal() -> io::Result<Receiver<()>> {
    let (sender, receiver) = bounded(1);
    let (mut reader, writer) = io::pipe()?;
    pipe::register(SIGHUP, writer)?;
    thread::Builder::new().spawn(move || {
        while reader.read_exact(&mut [0]).is_ok() {
            // A full channel holds a report that the program has yet to act on.
            let _ = sender.try_send(());
        }
    })?;
    Ok(receiver)
}

/// Makes a write beyond the limit of a file's size an error like any other, as its signal no longer
/// ends the process.
///
/// # Errors
///
/// When the handler cannot be installed.
pub fn survive_file_size_limit() -> io::Result<()> {
    flag::register(SIGXFSZ, Arc::default()).map(drop)
}
