//! After any fault of broker or network, `receive-logs` reconnects and reports what it has missed.

use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{self, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use logs_tests::{
    BANNER, Broker, Ended, Message, Peer, Proxy, Running, ScriptedBroker, TempFile, Tool, Way,
    binary, emit_log, rabbitmqctl, receive_logs, terminal, unique, url, url_with, wait_until,
};
use rustix::process::Signal;

const AGAIN: &str = " [!] Subscribed again after ";

/// The numbers of the lines that a receiver has written. Asserts that they are whole and in order.
fn numbers(ended: &Ended) -> Vec<u64> {
    let text = ended.stdout_text();
    assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
    let number = |line: &str| line.strip_prefix("line ").and_then(|n| n.parse().ok()).unwrap();
    let numbers: Vec<u64> = text.lines().map(number).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "repeated, or out of order");
    numbers
}

/// The gaps between the written lines.
fn gaps(numbers: &[u64]) -> Vec<(u64, u64)> {
    let pairs = numbers.windows(2).filter(|pair| pair[1] != pair[0] + 1);
    pairs.map(|pair| (pair[0] + 1, pair[1] - 1)).collect()
}

/// The gaps that a receiver reports.
fn reported(ended: &Ended) -> Vec<(u64, u64)> {
    let stderr = ended.stderr_text();
    let lines = stderr.lines().filter_map(|line| line.strip_prefix(" [!] missed "));
    let ranges = lines.map(|line| {
        let (count, rest) = line.split_once(" message").unwrap();
        let (_, range) = rest.trim_end_matches(')').split_once('(').unwrap();
        let (first, last) = range.split_once(" to ").unwrap_or((range, range));
        let (first, last) = (first.parse().unwrap(), last.parse().unwrap());
        assert_eq!(count.parse::<u64>().unwrap(), last - first + 1, "{line}");
        (first, last)
    });
    ranges.collect()
}

fn raw_receiver(url: &str) -> Running {
    receive_logs().args(["-r", "-u", url]).start().ready()
}

/// A receiver that connects through `proxy`, with a heartbeat every second.
fn receiver_through(proxy: &Proxy, exchange: &str, parameters: &str) -> Running {
    let through = format!("{}?heartbeat=1{parameters}", proxy.url());
    receive_logs().args(["-u", &through, "-e", exchange]).start().ready()
}

/// The duration of the outage that a receiver reports.
fn seconds_away(receiver: &Running) -> f64 {
    let stderr = receiver.stderr_so_far();
    let (_, seconds) = stderr.rsplit_once(AGAIN).unwrap();
    seconds.split_once(' ').unwrap().0.parse().unwrap()
}

/// Asserts that a message published now is received, and stops the receiver.
fn assert_receives(receiver: Running, exchange: &str) {
    emit_log().args(["-e", exchange, "after"]).run().success();
    receiver.wait_for_stdout(b" [x] \"after\"\n");
    receiver.stop().success();
}

/// Publishes numbered lines at full speed while `fault` disturbs the broker. Asserts that the receivers reconnect,
/// and write each line once except those in the gaps that they report.
fn assert_all_but_gaps(fault: impl FnOnce(&Broker, &dyn Fn())) {
    let broker = Broker::start();
    let receivers = [(); 3].map(|()| raw_receiver(broker.url()));
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-u", broker.url(), "-l"]).stdin(reader).start();
    let (end, is_ended) = mpsc::channel::<()>();
    let feeder = thread::spawn(move || {
        let numbers = (1..).take_while(|_| is_ended.try_recv() == Err(TryRecvError::Empty));
        numbers.for_each(|number: u64| writeln!(writer, "line {number}").unwrap());
    });
    let flows = || {
        let before: Vec<_> = receivers.iter().map(|r| r.stdout_so_far().len()).collect();
        wait_until("lines flow", || {
            let now = receivers.iter().map(|r| r.stdout_so_far().len());
            now.zip(&before).all(|(now, before)| now > before + 10_000)
        });
    };
    flows();
    fault(&broker, &flows);
    receivers.iter().for_each(|receiver| receiver.wait_for_stderr(AGAIN, 1));
    flows();
    drop(end);
    feeder.join().unwrap();
    emitter.wait().success();
    for receiver in receivers {
        let ended = receiver.stop().success();
        let numbers = numbers(&ended);
        assert_eq!(gaps(&numbers), reported(&ended), "{}", ended.stderr_text());
        assert_eq!(numbers[0], 1);
    }
}

#[test]
fn reconnects_after_a_kill_of_the_broker() {
    assert_all_but_gaps(|broker, _| {
        broker.kill();
        broker.restart();
    });
}

#[test]
fn reconnects_after_a_stop_of_the_broker() {
    assert_all_but_gaps(|broker, _| {
        broker.ctl(["stop_app"]);
        broker.ctl(["start_app"]);
    });
}

#[test]
fn reconnects_after_closed_connections_and_deleted_queues() {
    assert_all_but_gaps(|broker, flows| {
        broker.ctl(["close_all_connections", "for a test"]);
        flows();
        for queue in broker.ctl(["list_queues", "name"]).lines().filter(|q| q.starts_with("amq.")) {
            broker.ctl(["delete_queue", queue]);
        }
    });
}

#[test]
fn reconnects_after_a_silent_network() {
    let exchange = unique("silent");
    let proxy = Proxy::start(&url());
    let receiver = receiver_through(&proxy, &exchange, "");
    let started = Instant::now();
    proxy.stall();
    receiver.wait_for_stderr("; subscribing again\n", 1);
    assert!(started.elapsed() < Duration::from_secs(5), "more than two heartbeats");
    assert!(receiver.stderr_so_far().contains("missed heartbeats"));
    emit_log().args(["-e", &exchange, "lost"]).run().success();
    proxy.resume();
    receiver.wait_for_stderr(AGAIN, 1);
    assert!(seconds_away(&receiver) >= 1.0, "counts from the last received byte");
    assert_receives(receiver, &exchange);
}

#[test]
fn a_stopped_receiver_counts_the_outage_from_the_stop() {
    let exchange = unique("stopped");
    let with_heartbeat = format!("{}?heartbeat=1", url());
    let receiver = receive_logs().args(["-u", &with_heartbeat, "-e", &exchange]).start().ready();
    let stopped = Instant::now();
    receiver.signal(Signal::STOP);
    // When it continues, it detects at once that the broker has closed the connection.
    wait_until("its queue is deleted", || {
        emit_log().args(["-m", "-e", &exchange, "test"]).run().status.code() == Some(67)
    });
    let seconds = stopped.elapsed().as_secs_f64();
    receiver.signal(Signal::CONT);
    receiver.wait_for_stderr(AGAIN, 1);
    let reported = seconds_away(&receiver);
    assert!(reported > seconds - 1.5 && seconds > 2.0, "{reported} s instead of {seconds} s");
    receiver.stop().success();
}

#[test]
fn a_frozen_attempt_does_not_block_the_next() {
    let exchange = unique("hangs");
    let proxy = Proxy::start(&url());
    let receiver = receiver_through(&proxy, &exchange, "&connection_timeout=600000");
    for way in [Way::ToBroker, Way::FromBroker] {
        proxy.silence_after(way, 0);
    }
    receiver.wait_for_stderr("; subscribing again\n", 1);
    let before = proxy.swallowed(Way::ToBroker);
    wait_until("an attempt is swallowed", || proxy.swallowed(Way::ToBroker) > before);
    proxy.resume();
    receiver.wait_for_stderr(AGAIN, 1);
    // The broker closes the frozen connection later, after ten silent seconds.
    let stderr = receiver.stderr_so_far();
    assert!(!stderr.contains("trying again"), "{stderr}");
    assert_receives(receiver, &exchange);
}

#[test]
fn heartbeats_work_if_the_broker_wants_none() {
    let config = TempFile::with("rabbitmq.conf", b"heartbeat = 0\n");
    let broker = Broker::start_with(config.path());
    let proxy = Proxy::start(broker.url());
    let through = format!("{}?heartbeat=1", proxy.url());
    let receiver = receive_logs().args(["-u", &through]).start().ready();
    proxy.stall();
    let started = Instant::now();
    receiver.wait_for_stderr("missed heartbeats", 1);
    assert!(started.elapsed() < Duration::from_secs(5));
    proxy.resume();
    receiver.wait_for_stderr(AGAIN, 1);
    receiver.stop().success();
}

#[test]
fn a_deleted_user_ends_it_after_the_last_message() {
    let (exchange, user) = (unique("refused"), unique("user"));
    rabbitmqctl(["add_user", &user, "secret"]);
    rabbitmqctl(["set_permissions", &user, ".*", ".*", ".*"]);
    let url = url_with(&user, "secret", "%2f");
    let receiver =
        receive_logs().args(["-e", &exchange, "-u", &url, "--retry", "1s"]).start().ready();
    emit_log().args(["-e", &exchange, "before"]).run().success();
    receiver.wait_for_stdout(b" [x] \"before\"\n");
    // This closes the connections of the user as well.
    rabbitmqctl(["delete_user", &user]);
    let ended = receiver.wait().exits_with(77);
    let stderr = ended.stderr_text();
    let (_, lines) = stderr.split_once(BANNER).unwrap();
    let lines: Vec<_> = lines.lines().collect();
    assert!(lines[0].starts_with(" [!] receive from 127.0.0.1:"), "{ended:?}");
    assert!(lines[0].ends_with("; subscribing again"), "{ended:?}");
    assert!(lines[1].ends_with("; trying again"), "{ended:?}");
    assert!(lines[2].starts_with("receive-logs: log in to "), "{ended:?}");
    assert_eq!(lines.len(), 3, "{ended:?}");
}

#[test]
fn a_deleted_exchange_is_bound_again() {
    let (exchange, peer) = (unique("deleted"), Peer::connect());
    let receiver = receive_logs().args(["-e", &exchange]).start().ready();
    peer.channel().exchange_delete(&exchange, false).unwrap();
    receiver.wait_for_stderr("no exchange", 1);
    receiver.wait_for_stderr(AGAIN, 1);
    emit_log().args(["-e", &exchange, "declared by the receiver"]).run().success();
    receiver.wait_for_stdout(b" [x] \"declared by the receiver\"\n");

    peer.channel().exchange_delete(&exchange, false).unwrap();
    wait_until("the queue is bound to another exchange of that name", || {
        emit_log().args(["-e", &exchange, "again"]).run().success();
        receiver.stdout_so_far().ends_with(b"again\"\n")
    });
    receiver.stop().success();
}

#[test]
fn retry_limits_the_outage() {
    let broker = Broker::start();
    let receiver = receive_logs().args(["-u", broker.url(), "--retry", "1s"]).start().ready();
    let killed = Instant::now();
    broker.kill();
    let ended = receiver.wait().exits_with(69);
    assert!(killed.elapsed() >= Duration::from_secs(1), "{ended:?}");
    assert!(ended.stderr_text().contains("Connection refused"), "{ended:?}");
}

#[test]
fn signals_and_time_limits_end_it_during_an_outage() {
    let broker = Broker::start();
    let start =
        |options: &[&str]| receive_logs().args(["-u", broker.url()]).args(options).start().ready();
    let signalled = start(&[]);
    let limited = start(&["-n", "1", "--timeout", "8s"]);
    let idle = start(&["--idle-timeout", "8s"]);
    broker.kill();
    for receiver in [&signalled, &limited, &idle] {
        receiver.wait_for_stderr("Connection refused", 1);
    }
    let asked = Instant::now();
    signalled.stop().success();
    assert!(asked.elapsed() < Duration::from_secs(1));
    limited.wait().exits_with(75);
    let idle = idle.wait().exits_with(69).stderr_text();
    assert!(idle.ends_with("; not back within the time limit\n"), "{idle}");
}

#[test]
fn a_frozen_broker_does_not_delay_a_signal() {
    let exchange = unique("hangs");
    let proxy = Proxy::start(&url());
    let receiver = receiver_through(&proxy, &exchange, "");
    proxy.stall();
    receiver.wait_for_stderr("; subscribing again\n", 1);
    let asked = Instant::now();
    receiver.stop().success();
    assert!(asked.elapsed() < Duration::from_secs(1));
}

#[test]
fn with_passive_it_waits_for_the_exchange() {
    let broker = Broker::start();
    emit_log().args(["-u", broker.url(), "hello"]).run().success();
    let receiver = receive_logs().args(["-u", broker.url(), "--passive"]).start().ready();
    broker.kill();
    broker.restart();
    receiver.wait_for_stderr("no exchange 'logs'", 1);
    emit_log().args(["-u", broker.url(), "hello"]).run().success();
    receiver.wait_for_stderr(AGAIN, 1);
    emit_log().args(["-u", broker.url(), "again"]).run().success();
    receiver.wait_for_stdout(b" [x] \"again\"\n");
    receiver.stop().success();
}

/// Prevents a process from opening more file descriptors.
fn forbid_new_descriptors(process: &Running) {
    let descriptors = format!("/proc/{}/fd", process.id());
    let is_free = |number: &u32| !Path::new(&descriptors).join(number.to_string()).is_symlink();
    let limit = format!("--nofile={}", (0..).find(is_free).unwrap());
    Tool::new("prlimit").args(["--pid", &process.id().to_string(), &limit]).run().success();
}

#[test]
fn a_lost_connection_frees_its_descriptors_for_the_next() {
    let broker = Broker::start();
    let receiver = raw_receiver(broker.url());
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-u", broker.url(), "-l"]).stdin(reader).start();
    writeln!(writer, "before").unwrap();
    receiver.wait_for_stdout(b"before\n");
    for process in [&receiver, &emitter] {
        forbid_new_descriptors(process);
    }
    broker.ctl(["close_all_connections", "for a test"]);
    receiver.wait_for_stderr(AGAIN, 1);
    writeln!(writer, "after").unwrap();
    receiver.wait_for_stdout(b"before\nafter\n");
    drop(writer);
    emitter.wait().success();
    receiver.stop().success();
}

/// Creates a user with all permissions. Returns its name and the URL.
fn new_user() -> (String, String) {
    let user = unique("user");
    rabbitmqctl(["add_user", &user, "secret"]);
    rabbitmqctl(["set_permissions", &user, ".*", ".*", ".*"]);
    let url = url_with(&user, "secret", "%2f");
    (user, url)
}

/// Feeds an emitter until `fault` ends it with status 77. Asserts that every line is counted, and that as many lines
/// are confirmed as have arrived.
fn assert_counts_after(name: &str, fault: impl FnOnce(&str)) {
    let (user, url) = new_user();
    let exchange = unique(name);
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter =
        emit_log().args(["-l", "-e", &exchange, "-u", &url, "--retry", "1s"]).stdin(reader);
    let mut emitter = emitter.start();
    let arrived = || receiver.stdout_so_far().iter().filter(|byte| **byte == b'\n').count();
    let mut fed = 100;
    (1..=fed).for_each(|number| writeln!(writer, "line {number}").unwrap());
    wait_until("the lines arrive", || arrived() == fed);
    fault(&user);
    let mut last = Instant::now();
    wait_until("the emitter exits", || {
        // The broker caches the permissions of a channel until the channel is idle for about a second.
        if last.elapsed() > Duration::from_millis(1500) {
            // The emitter may have just exited.
            fed += usize::from(writeln!(writer, "line {}", fed + 1).is_ok());
            last = Instant::now();
        }
        !emitter.is_running()
    });
    let stderr = emitter.wait().exits_with(77).stderr_text();
    let count = |what: &str| {
        let (before, _) = stderr.split_once(what).unwrap_or(("0", ""));
        let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next();
        digits.unwrap().parse::<usize>().unwrap()
    };
    let (confirmed, in_doubt) = (count(" confirmed"), count(" in doubt"));
    assert_eq!(arrived(), confirmed, "{stderr}");
    let read = confirmed + in_doubt + count(" read and not sent");
    assert!(read == fed || read + 1 == fed, "{fed}, the last of them perhaps unread: {stderr}");
    receiver.stop().success();
}

#[test]
fn an_emitter_with_a_revoked_permission_has_right_counts() {
    assert_counts_after("revoked", |user| {
        rabbitmqctl(["set_permissions", user, ".*", "^$", ".*"]);
    });
}

#[test]
fn an_emitter_with_a_deleted_user_has_right_counts() {
    assert_counts_after("deleted", |user| drop(rabbitmqctl(["delete_user", user])));
}

#[test]
fn a_revoked_permission_ends_a_receiver_after_the_write() {
    let (user, url) = new_user();
    let exchange = unique("revoked");
    let receiver = receive_logs().args(["-r", "-e", &exchange, "-u", &url, "--retry", "1s"]);
    let receiver = receiver.start().ready();
    rabbitmqctl(["set_permissions", &user, "^$", "^$", "^$"]);
    // Messages are still delivered until the receiver binds its queue again.
    emit_log().args(["-e", &exchange, "after"]).run().success();
    receiver.wait_for_stdout(b"after\n");
    let ended = receiver.wait().exits_with(77);
    assert!(ended.stderr_text().contains("ACCESS_REFUSED"), "{ended:?}");
    assert_eq!(ended.stdout_text(), "after\n");
    rabbitmqctl(["delete_user", &user]);
}

#[test]
fn lines_of_a_deleted_exchange_are_written_or_missed() {
    let exchange = unique("deleted");
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-l", "-e", &exchange]).stdin(reader).start();
    let mut fed = 0;
    let mut feed = |count| {
        (fed + 1..=fed + count).for_each(|number| writeln!(writer, "line {number}").unwrap());
        fed += count;
        fed
    };
    let ends_with = |number: u64| {
        let last = format!("line {number}\n");
        wait_until("the last line is written", || {
            receiver.stdout_so_far().ends_with(last.as_bytes())
        });
    };
    ends_with(feed(100));
    Peer::connect().channel().exchange_delete(&exchange, false).unwrap();
    feed(100);
    wait_until("the receiver is bound again", || {
        feed(1);
        thread::sleep(Duration::from_millis(20));
        let so_far = receiver.stdout_so_far();
        so_far.iter().filter(|byte| **byte == b'\n').count() > 100
    });
    ends_with(feed(100));
    drop(writer);
    emitter.wait().success();
    let ended = receiver.stop().success();
    let numbers = numbers(&ended);
    assert_eq!(gaps(&numbers), reported(&ended), "{}", ended.stderr_text());
    assert_eq!((numbers[0], *numbers.last().unwrap()), (1, fed));
}

#[test]
fn a_terminal_counts_the_seconds_of_an_outage() {
    let broker = ScriptedBroker::start();
    let screen = TempFile::new("screen");
    let command = format!("exec {:?} -u {}", binary("receive-logs"), broker.url());
    let terminal = terminal(&command, screen.path()).env("TERM", "xterm").start();
    let shown = || String::from_utf8_lossy(&screen.read().unwrap_or_default()).into_owned();
    let wait_for = |text: &str| wait_until(text, || shown().contains(text));
    wait_for(BANNER.trim_end());
    let session = broker.accept();
    broker.go_down();
    session.cut();
    wait_for("\r\x1b[Kno broker for 1s, trying until there is one");
    wait_for("\r\x1b[Kno broker for 2s, trying until there is one");
    broker.come_back();
    let session = broker.accept();
    wait_for("Subscribed again after ");
    session.deliver(&Message::new("hi"));
    wait_for("[x] \"hi\"");
    let after = shown();
    let after = after.split_once("Subscribed again").unwrap().1;
    assert!(after.ends_with("\r\x1b[K [x] \"hi\"\r\n"), "{after:?}");
    terminal.kill();
}
