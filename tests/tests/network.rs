//! A network or a broker fails at any point of a conversation. Neither tool hangs, panics or reports a success that
//! is none.

use std::io::Write;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use logs_tests::{
    BANNER, Broker, Ended, Peer, Proxy, Running, Way, emit_log, receive_logs, unique, url,
    wait_until,
};
use rustix::process::Signal;

const WAYS: [Way; 2] = [Way::ToBroker, Way::FromBroker];

/// Longer than any of these runs.
const LIMIT: Duration = Duration::from_secs(10);

/// The conversation of `emit-log MESSAGE` with the broker at this URL.
fn publish(url: &str, exchange: &str, message: &str) -> Ended {
    emit_log().args(["-u", url, "-e", exchange, "--retry", "0s", message]).run()
}

/// The conversation of a receiver that subscribes and then receives this message.
fn receive(url: &str, exchange: &str, message: &str) -> Ended {
    let peer = Peer::connect();
    let options = ["-r", "-n", "1", "--retry", "0s", "--timeout", "5s"];
    let mut receiver = receive_logs().args(["-u", url, "-e", exchange]).args(options).start();
    wait_until("the receiver waits or has exited", || {
        receiver.stderr_so_far().contains(BANNER) || !receiver.is_running()
    });
    peer.publish(exchange, message.as_bytes());
    receiver.wait()
}

/// The URL with short time limits.
fn impatient(url: &str) -> String {
    format!("{url}?connection_timeout=1000&heartbeat=1")
}

/// A name for the message at this place of a conversation.
fn message(way: Way, bytes: usize) -> String {
    format!("{way:?} {bytes}")
}

/// Calls `work` with each of `places`, in any order, in several threads.
fn in_parallel(threads: usize, places: Range<usize>, work: impl Fn(usize) + Sync) {
    thread::scope(|scope| {
        for first in 0..threads {
            let (places, work) = (places.clone(), &work);
            scope.spawn(move || places.skip(first).step_by(threads).for_each(work));
        }
    });
}

/// The number of bytes in one direction of a conversation.
fn length(way: Way, conversation: impl Fn(&str) -> Ended) -> usize {
    let proxy = Proxy::start(&url());
    conversation(proxy.url()).success();
    proxy.passed(way)
}

/// Asserts that a run with a lost connection reports its result correctly. The loss may have been too late to matter.
fn assert_honest(ended: &Ended) -> bool {
    assert!(matches!(ended.status.code(), Some(0 | 69)), "{ended:?}");
    assert!(ended.elapsed < LIMIT, "{ended:?}");
    let stderr = ended.stderr_text();
    let complaints = stderr.replace(BANNER, "");
    assert!(complaints.lines().count() <= 1 && !complaints.contains("panic"), "{ended:?}");
    ended.status.success()
}

/// Disturbs the network at every place of the conversation of `emit-log`.
fn publish_through(disturb: impl Fn(&Proxy, Way, usize) + Sync, step: usize, threads: usize) {
    let exchange = unique("publish");
    let witness = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    for way in WAYS {
        let length = length(way, |url| publish(url, &exchange, "whole"));
        in_parallel(threads, 0..length / step, |place| {
            let (proxy, bytes) = (Proxy::start(&url()), 1 + place * step);
            disturb(&proxy, way, bytes);
            let message = message(way, bytes);
            let ended = publish(&impatient(proxy.url()), &exchange, &message);
            if assert_honest(&ended) {
                // It is confirmed, so it arrives.
                let line = format!("{message}\n").into_bytes();
                wait_until(&format!("{message} has arrived"), || {
                    witness.stdout_so_far().windows(line.len()).any(|bytes| bytes == line)
                });
            }
        });
    }
}

/// Disturbs the network at every place of the conversation of `receive-logs`.
fn receive_through(disturb: impl Fn(&Proxy, Way, usize) + Sync, step: usize, threads: usize) {
    for way in WAYS {
        let length = length(way, |url| receive(url, &unique("receive"), "whole"));
        in_parallel(threads, 0..length / step, |place| {
            let (proxy, bytes) = (Proxy::start(&url()), 1 + place * step);
            disturb(&proxy, way, bytes);
            let message = message(way, bytes);
            let ended = receive(&impatient(proxy.url()), &unique("receive"), &message);
            let has_all = ended.stdout == format!("{message}\n").into_bytes();
            let succeeded = assert_honest(&ended);
            assert!(has_all || ended.stdout.is_empty() && !succeeded, "{ended:?}");
        });
    }
}

#[test]
fn a_publisher_is_cut_off_after_any_byte() {
    publish_through(Proxy::cut_after, 1, 4);
}

#[test]
fn a_receiver_is_cut_off_after_any_byte() {
    receive_through(Proxy::cut_after, 1, 4);
}

#[test]
fn a_network_becomes_silent_after_any_byte() {
    let swallow = |proxy: &Proxy, way, bytes| proxy.silence_after(way, bytes);
    publish_through(swallow, 40, 16);
    receive_through(swallow, 40, 16);
}

#[test]
fn a_network_passes_one_byte_at_a_time() {
    let exchange = unique("trickle");
    for way in WAYS {
        let proxy = Proxy::start(&url());
        proxy.trickle(way, Duration::from_millis(1));
        publish(proxy.url(), &exchange, "slowly").success();
        let ended = receive(proxy.url(), &exchange, "slowly").success();
        assert_eq!(ended.stdout_text(), "slowly\n");
        // Bytes arrive all the time, but the login takes too long.
        proxy.trickle(way, Duration::from_millis(10));
        let limited = impatient(proxy.url());
        for ended in [publish(&limited, &exchange, "m"), receive(&limited, &exchange, "m")] {
            let ended = ended.fails_with(69, &["within the connection timeout"]);
            assert!(ended.elapsed < Duration::from_secs(3), "{ended:?}");
        }
    }
}

/// Sends numbered lines through this network while `disturb` runs. Asserts that no line is lost.
fn assert_lines_survive(url: &str, proxy: &Proxy, disturb: impl Fn(&Proxy, &Running)) {
    const LINES: u64 = 20_000;
    let exchange = unique("lines");
    let witness = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-l", "-u", url, "-e", &exchange]).stdin(reader).start();
    for number in 1..=LINES {
        if number % (LINES / 3) == 0 {
            disturb(proxy, &emitter);
        }
        writeln!(writer, "line {number}").unwrap();
    }
    drop(writer);
    let ended = emitter.wait().success();
    assert!(ended.stderr_text().contains(" again; "), "{ended:?}");
    let last = format!("line {LINES}\n").into_bytes();
    wait_until("the last line is there", || witness.stdout_so_far().ends_with(&last));
    let lines = (1..=LINES).map(|number| format!("line {number}\n"));
    assert_eq!(witness.stop().success().stdout_text(), lines.collect::<String>());
}

/// The note of emit-log about a lost connection.
const LOST: &str = "; trying again";

#[test]
fn no_line_is_lost_if_the_network_resets_connections() {
    let proxy = Proxy::start(&url());
    assert_lines_survive(proxy.url(), &proxy, |proxy, _| proxy.reset());
}

#[test]
fn no_line_is_lost_if_one_direction_fails() {
    for way in WAYS {
        let proxy = Proxy::start(&url());
        assert_lines_survive(&impatient(proxy.url()), &proxy, |proxy, emitter| {
            let losses = emitter.stderr_so_far().matches(LOST).count();
            proxy.stall_one(way);
            emitter.wait_for_stderr(LOST, losses + 1);
            proxy.resume();
        });
    }
}

#[test]
fn a_receiver_reconnects_if_one_direction_fails() {
    for way in WAYS {
        let proxy = Proxy::start(&url());
        let (exchange, through) = (unique("one-way"), impatient(proxy.url()));
        let receiver = receive_logs().args(["-r", "-u", &through, "-e", &exchange]).start();
        let receiver = receiver.ready();
        proxy.stall_one(way);
        receiver.wait_for_stderr("; subscribing again\n", 1);
        proxy.resume();
        receiver.wait_for_stderr(" [!] Subscribed again after ", 1);
        emit_log().args(["-e", &exchange, "hello"]).run().success();
        receiver.wait_for_stdout(b"hello\n");
        receiver.stop().success();
    }
}

#[test]
fn a_broker_is_frozen_at_any_time() {
    let broker = Broker::start();
    let url = impatient(broker.url());
    let emit = |args: &[&str]| emit_log().args(["-u", &url]).args(args);
    let receive = || receive_logs().args(["-r", "-u", &url]);

    // Before the connection: the kernel still accepts it for the broker.
    emit(&["hello"]).run().success();
    broker.freeze();
    for tool in [emit(&["hello"]), receive()] {
        let ended = tool.run().fails_with(69, &["log in to", "no answer within"]);
        assert!(ended.elapsed < Duration::from_secs(3), "{ended:?}");
    }
    broker.thaw();

    // While no message is sent.
    let receiver = receive().start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit(&["-l"]).stdin(reader).start();
    writeln!(writer, "first").unwrap();
    receiver.wait_for_stdout(b"first\n");
    broker.freeze();
    let frozen = Instant::now();
    receiver.wait_for_stderr("; subscribing again\n", 1);
    emitter.wait_for_stderr("trying again", 1);
    // Two heartbeats, and the next check.
    assert!(frozen.elapsed() < Duration::from_secs(4), "{:?}", frozen.elapsed());
    broker.thaw();
    receiver.wait_for_stderr(" [!] Subscribed again after ", 1);
    writeln!(writer, "second").unwrap();
    receiver.wait_for_stdout(b"first\nsecond\n");
    drop(writer);
    emitter.wait().success();

    // While lines are sent.
    let (reader, writer) = std::io::pipe().unwrap();
    let emitter = emit(&["-l", "--retry", "2s"]).stdin(reader).start();
    let feeder = thread::spawn(move || {
        let mut writer = writer;
        while writer.write_all(b"line\n").is_ok() {}
    });
    wait_until("lines flow", || receiver.stdout_so_far().len() > 10_000);
    broker.freeze();
    let ended = emitter.wait().exits_with(69);
    assert!(ended.stderr_text().contains(" in doubt"), "{ended:?}");
    feeder.join().unwrap();
    broker.thaw();
    receiver.wait_for_stderr(" [!] Subscribed again after ", 2);

    // While the tools close their connections.
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit(&["-l"]).stdin(reader).start();
    writeln!(writer, "last").unwrap();
    wait_until("the message is there", || receiver.stdout_so_far().ends_with(b"last\n"));
    wait_until("the line is confirmed", || {
        let channels = broker.ctl(["list_channels", "confirm", "messages_unconfirmed"]);
        channels.lines().any(|line| line == "true\t0")
    });
    broker.freeze();
    drop(writer);
    let asked = Instant::now();
    receiver.signal(Signal::TERM);
    emitter.wait().success();
    receiver.wait().success();
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
}
