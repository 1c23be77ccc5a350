//! Signals that concern the output alone.

use std::io::{self, Read};
use std::sync::Arc;
use std::thread;

use amqp::Mailbox;
use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGXFSZ};
use signal_hook::{flag, low_level::pipe};

/// Reports each SIGHUP. A SIGHUP that was ignored at the start, as
/// under `nohup`, is reported as well: `nohup` only asks that SIGHUP end no process.
///
/// # Errors
///
/// When the handler cannot be installed, or the system has no thread for it.
pub fn reopen_signal() -> Result<Mailbox<()>> {
    let (sender, mailbox) = Mailbox::open()?;
    let (mut reader, writer) = io::pipe()?;
    pipe::register(SIGHUP, writer)?;
    thread::Builder::new().spawn(move || {
        while reader.read_exact(&mut [0]).is_ok() {
            sender.send(());
        }
    })?;
    Ok(mailbox)
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
