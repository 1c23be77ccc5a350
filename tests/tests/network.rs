//! A network, or a broker, that fails at any point of a conversation: neither tool hangs, panics or
//! claims a success that is none.

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

/// Longer than any of these runs may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The conversation of `emit-log MESSAGE` with the broker at this URL.
fn publish(url: &str, exchange: &str, message: &str) -> Ended {
    emit_log().args(["-u", url, "-e", exchange, "--retry", "0s", message]).run()
}

/// The conversation of a receiver that subscribes and then gets this message.
fn receive(url: &str, exchange: &str, message: &str) -> Ended {
    let peer = Peer::connect();
    let options = ["-r", "-n", "1", "--retry", "0s", "--timeout", "5s"];
    let mut receiver = receive_logs().args(["-u", url, "-e", exchange]).args(options).start();
    wait_until("it waits or has ended", || {
        receiver.stderr_so_far().contains(BANNER) || !receiver.is_running()
    });
    peer.publish(exchange, message.as_bytes());
    receiver.wait()
}

/// The URL with short limits.
fn impatient(url: &str) -> String {
    format!("{url}?connection_timeout=1000&heartbeat=1")
}

/// The name of a message, for a place in a conversation.
fn message(way: Way, bytes: usize) -> String {
    format!("{way:?} {bytes}")
}

/// Calls `work` with all of `places`, which may be in no order, in some threads.
fn in_parallel(threads: usize, places: Range<usize>, work: impl Fn(usize) + Sync) {
    thread::scope(|scope| {
        for first in 0..threads {
            let (places, work) = (places.clone(), &work);
            scope.spawn(move || places.skip(first).step_by(threads).for_each(work));
        }
    });
}

/// How many bytes go one way in a conversation.
fn length(way: Way, conversation: impl Fn(&str) -> Ended) -> usize {
    let proxy = Proxy::start(&url());
    conversation(proxy.url()).success();
    proxy.passed(way)
}

/// Checks a run that lost its connection, maybe too late for that to matter.
fn assert_honest(ended: &Ended) -> bool {
    assert!(matches!(ended.status.code(), Some(0 | 69)), "{ended:?}");
    assert!(ended.elapsed < LIMIT, "{ended:?}");
    let stderr = ended.stderr_text();
    let complaints = stderr.replace(BANNER, "");
    assert!(complaints.lines().count() <= 1 && !complaints.contains("panic"), "{ended:?}");
    ended.status.success()
}

/// Does something to a network at every place of the conversation of `emit-log`.
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
                // Confirmed, so it is there, or about to be.
                let line = format!("{message}\n").into_bytes();
                wait_until(&format!("{message} has come"), || {
                    witness.stdout_so_far().windows(line.len()).any(|bytes| bytes == line)
                });
            }
        });
    }
}

/// Does something to a network at every place of the conversation of `receive-logs`.
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
fn a_publisher_cut_off_after_any_byte() {
    publish_through(Proxy::cut_after, 1, 4);
}

#[test]
fn a_receiver_cut_off_after_any_byte() {
    receive_through(Proxy::cut_after, 1, 4);
}

#[test]
fn a_network_that_falls_silent_after_any_byte() {
    let swallow = |proxy: &Proxy, way, bytes| proxy.silence_after(way, bytes);
    publish_through(swallow, 40, 16);
    receive_through(swallow, 40, 16);
}

#[test]
fn a_network_that_trickles() {
    let exchange = unique("trickle");
    for way in WAYS {
        let proxy = Proxy::start(&url());
        proxy.trickle(way, Duration::from_millis(1));
        publish(proxy.url(), &exchange, "slowly").success();
        let ended = receive(proxy.url(), &exchange, "slowly").success();
        assert_eq!(ended.stdout_text(), "slowly\n");
        // Something comes all the time, and still it takes too long.
        proxy.trickle(way, Duration::from_millis(10));
        let limited = impatient(proxy.url());
        for ended in [publish(&limited, &exchange, "m"), receive(&limited, &exchange, "m")] {
            let ended = ended.fails_with(69, &["within the connection timeout"]);
            assert!(ended.elapsed < Duration::from_secs(3), "{ended:?}");
        }
    }
}

/// Numbered lines through this network while `disturb` is done to it; none may be lost.
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

/// What emit-log says of a lost connection.
const LOST: &str = "; trying again";

#[test]
fn no_line_is_lost_in_a_network_that_resets_connections() {
    let proxy = Proxy::start(&url());
    assert_lines_survive(proxy.url(), &proxy, |proxy, _| proxy.reset());
}

#[test]
fn no_line_is_lost_when_one_direction_fails() {
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
fn a_receiver_comes_back_when_one_direction_fails() {
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
fn a_broker_that_stands_still() {
    let broker = Broker::start();
    let url = impatient(broker.url());
    let emit = |args: &[&str]| emit_log().args(["-u", &url]).args(args);
    let receive = || receive_logs().args(["-r", "-u", &url]);

    // Before it is connected to: the kernel still takes connections for it.
    emit(&["hello"]).run().success();
    broker.freeze();
    for tool in [emit(&["hello"]), receive()] {
        let ended = tool.run().fails_with(69, &["log in to", "no answer within"]);
        assert!(ended.elapsed < Duration::from_secs(3), "{ended:?}");
    }
    broker.thaw();

    // While nothing flows.
    let receiver = receive().start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit(&["-l"]).stdin(reader).start();
    writeln!(writer, "first").unwrap();
    receiver.wait_for_stdout(b"first\n");
    broker.freeze();
    let frozen = Instant::now();
    receiver.wait_for_stderr("; subscribing again\n", 1);
    emitter.wait_for_stderr("trying again", 1);
    // Two heartbeats, and the check for them.
    assert!(frozen.elapsed() < Duration::from_secs(4), "{:?}", frozen.elapsed());
    broker.thaw();
    receiver.wait_for_stderr(" [!] Subscribed again after ", 1);
    writeln!(writer, "second").unwrap();
    receiver.wait_for_stdout(b"first\nsecond\n");
    drop(writer);
    emitter.wait().success();

    // While lines flow.
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

    // While they say goodbye.
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit(&["-l"]).stdin(reader).start();
    writeln!(writer, "last").unwrap();
    wait_until("it is there", || receiver.stdout_so_far().ends_with(b"last\n"));
    wait_until("it is confirmed", || {
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
