//! SIGHUP, which reopens the output file.

use amqp::Mailbox;
use anyhow::Result;
use logs_process::signals::on;
use signal_hook::consts::SIGHUP;

/// Reports each SIGHUP. `nohup` ignores SIGHUP only so that it does not end the process, so an ignored SIGHUP is
/// reported as well.
///
/// # Errors
///
/// When the handler cannot be installed, or no thread can be started.
pub fn reopen_signal() -> Result<Mailbox<()>> {
    let (sender, mailbox) = Mailbox::open()?;
    on(SIGHUP, move || sender.send(()))?;
    Ok(mailbox)
}
