//! Checks the pages: the commands in README and docs work as they are written, in any order; links have a target;
//! every option is documented.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use logs_tests::{Broker, Tool, binary, project};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The README and the pages in docs, with their texts.
fn pages() -> Vec<(PathBuf, String)> {
    let docs = fs::read_dir(project().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut pages: Vec<_> = docs.filter(|path| path.extension() == Some("md".as_ref())).collect();
    pages.extend(["README.md", "SECURITY.md"].map(|page| project().join(page)));
    let text = |path: &PathBuf| fs::read_to_string(path).unwrap();
    pages.into_iter().map(|path| (path.clone(), text(&path))).collect()
}

/// The command lines in the code blocks that run one of the tools, without duplicates.
fn examples() -> Vec<String> {
    let mut commands: Vec<_> = pages().iter().flat_map(|(_, text)| code(text)).collect();
    commands.retain(|command| runs("emit-log", command) || runs("receive-logs", command));
    commands.sort_unstable();
    commands.dedup();
    commands
}

/// The lines of a page's code blocks, which are indented or fenced.
fn code(page: &str) -> Vec<String> {
    let mut is_fenced = false;
    let mut lines = Vec::new();
    for line in page.lines() {
        if line.starts_with("```") {
            is_fenced = !is_fenced;
        } else if let Some(code) = line.strip_prefix("    ").or(is_fenced.then_some(line)) {
            lines.push(code.strip_prefix("$ ").unwrap_or(code).to_owned());
        }
    }
    lines
}

fn runs(tool: &str, command: &str) -> bool {
    command.split_whitespace().take_while(|word| *word != "#").any(|word| word == tool)
}

/// A directory to run the examples in. It has the files that they name, and programs in `bin`.
fn workplace() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let bin = directory.path().join("bin");
    fs::create_dir(&bin).unwrap();
    fs::write(directory.path().join("big.log"), "line\n".repeat(10_000)).unwrap();
    fs::write(directory.path().join("app.log"), "line\n").unwrap();
    let program = |name: &str, text: &str| {
        let path = bin.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    };
    program("app", "echo info: started; echo error: failed >&2");
    program("mail", "exit 0");
    // The real programs follow a log forever.
    program("tail", "cat app.log");
    program("kubectl", "cat app.log");
    program("journalctl", "cat app.log");
    if !Tool::new("sh").args(["-c", "command -v jq"]).run().status.success() {
        program("jq", "cat");
    }
    let exec = |tool: &str| format!("exec '{}' \"$@\"", binary(tool).display());
    for tool in ["emit-log", "receive-logs"] {
        program(tool, &format!("echo $$ >\"$PID_FILE\"; {}", exec(tool)));
    }
    directory
}

/// Runs an example: an emitter until it exits or has found the files to follow, a receiver until its banner.
fn run(command: &str, broker: &Broker, directory: &Path) {
    let pid_file = directory.join("pid");
    let command = command
        .replace("/var/log/rabbit", &directory.display().to_string())
        .replace("/var/log", &directory.display().to_string())
        .replace("/var/lib/emit-log", &directory.display().to_string())
        .replace("/var/spool", &directory.display().to_string())
        .replace("--follow ", "-v --follow ")
        .replace("amqp://node1", broker.url())
        .replace("amqp://node2", broker.url());
    let shell = |end: &str| {
        let script = format!("cd \"$1\"; PATH=$1/bin:$PATH; set -o pipefail\n{command}\n{end}");
        let shell = Tool::new("bash").args(["-c", &script, "bash"]).arg(directory);
        let shell = shell.env("AMQP_URL", broker.url()).env("PID_FILE", &pid_file);
        shell.env("XDG_STATE_HOME", directory)
    };
    let stop = || {
        let pid = fs::read_to_string(&pid_file).unwrap();
        let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        // With --no-follow, the receiver may have exited.
        let _ = kill_process(pid, Signal::TERM);
    };
    if runs("emit-log", &command) && command.contains("--follow ") {
        let emitter = shell("").start();
        emitter.wait_for_stderr("publishing to exchange", 1);
        stop();
        assert_eq!(emitter.wait().signal(), Some(Signal::TERM.as_raw()));
        return;
    }
    if runs("emit-log", &command) {
        shell("").run().success();
        return;
    }
    // The status of the receiver, not of a grep without a match.
    let receiver = shell("exit \"${PIPESTATUS[0]}\"").start().ready();
    stop();
    receiver.wait().success();
}

#[test]
fn every_example_of_the_pages_works_in_any_order() {
    let forward = examples();
    assert!(forward.len() > 15, "{forward:#?}");
    let backward: Vec<_> = forward.iter().rev().cloned().collect();
    // The order matters: one of the examples meets an empty broker.
    for (first, second) in [(&forward, &backward), (&backward, &forward)] {
        // A position in a stream belongs to a broker.
        let directory = workplace();
        let broker = Broker::start();
        for command in first.iter().chain(second) {
            run(command, &broker, directory.path());
        }
    }
}

#[test]
fn options_md_has_every_option() {
    let page = fs::read_to_string(project().join("docs/options.md")).unwrap();
    for tool in ["emit-log", "receive-logs"] {
        let help = Tool::new(binary(tool)).arg("--help").run().success().stdout_text();
        let lines = help.lines().map(str::trim).filter(|line| line.starts_with('-'));
        let words = lines.map(|line| line.split([' ', ',', '[']));
        let options = words.filter_map(|mut words| words.find(|word| word.starts_with("--")));
        for option in options.filter(|option| !["--help", "--version"].contains(option)) {
            let forms = [format!("`{option}"), format!(", {option}")];
            assert!(forms.iter().any(|form| page.contains(form)), "{tool} {option}");
        }
    }
}

/// The anchor of a heading in a link, as GitHub creates it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_has_a_target() {
    for (path, page) in pages() {
        let links = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.starts_with("http")) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                _ => path.parent().unwrap().join(file),
            };
            assert!(target.exists(), "{link} in {path:?}");
            let is_there = || {
                let text = fs::read_to_string(&target).unwrap();
                text.lines().any(|line| line.starts_with('#') && anchor(line) == heading)
            };
            assert!(heading.is_empty() || is_there(), "{link} in {path:?}");
        }
    }
}
