//! Streams: history for receivers that start late, and files without gaps.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use amiquip::AmqpProperties;
use logs_tests::{
    BANNER, Broker, Ended, PATIENCE, Peer, Proxy, Running, TempFile, Tool, Way, emit_log,
    rabbitmqctl, receive_logs, unique, url, wait_until,
};
use rustix::process::Signal;

/// A stream on the shared node, bound to an exchange of the same name. Dropping it deletes the stream.
struct Stream {
    name: String,
}

impl Stream {
    fn new(name: &str) -> Stream {
        Stream::with(name, &[])
    }

    /// A stream that is created with these options.
    fn with(name: &str, options: &[&str]) -> Stream {
        let stream = Stream { name: unique(name) };
        stream.receiver().args(options).start().ready().stop().success();
        stream
    }

    fn receiver(&self) -> Tool {
        receive_logs().args(["-r", "-e", &self.name, "--stream", &self.name])
    }

    /// The numbers that are in the stream now, as selected by these options.
    fn read(&self, options: &[&str]) -> Vec<u64> {
        let ended = self.receiver().args(options).arg("--no-follow").run().success();
        assert_eq!(ended.stderr_text(), BANNER);
        numbers_in(&ended.stdout)
    }

    fn emitter(&self) -> Tool {
        emit_log().args(["-l", "-e", &self.name])
    }

    fn emit(&self, first: u64, last: u64, options: &[&str]) {
        emit(self.emitter().args(options), first, last).wait().success();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !thread::panicking() {
            rabbitmqctl(["delete_queue", &self.name]);
        }
    }
}

/// Publishes the numbers from `first` to `last`, one per line.
fn emit(emitter: Tool, first: u64, last: u64) -> Running {
    let lines: String = (first..=last).map(|number| format!("{number}\n")).collect();
    let input = TempFile::with("input", lines.as_bytes());
    emitter.stdin(File::open(input.path()).unwrap()).start()
}

/// The numbers in an output, in its order.
fn numbers_in(output: &[u8]) -> Vec<u64> {
    let text = str::from_utf8(output).unwrap();
    text.lines().map(|line| line.parse().unwrap_or_else(|_| panic!("{line:?}"))).collect()
}

fn lines_in(file: &TempFile) -> usize {
    file.read().unwrap_or_default().iter().filter(|byte| **byte == b'\n').count()
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Asserts that these are the numbers from 1 to `last`, each once and in order.
fn assert_all(numbers: &[u64], last: u64) {
    let wrong = numbers.iter().zip(1..).find(|(number, expected)| *number != expected);
    assert_eq!(wrong, None, "the first wrong number, and the expected one");
    assert_eq!(numbers.len() as u64, last);
}

#[test]
fn a_stream_keeps_messages_for_all_receivers() {
    let stream = Stream::new("history");
    stream.emit(1, 500, &[]);
    assert_all(&stream.read(&["--from-start"]), 500);
    assert_all(&stream.read(&["--from-start"]), 500);
    assert_eq!(stream.read(&["--tail", "3"]), [498, 499, 500]);
    assert_all(&stream.read(&["--since", "10m"]), 500);

    let live = stream.receiver().start().ready();
    let with_history = stream.receiver().args(["--tail", "1"]).start().ready();
    stream.emit(501, 502, &[]);
    live.wait_for_stdout(b"501\n502\n");
    with_history.wait_for_stdout(b"500\n501\n502\n");
    live.stop().success();
    with_history.stop().success();
    let first = stream.receiver().args(["--from-start", "-n", "2"]).run().success();
    assert_eq!(numbers_in(&first.stdout), [1, 2]);
}

#[test]
fn a_look_at_the_past_of_a_stream_that_is_new_is_noted() {
    for options in [
        &["--from-start", "--no-follow"][..],
        &["--tail", "5", "--idle-timeout", "1s"],
        &["--since", "10m", "--idle-timeout", "1s", "-q"],
    ] {
        let stream = Stream { name: unique("typo") };
        let read = || stream.receiver().args(options).run().success();
        let note = format!("stream '{}' did not exist: it is created, and", stream.name);
        assert_eq!(read().stderr_text().contains(&note), !options.contains(&"-q"));
        assert!(!read().stderr_text().contains(&note));
    }
}

#[test]
fn ten_receivers_read_a_stream_from_different_places() {
    let stream = Stream::new("many");
    stream.emit(1, 5000, &[]);
    let tails: Vec<_> = (1..=10).map(|part| (500 * part).to_string()).collect();
    let start = |tail: &String| stream.receiver().args(["--tail", tail]).start().ready();
    let receivers: Vec<_> = tails.iter().map(start).collect();
    stream.emit(5001, 6000, &[]);
    for (receiver, part) in receivers.into_iter().zip(1..) {
        let expected = (5001 - 500 * part)..=6000;
        wait_until("everything is read", || {
            numbers_in(&receiver.stdout_so_far()).len() >= expected.clone().count()
        });
        assert!(numbers_in(&receiver.stop().success().stdout).into_iter().eq(expected));
    }
}

#[test]
fn a_tail_counts_records_across_batches_and_segments() {
    // A segment holds 1 MB, which is about ten thousand messages.
    let stream = Stream::with("tail", &["--keep", "10MB"]);
    stream.emit(1, 20_000, &[]);
    stream.emit(20_001, 50_000, &["--batch"]);
    stream.emit(50_001, 60_000, &[]);
    stream.emit(60_001, 60_500, &["--batch"]);
    for tail in [1_u64, 499, 501, 1999, 2000, 2001, 10_500, 10_501, 33_333, 59_999, 60_000] {
        let read = stream.read(&["--tail", &tail.to_string()]);
        assert!(read.iter().copied().eq(60_501 - tail..=60_500), "{tail}: {:?}", read.len());
    }
    assert_all(&stream.read(&["--tail", "60501"]), 60_500);
    assert_all(&stream.read(&["--tail", "18446744073709551615"]), 60_500);
}

#[test]
fn a_tail_counts_messages_of_other_programs() {
    let stream = Stream::new("foreign");
    let peer = Peer::connect();
    for body in ["one", "two\nlines", "three"] {
        peer.publish(&stream.name, body.as_bytes());
    }
    let read = || stream.receiver().args(["--tail", "2", "--no-follow"]).run().success();
    wait_until("the messages are in the stream", || read().stdout == b"two\nlines\nthree\n");
}

#[test]
fn since_is_exact_to_the_second() {
    let stream = Stream::new("since");
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = stream.emitter().stdin(reader).start();
    let first = seconds();
    // Each line contains the second in which it was written.
    while seconds() < first + 4 {
        writeln!(writer, "{}", seconds()).unwrap();
        thread::sleep(Duration::from_millis(5));
    }
    drop(writer);
    emitter.wait().success();
    let all = stream.read(&["--from-start"]);
    for second in first..=first + 4 {
        let time = humantime::format_rfc3339(UNIX_EPOCH + Duration::from_secs(second)).to_string();
        let read = stream.read(&["--since", &time]);
        // A line that is written at the end of a second may be sent in the next second.
        let (before, after) = (second.saturating_sub(1), second);
        let least = all.iter().filter(|line| **line >= after).count();
        let most = all.iter().filter(|line| **line >= before).count();
        assert!((least..=most).contains(&read.len()), "{second}: {} of {most}", read.len());
        assert!(read.len() < least + 20 && read.iter().all(|line| *line >= before), "{read:?}");
        assert!(all.ends_with(&read));
    }
    let ago = stream.read(&["--since", &format!("{}s", seconds() - first)]);
    assert_eq!(ago.last(), all.last());
}

#[test]
fn since_is_approximate_for_other_programs() {
    let stream = Stream::new("approximate");
    let peer = Peer::connect();
    peer.publish(&stream.name, b"1");
    let old = AmqpProperties::default().with_timestamp(1_000_000_000);
    peer.publish_with(&stream.name, b"2", old);
    wait_until("both messages are there", || stream.read(&["--from-start"]) == [1, 2]);
    // The first message may be recent enough, because its time is unknown. The second one has a time, and is too old.
    assert_eq!(stream.read(&["--since", "1s"]), [1]);
}

#[test]
fn no_follow_ends_at_the_last_message_of_the_start() {
    let empty = Stream::new("empty");
    assert!(empty.read(&["--from-start"]).is_empty());
    assert!(empty.read(&["--tail", "5"]).is_empty());
    assert!(empty.read(&["--since", "5m"]).is_empty());

    // Publishers that never stop. Each has a stream of its own, because the start of a shared stream would grow from
    // round to round.
    for _ in 0..5 {
        let stream = Stream::new("end");
        let (reader, mut writer) = std::io::pipe().unwrap();
        let emitter = stream.emitter().stdin(reader).start();
        let feeder = thread::spawn(move || {
            let mut number = 1_u64;
            while writer.write_all(format!("{number}\n").as_bytes()).is_ok() {
                number += 1;
            }
        });
        let mut last = 0;
        for _ in 0..2 {
            let before = last;
            wait_until("more lines are there", || {
                last = *stream.read(&["--tail", "1"]).last().unwrap_or(&0);
                last > before
            });
        }
        let read = stream.read(&["--from-start"]);
        assert_all(&read, read.len() as u64);
        assert!(read.len() as u64 >= last, "{} of {last}", read.len());
        emitter.stop();
        feeder.join().unwrap();
    }
}

#[test]
fn a_cut_connection_neither_misses_nor_repeats_lines() {
    const LINES: u64 = 100_000;
    const CUTS: usize = 20;
    let stream = Stream::new("cut");
    let proxy = Proxy::start(&url());
    let receiver = receive_logs()
        .args(["-r", "-e", &stream.name, "--stream", &stream.name, "-u", proxy.url()])
        .start()
        .ready();
    let emitter = emit(stream.emitter(), 1, LINES);
    for cut in 1..=CUTS {
        wait_until("more lines are written", || {
            receiver.stdout_so_far().iter().filter(|byte| **byte == b'\n').count()
                >= cut * LINES as usize / (CUTS + 2)
        });
        proxy.reset();
        receiver.wait_for_stderr("Subscribed again", cut);
    }
    emitter.wait().success();
    wait_until("everything is written", || receiver.stdout_so_far().ends_with(b"\n100000\n"));
    let ended = receiver.stop().success();
    assert_all(&numbers_in(&ended.stdout), LINES);
    assert!(!ended.stderr_text().contains("missed"), "{}", ended.stderr_text());
    assert!(ended.stderr_text().contains("continues where it stopped"));
}

#[test]
fn a_cut_before_the_first_message_misses_nothing() {
    let stream = Stream::new("early");
    stream.emit(1, 10, &[]);
    let proxy = Proxy::start(&url());
    let receiver = receive_logs()
        .args(["-r", "-e", &stream.name, "--stream", &stream.name, "-u", proxy.url()])
        .start()
        .ready();
    proxy.stall();
    stream.emit(11, 20, &[]);
    proxy.reset();
    proxy.resume();
    receiver.wait_for_stdout(
        &(11..=20).flat_map(|n| format!("{n}\n").into_bytes()).collect::<Vec<_>>(),
    );
    receiver.stop().success();
}

/// A node that had a stream before. RabbitMQ 3.10 forgets all streams if it is killed shortly after the first one is
/// created.
fn node_with_stream(stream: &str) -> Broker {
    let broker = Broker::start();
    let receiver = || receive_logs().args(["-u", broker.url(), "--durable", "--stream", stream]);
    receiver().start().ready().stop().success();
    broker.ctl(["stop_app"]);
    broker.ctl(["start_app"]);
    // The stream is available a moment after the node.
    receiver().args(["--retry", "20s"]).start().ready().stop().success();
    broker
}

#[test]
fn a_killed_broker_misses_nothing() {
    const LINES: u64 = 50_000;
    let broker = node_with_stream("history");
    let options = ["-u", broker.url(), "--durable"];
    let receiver = receive_logs()
        .args(options)
        .args(["--stream", "history", "--from-start", "-r"])
        .args(["--retry", "60s"])
        .start()
        .ready();
    let emitter = emit_log().args(options).args(["-l", "--retry", "60s"]);
    let emitter = emit(emitter, 1, LINES);
    for round in 1..=2 {
        wait_until("some lines are written", || {
            numbers_in(&whole_lines(&receiver.stdout_so_far())).len() as u64 >= round * LINES / 10
        });
        broker.kill();
        broker.restart();
        receiver.wait_for_stderr("Subscribed again", round as usize);
    }
    emitter.wait().success();
    wait_until("everything is written", || receiver.stdout_so_far().ends_with(b"\n50000\n"));
    let ended = receiver.stop().success();
    assert_all(&numbers_in(&ended.stdout), LINES);
    assert!(!ended.stderr_text().contains("missed"), "{}", ended.stderr_text());
}

#[test]
fn a_receiver_that_the_broker_has_forgotten_continues() {
    let broker = node_with_stream("history");
    let receiver = receive_logs()
        .args(["-u", broker.url(), "--durable", "--stream", "history", "-r", "-v"])
        .start()
        .ready();
    let send = |text| emit_log().args(["-u", broker.url(), "--durable", text]).run().success();
    send("before");
    receiver.wait_for_stdout(b"before\n");
    // What happens in a cluster when the receiver's node is cut off for a moment, and later the replica restarts.
    broker.ctl([
        "eval",
        "{ok, Queue} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"history\">>)),
         Coordinator = {rabbit_stream_coordinator, node()},
         [ra:process_command(Coordinator, {down, Channel, noconnection}) || Channel <- rabbit_channel:list()],
         exit(amqqueue:get_pid(Queue), kill).",
    ]);
    send("after");
    receiver.wait_for_stderr("silent stream 'history' is consumed again", 1);
    receiver.wait_for_stdout(b"before\nafter\n");
    receiver.stop().success();
}

/// The output up to its last newline.
fn whole_lines(output: &[u8]) -> Vec<u8> {
    let end = output.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    output[..end].to_vec()
}

#[test]
fn a_node_without_a_replica_is_skipped() {
    const LINES: u64 = 20_000;
    let first = Broker::start();
    let others = [(); 2].map(|()| Broker::start_beside(&first));
    let nodes = [&others[0], &others[1], &first];
    let urls = nodes.map(Broker::url).join(" ");

    // A stream on one node only, as an operator may create it.
    let python = format!(
        "import pika\n\
         channel = pika.BlockingConnection(pika.URLParameters('{}')).channel()\n\
         channel.queue_declare('one', durable=True, arguments={{'x-queue-type': 'stream', \
         'x-initial-cluster-size': 1}})\n",
        first.url()
    );
    logs_tests::python().args(["-c", &python]).run().success();
    for _ in 0..6 {
        let read = ["-u", &urls, "--durable", "--stream", "one", "--from-start", "--no-follow"];
        receive_logs().args(read).run().success();
    }
    let elsewhere = ["-u", nodes[0].url(), "--durable", "--stream", "one"];
    let parts = ["consume queue 'one': ", "replica on the local node (--uri"];
    receive_logs().args(elsewhere).run().fails_with(69, &parts);
    first.ctl(["delete_queue", "one"]);

    let receiver = receive_logs()
        .args(["-u", &urls, "--durable", "--stream", "three", "-r", "--retry", "60s"])
        .start()
        .ready();
    let emitter = emit_log().args(["-u", &urls, "--durable", "-l", "--retry", "60s"]);
    let emitter = emit(emitter, 1, LINES);
    wait_until("some lines are written", || receiver.stdout_so_far().len() > 20_000);
    nodes[0].kill();
    emitter.wait().success();
    wait_until("everything is written", || receiver.stdout_so_far().ends_with(b"\n20000\n"));
    nodes[0].restart();
    let ended = receiver.stop().success();
    assert_all(&numbers_in(&ended.stdout), LINES);
    assert!(!ended.stderr_text().contains("missed"), "{}", ended.stderr_text());
}

#[test]
fn kills_leave_each_line_once_in_the_file() {
    const LINES: u64 = 100_000;
    let stream = Stream::new("killed");
    let (file, position) = (TempFile::new("all.log"), TempFile::new("all.pos"));
    let receiver =
        || stream.receiver().arg("-o").arg(file.path()).arg("--resume").arg(position.path());
    let mut running = receiver().start().ready();
    let emitter = emit(stream.emitter(), 1, LINES);
    let mut stderr = String::new();
    for kill in 1..=10 {
        wait_until("more lines are written", || lines_in(&file) >= kill * LINES as usize / 12);
        running.signal(Signal::KILL);
        stderr += &running.wait().stderr_text();
        running = receiver().start().ready();
    }
    emitter.wait().success();
    wait_until("everything is written", || lines_in(&file) == LINES as usize);
    stderr += &running.stop().success().stderr_text();
    assert_all(&numbers_in(&file.read().unwrap()), LINES);
    assert!(
        stderr.contains("to the last recorded position: the messages in them are written again"),
        "{stderr}"
    );
    assert!(!stderr.contains("missed") && !stderr.contains("may be repeated"), "{stderr}");

    // While no receiver runs.
    stream.emit(LINES + 1, LINES + 100, &["--batch"]);
    let ended = receiver().arg("--no-follow").run().success();
    assert_eq!(ended.stderr_text(), BANNER);
    assert_all(&numbers_in(&file.read().unwrap()), LINES + 100);
}

#[test]
fn an_output_that_cannot_be_truncated_may_repeat_messages() {
    const LINES: u64 = 30_000;
    let stream = Stream::new("repeated");
    stream.emit(1, LINES, &[]);
    let position = TempFile::new("pos");
    let receiver = || stream.receiver().arg("--from-start").arg("--resume").arg(position.path());
    // A reader that stops reading.
    let (reader, writer) = std::io::pipe().unwrap();
    let running = receiver().stdout(writer).start_redirected();
    let mut reader = reader;
    let mut first = vec![0; 80_000];
    std::io::Read::read_exact(&mut reader, &mut first).unwrap();
    wait_until("a position is recorded", || {
        position.read().is_ok_and(|content| content.windows(8).any(|part| part == b"\"offset\""))
    });
    running.kill();
    std::io::Read::read_to_end(&mut reader, &mut first).unwrap();
    let before = numbers_in(&whole_lines(&first));

    let ended = receiver().arg("--no-follow").run().success();
    let note =
        " [!] up to 10000 messages, or one batch more, may be repeated: the previous receiver";
    assert!(ended.stderr_text().contains(note), "{}", ended.stderr_text());
    let after = numbers_in(&ended.stdout);
    assert_all(&before, before.len() as u64);
    assert!(after.first().is_some_and(|first| *first <= before.len() as u64 + 1));
    assert!(before.len() + after.len() <= LINES as usize + 10_000);
    assert!(after.into_iter().eq(LINES - ended.stdout_text().lines().count() as u64 + 1..=LINES));

    // The second receiver recorded a complete position.
    let ended = receiver().arg("--no-follow").run().success();
    assert_eq!((ended.stdout_text().as_str(), ended.stderr_text().as_str()), ("", BANNER));
}

#[test]
fn a_receiver_continues_after_the_count_of_the_last() {
    let stream = Stream::new("counted");
    stream.emit(1, 1000, &[]);
    let position = TempFile::new("pos");
    let read = |options: &[&str]| {
        let receiver = stream.receiver().arg("--resume").arg(position.path()).args(options);
        numbers_in(&receiver.run().success().stdout)
    };
    let mut all = read(&["--from-start", "-n", "250"]);
    all.extend(read(&["--from-start", "-n", "250"]));
    all.extend(read(&["--no-follow"]));
    assert_all(&all, 1000);
}

#[test]
fn logrotate_and_a_kill_neither_miss_nor_repeat_lines() {
    let stream = Stream::new("rotated");
    let (file, position) = (TempFile::new("all.log"), TempFile::new("all.pos"));
    let receiver =
        || stream.receiver().arg("-o").arg(file.path()).arg("--resume").arg(position.path());
    let running = receiver().start().ready();
    stream.emit(1, 100, &[]);
    wait_until("the lines are written", || lines_in(&file) == 100);
    let rotated = file.path().with_extension("1");
    std::fs::rename(file.path(), &rotated).unwrap();
    running.signal(Signal::HUP);
    wait_until("the file is reopened", || file.path().exists());
    stream.emit(101, 200, &[]);
    wait_until("the lines are written", || lines_in(&file) == 100);
    running.kill();
    let ended = receiver().arg("--no-follow").run().success();
    let mut all = numbers_in(&std::fs::read(rotated).unwrap());
    all.extend(numbers_in(&file.read().unwrap()));
    assert_all(&all, 200);
    assert!(!ended.stderr_text().contains("repeated"), "{}", ended.stderr_text());
}

#[test]
fn messages_removed_from_a_stopped_receiver_are_reported() {
    const LINES: u64 = 40_000;
    let stream = Stream::with("overtaken", &["--keep", "500KB"]);
    let receiver = stream.receiver().start().ready();
    stream.emit(1, 100, &[]);
    wait_until("the first lines are written", || receiver.stdout_so_far().ends_with(b"\n100\n"));
    receiver.signal(Signal::STOP);
    stream.emit(101, LINES, &[]);
    receiver.signal(Signal::CONT);
    wait_until("the last line is written", || receiver.stdout_so_far().ends_with(b"\n40000\n"));
    let ended = receiver.stop().success();
    let received: BTreeSet<_> = numbers_in(&ended.stdout).into_iter().collect();
    let missing: Vec<_> = (1..=LINES).filter(|number| !received.contains(number)).collect();
    assert!(!missing.is_empty(), "nothing was removed");
    let stderr = ended.stderr_text();
    let reported = format!(" [!] missed {} messages from run", missing.len());
    assert!(stderr.contains(&reported), "{reported}: {stderr}");
    assert!(stderr.contains("messages of stream") && stderr.contains("its limits have removed"));
}

#[test]
fn messages_removed_between_two_receivers_are_reported() {
    let stream = Stream::with("between", &["--keep", "100KB"]);
    let position = TempFile::new("pos");
    let receiver = || stream.receiver().arg("--no-follow").arg("--resume").arg(position.path());
    stream.emit(1, 10, &[]);
    let before = numbers_in(&receiver().arg("--from-start").run().success().stdout);
    assert_all(&before, 10);
    stream.emit(11, 10_000, &[]);
    let ended = receiver().run().success();
    let after = numbers_in(&ended.stdout);
    let missing = after[0] - 11;
    assert!(missing > 0, "nothing was removed");
    let stderr = ended.stderr_text();
    let reported = stderr.lines().find(|line| line.contains("missed up to")).expect(&stderr);
    let up_to: u64 = reported.split(' ').nth(5).unwrap().parse().unwrap();
    // The end of each segment has an offset as well.
    assert!((missing..=missing + missing / 50 + 2).contains(&up_to), "{missing}: {reported}");
}

#[test]
fn a_recreated_stream_is_read_from_its_beginning() {
    let stream = Stream::new("recreated");
    stream.emit(1, 100, &[]);
    let receiver = stream.receiver().arg("--from-start").start().ready();
    wait_until("everything is written", || receiver.stdout_so_far().ends_with(b"\n100\n"));
    rabbitmqctl(["delete_queue", &stream.name]);
    receiver.wait_for_stderr("and created again, and is read from its beginning", 1);
    receiver.wait_for_stderr("Subscribed again", 1);
    stream.emit(101, 110, &[]);
    wait_until("everything is written", || receiver.stdout_so_far().ends_with(b"\n110\n"));
    assert_all(&numbers_in(&receiver.stop().success().stdout), 110);
}

#[test]
fn a_stream_deleted_during_reading_is_reported_once() {
    let stream = Stream::new("deleted");
    let receiver = stream.receiver().start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = stream.emitter().stdin(reader).start();
    let start = Instant::now();
    // Each line is the time of its writing, in milliseconds.
    let feeder = thread::spawn(move || {
        while writeln!(writer, "{}", start.elapsed().as_millis()).is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
    });
    let lines = || numbers_in(&whole_lines(&receiver.stdout_so_far()));
    wait_until("lines are written", || lines().len() > 200);
    rabbitmqctl(["delete_queue", &stream.name]);
    let deleted = start.elapsed().as_millis() as u64;
    receiver.wait_for_stderr("Subscribed again", 1);
    wait_until("later lines are written", || lines().last() > Some(&(deleted + 1000)));
    emitter.stop();
    feeder.join().unwrap();
    let ended = receiver.stop().success();
    let lines = numbers_in(&ended.stdout);
    let gap = lines.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max().unwrap();
    assert!(lines.is_sorted() && gap < 3000, "{gap} ms without a line");
    let stderr = ended.stderr_text();
    let note = "and created again, and is read from its beginning; messages sent in between may be missing";
    assert_eq!(stderr.matches("created again").count(), 1, "{stderr}");
    assert!(stderr.contains(note) && !stderr.contains("continues where it stopped"), "{stderr}");
}

/// Kills a receiver when it has written the first bytes, and lets another one write the rest.
fn assert_exact_after_an_early_kill(start: &[&str], options: &[&str]) {
    for round in 0..3 {
        let stream = Stream::new("first");
        let (file, position) = (TempFile::new("all.log"), TempFile::new("all.pos"));
        let receiver = |options: &[&str]| {
            let receiver = stream.receiver().arg("-o").arg(file.path()).args(options);
            receiver.arg("--resume").arg(position.path())
        };
        let emitter = || emit(stream.emitter().args(options), 1, 20);
        let (running, emitter) = match start {
            // The next message, in an empty stream.
            [] => {
                let running = receiver(&[]).start().ready();
                (running, emitter())
            }
            _ => {
                let emitter = emitter();
                (receiver(start).start(), emitter)
            }
        };
        let begun = Instant::now();
        // Before a position can be recorded after these bytes.
        while std::fs::metadata(file.path()).map_or(0, |file| file.len()) == 0 {
            assert!(begun.elapsed() < PATIENCE, "nothing is written");
        }
        running.kill();
        emitter.wait().success();
        let ended = receiver(start).arg("--no-follow").run().success();
        let written = numbers_in(&file.read().unwrap());
        assert!(written.iter().copied().eq(1..=20), "{round}: {written:?}, {ended:?}");
    }
}

#[test]
fn a_kill_at_the_first_message_repeats_nothing() {
    for start in [&[][..], &["--from-start"], &["--since", "10m"]] {
        assert_exact_after_an_early_kill(start, &[]);
    }
}

#[test]
fn a_kill_at_the_first_batch_repeats_nothing() {
    for start in [&[][..], &["--from-start"], &["--since", "10m"]] {
        assert_exact_after_an_early_kill(start, &["--batch"]);
    }
}

#[test]
fn a_position_of_another_stream_is_an_error() {
    let (stream, other) = (Stream::new("one"), Stream::new("other"));
    stream.emit(1, 10, &[]);
    other.emit(1, 10, &[]);
    let position = TempFile::new("pos");
    let resume = |tool: Tool| tool.arg("--no-follow").arg("--resume").arg(position.path());
    resume(stream.receiver().arg("--from-start")).run().success();
    let refused = |ended: Ended, part: &str| drop(ended.fails_with(78, &[part]));
    let noted = format!("the position belongs to stream '{}'", stream.name);
    refused(resume(other.receiver()).run(), &noted);
    let exchange = ["-e", &other.name, "--stream", &stream.name];
    refused(resume(receive_logs().args(exchange)).run(), &noted);
    let broker = node_with_stream(&stream.name);
    let elsewhere = ["-u", broker.url(), "-e", &stream.name, "--stream", &stream.name];
    refused(resume(receive_logs().args(elsewhere)).run(), &noted);
    rabbitmqctl(["delete_queue", &stream.name]);
    refused(resume(stream.receiver()).run(), "belongs to another stream of this name");
    // Longer than the old stream.
    stream.emit(11, 40, &[]);
    refused(resume(stream.receiver()).run(), "belongs to another stream of this name");
}

#[test]
fn a_file_without_a_position_or_in_use_is_an_error() {
    let stream = Stream::new("files");
    let resume = |file: &TempFile| stream.receiver().arg("--resume").arg(file.path());
    let foreign = TempFile::with("foreign", b"hello\n");
    let parts = ["resume from ", "it holds no position", "(remove the file to start over)"];
    resume(&foreign).run().fails_with(78, &parts);
    assert_eq!(foreign.read().unwrap(), b"hello\n");
    let shared = TempFile::new("shared");
    let first = resume(&shared).start().ready();
    resume(&shared).run().fails_with(78, &["resume from ", "another receiver uses it"]);
    first.signal(Signal::KILL);
    first.wait();
    // The lock is released when its process exits.
    resume(&shared).start().ready().stop().success();
    let nowhere = TempFile::new("nowhere");
    let nowhere = nowhere.path().join("pos");
    stream.receiver().arg("--resume").arg(nowhere).run().fails_with(74, &["resume from "]);
}

#[test]
fn queues_of_another_type_and_streams_with_other_limits() {
    let queue = unique("queue");
    let on_queue = ["-e", &queue, "--queue", &queue];
    receive_logs().args(on_queue).start().ready().stop().success();
    let hint =
        "(a queue of this name exists and is not a stream: use another --stream, or --queue)";
    for passive in [&[][..], &["--passive"]] {
        let receiver = receive_logs().args(["-e", &queue, "--stream", &queue]).args(passive);
        receiver.run().fails_with(78, &[&queue, hint]);
    }
    rabbitmqctl(["delete_queue", &queue]);

    let stream = Stream::with("limits", &["--keep", "2h", "--keep", "20MB"]);
    let list = rabbitmqctl(["list_queues", "name", "arguments"]);
    let line = list.lines().find(|line| line.starts_with(&stream.name)).unwrap();
    for part in [
        "\"x-max-age\",\"7200s\"",
        "\"x-max-length-bytes\",20000000",
        "\"x-stream-max-segment-size-bytes\",2000000",
    ] {
        assert!(line.contains(part), "{line}");
    }
    let note = format!("stream '{}' exists with other limits, and is used as it is", stream.name);
    for (options, times) in [(&["-v"][..], 1), (&[], 0)] {
        let ended = stream.receiver().args(["--from-start", "--no-follow"]).args(options).run();
        let stderr = ended.success().stderr_text();
        assert_eq!(stderr.matches(&note).count(), times, "{stderr}");
    }
}

#[test]
fn a_passive_receiver_declares_and_binds_nothing() {
    let name = unique("passive");
    let reads = ["-e", "no-such-exchange", "--stream", &name, "--passive", "-r"];
    receive_logs().args(reads).run().fails_with(78, &["NOT_FOUND", &name]);
    let stream = Stream::new("passive");
    stream.emit(1, 3, &[]);
    let reads = ["-e", "no-such-exchange", "--stream", &stream.name, "--passive", "-r"];
    let ended = receive_logs().args(reads).args(["--from-start", "--no-follow"]).run().success();
    assert_eq!(numbers_in(&ended.stdout), [1, 2, 3]);
}

#[test]
fn a_stream_counts_as_a_queue_for_mandatory() {
    let stream = Stream::new("mandatory");
    emit_log().args(["-m", "-e", &stream.name, "hi"]).run().success();
}

#[test]
fn reading_history_needs_little_memory() {
    const LINES: u64 = 200_000;
    let stream = Stream::new("memory");
    let line = format!("{}\n", "x".repeat(100));
    let input = TempFile::with("input", line.repeat(LINES as usize).as_bytes());
    let emitter = stream.emitter().stdin(File::open(input.path()).unwrap());
    emitter.args(["--no-confirm"]).run().success();
    let file = TempFile::new("all.log");
    let receiver = stream.receiver().arg("--from-start").arg("-o").arg(file.path()).start();
    wait_until("everything is read", || lines_in(&file) == LINES as usize);
    // Half of this is the debug build of the program.
    assert!(receiver.peak_memory() < 20_000_000, "{} bytes", receiver.peak_memory());
    receiver.stop().success();
}

#[test]
fn a_time_limit_ends_reading_a_stream() {
    let stream = Stream::new("limited");
    stream.emit(1, 5, &[]);
    let read = ["--from-start", "--idle-timeout", "300ms"];
    let ended = stream.receiver().args(read).run().success();
    assert_eq!(numbers_in(&ended.stdout), [1, 2, 3, 4, 5]);
    let started = Instant::now();
    stream.receiver().args(["--timeout", "500ms"]).run().success();
    assert!(started.elapsed() >= Duration::from_millis(500));
}

#[test]
fn lines_sent_again_during_a_restart_are_written_once() {
    let stream = Stream::new("restart");
    let (proxy, input) = (Proxy::start(&url()), std::io::pipe().unwrap());
    let emitter = stream.emitter().args(["-u", proxy.url()]).stdin(input.0).start();
    let mut writer = input.1;
    let (output, position) = (TempFile::new("log"), TempFile::new("position"));
    let receiver = || {
        let receiver = stream.receiver().arg("--from-start").arg("--resume").arg(position.path());
        receiver.arg("-o").arg(output.path()).start().ready()
    };
    let first = receiver();
    writeln!(writer, "1").unwrap();
    wait_until("a line is written", || lines_in(&output) == 1);
    // The broker receives the lines, but its confirms do not arrive.
    proxy.stall_one(Way::FromBroker);
    (2..=1000).for_each(|number| writeln!(writer, "{number}").unwrap());
    wait_until("all lines are written", || lines_in(&output) == 1000);
    first.stop().success();
    proxy.reset();
    proxy.resume();
    drop(writer);
    let ended = emitter.wait().success();
    assert!(ended.stderr_text().contains(" again; "), "{ended:?}");
    let second = receiver();
    stream.emit(1001, 1001, &[]);
    wait_until("the last line is written", || output.read().unwrap().ends_with(b"1001\n"));
    let stderr = second.stop().success().stderr_text();
    assert_all(&numbers_in(&output.read().unwrap()), 1001);
    assert!(stderr.contains("messages left out: their numbers were written before"), "{stderr}");
}
