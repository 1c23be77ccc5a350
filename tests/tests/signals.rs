//! Signals: early ones, ignored ones, and those that arrive while a program is busy.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use logs_tests::{
    Broker, Proxy, Running, TempFile, Tool, binary, emit_log, receive_logs, unique, unshare, url,
    wait_until,
};
use rustix::process::{Pid, Signal, kill_process};

/// An address without a listener.
const NO_BROKER: &str = "amqp://127.0.0.1:1";

/// A program as process 1 of a container, and a way to send it a signal.
struct Init {
    parent: Running,
    process: Pid,
}

impl Init {
    /// Returns `None` if this user cannot create a namespace. The test is then skipped.
    fn start(program: &str, args: &[&str], configure: impl FnOnce(Tool) -> Tool) -> Option<Init> {
        let tool = unshare()?.arg(binary(program)).args(args).env("AMQP_URL", url());
        let mut parent = configure(tool).start();
        let id = parent.id();
        let child = || fs::read_to_string(format!("/proc/{id}/task/{id}/children")).ok();
        let mut process = None;
        wait_until("the program has started", || {
            process = child().and_then(|id| Pid::from_raw(id.trim().parse().ok()?));
            assert!(parent.is_running() || process.is_some(), "{}", parent.stderr_so_far());
            process.is_some()
        });
        Some(Init { parent, process: process.unwrap() })
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.process, signal).unwrap();
    }
}

/// A pipe that is full, and never read.
fn unread_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    (reader, writer)
}

#[test]
fn process_1_without_a_broker_ends_at_sigterm_and_sigint() {
    for (signal, status) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        for (program, args) in [("emit-log", &["-l"][..]), ("emit-log", &[]), ("receive-logs", &[])]
        {
            let args = [args, &["-u", NO_BROKER, "--retry", "forever"]].concat();
            let Some(init) = Init::start(program, &args, |tool| tool) else { return };
            init.parent.wait_for_stderr("trying again", 1);
            let asked = Instant::now();
            init.signal(signal);
            let ended = init.parent.wait().exits_with(status);
            assert!(asked.elapsed() < Duration::from_secs(1), "{ended:?}");
        }
    }
}

#[test]
fn process_1_reports_counts_and_exits_with_128_plus_signal() {
    let exchange = unique("init");
    let receiver = receive_logs().args(["-e", &exchange]).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let args = ["-l", "-e", &exchange];
    let Some(init) = Init::start("emit-log", &args, |tool| tool.stdin(reader)) else { return };
    writer.write_all(b"line\n").unwrap();
    receiver.wait_for_stdout(b" [x] \"line\"\n");
    init.signal(Signal::TERM);
    let ended = init.parent.wait().exits_with(143);
    assert_eq!(ended.stderr_text(), "emit-log: stopped by SIGTERM: 1 confirmed, 0 in doubt\n");

    let args = ["-e", &exchange];
    let Some(init) = Init::start("receive-logs", &args, |tool| tool) else { return };
    let ready = init.parent.ready();
    kill_process(init.process, Signal::TERM).unwrap();
    ready.wait().success();
}

#[test]
fn signals_ignored_at_the_start_stay_ignored() {
    let exchange = unique("ignored");
    let ignoring = |signals: &str, program: &str| {
        let script = format!("trap '' {signals}; exec \"$0\" \"$@\"");
        let bash = Tool::new("bash").args(["-c", &script]).arg(binary(program));
        bash.args(["-e", &exchange]).env("AMQP_URL", url())
    };
    let receiver = ignoring("INT HUP", "receive-logs").start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = ignoring("INT HUP", "emit-log").arg("-l").stdin(reader).start();
    let mut expected = String::new();
    for line in ["before", "after"] {
        writeln!(writer, "{line}").unwrap();
        expected += &format!(" [x] \"{line}\"\n");
        receiver.wait_for_stdout(expected.as_bytes());
        for signal in [Signal::INT, Signal::HUP] {
            receiver.signal(signal);
            emitter.signal(signal);
        }
    }
    emitter.signal(Signal::TERM);
    assert_eq!(emitter.wait().signal(), Some(Signal::TERM.as_raw()));
    receiver.stop().success();

    let receiver = ignoring("TERM", "receive-logs").start().ready();
    receiver.signal(Signal::TERM);
    emit_log().args(["-e", &exchange, "after"]).run().success();
    receiver.wait_for_stdout(b" [x] \"after\"\n");
    receiver.signal(Signal::INT);
    receiver.wait().success();
}

#[test]
fn a_receiver_with_unread_stderr_continues_and_stops() {
    let broker = Broker::start();
    let (_reader, writer) = unread_pipe();
    let ready = TempFile::new("ready");
    let receiver = receive_logs().args(["-u", broker.url(), "-v", "--ready-file"]);
    let receiver = receiver.arg(ready.path()).stderr(writer).start();
    wait_until("it is ready", || ready.path().exists());
    for count in 1..=3 {
        broker.ctl(["close_all_connections", "for a test"]);
        wait_until("it has subscribed again", || {
            broker.ctl(["list_bindings"]).contains("amq.gen-")
        });
        emit_log().args(["-u", broker.url(), "line"]).run().success();
        receiver.wait_for_stdout(" [x] \"line\"\n".repeat(count).as_bytes());
    }
    let asked = Instant::now();
    let ended = receiver.stop().success();
    assert!(asked.elapsed() < Duration::from_secs(2), "{ended:?}");
}

#[test]
fn an_emitter_with_unread_stderr_stops_at_one_signal() {
    let exchange = unique("unread");
    let receiver = receive_logs().args(["-e", &exchange]).start().ready();
    for options in [&["-q"][..], &["-v"]] {
        let (_reader, stderr) = unread_pipe();
        let (reader, mut writer) = std::io::pipe().unwrap();
        let emitter = emit_log().args(["-l", "-e", &exchange]).args(options);
        let emitter = emitter.stdin(reader).stderr(stderr).start();
        let before = receiver.stdout_so_far().len();
        writer.write_all(b"line\n").unwrap();
        wait_until("the line is received", || receiver.stdout_so_far().len() > before);
        let asked = Instant::now();
        emitter.signal(Signal::TERM);
        let ended = emitter.wait();
        assert!(asked.elapsed() < Duration::from_secs(3), "{ended:?}");
        assert_eq!(ended.signal(), Some(Signal::TERM.as_raw()), "{ended:?}");
    }
}

/// A receiver that writes a message larger than a pipe to an unread pipe.
fn blocked_receiver() -> (Running, std::io::PipeReader, String) {
    let exchange = unique("blocked");
    let (reader, writer) = std::io::pipe().unwrap();
    let receiver = receive_logs().args(["-r", "-e", &exchange]).stdout(writer);
    let receiver = receiver.start_redirected().ready();
    let lines: Vec<_> = (1..=35).map(|number| format!("{number} {:x>10000}\n", "")).collect();
    let input = TempFile::with("input", lines.concat().as_bytes());
    let emitter = emit_log().args(["-l", "-e", &exchange]);
    emitter.stdin(fs::File::open(input.path()).unwrap()).run().success();
    logs_tests::wait_until_full(&reader);
    (receiver, reader, lines.concat())
}

/// `timeout` sends a signal to its child, and then to the process group, which includes the child.
#[test]
fn a_repeated_signal_does_not_interrupt_a_receiver() {
    for signal in [Signal::TERM, Signal::INT] {
        let (receiver, mut reader, expected) = blocked_receiver();
        receiver.signal(signal);
        // The kernel would drop the second signal while the first one is pending.
        wait_until("the first signal is handled", || !is_pending(&receiver, signal));
        receiver.signal(signal);
        let mut written = String::new();
        reader.read_to_string(&mut written).unwrap();
        receiver.wait().success();
        assert!(written == expected, "{} of {} bytes", written.len(), expected.len());
    }
}

#[test]
fn the_same_signal_later_ends_a_blocked_receiver() {
    let (receiver, _reader, _) = blocked_receiver();
    let asked = Instant::now();
    receiver.signal(Signal::TERM);
    std::thread::sleep(Duration::from_millis(600));
    receiver.signal(Signal::TERM);
    let ended = receiver.wait();
    // This is earlier than the deadline of the first signal.
    assert!(asked.elapsed() < Duration::from_millis(1600), "{ended:?}");
    assert_eq!(ended.signal(), Some(Signal::TERM.as_raw()), "{ended:?}");
}

#[test]
fn a_repeated_signal_does_not_interrupt_an_emitter() {
    let exchange = unique("twice");
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let proxy = Proxy::start(&url());
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-l", "-e", &exchange, "-u", proxy.url()]);
    let emitter = emitter.stdin(reader).start();
    writer.write_all(b"before\n").unwrap();
    receiver.wait_for_stdout(b"before\n");
    proxy.stall();
    writer.write_all(b"after\n").unwrap();
    wait_until("the line is read", || rustix::io::ioctl_fionread(&writer).unwrap() == 0);
    emitter.signal(Signal::TERM);
    wait_until("the first signal is handled", || !is_pending(&emitter, Signal::TERM));
    emitter.signal(Signal::TERM);
    wait_until("the second signal is handled", || !is_pending(&emitter, Signal::TERM));
    proxy.resume();
    let ended = emitter.wait();
    assert_eq!(ended.stderr_text(), "emit-log: stopped by SIGTERM: 2 confirmed, 0 in doubt\n");
}

/// A terminal that closes sends SIGHUP.
#[test]
fn a_hangup_leaves_no_record_in_part() {
    let (receiver, mut reader, expected) = blocked_receiver();
    receiver.signal(Signal::HUP);
    let mut written = String::new();
    reader.read_to_string(&mut written).unwrap();
    assert_eq!(receiver.wait().signal(), Some(Signal::HUP.as_raw()));
    assert!(written == expected, "{} of {} bytes", written.len(), expected.len());
}

#[test]
fn at_a_hangup_an_emitter_sends_what_it_has_read() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-l", "-e", &unique("hangup")]).stdin(reader).start();
    writer.write_all(b"whole\nhalf").unwrap();
    wait_until("all is read", || rustix::io::ioctl_fionread(&writer).unwrap() == 0);
    emitter.signal(Signal::HUP);
    let ended = emitter.wait();
    assert_eq!(ended.signal(), Some(Signal::HUP.as_raw()));
    assert_eq!(ended.stderr_text(), "emit-log: stopped by SIGHUP: 2 confirmed, 0 in doubt\n");
}

/// Whether a signal to a process is pending (Linux).
fn is_pending(running: &Running, signal: Signal) -> bool {
    let path = format!("/proc/{}/status", running.id());
    let status = fs::read_to_string(path).unwrap_or_default();
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap_or("0");
    let pending = u64::from_str_radix(pending.trim(), 16).unwrap();
    pending & 1 << (signal.as_raw() - 1) != 0
}

#[test]
fn dropped_notes_are_counted_when_stderr_is_read_again() {
    let broker = Broker::start();
    let (reader, writer) = unread_pipe();
    let receiver = receive_logs().args(["-u", broker.url()]).stderr(writer).start();
    let again = |count| {
        broker.ctl(["close_all_connections", "for a test"]);
        wait_until("it has subscribed again", || {
            let queues = broker.ctl(["list_consumers"]);
            queues.contains("amq.gen-")
        });
        emit_log().args(["-u", broker.url(), "line"]).run().success();
        receiver.wait_for_stdout(" [x] \"line\"\n".repeat(count).as_bytes());
    };
    wait_until("it consumes", || broker.ctl(["list_consumers"]).contains("amq.gen-"));
    again(1);
    let mut reader = reader;
    let notes = std::thread::spawn(move || std::io::read_to_string(&mut reader).unwrap());
    again(2);
    receiver.stop().success();
    let notes = notes.join().unwrap();
    // The banner, the loss and the new subscription.
    assert!(notes.contains(" [!] 3 lines are missing here: stderr was not read\n"), "{notes}");
    assert_eq!(notes.matches("Subscribed again").count(), 1, "{notes}");
}

/// Each write to a datagram socket is a datagram.
#[test]
fn each_note_is_one_write() {
    let broker = Broker::start();
    let socket = || {
        let (test, program) = UnixDatagram::pair().unwrap();
        test.set_read_timeout(Some(logs_tests::PATIENCE)).unwrap();
        (test, OwnedFd::from(program))
    };
    let wait_for = |notes: &UnixDatagram, text: &str| loop {
        let mut buffer = [0; 10_000];
        let length = notes.recv(&mut buffer).expect(text);
        let note = String::from_utf8_lossy(&buffer[..length]);
        assert!(note.ends_with('\n') && note.matches('\n').count() == 1, "{note:?}");
        if note.contains(text) {
            break;
        }
    };
    let (notes, stderr) = socket();
    let receiver = receive_logs().args(["-u", broker.url()]).stderr(stderr).start();
    wait_for(&notes, "Waiting for logs");
    let (reader, _writer) = std::io::pipe().unwrap();
    let (emitter_notes, stderr) = socket();
    let emitter = emit_log().args(["-u", broker.url(), "-l"]).stdin(reader).stderr(stderr).start();
    wait_until("both are connected", || {
        broker.ctl(["list_channels", "pid"]).matches('<').count() == 2
    });
    broker.ctl(["close_all_connections", "for a test"]);
    wait_for(&notes, "Subscribed again");
    wait_for(&emitter_notes, " again; ");
    emitter.signal(Signal::TERM);
    wait_for(&emitter_notes, "stopped by SIGTERM");
    emitter.wait();
    receiver.stop().success();
    let (notes, stderr) = socket();
    emit_log().args(["-u", NO_BROKER]).stderr(stderr).start().wait().exits_with(69);
    wait_for(&notes, "refused");
}
