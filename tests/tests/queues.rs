//! Queues that are durable, shared, or limited.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use amiquip::AmqpProperties;
use logs_tests::{
    BANNER, Broker, Peer, Proxy, Running, TempFile, Tool, Way, emit_log, rabbitmqctl, receive_logs,
    unique, url, wait_until, wait_until_full,
};
use rustix::process::Signal;

fn on_queue(queue: &str) -> Tool {
    receive_logs().args(["-r", "-e", queue, "--queue", queue])
}

/// Publishes `line 1` to `line COUNT`.
fn emit(exchange: &str, count: u64) -> Running {
    let lines: String = (1..=count).map(|number| format!("line {number}\n")).collect();
    let input = TempFile::with("input", lines.as_bytes());
    let input = std::fs::File::open(input.path()).unwrap();
    emit_log().args(["-l", "-e", exchange]).stdin(input).start()
}

fn number(line: &str) -> u64 {
    line.strip_prefix("line ").and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{line:?}"))
}

/// The number of lines that a receiver has written.
fn count(receiver: &Running) -> u64 {
    receiver.stdout_so_far().iter().filter(|byte| **byte == b'\n').count() as u64
}

/// The number of undelivered messages in a queue. (The list of queues is some seconds old.)
fn waiting(queue: &str) -> u32 {
    let peer = Peer::connect();
    let queue = peer.channel().queue_declare_passive(queue).unwrap();
    queue.declared_message_count().unwrap()
}

fn delete(queue: &str) {
    rabbitmqctl(["delete_queue", queue]);
}

#[test]
fn messages_wait_in_a_durable_queue() {
    for kind in ["quorum", "classic"] {
        let queue = unique(kind);
        let options = ["--queue-type", kind];
        on_queue(&queue).args(options).start().ready().stop().success();
        emit_log().args(["-e", &queue, "while no receiver runs"]).run().success();
        let ended = on_queue(&queue).args(options).args(["-n", "1"]).run().success();
        assert_eq!(ended.stdout_text(), "while no receiver runs\n");
        assert_eq!(waiting(&queue), 0, "written messages are acknowledged");
        let list = rabbitmqctl(["list_queues", "name", "type", "durable", "arguments"]);
        let line = list.lines().find(|line| line.starts_with(&queue)).unwrap();
        assert!(line.contains(&format!("{kind}\ttrue")), "{line}");
        let is_unlimited = line.contains("\"x-delivery-limit\",2147483647");
        assert_eq!(is_unlimited, kind == "quorum", "{line}");
        delete(&queue);
    }
}

#[test]
fn killed_receivers_lose_nothing_and_report_repetitions() {
    const LINES: u64 = 30_000;
    const KILLS: usize = 4;
    let (queue, file) = (unique("killed"), TempFile::new("all.log"));
    let start = || on_queue(&queue).arg("-o").arg(file.path()).start().ready();
    let lines = || file.read().unwrap_or_default().iter().filter(|b| **b == b'\n').count();
    let mut receiver = start();
    let emitter = emit(&queue, LINES);
    for _ in 0..KILLS {
        let before = lines();
        wait_until("some lines are written", || lines() >= before + 5_000);
        receiver.kill();
        receiver = start();
    }
    emitter.wait().success();
    wait_until("everything is written", || {
        let text = file.read().unwrap();
        let lines: BTreeSet<_> = text.split(|byte| *byte == b'\n').collect();
        // Including the empty element after the last newline.
        lines.len() as u64 > LINES
    });
    let stderr = receiver.stop().success().stderr_text();
    let reported = stderr.lines().filter(|line| line.contains("may be repeated"));
    let reported = reported.map(|line| line.split(' ').nth(2).unwrap().parse::<usize>().unwrap());
    // Two receivers may report the same message: the second was killed before it processed the messages of the first.
    assert!((1..=2 * 2000).contains(&reported.sum::<usize>()), "{stderr}");
    let text = String::from_utf8(file.read().unwrap()).unwrap();
    let numbers: BTreeSet<_> = text.lines().map(number).collect();
    assert!(numbers.into_iter().eq(1..=LINES));
    assert!(text.lines().count() <= LINES as usize + KILLS * 2000);
    delete(&queue);
}

#[test]
fn stopped_receivers_of_a_quorum_queue_repeat_nothing() {
    const STOPS: usize = 25;
    let (queue, file) = (unique("restarted"), TempFile::new("all.log"));
    let start = || on_queue(&queue).arg("-o").arg(file.path()).start().ready();
    let size = || std::fs::metadata(file.path()).map_or(0, |metadata| metadata.len());
    let mut receiver = start();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-l", "-e", &queue]).stdin(reader).start();
    let (end, is_ended) = mpsc::channel::<()>();
    let feeder = thread::spawn(move || {
        let mut fed = 0;
        while is_ended.try_recv() == Err(TryRecvError::Empty) {
            fed += 1;
            writeln!(writer, "line {fed}").unwrap();
        }
        fed
    });
    for _ in 0..STOPS {
        let before = size();
        wait_until("lines flow", || size() > before + 50_000);
        let stderr = receiver.stop().success().stderr_text();
        assert!(!stderr.contains("missed"), "messages out of order are not missed: {stderr}");
        receiver = start();
    }
    drop(end);
    let fed = feeder.join().unwrap();
    emitter.wait().success();
    let text = || String::from_utf8(std::fs::read(file.path()).unwrap()).unwrap();
    wait_until("everything is written", || {
        text().ends_with('\n') && text().lines().collect::<BTreeSet<_>>().len() as u64 == fed
    });
    receiver.stop().success();
    let repeated = text().lines().count() as u64 - fed;
    assert_eq!(repeated, 0, "of {fed}");
    delete(&queue);
}

#[test]
fn slow_messages_are_acknowledged() {
    let (queue, file) = (unique("slow"), TempFile::new("all.log"));
    let receiver = on_queue(&queue).arg("-o").arg(file.path()).start().ready();
    let peer = Peer::connect();
    let begun = Instant::now();
    let mut sent = 0;
    while begun.elapsed() < Duration::from_secs(4) {
        sent += 1;
        peer.publish(&queue, format!("{sent}").as_bytes());
        thread::sleep(Duration::from_millis(200));
    }
    wait_until("everything is written", || {
        file.read().unwrap().ends_with(format!("{sent}\n").as_bytes())
    });
    receiver.kill();
    let again = || on_queue(&queue).args(["--idle-timeout", "1s"]).run().success();
    let repeated = again().stdout_text().lines().count();
    assert!(repeated < sent / 2, "{repeated} of {sent} again");
    delete(&queue);
}

#[test]
fn receivers_of_one_queue_share_its_messages() {
    const LINES: u64 = 10_000;
    let queue = unique("shared");
    let receivers = [(); 2].map(|()| on_queue(&queue).start().ready());
    emit(&queue, LINES).wait().success();
    wait_until("everything is written", || receivers.iter().map(count).sum::<u64>() >= LINES);
    let mut all = BTreeSet::new();
    for receiver in receivers {
        let ended = receiver.stop().success();
        assert_eq!(ended.stderr_text(), BANNER, "the last receiver knows of the others");
        let text = ended.stdout_text();
        assert!(!text.is_empty());
        for line in text.lines() {
            assert!(all.insert(number(line)), "{line} twice");
        }
    }
    assert!(all.into_iter().eq(1..=LINES));
    delete(&queue);
}

#[test]
fn a_stopped_receiver_leaves_the_rest_to_the_others() {
    const LINES: u64 = 50_000;
    let queue = unique("stopped");
    let start = || on_queue(&queue).args(["--queue-type", "classic"]).start().ready();
    let [first, second] = [(); 2].map(|()| start());
    let emitter = emit(&queue, LINES);
    wait_until("both receivers have lines", || {
        [&first, &second].iter().all(|one| count(one) > 3_000)
    });
    let first = first.stop().success();
    assert!(!first.stderr_text().contains("missed"), "the other receiver has them: {first:?}");
    let done = first.stdout_text().lines().count() as u64;
    assert!(done < LINES / 2, "it was stopped too late");
    emitter.wait().success();
    wait_until("everything is written", || done + count(&second) >= LINES);
    let second = second.stop().success();
    let text = first.stdout_text() + &second.stdout_text();
    assert_eq!(text.lines().count() as u64, LINES, "each once");
    assert!(text.lines().map(number).collect::<BTreeSet<_>>().into_iter().eq(1..=LINES));
    delete(&queue);
}

#[test]
fn a_receiver_with_a_slow_reader_stops_in_time() {
    // Several times the amount that the reader reads in the two seconds of a stop.
    const MESSAGES: usize = 300;
    let queue = unique("slow");
    on_queue(&queue).start().ready().stop().success();
    let padding = "x".repeat(200_000);
    let lines: String = (1..=MESSAGES).map(|number| format!("{number} {padding}\n")).collect();
    let input = TempFile::with("input", lines.as_bytes());
    let input = std::fs::File::open(input.path()).unwrap();
    emit_log().args(["-l", "-e", &queue]).stdin(input).run().success();

    let (mut reader, writer) = std::io::pipe().unwrap();
    let receiver = on_queue(&queue).stdout(writer).start_redirected();
    let (sender, pieces) = mpsc::channel();
    let slow = thread::spawn(move || {
        let mut piece = vec![0; 64 * 1024];
        while let length @ 1.. = reader.read(&mut piece).unwrap() {
            sender.send(piece[..length].to_vec()).unwrap();
            thread::sleep(Duration::from_millis(10));
        }
    });
    let mut written = pieces.recv().unwrap();
    receiver.stop().success();
    slow.join().unwrap();
    written.extend(pieces.into_iter().flatten());
    assert!(written.ends_with(b"\n"), "the last message is whole");
    let first = String::from_utf8(written).unwrap();
    let left = MESSAGES - first.lines().count();
    assert!(left > 0, "the reader was too fast");
    let rest = on_queue(&queue).args(["-n", &left.to_string()]).run().success().stdout_text();
    let numbers: BTreeSet<_> = first.lines().chain(rest.lines()).collect();
    assert_eq!(numbers.len(), MESSAGES, "each once");
    assert_eq!(waiting(&queue), 0);
    delete(&queue);
}

#[test]
fn messages_of_a_lost_receiver_are_delivered_to_others() {
    const LINES: u64 = 3_000;
    let queue = unique("handed-on");
    let (stuck, survivor) = (on_queue(&queue), on_queue(&queue));
    // A reader that reads nothing, so the messages of its receiver are neither written nor acknowledged.
    let (reader, writer) = std::io::pipe().unwrap();
    let stuck = stuck.stdout(writer).start_redirected().ready();
    stuck.signal(Signal::STOP);
    let survivor = survivor.start().ready();
    emit(&queue, LINES).wait().success();
    stuck.kill();
    drop(reader);
    wait_until("everything is written", || count(&survivor) >= LINES);
    let ended = survivor.stop().success();
    assert!(!ended.stderr_text().contains("arrived late"), "none was missed: {ended:?}");
    let text = ended.stdout_text();
    let numbers: BTreeSet<_> = text.lines().map(number).collect();
    assert!(numbers.into_iter().eq(1..=LINES));
    assert_eq!(text.lines().count() as u64, LINES);
    delete(&queue);
}

#[test]
fn messages_beyond_the_count_stay_in_the_queue() {
    let queue = unique("count");
    on_queue(&queue).start().ready().stop().success();
    emit(&queue, 100).wait().success();
    let mut left = 100;
    // Repeated, because the end races with the frames of the broker.
    while left > 0 {
        for limit in [1, 2, 7] {
            let ended = on_queue(&queue).args(["-q", "-n", &limit.to_string()]).run().success();
            left -= limit;
            assert_eq!(number(ended.stdout_text().lines().last().unwrap()), 100 - left);
            assert_eq!(u64::from(waiting(&queue)), left);
            assert_eq!(ended.stderr_text(), "", "none of them was delivered before");
        }
    }
    delete(&queue);
}

#[test]
fn a_batch_is_removed_as_a_whole() {
    let queue = unique("batch");
    on_queue(&queue).start().ready().stop().success();
    for body in ["1\n2\n3", "4"] {
        let properties = AmqpProperties::default().with_type_("lines".into());
        Peer::connect().publish_with(&queue, body.as_bytes(), properties);
    }
    let take_one = || on_queue(&queue).args(["-n", "1"]).run().success().stdout_text();
    assert_eq!((take_one(), take_one()), ("1\n2\n3\n".into(), "4\n".into()));
    delete(&queue);
}

#[test]
fn messages_that_a_closed_reader_missed_stay_in_the_queue() {
    let queue = unique("reader");
    on_queue(&queue).start().ready().stop().success();
    emit(&queue, 20_000).wait().success();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let receiver = on_queue(&queue).stdout(writer).start_redirected();
    let mut some = vec![0; 1000];
    reader.read_exact(&mut some).unwrap();
    let got = some.len() as u64 + wait_until_full(&reader);
    drop(reader);
    receiver.wait().success();
    let rest = on_queue(&queue).args(["-n", "1"]).run().success().stdout_text();
    let all: String = (1..=20_000).map(|number| format!("line {number}\n")).collect();
    let first_lost = all[..got as usize].matches('\n').count() as u64 + 1;
    assert!(number(rest.trim_end()) <= first_lost, "{rest} after {first_lost}");
    delete(&queue);
}

#[test]
fn a_deleted_queue_is_created_again_with_a_warning() {
    let queue = unique("deleted");
    let receiver = on_queue(&queue).start().ready();
    delete(&queue);
    receiver.wait_for_stderr(": the queue was deleted; subscribing again\n", 1);
    let created_again =
        format!("queue '{queue}' was deleted and is created again: the messages in it and ");
    receiver.wait_for_stderr(&created_again, 1);
    emit_log().args(["-e", &queue, "again"]).run().success();
    receiver.wait_for_stdout(b"again\n");
    receiver.stop().success();
    delete(&queue);
}

/// Publishes a message with this number of a run.
fn publish_number(queue: &str, number: u64) {
    let id = format!("emit-log/00c0ffee00c0ffee/{number}");
    let properties = AmqpProperties::default().with_message_id(id);
    Peer::connect().publish_with(queue, b"x", properties);
}

#[test]
fn a_queue_of_a_stopped_node_is_not_reported_as_deleted() {
    let home = Broker::start();
    let other = Broker::start_beside(&home);
    let on = |broker: &Broker| {
        let receiver = receive_logs().args(["-r", "--queue", "kept", "--queue-type", "classic"]);
        receiver.args(["--durable", "-u", broker.url()]).start().ready()
    };
    on(&home).stop().success();
    let receiver = on(&other);
    home.kill();
    receiver.wait_for_stderr("the broker cancelled the consumer", 1);
    home.restart();
    receiver.wait_for_stderr("Subscribed again after ", 1);
    emit_log().args(["-u", other.url(), "--durable", "after"]).run().success();
    receiver.wait_for_stdout(b"after\n");
    let stderr = receiver.stop().success().stderr_text();
    assert!(!stderr.contains("deleted") && !stderr.contains("created again"), "{stderr}");
}

#[test]
fn a_gap_is_reported_if_no_other_receiver_consumes() {
    let queue = unique("gap");
    let receiver = on_queue(&queue).start().ready();
    let publish = |number| publish_number(&queue, number);
    let begun = Instant::now();
    [1, 3, 2, 6, 4].into_iter().for_each(publish);
    receiver.wait_for_stderr("missed 1 message from run 00c0ffee00c0ffee (5), unless ", 1);
    let elapsed = begun.elapsed();
    assert!(elapsed >= Duration::from_secs(5) && elapsed < Duration::from_secs(11), "{elapsed:?}");
    [8, 10].into_iter().for_each(publish);
    wait_until("the lines are written", || receiver.stdout_so_far().len() == 14);
    let other = on_queue(&queue).start().ready();
    (11..=20).for_each(publish);
    let count = |receiver: &Running| receiver.stdout_so_far().len() / 2;
    wait_until("everything is written", || count(&receiver) + count(&other) == 17);
    assert!(count(&other) > 0);
    let seen = Instant::now();
    wait_until("the time of the gaps has passed", || seen.elapsed() > Duration::from_secs(6));
    other.stop().success();
    // The receiver is alone from now on, but the messages of the other one are still missing here.
    (21..=22).for_each(publish);
    wait_until("the rest is written", || receiver.stdout_so_far().ends_with(b"x\nx\n"));
    let stderr = receiver.stop().success().stderr_text();
    assert_eq!(stderr.matches("missed").count(), 1, "{stderr}");
    delete(&queue);
}

#[test]
fn a_recent_gap_is_reported_at_a_stop() {
    let queue = unique("gap");
    let receiver = on_queue(&queue).start().ready();
    [1, 3].iter().for_each(|number| publish_number(&queue, *number));
    wait_until("the lines are written", || receiver.stdout_so_far().len() == 4);
    let stderr = receiver.stop().success().stderr_text();
    assert!(stderr.contains("missed 1 message from run 00c0ffee00c0ffee (2), unless "), "{stderr}");
    delete(&queue);
}

#[test]
fn an_unanswered_request_does_not_delay_a_signal() {
    let queue = unique("gap");
    let proxy = Proxy::start(&url());
    let receiver = on_queue(&queue).args(["-u", proxy.url()]).start().ready();
    proxy.stall_one(Way::ToBroker);
    [1, 3].iter().for_each(|number| publish_number(&queue, *number));
    wait_until("the lines are written", || receiver.stdout_so_far().len() == 4);
    let signalled = Instant::now();
    receiver.stop().success();
    assert!(signalled.elapsed() < Duration::from_secs(2), "{:?}", signalled.elapsed());
    proxy.resume();
    delete(&queue);
}

#[test]
fn a_queue_with_other_settings_is_an_error() {
    let queue = unique("other");
    on_queue(&queue).start().ready().stop().success();
    for options in [&["--queue-type", "classic"][..], &["--max-backlog", "1MB"]] {
        let refused = on_queue(&queue).args(options).run();
        let operation = format!("declare queue '{queue}'");
        refused.fails_with(78, &[&operation, "PRECONDITION_FAILED", "--queue-type"]);
    }
    // With --passive, the queue is used as it is.
    on_queue(&queue).args(["--max-backlog", "1MB", "--passive"]).start().ready().stop().success();
    delete(&queue);
    on_queue(&queue).arg("--passive").run().fails_with(78, &["NOT_FOUND", "--passive"]);
    for name in ["amq.mine", "", &"n".repeat(256)] {
        receive_logs().args(["--queue", name]).run().exits_with(2);
    }
    receive_logs().args(["--queue-type", "classic"]).run().exits_with(2);
}

#[test]
fn a_backlog_is_limited_and_dropped_messages_are_reported() {
    const LINES: u64 = 50_000;
    let exchange = unique("backlog");
    let receiver = receive_logs().args(["-r", "-e", &exchange, "--max-backlog", "100KB"]);
    let receiver = receiver.start().ready();
    receiver.signal(Signal::STOP);
    emit(&exchange, LINES).wait().success();
    let bytes = rabbitmqctl(["list_queues", "message_bytes_ready", "arguments"]);
    let bytes = bytes.lines().find_map(|line| {
        line.contains("100000").then(|| line.split('\t').next().unwrap().parse::<u64>().unwrap())
    });
    assert!(bytes.is_some_and(|bytes| (90_000..=100_000).contains(&bytes)), "{bytes:?}");
    receiver.signal(Signal::CONT);
    let last = format!("line {LINES}\n");
    wait_until("the last line is written", || receiver.stdout_so_far().ends_with(last.as_bytes()));
    let ended = receiver.stop().success();
    let written = ended.stdout_text().lines().map(number).collect::<Vec<_>>();
    assert!(written.is_sorted());
    let stderr = ended.stderr_text();
    let missed = stderr.lines().filter_map(|line| line.strip_prefix(" [!] missed "));
    let missed = missed.map(|line| line.split(' ').next().unwrap().parse::<u64>().unwrap());
    assert_eq!(missed.sum::<u64>() + written.len() as u64, LINES, "{stderr}");
}

#[test]
fn an_empty_durable_queue_has_missed_nothing() {
    let queue = unique("empty");
    let receiver = on_queue(&queue).args(["--durable", "-v"]);
    let proxy = Proxy::start(&url());
    let receiver = receiver.args(["-u", proxy.url()]).start().ready();
    proxy.reset();
    receiver.wait_for_stderr("Subscribed again after ", 1);
    receiver.wait_for_stderr(&format!("; 0 messages wait in queue '{queue}'\n"), 1);
    receiver.stop().success();
    delete(&queue);
    Peer::connect().channel().exchange_delete(&queue, false).unwrap();
}

#[test]
fn a_durable_queue_collects_messages_across_a_restart() {
    let broker = logs_tests::Broker::start();
    let options = ["-u", broker.url(), "--durable"];
    let receiver = receive_logs().args(options).args(["-r", "--queue", "archive"]);
    let receiver = receiver.start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(options).arg("-l").stdin(reader).start();
    let (is_wanted, wanted) = mpsc::channel::<()>();
    let feeder = thread::spawn(move || {
        let mut fed = 0;
        while wanted.recv_timeout(Duration::from_millis(10)) == Err(RecvTimeoutError::Timeout) {
            for _ in 0..100 {
                fed += 1;
                writeln!(writer, "line {fed}").unwrap();
            }
        }
        fed
    });
    wait_until("lines flow", || receiver.stdout_so_far().len() > 10_000);
    // Not killed: a new quorum queue may then remain without a leader forever.
    broker.ctl(["stop_app"]);
    broker.ctl(["start_app"]);
    receiver.wait_for_stderr("Subscribed again after ", 1);
    // No message is lost, whatever the number of waiting messages.
    assert!(!receiver.stderr_so_far().contains("may be missing"));
    drop(is_wanted);
    let fed = feeder.join();
    emitter.wait().success();
    let fed = fed.unwrap();
    let last = format!("line {fed}\n");
    wait_until("the last line is written", || receiver.stdout_so_far().ends_with(last.as_bytes()));
    let ended = receiver.stop().success();
    let stderr = ended.stderr_text();
    assert!(stderr.contains("messages wait in queue 'archive'"), "{stderr}");
    assert!(!stderr.contains("missed"), "{stderr}");
    assert!(ended.stdout_text().lines().map(number).eq(1..=fed), "each once, in order");
}
