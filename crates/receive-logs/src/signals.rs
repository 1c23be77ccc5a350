//! SIGHUP, which concerns the output alone.

use amqp::Mailbox;
use anyhow::Result;
use logs_process::signals::on;
use signal_hook::consts::SIGHUP;

/// Reports each SIGHUP. A SIGHUP that was ignored at the start, as
/// under `nohup`, is reported as well: `nohup` only asks that SIGHUP end no process.
///
/// # Errors
///
/// When the handler cannot be installed, or the system has no thread for it.
pub fn reopen_signal() -> Result<Mailbox<()>> {
    let (sender, mailbox) = Mailbox::open()?;
    on(SIGHUP, move || sender.send(()))?;
    Ok(mailbox)
}
