//! Data in standard input without `--lines`, as in `echo hi | emit-log`.

use std::fs::File;
use std::io::{PipeWriter, Write};
use std::net::TcpListener;
use std::path::Path;

use logs_tests::{
    PATIENCE, Proxy, ScriptedBroker, TempFile, Tool, binary, emit_log, receive_logs, terminal,
    unique, url,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const DEFAULT: &str = " [x] Sent \"info: Hello World!\"\n";
const UNREAD_DATA: &[&str] = &["emit-log: nothing is sent: standard input has data", "--lines"];
const OPEN_PIPE: &str =
    "emit-log: standard input was not read: --lines publishes each line of it\n";

/// `emit-log` on an exchange, with a pipe to read from.
fn with_pipe(args: &[&str]) -> (Tool, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    (emit_log().args(args).stdin(reader), writer)
}

#[test]
fn without_words_input_is_an_error_and_nothing_is_sent() {
    let exchange = unique("unread");
    let receiver = receive_logs().args(["-e", &exchange, "-n", "1"]).start().ready();
    for words in [&[][..], &["-"]] {
        let (emitter, mut writer) = with_pipe(&[&["-e", &exchange], words].concat());
        writer.write_all(b"hi\n").unwrap();
        emitter.run().fails_with(2, UNREAD_DATA);
        let file = TempFile::with("input", b"hi\n");
        let emitter = emit_log().args(["-q", "-e", &exchange]).args(words);
        emitter.stdin(File::open(file.path()).unwrap()).run().fails_with(2, UNREAD_DATA);
    }
    // The error needs no broker.
    let (emitter, mut writer) = with_pipe(&["-u", "amqp://127.0.0.1:1"]);
    writer.write_all(b"hi").unwrap();
    drop(writer);
    emitter.run().fails_with(2, UNREAD_DATA);
    emit_log().args(["-e", &exchange, "last"]).run().success();
    assert_eq!(receiver.wait().success().stdout_text(), " [x] \"last\"\n");
}

#[test]
fn without_words_empty_input_is_ignored() {
    let exchange = unique("silent");
    let sent = |emitter: Tool| {
        let ended = emitter.args(["-e", &exchange]).run().success();
        assert_eq!((ended.stdout_text().as_str(), ended.stderr_text().as_str()), (DEFAULT, ""));
    };
    sent(emit_log());
    sent(emit_log().arg("-"));
    let (silent, _writer) = with_pipe(&[]);
    sent(silent);
    let (ended, writer) = with_pipe(&[]);
    drop(writer);
    sent(ended);
    let empty = TempFile::with("empty", b"");
    sent(emit_log().stdin(File::open(empty.path()).unwrap()));
}

#[test]
fn words_leave_a_pipe_alone() {
    let (emitter, mut writer) = with_pipe(&["-e", &unique("words"), "-", "hi"]);
    writer.write_all(b"hi\n").unwrap();
    let ended = emitter.run().success();
    assert_eq!(
        (ended.stdout_text().as_str(), ended.stderr_text().as_str()),
        (" [x] Sent \"- hi\"\n", "")
    );
}

#[test]
fn input_that_arrives_during_the_login_is_an_error() {
    let exchange = unique("slow");
    let receiver = receive_logs().args(["-e", &exchange, "-n", "1"]).start().ready();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("amqp://guest:guest@{}", listener.local_addr().unwrap());
    let (emitter, mut writer) = with_pipe(&["-e", &exchange, "-u", &address]);
    let emitter = emitter.start();
    let timeout = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let mut polled = [PollFd::new(&listener, PollFlags::IN)];
    assert_eq!(poll(&mut polled, Some(&timeout)), Ok(1), "it connects");
    writer.write_all(b"hi\n").unwrap();
    let _proxy = Proxy::start_on(listener, &url());
    emitter.wait().fails_with(2, UNREAD_DATA);
    emit_log().args(["-e", &exchange, "last"]).run().success();
    assert_eq!(receiver.wait().success().stdout_text(), " [x] \"last\"\n");
}

#[test]
fn input_that_arrives_before_the_confirm_is_reported() {
    let broker = ScriptedBroker::start();
    let (emitter, mut writer) = with_pipe(&["-q", "-u", &broker.url()]);
    let emitter = emitter.start();
    let session = broker.accept();
    session.expect_publishes(1);
    writer.write_all(b"hi\n").unwrap();
    session.ack(1, false);
    session.expect_close();
    drop(session);
    emitter.wait().fails_with(2, &["emit-log: message sent, but standard input", "--lines"]);
}

#[test]
fn a_terminal_shows_that_an_open_pipe_is_not_read() {
    let shown = |redirection: &str| {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        Tool::new("mkfifo").arg(&fifo).run().success();
        let (binary, exchange) = (binary("emit-log"), unique("onlooker"));
        // The reader opens the pipe for writing as well, so the pipe always has a writer.
        let command = format!("exec {binary:?} -e {exchange} {redirection}{fifo:?}");
        let screen = directory.path().join("screen");
        terminal(&command, &screen).env("AMQP_URL", url()).run().success();
        std::fs::read_to_string(screen).unwrap().replace('\r', "")
    };
    let screen = shown("0<>");
    assert!(screen.contains(&format!("{DEFAULT}{OPEN_PIPE}")), "{screen}");
    let screen = shown("3<>");
    assert!(screen.contains(DEFAULT) && !screen.contains(OPEN_PIPE), "{screen}");
}

#[test]
fn a_terminal_shows_that_no_receiver_is_running() {
    let note = "emit-log: no receiver is running: the message has reached no queue\n";
    let exchange = unique("alone");
    let shown = |options: &str| {
        let command = format!("exec {:?} -e {exchange} {options} hi", binary("emit-log"));
        let ended = terminal(&command, Path::new("/dev/null")).env("AMQP_URL", url()).run();
        ended.success().stdout_text().replace('\r', "")
    };
    assert_eq!(shown(""), format!(" [x] Sent \"hi\"\n{note}"));
    assert_eq!(shown("--no-confirm"), format!(" [x] Sent \"hi\"\n{note}"));
    assert_eq!(shown("--quiet"), "");
    let receiver = receive_logs().args(["-e", &exchange]).start().ready();
    assert_eq!(shown(""), " [x] Sent \"hi\"\n");
    receiver.wait_for_stdout(b" [x] \"hi\"\n");
    receiver.stop().success();
    assert_eq!(emit_log().args(["-e", &exchange, "hi"]).run().success().stderr_text(), "");
}

#[test]
fn a_dash_with_lines_is_standard_input() {
    let (emitter, mut writer) = with_pipe(&["-e", &unique("dash"), "--lines", "-"]);
    writer.write_all(b"hi\n").unwrap();
    drop(writer);
    emitter.run().success();
    emit_log().args(["--lines", "word"]).run().fails_with(2, &["--lines", "remove the words"]);
}
