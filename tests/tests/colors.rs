//! When the severity of a message is coloured: `--color`, the environment, and the terminal.

use std::path::Path;

use logs_tests::{Tool, binary, emit_log, receive_logs, terminal, unique, url, wait_until};

const PLAIN: &str = " [x] \"error: no\"";
const COLORED: &str = " [x] \"\x1b[31merror\x1b[0m: no\"";

/// The output of a receiver to a pipe or a terminal.
fn written(receiver: Tool, environment: &[(&str, &str)], exchange: &str) -> String {
    let set = |tool: Tool, (name, value): &(&str, &str)| tool.env(name, value);
    let receiver = environment.iter().fold(receiver, set).start();
    // A terminal shows stdout and stderr of the receiver; both arrive on the stdout of `script`.
    let all = || receiver.stderr_so_far() + &String::from_utf8_lossy(&receiver.stdout_so_far());
    wait_until("the receiver is ready", || all().contains("Waiting for logs"));
    emit_log().args(["-e", exchange, "error: no"]).run().success();
    let text = receiver.wait().success().stdout_text();
    text.lines().filter(|line| line.contains("[x]")).collect()
}

#[test]
fn a_terminal_gets_colours_unless_they_are_off() {
    let exchange = unique("terminal");
    for (environment, option, expected) in [
        (&[][..], "auto", COLORED),
        (&[("NO_COLOR", "1")], "auto", PLAIN),
        (&[("NO_COLOR", "1"), ("CLICOLOR_FORCE", "1")], "auto", PLAIN),
        (&[("NO_COLOR", "")], "auto", COLORED),
        (&[("CLICOLOR", "0")], "auto", PLAIN),
        (&[("TERM", "dumb")], "auto", PLAIN),
        (&[("TERM", "dumb"), ("CLICOLOR", "1")], "auto", COLORED),
        (&[], "never", PLAIN),
        (&[("NO_COLOR", "1")], "always", COLORED),
    ] {
        let receiver = binary("receive-logs");
        let command = format!("{} -n 1 -e {exchange} --color {option}", receiver.display());
        let tool = terminal(&command, Path::new("/dev/null"));
        let tool = tool.env("AMQP_URL", url()).env("TERM", "xterm");
        let written = written(tool, environment, &exchange);
        assert_eq!(written, expected, "{environment:?} --color {option}");
    }
}

#[test]
fn a_pipe_gets_colours_if_requested() {
    let exchange = unique("pipe");
    for (environment, option, expected) in [
        (&[("TERM", "xterm")][..], "auto", PLAIN),
        (&[("TERM", "xterm"), ("CLICOLOR", "1")], "auto", PLAIN),
        (&[("CLICOLOR_FORCE", "1")], "auto", COLORED),
        (&[("CLICOLOR_FORCE", "1"), ("CLICOLOR", "0")], "auto", COLORED),
        (&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], "auto", PLAIN),
        (&[("CLICOLOR_FORCE", "1")], "never", PLAIN),
        (&[], "always", COLORED),
    ] {
        let tool = receive_logs().args(["-n", "1", "-e", &exchange, "--color", option]);
        let written = written(tool, environment, &exchange);
        assert_eq!(written, expected, "{environment:?} --color {option}");
    }
}
