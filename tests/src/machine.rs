//! Resources of the machine that a container may lack: pseudo-terminals and namespaces.

use std::path::Path;
use std::sync::OnceLock;

use crate::{Tool, skip};

/// Runs a shell command on a terminal of its own. `screen` receives the output of the terminal.
///
/// # Panics
///
/// When the system has no pseudo-terminal, such as in a chroot without devpts. The message quotes `script`.
pub fn terminal(command: &str, screen: &Path) -> Tool {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    let script = || Tool::new("script").arg("-qefc");
    let tried = TRIED.get_or_init(|| attempt(script().args(["true", "/dev/null"])));
    if let Err(output) = tried {
        panic!("no pseudo-terminal on this machine: {output}");
    }
    script().arg(command).arg(screen)
}

/// `unshare`, to run a program as process 1 of a namespace. If the user may not create namespaces, this prints a note
/// and returns `None`, so that the test can end.
///
/// # Panics
///
/// When `unshare` fails for another reason. The message quotes it.
pub fn unshare() -> Option<Tool> {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    let unshare = || Tool::new("unshare").args(["--map-root-user", "--pid", "--fork"]);
    match TRIED.get_or_init(|| attempt(unshare().arg("true"))) {
        Ok(()) => Some(unshare()),
        Err(output) if is_forbidden(output) => {
            skip(&format!("this user may not create namespaces: {output}"));
            None
        }
        Err(output) => panic!("no namespaces on this machine: {output}"),
    }
}

/// Whether an error is a missing permission, or the limit `user.max_user_namespaces`.
fn is_forbidden(output: &str) -> bool {
    ["not permitted", "denied", "No space left"].iter().any(|reason| output.contains(reason))
}

/// Runs a tool. Returns its output and status if it fails.
fn attempt(tool: Tool) -> Result<(), String> {
    let ended = tool.run();
    let output = ended.stderr_text() + &ended.stdout_text();
    match ended.status.success() {
        true => Ok(()),
        false => Err(format!("{} ({})", output.trim(), ended.status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_tool_is_quoted() {
        let tool = |script: &str| attempt(Tool::new("sh").args(["-c", script]));
        assert_eq!(tool("exit 0"), Ok(()));
        let failed = tool("echo unshare: Operation not permitted >&2; exit 3").unwrap_err();
        assert_eq!(failed, "unshare: Operation not permitted (exit status: 3)");
        assert!(is_forbidden(&failed) && !is_forbidden("unrecognized option"));
    }
}
