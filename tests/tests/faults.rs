//! Brokers that are killed, cut connections and alarms: no message that `emit-log` reports as confirmed is lost. Each
//! test has a node of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use amiquip::{
    AmqpValue, Channel, Connection, Delivery, ExchangeDeclareOptions, ExchangeType, FieldTable,
};
use amiquip::{QueueDeclareOptions, QueueDeleteOptions};
use logs_tests::{Broker, Proxy, TempFile, emit_log, receive_logs, wait_until};
use rustix::process::Signal;

/// A durable queue bound to the durable exchange `logs`.
const QUEUE: &str = "keep";

fn with_channel<T>(broker: &Broker, work: impl FnOnce(&Channel) -> T) -> T {
    let mut connection = Connection::insecure_open(broker.url()).unwrap();
    let channel = connection.open_channel(None).unwrap();
    work(&channel)
}

fn bind_a_durable_queue(broker: &Broker) {
    with_channel(broker, |channel| {
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel.exchange_declare(ExchangeType::Fanout, "logs", durable).unwrap();
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(QUEUE, durable).unwrap();
        channel.queue_bind(QUEUE, "logs", "", FieldTable::new()).unwrap();
    });
    broker.sync();
}

/// Removes all messages from the queue. Returns the number in the message_id and the body of each.
fn take_all(broker: &Broker) -> Vec<(u64, Vec<u8>)> {
    with_channel(broker, |channel| {
        let get = || channel.basic_get(QUEUE, true).unwrap();
        let number = |delivery: &Delivery| {
            let id = delivery.properties.message_id().clone().unwrap();
            id.rsplit_once('/').unwrap().1.parse().unwrap()
        };
        let messages = std::iter::from_fn(|| get().map(|got| got.delivery));
        let all = messages.map(|delivery| (number(&delivery), delivery.body)).collect();
        channel.queue_delete(QUEUE, QueueDeleteOptions::default()).unwrap();
        all
    })
}

/// Asserts that every line arrived, and in order if repetitions are ignored.
fn assert_complete(messages: &[(u64, Vec<u8>)], lines: u64) {
    let mut seen = BTreeMap::new();
    let mut last = 0;
    for (number, body) in messages {
        assert_eq!(String::from_utf8_lossy(body), format!("line {number}"));
        if seen.insert(*number, ()).is_none() {
            assert!(*number > last, "{number} comes first after {last}");
            last = *number;
        }
    }
    let missing: Vec<_> = (1..=lines).filter(|number| !seen.contains_key(number)).collect();
    assert!(missing.is_empty(), "{} lost, from {:?}", missing.len(), missing.first());
}

/// Writes numbered lines at full speed. Calls `at` with the number of each line before it is written.
fn feed(mut pipe: impl Write, lines: u64, mut at: impl FnMut(u64)) {
    for number in 1..=lines {
        at(number);
        writeln!(pipe, "line {number}").unwrap();
    }
}

/// Publishes lines while `fault` disturbs the broker at some of them. Asserts that no line is lost.
fn assert_nothing_is_lost(fault: impl Fn(&Broker, u64)) {
    const LINES: u64 = 30_000;
    let broker = Broker::start();
    bind_a_durable_queue(&broker);
    let (reader, writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-u", broker.url(), "-l", "--durable"]).stdin(reader).start();
    feed(writer, LINES, |number| fault(&broker, number));
    let ended = emitter.wait().success();
    assert!(ended.stderr_text().contains(" again; "), "{ended:?}");
    assert_complete(&take_all(&broker), LINES);
}

#[test]
fn no_line_is_lost_when_the_broker_is_killed() {
    assert_nothing_is_lost(|broker, number| {
        if number % 10_000 == 0 {
            broker.kill();
            broker.restart();
        }
    });
}

#[test]
fn no_line_is_lost_when_connections_are_closed() {
    assert_nothing_is_lost(|broker, number| {
        if number % 7_000 == 0 {
            broker.ctl(["close_all_connections", "for a test"]);
        }
    });
}

#[test]
fn a_broker_that_does_not_return_ends_it_with_the_counts() {
    const LINES: u64 = 200_000;
    let broker = Broker::start();
    let lines: String = (1..=LINES).map(|number| format!("line {number}\n")).collect();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter =
        emit_log().args(["-u", broker.url(), "-l", "--retry", "2s"]).stdin(reader).start();
    let (some, rest) = lines.split_at(lines.len() / 10);
    let rest = rest.to_string();
    writer.write_all(some.as_bytes()).unwrap();
    let killed = Instant::now();
    broker.kill();
    let feeder = thread::spawn(move || writer.write_all(rest.as_bytes()));
    let ended = emitter.wait().exits_with(69);
    assert!(killed.elapsed() >= Duration::from_secs(2), "{ended:?}");
    assert!(killed.elapsed() < Duration::from_secs(15), "{ended:?}");
    // The remaining lines do not fit into a pipe, so the producer gets a broken pipe.
    assert!(feeder.join().unwrap().is_err());
    let stderr = ended.stderr_text();
    let last = stderr.lines().last().unwrap();
    let counts: Vec<u64> = last.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
    assert!(last.contains("confirmed") && last.contains("in doubt"), "{last}");
    assert!(counts[0] + counts[1] <= LINES && counts[0] > 0, "{last}");
}

#[test]
fn a_single_message_survives_a_restart_of_the_broker() {
    let broker = Broker::start();
    broker.kill();
    let emitter = emit_log().args(["-u", broker.url(), "--retry", "60s", "patience"]).start();
    wait_until("the first attempt has failed", || emitter.stderr_so_far().contains("trying again"));
    broker.restart();
    assert_eq!(emitter.wait().success().stdout_text(), " [x] Sent \"patience\"\n");
}

#[test]
fn an_idle_emitter_survives_many_lost_connections() {
    let broker = Broker::start();
    let receiver = receive_logs().args(["-u", broker.url(), "--durable", "-n", "1", "-q"]);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let args = ["-u", broker.url(), "-l", "--durable", "--retry", "1s", "-v"];
    let emitter = emit_log().args(args).stdin(reader).start();
    for losses in 1..=3 {
        broker.ctl(["close_all_connections", "for a test"]);
        wait_until("the emitter has reconnected", || {
            let connected = emitter.stderr_so_far().matches(" again; ").count();
            connected == losses && broker.ctl(["list_connections", "pid"]).contains('<')
        });
        // Longer than --retry.
        thread::sleep(Duration::from_millis(1100));
    }
    let receiver = receiver.start();
    wait_until("the receiver is bound", || broker.ctl(["list_bindings"]).contains("amq.gen-"));
    writer.write_all(b"still here\n").unwrap();
    assert_eq!(receiver.wait().success().stdout_text(), " [x] \"still here\"\n");
    drop(writer);
    emitter.wait().success();
}

#[test]
fn without_confirms_a_lost_connection_is_an_error() {
    let broker = Broker::start();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-u", broker.url(), "-l", "--no-confirm"]).stdin(reader).start();
    let receiver = receive_logs().args(["-u", broker.url()]).start().ready();
    writer.write_all(b"line\n").unwrap();
    receiver.wait_for_stdout(b" [x] \"line\"\n");
    broker.ctl(["close_all_connections", "for a test"]);
    let parts = ["1 sent without confirmation, 1 in doubt", "CONNECTION_FORCED - for a test"];
    emitter.wait().fails_with(69, &parts);
}

#[test]
fn without_confirms_unanswered_messages_are_in_doubt() {
    const LINES: u64 = 3000;
    let broker = Broker::start();
    let proxy = Proxy::start(broker.url());
    let (reader, mut writer) = std::io::pipe().unwrap();
    let args = ["-u", proxy.url(), "-l", "--no-confirm", "--retry", "5s"];
    let emitter = emit_log().args(args).stdin(reader).start();
    let receiver = receive_logs().args(["-u", broker.url()]).start().ready();
    writeln!(writer, "line").unwrap();
    receiver.wait_for_stdout(b" [x] \"line\"\n");
    // Messages sent from here on do not arrive.
    proxy.stall();
    (1..LINES).for_each(|_| writeln!(writer, "line").unwrap());
    wait_until("everything is read", || rustix::io::ioctl_fionread(&writer).unwrap() == 0);
    drop(writer);
    let ended = emitter.wait().exits_with(69);
    let expected = format!("{LINES} sent without confirmation, {LINES} in doubt: ");
    assert!(ended.stderr_text().contains(&expected), "{ended:?}");
}

#[test]
fn a_signal_ends_an_idle_emitter_without_a_broker_at_once() {
    let broker = Broker::start();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let args = ["-u", broker.url(), "-l", "--retry", "forever"];
    let emitter = emit_log().args(args).stdin(reader).start();
    let receiver = receive_logs().args(["-u", broker.url(), "-q"]).start();
    wait_until("the receiver is bound", || broker.ctl(["list_bindings"]).contains("amq.gen-"));
    writeln!(writer, "line").unwrap();
    receiver.wait_for_stdout(b" [x] \"line\"\n");
    broker.kill();
    emitter.wait_for_stderr("Connection refused", 1);
    let asked = Instant::now();
    emitter.signal(Signal::TERM);
    let ended = emitter.wait();
    assert!(asked.elapsed() < Duration::from_secs(1), "{ended:?}");
    assert_eq!(ended.signal(), Some(Signal::TERM.as_raw()), "{ended:?}");
    assert!(ended.stderr_text().contains("SIGTERM: 1 confirmed, 0 in doubt\n"), "{ended:?}");
}

#[test]
fn only_lines_retry_the_first_connection() {
    let broker = Broker::start();
    broker.kill();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-u", broker.url(), "-l"]).stdin(reader).start();
    emitter.wait_for_stderr("Connection refused", 1);
    emitter.wait_for_stderr("; trying again\n", 1);
    let ended = emit_log().args(["-u", broker.url()]).run().exits_with(69);
    assert!(ended.elapsed < Duration::from_secs(2), "{ended:?}");
    let input = TempFile::with("input", b"line\n");
    let input = std::fs::File::open(input.path()).unwrap();
    let at_once = emit_log().args(["-u", broker.url(), "-l", "--retry", "0s"]).stdin(input).run();
    assert!(at_once.exits_with(69).elapsed < Duration::from_secs(2));
    // The producer is not ended.
    writeln!(writer, "line").unwrap();
    broker.restart();
    drop(writer);
    let ended = emitter.wait().success();
    assert!(ended.stderr_text().lines().count() == 1, "{ended:?}");
}

/// The queue has room for one message, and nacks others until that one is removed.
#[test]
fn only_nacked_messages_are_sent_again() {
    const LINES: u64 = 5;
    let broker = Broker::start();
    let mut arguments = FieldTable::new();
    arguments.insert("x-max-length".into(), AmqpValue::LongInt(1));
    arguments.insert("x-overflow".into(), AmqpValue::LongString("reject-publish".into()));
    with_channel(&broker, |channel| {
        channel.exchange_declare(ExchangeType::Fanout, "logs", Default::default()).unwrap();
        let options = QueueDeclareOptions { arguments, ..Default::default() };
        channel.queue_declare(QUEUE, options).unwrap();
        channel.queue_bind(QUEUE, "logs", "", FieldTable::new()).unwrap();

        let (reader, mut writer) = std::io::pipe().unwrap();
        let emitter = emit_log().args(["-u", broker.url(), "-l"]).stdin(reader).start();
        for number in 1..=LINES {
            writeln!(writer, "line {number}").unwrap();
        }
        drop(writer);
        let mut taken = Vec::new();
        wait_until("all lines have arrived", || {
            let got = channel.basic_get(QUEUE, true).unwrap();
            taken.extend(got.map(|got| String::from_utf8(got.delivery.body).unwrap()));
            taken.len() == LINES as usize
        });
        taken.sort();
        let lines: Vec<_> = (1..=LINES).map(|number| format!("line {number}")).collect();
        assert_eq!(taken, lines);
        let ended = emitter.wait().success();
        assert!(ended.stderr_text().contains("nacked by a queue"), "{ended:?}");
        assert!(channel.basic_get(QUEUE, true).unwrap().is_none());

        // If a queue continues to nack, emit-log gives up and reports the counts.
        let input = TempFile::with("input", b"one\ntwo\n");
        let emitter = emit_log().args(["-u", broker.url(), "-l", "--retry", "1s"]);
        let ended = emitter.stdin(std::fs::File::open(input.path()).unwrap()).run().exits_with(69);
        let stderr = ended.stderr_text();
        let last = stderr.lines().last().unwrap();
        let expected = "1 confirmed, 1 in doubt: record 2: publish to exchange 'logs': nacked";
        assert!(last.contains(expected), "{ended:?}");
    });
}

/// The queue is nearly always full, and is emptied all the time.
#[test]
fn repeated_nacks_delay_lines_and_do_not_end_it() {
    const LINES: u64 = 300;
    let broker = Broker::start();
    let mut arguments = FieldTable::new();
    arguments.insert("x-max-length".into(), AmqpValue::LongInt(20));
    arguments.insert("x-overflow".into(), AmqpValue::LongString("reject-publish".into()));
    with_channel(&broker, |channel| {
        channel.exchange_declare(ExchangeType::Fanout, "logs", Default::default()).unwrap();
        let options = QueueDeclareOptions { arguments, ..Default::default() };
        channel.queue_declare(QUEUE, options).unwrap();
        channel.queue_bind(QUEUE, "logs", "", FieldTable::new()).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let emitter = emit_log().args(["-u", broker.url(), "-l", "--retry", "2s"]);
        let emitter = emitter.stdin(reader).start();
        feed(writer, LINES, |_| {});
        let mut taken = Vec::new();
        wait_until("all lines have arrived", || {
            thread::sleep(Duration::from_millis(10));
            let got = channel.basic_get(QUEUE, true).unwrap();
            taken.extend(got.map(|got| String::from_utf8(got.delivery.body).unwrap()));
            taken.len() == LINES as usize
        });
        let ended = emitter.wait().success();
        assert!(ended.elapsed > Duration::from_secs(2), "longer than --retry: {ended:?}");
        assert_eq!(ended.stderr_text().matches("nacked by a queue").count(), 1, "{ended:?}");
        taken.sort_by_key(|line| line.strip_prefix("line ").and_then(|n| n.parse::<u64>().ok()));
        let lines: Vec<_> = (1..=LINES).map(|number| format!("line {number}")).collect();
        assert_eq!(taken, lines);
    });
}

/// One queue accepts every message. The other one is full and nacks.
#[test]
fn counts_are_right_if_the_broker_is_lost_after_nacks() {
    const ROOM: u64 = 100;
    const LINES: u64 = 300;
    let broker = Broker::start();
    let (stderr, sent) = with_channel(&broker, |channel| {
        let mut arguments = FieldTable::new();
        arguments.insert("x-max-length".into(), AmqpValue::LongInt(ROOM as i32));
        arguments.insert("x-overflow".into(), AmqpValue::LongString("reject-publish".into()));
        channel.exchange_declare(ExchangeType::Fanout, "logs", Default::default()).unwrap();
        for (name, arguments) in [(QUEUE, FieldTable::new()), ("refusing", arguments)] {
            let options = QueueDeclareOptions { arguments, ..Default::default() };
            channel.queue_declare(name, options).unwrap();
            channel.queue_bind(name, "logs", "", FieldTable::new()).unwrap();
        }
        let (reader, writer) = std::io::pipe().unwrap();
        let emitter = emit_log().args(["-u", broker.url(), "-l", "--retry", "5s"]);
        let emitter = emitter.stdin(reader).start();
        feed(&writer, LINES, |_| {});
        emitter.wait_for_stderr("nacked by a queue", 1);
        // All nacked messages have been sent again, and wait for the next attempt.
        let (mut taken, mut since) = (0, Instant::now());
        wait_until("the message is sent again", || {
            let queue = channel.queue_declare_passive(QUEUE).unwrap();
            let now = u64::from(queue.declared_message_count().unwrap());
            if now != taken {
                (taken, since) = (now, Instant::now());
            }
            taken > LINES && since.elapsed() > Duration::from_millis(50)
        });
        emitter.signal(Signal::STOP);
        let get = || channel.basic_get(QUEUE, true).unwrap();
        let sent: BTreeSet<_> = std::iter::from_fn(|| get().map(|got| got.delivery.body)).collect();
        broker.kill();
        emitter.signal(Signal::CONT);
        (emitter.wait().exits_with(69).stderr_text(), sent.len() as u64)
    });
    let last = stderr.lines().last().unwrap();
    let counts: Vec<u64> = last.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
    assert_eq!(counts[0] + counts[1], sent, "confirmed or in doubt: {stderr}");
    assert!(counts[0] >= ROOM, "{stderr}");
}

#[test]
fn an_alarm_delays_lines_and_loses_none() {
    const LINES: u64 = 20_000;
    let broker = Broker::start();
    let lines: String = (1..=LINES).map(|number| format!("line {number}\n")).collect();
    let receiver = receive_logs().args(["-u", broker.url(), "-r", "-n", &LINES.to_string()]);
    let receiver = receiver.start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-u", broker.url(), "-l"]).stdin(reader).start();
    writer.write_all(b"line 1\n").unwrap();
    wait_until("the first line is received", || !receiver.stdout_so_far().is_empty());
    broker.ctl(["set_vm_memory_high_watermark", "0.0000001"]);
    let rest = lines["line 1\n".len()..].to_string();
    let feeder = thread::spawn(move || writer.write_all(rest.as_bytes()).unwrap());
    wait_until("the alarm is reported", || {
        emitter.stderr_so_far().contains("blocked by the broker: low on memory")
    });
    assert!(receiver.stdout_so_far().len() < lines.len());
    broker.ctl(["set_vm_memory_high_watermark", "0.6"]);
    feeder.join().unwrap();
    let ended = emitter.wait().success();
    assert!(ended.stderr_text().contains("unblocked"), "{ended:?}");
    assert_eq!(receiver.wait().success().stdout_text(), lines);
}

#[test]
fn without_confirms_it_waits_for_the_end_of_an_alarm() {
    let broker = Broker::start();
    let receiver = receive_logs().args(["-u", broker.url(), "-n", "1"]).start().ready();
    broker.ctl(["set_vm_memory_high_watermark", "0.0000001"]);
    let url = format!("{}?connection_timeout=1000", broker.url());
    let emit = || emit_log().args(["-u", &url, "--no-confirm", "hi"]);
    let ended = emit().args(["--retry", "5s"]).run();
    let stderr = ended.exits_with(69).stderr_text();
    let lines: Vec<_> = stderr.lines().collect();
    assert_eq!(lines[0], "emit-log: blocked by the broker: low on memory");
    let expected =
        "emit-log: 1 sent without confirmation, 1 in doubt: publish to exchange 'logs': 127.0.0.1:";
    assert!(lines[1].starts_with(expected), "{stderr}");
    let expected = " has not read all messages within 5s; it blocks publishers: low on memory (--retry sets how long to wait)";
    assert!(lines[1].ends_with(expected), "{stderr}");
    assert_eq!(lines.len(), 2, "{stderr}");
    let emitter = emit().start();
    emitter.wait_for_stderr("blocked by the broker: low on memory\n", 1);
    broker.ctl(["set_vm_memory_high_watermark", "0.6"]);
    emitter.wait().success();
    assert!(receiver.wait().success().stdout_text().contains("hi"));
}

#[test]
fn a_signal_during_an_alarm_ends_it_with_the_counts() {
    let broker = Broker::start();
    broker.ctl(["set_vm_memory_high_watermark", "0.0000001"]);
    let input = TempFile::with("input", &b"line\n".repeat(5_000));
    let emitter = emit_log().args(["-u", broker.url(), "-l"]);
    let emitter = emitter.stdin(std::fs::File::open(input.path()).unwrap()).start();
    wait_until("the alarm is reported", || {
        emitter.stderr_so_far().contains("blocked by the broker")
    });
    let signalled = Instant::now();
    emitter.signal(Signal::INT);
    let ended = emitter.wait();
    assert!(signalled.elapsed() < Duration::from_secs(6), "{ended:?}");
    assert_eq!(ended.signal(), Some(Signal::INT.as_raw()), "{ended:?}");
    let stderr = ended.stderr_text();
    assert!(
        stderr.contains("stopped by SIGINT: 0 confirmed, 2000 in doubt, 3000 read and not sent"),
        "{stderr}"
    );
}

#[test]
fn a_refused_message_is_named_after_the_others_are_confirmed() {
    let config = TempFile::with("rabbitmq.conf", b"max_message_size = 1000\n");
    let broker = Broker::start_with(config.path());
    let receiver = receive_logs().args(["-u", broker.url(), "-r"]).start().ready();
    let input = [&b"small\n".repeat(50)[..], &b"x".repeat(1001), b"\nnever sent\n"].concat();
    let input = TempFile::with("input", &input);
    let emitter = emit_log().args(["-u", broker.url(), "-l"]);
    let ended = emitter.stdin(std::fs::File::open(input.path()).unwrap()).run().exits_with(65);
    let stderr = ended.stderr_text();
    let last = stderr.lines().last().unwrap();
    for part in ["50 confirmed, 0 in doubt", "record 51", "PRECONDITION_FAILED - message size 1001"]
    {
        assert!(last.contains(part), "{part:?}: {ended:?}");
    }
    // Messages before the refused one may have been sent twice, but none is missing.
    wait_until("everything is received", || receiver.stdout_so_far().len() >= 300);
    let received = receiver.stop().success().stdout_text();
    assert!(received.lines().all(|line| line == "small"), "{received}");
}

#[test]
fn a_batch_that_is_too_large_is_split() {
    let config = TempFile::with("rabbitmq.conf", b"max_message_size = 1000\n");
    let broker = Broker::start_with(config.path());
    let receiver = receive_logs().args(["-u", broker.url(), "-r"]).start().ready();
    let lines: String = (1..=2000).map(|number| format!("line {number}\n")).collect();
    let input = TempFile::with("input", lines.as_bytes());
    let batch = || emit_log().args(["-u", broker.url(), "-l", "--batch"]);
    batch().stdin(std::fs::File::open(input.path()).unwrap()).run().success();
    receiver.wait_for_stdout(lines.as_bytes());

    let large = [lines.as_bytes(), &b"x".repeat(1001), b"\nnever sent\n"].concat();
    let input = TempFile::with("input", &large);
    let ended = batch().stdin(std::fs::File::open(input.path()).unwrap()).run().exits_with(65);
    let stderr = ended.stderr_text();
    let last = stderr.lines().last().unwrap();
    let expected = "2000 confirmed, 0 in doubt, 2 read and not sent: record 2001: ";
    assert!(last.contains(expected), "{last}");
    receiver.wait_for_stdout(lines.repeat(2).as_bytes());

    // The first record is too large.
    let input = TempFile::with("input", &large[lines.len()..]);
    let emitter = emit_log().args(["-u", broker.url(), "-l"]);
    let ended = emitter.stdin(std::fs::File::open(input.path()).unwrap()).run().exits_with(65);
    let expected = "0 confirmed, 0 in doubt, 2 read and not sent: record 1: ";
    assert!(ended.stderr_text().contains(expected), "{ended:?}");
    receiver.stop().success();
}
