//! What a test needs of the machine, and a container may not have: pseudo-terminals and namespaces.

use std::path::Path;
use std::sync::OnceLock;

use crate::{Tool, skip};

/// A terminal of its own for a shell command; `screen` gets what the terminal shows.
///
/// # Panics
///
/// Where the system has no terminal to give, such as in a chroot without devpts: with the words of `script`.
pub fn terminal(command: &str, screen: &Path) -> Tool {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    let script = || Tool::new("script").arg("-qefc");
    let tried = TRIED.get_or_init(|| attempt(script().args(["true", "/dev/null"])));
    if let Err(words) = tried {
        panic!("this machine has no terminal for a test: {words}");
    }
    script().arg(command).arg(screen)
}

/// `unshare`, to run a program as process 1 of a namespace. `None` where this user may not make namespaces; the test
/// then says so, and tests nothing.
///
/// # Panics
///
/// Where `unshare` fails for another reason: with its words.
pub fn unshare() -> Option<Tool> {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    let unshare = || Tool::new("unshare").args(["--map-root-user", "--pid", "--fork"]);
    match TRIED.get_or_init(|| attempt(unshare().arg("true"))) {
        Ok(()) => Some(unshare()),
        Err(words) if is_forbidden(words) => {
            skip(&format!("this user may not make namespaces: {words}"));
            None
        }
        Err(words) => panic!("this machine has no namespaces for a test: {words}"),
    }
}

/// Whether these are the words for a missing permission, or for the limit `user.max_user_namespaces`.
fn is_forbidden(words: &str) -> bool {
    ["not permitted", "denied", "No space left"].iter().any(|reason| words.contains(reason))
}

/// Runs a tool. If that fails, returns how, with the words of the tool.
fn attempt(tool: Tool) -> Result<(), String> {
    let ended = tool.run();
    let words = ended.stderr_text() + &ended.stdout_text();
    match ended.status.success() {
        true => Ok(()),
        false => Err(format!("{} ({})", words.trim(), ended.status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_fails_is_quoted() {
        let tool = |script: &str| attempt(Tool::new("sh").args(["-c", script]));
        assert_eq!(tool("exit 0"), Ok(()));
        let failed = tool("echo unshare: Operation not permitted >&2; exit 3").unwrap_err();
        assert_eq!(failed, "unshare: Operation not permitted (exit status: 3)");
        assert!(is_forbidden(&failed) && !is_forbidden("unrecognized option"));
    }
}
