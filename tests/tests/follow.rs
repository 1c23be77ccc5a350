//! `--follow`: files that grow, rotate and disappear, and positions that survive a kill.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use logs_tests::{Proxy, Running, Tool, binary, emit_log, receive_logs, unique, url, wait_until};
use rustix::process::Signal;
use tempfile::TempDir;

/// A directory with followed files, and an exchange.
struct Files {
    directory: TempDir,
    exchange: String,
}

impl Files {
    fn new() -> Files {
        Files { directory: tempfile::tempdir().unwrap(), exchange: unique("follow") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn append(&self, name: &str, text: &str) {
        let file = OpenOptions::new().create(true).append(true).open(self.path(name));
        file.unwrap().write_all(text.as_bytes()).unwrap();
    }

    fn rename(&self, from: &str, to: &str) {
        fs::rename(self.path(from), self.path(to)).unwrap();
    }

    fn receiver(&self) -> Running {
        receive_logs().args(["-e", &self.exchange, "--raw"]).start().ready()
    }

    /// An emit-log that follows these files.
    fn follow(&self, names: &[&str]) -> Tool {
        let paths = names.iter().map(|name| self.path(name));
        let tool = emit_log().args(["-e", &self.exchange, "--follow"]).args(paths);
        tool.arg("--position").arg(self.path("position"))
    }

    /// A started emit-log that has found a file.
    fn following(&self, names: &[&str]) -> Running {
        started(self.follow(names))
    }

    /// Does something while emit-log is stopped or, if `down`, killed.
    fn unwatched(&self, emitter: Running, down: bool, work: impl FnOnce()) -> Running {
        if down {
            emitter.kill();
            work();
            return self.following(&["app.log"]);
        }
        emitter.signal(Signal::STOP);
        work();
        emitter.signal(Signal::CONT);
        emitter
    }
}

/// Starts an emit-log, and waits until it is connected.
fn started(tool: Tool) -> Running {
    let emitter = tool.args(["-v"]).start();
    emitter.wait_for_stderr("publishing to exchange", 1);
    emitter
}

/// An empty app.log, a receiver, and an emit-log that follows the file.
fn empty_file() -> (Files, Running, Running) {
    let files = Files::new();
    files.append("app.log", "");
    let (receiver, emitter) = (files.receiver(), files.following(&["app.log"]));
    (files, receiver, emitter)
}

/// Waits until this number of lines has arrived.
fn wait_for_lines(receiver: &Running, count: usize) {
    wait_until("the lines arrive", || {
        receiver.stdout_so_far().iter().filter(|byte| **byte == b'\n').count() >= count
    });
}

/// Ends the programs, and returns what the receiver has written.
fn received(receiver: Running, emitter: Running) -> String {
    emitter.signal(Signal::TERM);
    let ended = emitter.wait();
    assert_eq!(ended.signal(), Some(Signal::TERM.as_raw()), "{ended:?}");
    let ended = receiver.stop().success();
    assert!(!ended.stderr_text().contains("missed"), "{ended:?}");
    ended.stdout_text()
}

#[test]
fn a_file_is_followed_from_its_end_and_then_from_the_position() {
    let files = Files::new();
    files.append("app.log", "old\npart");
    files.append("short.log", "part");
    let receiver = files.receiver();
    let emitter = files.following(&["app.log", "short.log"]);
    files.append("app.log", "ly old\none\n");
    receiver.wait_for_stdout(b"partly old\none\n");
    files.append("short.log", "ly\n");
    receiver.wait_for_stdout(b"partly old\none\npartly\n");
    emitter.kill();
    files.append("app.log", "while down\n");
    let emitter = files.following(&["app.log", "short.log"]);
    files.append("app.log", "two\n");
    let expected = "partly old\none\npartly\nwhile down\ntwo\n";
    receiver.wait_for_stdout(expected.as_bytes());
    assert_eq!(received(receiver, emitter), expected);
}

#[test]
fn a_batch_job_reads_what_is_new() {
    let files = Files::new();
    files.append("a.log", "one\ntwo\nlast");
    files.append("b.log", "three\n");
    let receiver = files.receiver();
    let job = || files.follow(&["a.log", "b.log"]).args(["--no-follow"]).run().success();
    job();
    wait_for_lines(&receiver, 4);
    job();
    files.append("b.log", "four\n");
    job();
    wait_for_lines(&receiver, 5);
    let text = receiver.stop().success().stdout_text();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["four", "last", "one", "three", "two"]);
    let missing = files.follow(&["c.log"]).args(["--no-follow"]).run();
    missing.fails_with(74, &["c.log", "No such file"]);
}

#[test]
fn a_rotation_loses_no_line() {
    let (files, receiver, emitter) = empty_file();
    let mut expected = String::new();
    let mut append = |name: &str, line: &str| {
        files.append(name, &format!("{line}\n"));
        expected += &format!("{line}\n");
        receiver.wait_for_stdout(expected.as_bytes());
    };
    append("app.log", "one");
    files.rename("app.log", "app.log.1");
    append("app.log.1", "into the renamed file");
    append("app.log", "two");
    append("app.log.1", "still into the renamed file");
    fs::remove_file(files.path("app.log")).unwrap();
    append("app.log", "three");
    received(receiver, emitter);
}

#[test]
fn a_new_file_from_an_editor_is_read_from_its_beginning() {
    let (files, receiver, emitter) = empty_file();
    files.append("app.log", "one\n");
    receiver.wait_for_stdout(b"one\n");
    files.append("new", "one\ntwo\n");
    files.rename("new", "app.log");
    receiver.wait_for_stdout(b"one\none\ntwo\n");
    assert_eq!(received(receiver, emitter), "one\none\ntwo\n");
}

#[test]
fn a_file_that_is_rotated_twice_between_two_looks_is_found() {
    for down in [false, true] {
        let (files, receiver, emitter) = empty_file();
        files.append("app.log", "one\n");
        receiver.wait_for_stdout(b"one\n");
        let emitter = files.unwatched(emitter, down, || {
            files.append("app.log", "two\n");
            files.rename("app.log", "app.log.1");
            files.append("app.log", "three\n");
            files.rename("app.log.1", "app.log.2");
            files.rename("app.log", "app.log.1");
            files.append("app.log", "four\n");
        });
        receiver.wait_for_stdout(b"one\ntwo\nthree\nfour\n");
        assert_eq!(received(receiver, emitter), "one\ntwo\nthree\nfour\n");
    }
}

#[test]
fn a_truncated_file_is_read_again_and_its_rest_from_the_copy() {
    for down in [false, true] {
        let (files, receiver, emitter) = empty_file();
        let first = "a line of more than a few bytes, ".repeat(3);
        files.append("app.log", &format!("{first}\n"));
        receiver.wait_for_stdout(format!("{first}\n").as_bytes());
        let emitter = files.unwatched(emitter, down, || {
            files.append("app.log", "before the copy\n");
            fs::copy(files.path("app.log"), files.path("app.log.1")).unwrap();
            File::create(files.path("app.log")).unwrap();
            files.append("app.log", "after\n");
        });
        let expected = format!("{first}\nbefore the copy\nafter\n");
        receiver.wait_for_stdout(expected.as_bytes());
        assert_eq!(received(receiver, emitter), expected);
    }
}

/// During an outage, emit-log reads no file to its end, so it has not read the file that is truncated next.
#[test]
fn a_file_that_is_truncated_twice_in_an_outage_loses_nothing() {
    let (files, proxy) = (Files::new(), Proxy::start(&url()));
    files.append("app.log", "");
    let receiver = files.receiver();
    let emitter = started(files.follow(&["app.log"]).args(["--uri", proxy.url()]));
    proxy.stall();
    let content = |name: &str| (1..=5000).map(|n| format!("{name} {n}\n")).collect::<String>();
    for (index, copy) in ["app.log.2", "app.log.1"].into_iter().enumerate() {
        files.append("app.log", &content(["first", "second"][index]));
        wait_until("the checksum of the file is recorded", || {
            let positions = fs::read_to_string(files.path("position")).unwrap_or_default();
            positions.matches("\"length\":1024").count() > index
        });
        fs::copy(files.path("app.log"), files.path(copy)).unwrap();
        File::create(files.path("app.log")).unwrap();
    }
    files.append("app.log", &content("third"));
    proxy.resume();
    let expected = ["first", "second", "third"].map(content).concat();
    wait_until("all lines have arrived", || receiver.stdout_so_far().len() >= expected.len());
    assert!(received(receiver, emitter) == expected);
}

#[test]
fn a_file_truncated_before_the_first_connection_is_not_lost() {
    let (files, proxy) = (Files::new(), Proxy::start(&url()));
    proxy.stall();
    let first = "a line of more than a few bytes, ".repeat(3);
    files.append("app.log", &format!("{first}\n"));
    let receiver = files.receiver();
    let emitter = files.follow(&["app.log"]).args(["--from-start", "--retry", "forever"]);
    let emitter = emitter.args(["--uri", proxy.url()]).start();
    wait_until("the file is known", || files.path("position").exists());
    fs::copy(files.path("app.log"), files.path("app.log.1")).unwrap();
    File::create(files.path("app.log")).unwrap();
    files.append("app.log", "after\n");
    proxy.resume();
    let expected = format!("{first}\nafter\n");
    receiver.wait_for_stdout(expected.as_bytes());
    assert_eq!(received(receiver, emitter), expected);
}

#[test]
fn a_short_file_that_is_copied_and_truncated_is_not_repeated() {
    let (files, receiver, emitter) = empty_file();
    files.append("app.log", "one\n");
    receiver.wait_for_stdout(b"one\n");
    let emitter = files.unwatched(emitter, false, || {
        fs::copy(files.path("app.log"), files.path("app.log.1")).unwrap();
        File::create(files.path("app.log")).unwrap();
    });
    emitter.wait_for_stderr("the file was truncated", 1);
    files.append("app.log", "two\n");
    receiver.wait_for_stdout(b"one\ntwo\n");
    assert_eq!(received(receiver, emitter), "one\ntwo\n");
}

#[test]
fn the_position_in_a_file_that_is_away_for_a_time_is_kept() {
    let files = Files::new();
    files.append("app.log", "one\n");
    let receiver = files.receiver();
    let job = || files.follow(&["app.log"]).args(["--no-follow"]).run();
    job().success();
    fs::create_dir(files.path("elsewhere")).unwrap();
    files.rename("app.log", "elsewhere/app.log");
    job().fails_with(74, &["app.log", "No such file"]);
    files.rename("elsewhere/app.log", "app.log");
    files.append("app.log", "two\n");
    job().success();
    receiver.wait_for_stdout(b"one\ntwo\n");
    // A copy on another file system has another inode.
    let long = "a line of more than a few bytes, ".repeat(3);
    files.append("app.log", &format!("{long}\n"));
    job().success();
    fs::copy(files.path("app.log"), files.path("new")).unwrap();
    fs::remove_file(files.path("app.log")).unwrap();
    files.rename("new", "app.log");
    files.append("app.log", "three\n");
    job().success();
    let expected = format!("one\ntwo\n{long}\nthree\n");
    receiver.wait_for_stdout(expected.as_bytes());
    assert_eq!(receiver.stop().success().stdout_text(), expected);
}

#[test]
fn with_mandatory_lines_wait_for_a_queue() {
    let files = Files::new();
    files.append("app.log", "one\ntwo\n");
    let emitter = started(files.follow(&["app.log"]).args(["--from-start", "--mandatory"]));
    emitter.wait_for_stderr("not routed to any queue", 1);
    let receiver = files.receiver();
    receiver.wait_for_stdout(b"one\ntwo\n");
    files.append("app.log", "three\n");
    receiver.wait_for_stdout(b"one\ntwo\nthree\n");
    assert_eq!(received(receiver, emitter), "one\ntwo\nthree\n");
}

#[test]
fn files_that_appear_later_and_switched_links_are_followed() {
    let files = Files::new();
    let receiver = files.receiver();
    let emitter = files.following(&["later/app.log", "link.log"]);
    emitter.wait_for_stderr("waiting for it", 2);
    fs::create_dir(files.path("later")).unwrap();
    files.append("later/app.log", "one\n");
    receiver.wait_for_stdout(b"one\n");
    files.append("first.log", "two\n");
    symlink(files.path("first.log"), files.path("link.log")).unwrap();
    receiver.wait_for_stdout(b"one\ntwo\n");
    files.append("second.log", "three\n");
    symlink(files.path("second.log"), files.path("new")).unwrap();
    files.rename("new", "link.log");
    receiver.wait_for_stdout(b"one\ntwo\nthree\n");
    files.append("second.log", "four\n");
    receiver.wait_for_stdout(b"one\ntwo\nthree\nfour\n");
    assert_eq!(received(receiver, emitter), "one\ntwo\nthree\nfour\n");
}

#[test]
fn an_incomplete_line_waits() {
    let (files, receiver, emitter) = empty_file();
    files.append("app.log", "one\ntw");
    receiver.wait_for_stdout(b"one\n");
    files.append("app.log", "o\nthe last");
    receiver.wait_for_stdout(b"one\ntwo\n");
    files.rename("app.log", "app.log.1");
    files.append("app.log", "next\n");
    wait_for_lines(&receiver, 4);
    assert_eq!(received(receiver, emitter), "one\ntwo\nnext\nthe last\n");

    let files = Files::new();
    files.append("app.log", "");
    let receiver = files.receiver();
    let emitter = started(files.follow(&["app.log"]).args(["--idle", "100ms"]));
    files.append("app.log", "prompt> ");
    receiver.wait_for_stdout(b"prompt> \n");
    assert_eq!(received(receiver, emitter), "prompt> \n");
}

#[test]
fn a_stack_trace_is_one_record() {
    let trace = "error: failed\njava.lang.Error: x\n\tat a.B.c(B.java:1)\n";
    let files = Files::new();
    files.append("app.log", "");
    let receiver = receive_logs().args(["-e", &files.exchange, "-f", "text"]).start().ready();
    let emitter = started(files.follow(&["app.log"]).args(["--join"]));
    files.append("app.log", &format!("info: a\n{trace}"));
    let joined = "\"error: failed\\njava.lang.Error: x\\n\\tat a.B.c(B.java:1)\"";
    let expected = format!(" [x] \"info: a\"\n [x] {joined}\n");
    receiver.wait_for_stdout(expected.as_bytes());
    assert_eq!(received(receiver, emitter), expected);

    // The same from standard input, in batches and alone.
    for options in [&["--join"][..], &["--join", "--batch"], &["--join=^(info|error)"]] {
        let exchange = unique("join");
        let receiver = receive_logs().args(["-e", &exchange, "-n", "3"]).start().ready();
        let input = files.path("input");
        fs::write(&input, format!("info: a\n{trace}info: b\n")).unwrap();
        let emitter = emit_log().args(["-e", &exchange, "--lines"]).args(options);
        emitter.stdin(File::open(&input).unwrap()).run().success();
        let expected = format!(" [x] \"info: a\"\n [x] {joined}\n [x] \"info: b\"\n");
        assert_eq!(receiver.wait().success().stdout_text(), expected, "{options:?}");
    }
}

#[test]
fn an_open_record_of_standard_input_is_sent_after_a_time() {
    let exchange = unique("join-time");
    let receiver = receive_logs().args(["-e", &exchange]).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-e", &exchange, "--lines", "--join"]).stdin(reader).start();
    writer.write_all(b"error: a\n  b\n").unwrap();
    receiver.wait_for_stdout(b" [x] \"error: a\\n  b\"\n");
    drop(writer);
    emitter.wait().success();
    receiver.stop().success();
}

#[test]
fn a_thousand_files_are_followed_beyond_the_limit_on_open_files() {
    let files = Files::new();
    let names: Vec<_> = (0..1000).map(|number| format!("{number}.log")).collect();
    names.iter().for_each(|name| files.append(name, ""));
    let receiver = files.receiver();
    let paths: Vec<_> = names.iter().map(|name| files.path(name)).collect();
    let start = || {
        // emit-log raises the soft limit.
        let tool = Tool::new("bash").args(["-c", "ulimit -Sn 100; exec \"$0\" \"$@\""]);
        let tool = tool.arg(binary("emit-log")).args(["-u", &url(), "-e", &files.exchange]);
        let tool = tool.arg("--position").arg(files.path("position")).arg("--batch");
        started(tool.arg("--follow").args(&paths))
    };
    let append = |text: &str| {
        for name in &names {
            files.append(name, &format!("{text} {name}\n"));
        }
    };
    let emitter = start();
    append("one");
    wait_for_lines(&receiver, 1000);
    emitter.kill();
    append("two");
    let emitter = start();
    wait_for_lines(&receiver, 2000);
    names.iter().for_each(|name| files.rename(name, &format!("{name}.1")));
    append("three");
    wait_for_lines(&receiver, 3000);
    let text = received(receiver, emitter);
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), 3000);
}

#[test]
fn records_name_their_file() {
    let files = Files::new();
    files.append("web.log", "");
    let options = ["-e", &files.exchange, "--exchange-type", "topic"];
    let receiver = |more: &[&str]| receive_logs().args(options).args(more).start().ready();
    let (errors, prefixed) = (receiver(&["-b", "web.error", "--raw"]), receiver(&["--prefix"]));
    let emitter = files.follow(&["web.log"]).args(["--exchange-type", "topic", "--tag", "app"]);
    let emitter = started(emitter.args(["-k", "{file}.{severity}"]));
    files.append("web.log", "info: one\nerror: two\n");
    errors.wait_for_stdout(b"error: two\n");
    let path = files.path("web.log");
    let expected =
        ["info: one", "error: two"].map(|line| format!("app:{} [x] \"{line}\"\n", path.display()));
    prefixed.wait_for_stdout(expected.concat().as_bytes());
    errors.stop().success();
    assert_eq!(received(prefixed, emitter), expected.concat());
}

#[test]
fn what_cannot_be_read_is_reported_and_the_rest_is_followed() {
    let files = Files::new();
    files.append("good.log", "");
    fs::create_dir(files.path("directory")).unwrap();
    Tool::new("mkfifo").arg(files.path("fifo")).run().success();
    let receiver = files.receiver();
    let emitter = files.following(&["directory", "fifo", "good.log"]);
    emitter.wait_for_stderr("it is a directory, not a file", 1);
    emitter.wait_for_stderr("it is not a regular file (use --lines < FILE)", 1);
    files.append("good.log", "one\n");
    receiver.wait_for_stdout(b"one\n");
    assert_eq!(received(receiver, emitter), "one\n");

    files.append("good.log", &format!("two\n{}\nthree\n", "x".repeat(2000)));
    let receiver = files.receiver();
    let large = files.follow(&["good.log"]).args(["--max-record", "1KB"]).run();
    large.fails_with(65, &["1 confirmed", "good.log", "byte 8", "--max-record"]);
    receiver.wait_for_stdout(b"two\n");
    receiver.stop().success();
}

#[test]
fn a_position_file_has_one_user_and_must_be_sound() {
    let files = Files::new();
    files.append("app.log", "");
    let emitter = files.following(&["app.log"]);
    files.follow(&["app.log"]).run().fails_with(78, &["another emit-log uses it"]);
    emitter.signal(Signal::TERM);
    emitter.wait();
    let path = files.path("position");
    let position = fs::read_to_string(&path).unwrap();
    for damaged in [&position[..20], &position.replace("\"offset\":0", "\"offset\":1")] {
        fs::write(&path, damaged).unwrap();
        let failed = files.follow(&["app.log"]).run();
        failed.fails_with(78, &["position", "remove the file"]);
    }
}

#[test]
fn options_that_do_not_fit_are_wrong_usage() {
    for (options, text) in [
        (&["--follow", "a", "--spool", "d"][..], "--spool"),
        (&["--follow", "a", "--no-confirm"], "--no-confirm"),
        (&["--follow", "a", "--lines"], "--lines"),
        (&["--position", "p"], "--follow"),
        (&["--join", "hello"], "--lines"),
        (&["--lines", "--join=("], "--join"),
    ] {
        let ended = emit_log().args(options).run().exits_with(2);
        assert!(ended.stderr_text().contains(text), "{options:?}: {ended:?}");
    }
}
