//! How a receiver ends: signals, limits, and readers that exit. What it writes before.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use amiquip::QueueDeleteOptions;
use logs_tests::{
    BANNER, Ended, PATIENCE, Peer, Proxy, Running, TempFile, Tool, binary, emit_log, receive_logs,
    unique, url, wait_until, wait_until_full,
};
use rustix::process::Signal;

/// Publishes numbered messages until [`stop`](Load::stop), which returns their number.
struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Load {
    fn start(exchange: &str) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, exchange) = (Arc::clone(&stop), exchange.to_string());
        let thread = thread::spawn(move || {
            let peer = Peer::connect();
            let mut number = 0;
            while !stopped.load(Ordering::Relaxed) {
                number += 1;
                peer.publish(&exchange, format!("message {number}").as_bytes());
            }
            number
        });
        Load { stop, thread }
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Asserts that the output is whole lines, numbered from the first without a gap.
fn assert_consecutive(output: &[u8]) {
    let text = String::from_utf8_lossy(output);
    assert!(text.ends_with('\n'), "half a line: {:?}", text.lines().last());
    let number = |line: &str| line.strip_prefix("message ").unwrap().parse::<u64>().unwrap();
    let numbers: Vec<u64> = text.lines().map(number).collect();
    let expected: Vec<u64> = (numbers[0]..).take(numbers.len()).collect();
    assert!(numbers == expected, "gap or repetition in {} lines", numbers.len());
}

#[test]
fn a_signal_under_load_ends_with_whole_lines_and_status_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let exchange = unique("load");
        let receiver = receive_logs().args(["-e", &exchange, "-r"]).start().ready();
        let load = Load::start(&exchange);
        wait_until("messages flow", || receiver.stdout_so_far().len() > 1_000_000);
        let signalled = Instant::now();
        receiver.signal(signal);
        let ended = receiver.wait().success();
        assert!(signalled.elapsed() < Duration::from_secs(2), "{:?}", signalled.elapsed());
        assert_eq!(ended.stderr_text(), BANNER);
        load.stop();
        assert_consecutive(&ended.stdout);
    }
}

#[test]
fn a_signal_ends_an_idle_receiver_at_once() {
    let receiver = receive_logs().args(["-e", &unique("idle")]).start().ready();
    let signalled = Instant::now();
    let ended = receiver.stop().success();
    assert!(signalled.elapsed() < Duration::from_secs(1), "{ended:?}");
}

/// A receiver that is blocked in a write, because the reader has stopped after the first bytes.
fn stuck_receiver() -> (Running, UnixStream) {
    let exchange = unique("stuck");
    let (mut reader, writer) = UnixStream::pair().unwrap();
    let receiver = receive_logs().args(["-e", &exchange, "-r"]);
    let receiver = receiver.stdout(OwnedFd::from(writer)).start_redirected().ready();
    let peer = Peer::connect();
    (0..100).for_each(|_| peer.publish(&exchange, &[b'x'; 100_000]));
    reader.read_exact(&mut [0; 1000]).unwrap();
    wait_until_full(&reader);
    (receiver, reader)
}

#[test]
fn a_durable_queue_does_not_delay_the_end() {
    let queue = unique("stuck");
    let receiver = receive_logs().args(["-r", "-e", &queue, "--queue", &queue]);
    let (mut reader, writer) = UnixStream::pair().unwrap();
    let receiver = receiver.stdout(OwnedFd::from(writer)).start_redirected().ready();
    let lines =
        TempFile::with("input", "a line of thirty-two characters.\n".repeat(300_000).as_bytes());
    let input = std::fs::File::open(lines.path()).unwrap();
    emit_log().args(["-l", "--batch", "-e", &queue]).stdin(input).run().success();
    reader.read_exact(&mut [0; 1000]).unwrap();
    wait_until_full(&reader);
    let signalled = Instant::now();
    let ended = receiver.stop();
    assert!(signalled.elapsed() < Duration::from_secs(2), "{:?}: {ended:?}", signalled.elapsed());
    Peer::connect().channel().queue_delete(&queue, QueueDeleteOptions::default()).unwrap();
}

#[test]
fn a_frozen_broker_does_not_delay_the_end() {
    let proxy = Proxy::start(&url());
    let queue = unique("mute");
    let receiver = receive_logs().args(["-u", proxy.url(), "-r", "-e", &queue, "--queue", &queue]);
    let receiver = receiver.start().ready();
    emit_log().args(["-e", &queue, "one"]).run().success();
    receiver.wait_for_stdout(b"one\n");
    proxy.stall();
    let signalled = Instant::now();
    // It exits by itself; the signal does not end it.
    receiver.stop().success();
    assert!(signalled.elapsed() < Duration::from_secs(2), "{:?}", signalled.elapsed());
    proxy.resume();
    Peer::connect().channel().queue_delete(&queue, QueueDeleteOptions::default()).unwrap();
}

#[test]
fn a_second_signal_ends_a_receiver_with_a_stopped_reader() {
    let (receiver, _reader) = stuck_receiver();
    let signalled = Instant::now();
    receiver.signal(Signal::TERM);
    receiver.signal(Signal::INT);
    let ended = receiver.wait();
    // Earlier than one signal would end the receiver. The kernel may deliver the two signals in either order.
    assert!(signalled.elapsed() < Duration::from_millis(1500), "{ended:?}");
    assert_eq!(ended.status.code(), None, "{ended:?}");
    assert!(ended.stderr_text().contains("stopped before all"), "{ended:?}");
}

#[test]
fn a_stopped_reader_does_not_delay_the_end() {
    let (receiver, _reader) = stuck_receiver();
    let signalled = Instant::now();
    let ended = receiver.stop();
    assert!(signalled.elapsed() < Duration::from_secs(3), "{ended:?}");
    assert_eq!(ended.status.code(), None, "ended by the signal: {ended:?}");
    assert!(ended.stderr_text().contains("before all received messages"), "{ended:?}");
}

#[test]
fn a_reader_that_exits_ends_the_receiver_without_an_error() {
    let exchange = unique("head");
    let (reader, writer) = std::io::pipe().unwrap();
    let receiver = receive_logs().args(["-e", &exchange]).stdout(writer).start_redirected().ready();
    emit_log().args(["-e", &exchange, "one"]).run().success();
    let mut line = String::new();
    let mut reader = BufReader::new(reader);
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, " [x] \"one\"\n");
    // No message arrives, so the receiver must detect the closed reader by itself.
    let gone = Instant::now();
    drop(reader);
    let ended = receiver.wait().success();
    assert!(gone.elapsed() < Duration::from_secs(3), "{ended:?}");
    assert_eq!(ended.stderr_text(), BANNER);
}

#[test]
fn a_reader_that_exits_under_load_ends_the_receiver() {
    let exchange = unique("head");
    let (reader, writer) = std::io::pipe().unwrap();
    let receiver = receive_logs().args(["-e", &exchange]).stdout(writer).start_redirected().ready();
    let load = Load::start(&exchange);
    let mut line = String::new();
    BufReader::new(reader).read_line(&mut line).unwrap();
    let ended = receiver.wait().success();
    assert_eq!(ended.stderr_text(), BANNER);
    load.stop();
}

#[test]
fn count_stops_after_exactly_n_records() {
    let exchange = unique("count");
    let receiver = receive_logs().args(["-e", &exchange, "-r", "-n", "1500"]).start().ready();
    let load = Load::start(&exchange);
    let ended = receiver.wait().success();
    load.stop();
    assert_consecutive(&ended.stdout);
    assert_eq!(ended.stdout.iter().filter(|byte| **byte == b'\n').count(), 1500);
}

#[test]
fn time_limits_end_a_receiver() {
    let exchange = unique("time");
    let receive = |args: &[&str]| receive_logs().args(["-e", &exchange]).args(args).run();
    let limit = Duration::from_millis(300);
    for option in ["--timeout", "--idle-timeout"] {
        let ended = receive(&[option, "300ms"]).success();
        assert!(ended.elapsed >= limit, "{ended:?}");
        let ended = receive(&[option, "300ms", "-n", "1", "-q"]);
        let ended = ended.fails_with(75, &["0 of 1 records", "time limit"]);
        assert!(ended.elapsed >= limit, "{ended:?}");
    }
    let receiver =
        receive_logs().args(["-e", &exchange, "-n", "2", "--timeout", "20s"]).start().ready();
    emit_log().args(["-e", &exchange, "one"]).run().success();
    emit_log().args(["-e", &exchange, "two"]).run().success();
    assert_eq!(receiver.wait().success().stdout_text(), " [x] \"one\"\n [x] \"two\"\n");
}

#[test]
fn messages_restart_the_idle_timeout() {
    let exchange = unique("idle");
    let receiver = receive_logs().args(["-e", &exchange, "--idle-timeout", "2s"]).start().ready();
    let peer = Peer::connect();
    let started = Instant::now();
    let mut sent = 0;
    while started.elapsed() < Duration::from_secs(4) {
        peer.publish(&exchange, b"tick");
        sent += 1;
        thread::sleep(Duration::from_millis(100));
    }
    let ended = receiver.wait().success();
    assert!(started.elapsed() >= Duration::from_secs(5), "{ended:?}");
    assert_eq!(ended.stdout_text(), " [x] \"tick\"\n".repeat(sent));
}

#[test]
fn a_stopped_reader_neither_fills_memory_nor_loses_messages() {
    const MESSAGES: usize = 200_000;
    const BODY: [u8; 100] = [b'x'; 100];
    let exchange = unique("memory");
    let (mut reader, writer) = UnixStream::pair().unwrap();
    let receiver = receive_logs().args(["-e", &exchange, "-r", "-n", &MESSAGES.to_string()]);
    let receiver = receiver.stdout(OwnedFd::from(writer)).start_redirected().ready();
    let peer = Peer::connect();
    peer.channel().enable_publisher_confirms().unwrap();
    let confirms = peer.channel().listen_for_publisher_confirms().unwrap();
    (0..MESSAGES).for_each(|_| peer.publish(&exchange, &BODY));
    let mut confirmed = 0;
    while confirmed < MESSAGES as u64 {
        match confirms.recv_timeout(PATIENCE).unwrap() {
            amiquip::Confirm::Ack(ack) => confirmed = confirmed.max(ack.delivery_tag),
            amiquip::Confirm::Nack(nack) => panic!("{nack:?}"),
        }
    }
    let peak = receiver.peak_memory();
    assert!(peak < 10_000_000, "{peak} bytes");

    let copy = thread::spawn(move || {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        received
    });
    receiver.wait().success();
    let received = copy.join().unwrap();
    assert_eq!(received.len(), MESSAGES * 101);
    assert!(received.chunks(101).all(|line| line[..100] == BODY && line[100] == b'\n'));
}

/// Starts a receiver by a shell, which can close or redirect stdout.
fn run_redirected(redirection: &str, args: &[&str]) -> Ended {
    let script = format!("exec \"$0\" \"$@\" {redirection}");
    let shell = Tool::new("bash").args(["-c", &script]).arg(binary("receive-logs"));
    shell.args(args).env("AMQP_URL", url()).run()
}

#[test]
fn a_stdout_that_cannot_be_written_is_an_early_error() {
    let queue = unique("closed");
    let options = ["-e", &queue, "--queue", &queue, "--queue-type", "classic"];
    receive_logs().args(options).start().ready().stop().success();
    emit_log().args(["-e", &queue, "precious"]).run().success();
    let limited = [&options[..], &["--timeout", "2s"]].concat();
    for redirection in [">&-", "1</dev/null"] {
        let ended = run_redirected(redirection, &limited);
        ended.fails_with(74, &["write to stdout"]);
    }
    let peer = Peer::connect();
    let left = peer.channel().queue_declare_passive(&queue).unwrap().declared_message_count();
    assert_eq!(left, Some(1));
    // A stdout that is discarded on purpose accepts everything.
    run_redirected(">/dev/null", &[&options[..], &["-n", "1"]].concat()).success();
    peer.channel().queue_delete(&queue, QueueDeleteOptions::default()).unwrap();
}

#[test]
fn a_file_is_written_if_stdout_is_closed() {
    let (exchange, file) = (unique("closed"), TempFile::new("all.log"));
    let path = file.path().to_str().unwrap();
    run_redirected(">&-", &["-e", &exchange, "-o", path, "--timeout", "100ms"]).success();
}

#[test]
fn a_reader_that_has_exited_at_the_start_needs_no_broker() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let receiver = receive_logs().args(["-u", "amqp://127.0.0.1:1"]).stdout(writer);
    receiver.start_redirected().wait().success();
}
