//! SIGHUP, which concerns the output alone.

use std::io::{self, Read};
use std::thread;

use amqp::Mailbox;
use anyhow::Result;
use signal_hook::consts::SIGHUP;
use signal_hook::low_level::pipe;

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
