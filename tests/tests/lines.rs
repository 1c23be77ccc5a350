//! `emit-log --lines`: receivers get each line of a program as it is printed, byte for byte.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use logs_tests::{
    BANNER, Broker, Peer, Running, TempFile, Tool, binary, emit_log, receive_logs, terminal,
    unique, url, wait_until,
};
use rustix::process::Signal;

/// Usual and unusual lines: empty, with CRLF, with NUL, with bytes that are not UTF-8, short, long, and without a
/// newline at the end.
fn log_text(lines: usize) -> Vec<u8> {
    let mut text = Vec::new();
    for number in 0..lines {
        match number % 7 {
            0 => text.extend(format!("{number} info: request served in 3 ms").bytes()),
            1 => {}
            2 => text.extend(format!("{number} warning: line of a Windows program\r").bytes()),
            3 => text
                .extend([b"NUL \0 and \xff\xfe caf\xe9 ", number.to_string().as_bytes()].concat()),
            4 => text.extend(b"x".repeat(number % 3000)),
            5 => text.extend(format!("{number} ünïcödé \u{202e}\x1b[31m").bytes()),
            _ => text.push(b'\t'),
        }
        text.push(b'\n');
    }
    text.extend(b"the last line has no newline");
    text
}

/// Publishes `input` and returns what a receiver with these options writes.
fn through(emit: &[&str], receive: &[&str], input: &[u8], records: usize) -> Vec<u8> {
    let exchange = unique("lines");
    let receiver = receive_logs().args(["-e", &exchange, "-n", &records.to_string()]);
    let receiver = receiver.args(receive).start().ready();
    let file = TempFile::with("input", input);
    let emitter = emit_log().args(["-e", &exchange, "-l"]).args(emit);
    let ended = emitter.stdin(File::open(file.path()).unwrap()).run().success();
    assert_eq!(ended.stdout_text() + &ended.stderr_text(), "", "only failures are reported");
    receiver.wait().success().stdout
}

/// An emitter that is fed by the test.
fn live(args: &[&str]) -> (Running, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    (emit_log().args(args).stdin(reader).start(), writer)
}

#[test]
fn lines_arrive_byte_for_byte() {
    let text = log_text(20_000);
    for options in [&[][..], &["--batch"], &["--no-confirm"]] {
        let received = through(options, &["--raw"], &text, 20_001);
        assert!(received == [&text[..], b"\n"].concat(), "{options:?}");
    }
}

#[test]
fn records_that_end_in_nul_may_hold_newlines() {
    let text = log_text(5_000);
    let records: Vec<_> =
        text.split(|byte| *byte == b'\n').map(|l| l.to_ascii_uppercase()).collect();
    let input: Vec<u8> = records
        .iter()
        .flat_map(|record| {
            let line = record.iter().filter(|byte| **byte != 0).copied();
            line.chain(*b"\nsecond line\0").collect::<Vec<_>>()
        })
        .collect();
    for options in [&["-0"][..], &["-0", "--batch"]] {
        let received = through(options, &["--raw", "-0"], &input, records.len());
        assert!(received == input, "{options:?}");
    }
}

#[test]
fn batches_are_split_in_every_format() {
    let text = through(&["--batch"], &[], b"one\n\nthree\n", 3);
    assert_eq!(String::from_utf8_lossy(&text), " [x] \"one\"\n [x] \"\"\n [x] \"three\"\n");
    let json = through(&["--batch"], &["-f", "json"], b"one\ntwo\n", 2);
    let bodies: Vec<serde_json::Value> =
        json.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    assert_eq!(
        bodies.iter().map(|o| o["body"].as_str().unwrap()).collect::<Vec<_>>(),
        ["one", "two"]
    );
    // The receiver stops inside a batch.
    assert_eq!(through(&["--batch"], &["-r"], b"one\ntwo\nthree\n", 2), b"one\ntwo\n");
}

#[test]
fn empty_lines_can_be_skipped() {
    for options in [&["--skip-empty"][..], &["--skip-empty", "--batch"]] {
        assert_eq!(through(options, &["-r"], b"\n\none\n\n\ntwo\n\n", 2), b"one\ntwo\n");
    }
}

#[test]
fn a_line_is_published_as_soon_as_it_is_complete() {
    for options in [&[][..], &["--batch"]] {
        let exchange = unique("live");
        let receiver = receive_logs().args(["-e", &exchange]).start().ready();
        let args = [&["-l", "-e", &exchange][..], options].concat();
        let (emitter, mut pipe) = live(&args);
        for (piece, expected) in [
            (&b"one\ntw"[..], &b" [x] \"one\"\n"[..]),
            (b"o\n", b" [x] \"one\"\n [x] \"two\"\n"),
            (b"three", b" [x] \"one\"\n [x] \"two\"\n"),
        ] {
            pipe.write_all(piece).unwrap();
            receiver.wait_for_stdout(expected);
        }
        drop(pipe);
        emitter.wait().success();
        receiver.wait_for_stdout(b" [x] \"one\"\n [x] \"two\"\n [x] \"three\"\n");
    }
}

#[test]
fn each_message_has_the_number_of_its_first_record() {
    let numbers = |options: &[&str]| -> Vec<String> {
        let records = through(options, &["-f", "json"], b"a\nb\nc", 3);
        let objects =
            serde_json::Deserializer::from_slice(&records).into_iter::<serde_json::Value>();
        let ids = objects.map(|object| {
            object.unwrap()["properties"]["message_id"].as_str().unwrap().to_string()
        });
        ids.collect()
    };
    let ids = numbers(&[]);
    let (run, _) = ids[0].rsplit_once('/').unwrap();
    let digits = run.strip_prefix("emit-log/").unwrap();
    assert!(digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_hexdigit()), "{run}");
    assert_eq!(ids, [1, 2, 3].map(|n| format!("{run}/{n}")));
    assert_ne!(numbers(&[])[0], ids[0], "each run has an id of its own");
    let batched: Vec<_> =
        numbers(&["--batch"]).iter().map(|id| id.rsplit_once('/').unwrap().1.to_string()).collect();
    assert_eq!(batched, ["1", "2", "3"], "each record has its own, in a batch too");
}

#[test]
fn a_too_large_record_ends_it_after_earlier_confirms() {
    let exchange = unique("large");
    let receiver = receive_logs().args(["-e", &exchange, "-r"]).start().ready();
    let input =
        TempFile::with("input", &[b"one\ntwo\n", &b"x".repeat(1001)[..], b"\nfour\n"].concat());
    let emitter = emit_log().args(["-e", &exchange, "-l", "--max-record", "1KB"]);
    let ended = emitter.stdin(File::open(input.path()).unwrap()).run();
    ended.fails_with(65, &["2 confirmed, 0 in doubt", "record 3 is larger than", "--max-record"]);
    receiver.wait_for_stdout(b"one\ntwo\n");
}

#[test]
fn input_without_newlines_needs_bounded_memory() {
    let zeros = Tool::new("head").args(["-c", "200M", "/dev/zero"]);
    let (reader, writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-e", &unique("zeros"), "-l"]).stdin(reader).start();
    let zeros = zeros.stdout(writer).start_redirected();
    let mut peak = 0;
    wait_until("emit-log fails", || {
        peak = emitter.try_peak_memory().unwrap_or(0).max(peak);
        emitter.stderr_so_far().contains("larger than")
    });
    emitter.wait().fails_with(65, &["record 1 is larger than 16"]);
    assert!(peak > 0 && peak < 40_000_000, "{peak} bytes");
    drop(zeros);
}

#[test]
fn mandatory_counts_unroutable_records() {
    let exchange = unique("mandatory");
    let input = TempFile::with("input", b"one\ntwo\nthree\n");
    let emit = |options: &[&str]| {
        let emitter = emit_log().args(["-e", &exchange, "-l", "-m"]).args(options);
        emitter.stdin(File::open(input.path()).unwrap()).run()
    };
    for options in [&[][..], &["--batch"]] {
        emit(options).fails_with(67, &["3 confirmed", "3 unroutable", "not routed to any queue"]);
    }
    emit(&["--no-confirm"]).fails_with(67, &["3 sent without confirmation", "3 unroutable"]);
    let _receiver = receive_logs().args(["-e", &exchange]).start().ready();
    emit(&[]).success();
}

#[test]
fn a_signal_ends_it_after_all_read_lines_are_confirmed() {
    // The lines are long enough that a slow broker confirms all lines of a read within seconds.
    let line = "y".repeat(99);
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
        for options in [&[][..], &["--batch"]] {
            let exchange = unique("signal");
            let receiver = receive_logs().args(["-e", &exchange, "-r"]).start().ready();
            let (reader, writer) = std::io::pipe().unwrap();
            let yes = Tool::new("yes").arg(&line).stdout(writer).start_redirected();
            let emitter = emit_log().args(["-e", &exchange, "-l"]).args(options);
            let emitter = emitter.stdin(reader).start();
            wait_until("messages flow", || receiver.stdout_so_far().len() > 100_000);
            emitter.signal(signal);
            let ended = emitter.wait();
            assert_eq!(ended.signal(), Some(signal.as_raw()), "{ended:?}");
            let stderr = ended.stderr_text();
            let confirmed = stderr.strip_prefix(&format!("emit-log: stopped by {name}: "));
            let confirmed =
                confirmed.and_then(|rest| rest.strip_suffix(" confirmed, 0 in doubt\n"));
            let confirmed: usize = confirmed.expect(&stderr).parse().unwrap();
            // The last line may be partial.
            let lines = || receiver.stdout_so_far().iter().filter(|byte| **byte == b'\n').count();
            wait_until("all confirmed lines are received", || lines() >= confirmed);
            let received = receiver.stop().success().stdout_text();
            let whole = format!("{line}\n").repeat(confirmed - 1);
            let last = received.strip_prefix(&whole).and_then(|last| last.strip_suffix('\n'));
            assert!(last.is_some_and(|last| line.starts_with(last)), "{last:?}");
            drop(yes);
        }
    }
}

#[test]
fn a_signal_sends_the_last_line_without_its_newline() {
    let dir = tempfile::tempdir().unwrap();
    let spool = dir.path().join("spool");
    let spool = spool.to_str().unwrap();
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
        for options in [&[][..], &["--batch", "--linger", "1h"], &["--spool", spool]] {
            let exchange = unique("idle");
            let (emitter, mut pipe) = live(&[&["-e", &exchange, "-l", "-v"], options].concat());
            let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
            let connected = || emitter.stderr_so_far().contains("publishing to exchange");
            wait_until("emit-log is connected", connected);
            pipe.write_all(b"starting\npanic: oom").unwrap();
            wait_until("all is read", || rustix::io::ioctl_fionread(&pipe).unwrap() == 0);
            emitter.signal(signal);
            let ended = emitter.wait();
            assert_eq!(ended.signal(), Some(signal.as_raw()), "{ended:?}");
            let stopped = format!("emit-log: stopped by {name}: 2 confirmed, 0 in doubt\n");
            assert!(ended.stderr_text().ends_with(&stopped), "{ended:?}");
            receiver.wait_for_stdout(b"starting\npanic: oom\n");
            receiver.stop().success();
        }
    }
}

#[test]
fn an_unsent_partial_line_is_counted() {
    let broker = Broker::start();
    let receiver = receive_logs().args(["-r", "-u", broker.url(), "-n", "1"]).start().ready();
    let (emitter, mut pipe) = live(&["-u", broker.url(), "-l", "--retry", "1s"]);
    pipe.write_all(b"whole\nhalf").unwrap();
    receiver.wait().success();
    wait_until("all is read", || rustix::io::ioctl_fionread(&pipe).unwrap() == 0);
    broker.kill();
    let ended = emitter.wait().exits_with(69);
    let counts = "emit-log: 1 confirmed, 0 in doubt, 1 read and not sent: ";
    assert!(ended.stderr_text().contains(counts), "{ended:?}");
}

#[test]
fn unroutable_records_are_reported_after_a_signal() {
    let exchange = unique("unroutable");
    let (emitter, mut pipe) = live(&["-e", &exchange, "-l", "-m", "-v"]);
    pipe.write_all(b"one\n").unwrap();
    wait_until("the line is returned", || emitter.stderr_so_far().contains("NO_ROUTE"));
    emitter.signal(Signal::TERM);
    let stderr = emitter.wait().stderr_text();
    let stopped = "emit-log: stopped by SIGTERM: 1 confirmed, 0 in doubt, 1 unroutable\n";
    assert!(stderr.ends_with(stopped), "{stderr}");
}

#[test]
fn many_confirms_do_not_block_the_connection() {
    let exchange = unique("many");
    let input = TempFile::with("input", &b"\n".repeat(300_000));
    let emitter = emit_log().args(["-e", &exchange, "-l", "--retry", "10s"]);
    emitter.stdin(File::open(input.path()).unwrap()).run().success();
}

#[test]
fn unreadable_input_is_an_error() {
    let directory = File::open("/").unwrap();
    let ended = emit_log().args(["-e", &unique("directory"), "-l"]).stdin(directory).run();
    ended.fails_with(74, &["read standard input", "directory"]);
}

#[test]
fn closed_standard_input_is_not_empty_input() {
    let exchange = unique("closed");
    let emit = |redirection: &str| {
        let script = format!("exec \"$0\" -l -e {exchange} {redirection}");
        let bash = Tool::new("bash").args(["-c", &script]).arg(binary("emit-log"));
        bash.env("AMQP_URL", url()).run()
    };
    emit("<&-").fails_with(74, &["read standard input", "closed"]);
    emit("< /dev/null").success();
}

#[test]
fn options_of_lines_need_lines_and_no_words() {
    for args in [
        &["-l", "word"][..],
        &["--batch"],
        &["-0"],
        &["--skip-empty"],
        &["-l", "--max-record", "0"],
        &["-l", "--max-record", "much"],
    ] {
        emit_log().args(args).run().exits_with(2);
    }
}

#[test]
fn a_terminal_shows_progress_and_a_summary() {
    let exchange = unique("terminal");
    let input = TempFile::with("input", &log_text(3_000));
    let emit = |options: &str| {
        let screen = TempFile::new("screen");
        let emitter = binary("emit-log");
        let command = format!("exec {emitter:?} {options} -e {exchange} < {:?}", input.path());
        let terminal = terminal(&command, screen.path()).env("AMQP_URL", url());
        terminal.env("TERM", "xterm").run().success();
        String::from_utf8(screen.read().unwrap()).unwrap()
    };
    let shown = emit("-l");
    let sent = shown.lines().find_map(|line| line.split_once("Sent 3001 messages ("));
    assert!(sent.is_some_and(|(_, rest)| rest.ends_with("/s, all confirmed")), "{shown}");
    let shown = emit("-l -q");
    assert!(!shown.contains("messages"), "{shown}");
}

/// The final lines of a terminal, without cleared text and without the lines of `script`.
fn final_screen(text: &str) -> Vec<&str> {
    let text = text.lines().filter(|line| !line.starts_with("Script "));
    let lines = text.map(|line| line.rsplit("\x1b[K").next().unwrap_or(line));
    lines.map(|line| line.trim_matches('\r')).filter(|line| !line.is_empty()).collect()
}

#[test]
fn a_terminal_shows_an_outage_and_no_partial_lines() {
    let broker = Broker::start();
    let (screen, fifo) = (TempFile::new("screen"), TempFile::new("fifo"));
    Tool::new("mkfifo").arg(fifo.path()).run().success();
    let mut input = OpenOptions::new().read(true).write(true).open(fifo.path()).unwrap();
    let (emitter, url) = (binary("emit-log"), broker.url());
    let command = format!("exec {emitter:?} -l -u {url} --retry 1000s < {:?}", fifo.path());
    let terminal = terminal(&command, screen.path()).env("TERM", "xterm").start();
    let shown = || String::from_utf8_lossy(&screen.read().unwrap_or_default()).into_owned();
    let wait_for = |text: &str| wait_until(text, || shown().contains(text));
    input.write_all(&b"line\n".repeat(1000)).unwrap();
    wait_for("1 000 messages (5.0 kB), ");
    // The rate covers the last seconds.
    wait_for(", 0/s, 0 unconfirmed");
    broker.kill();
    wait_for("; trying again");
    wait_for("0 in doubt, no broker for 1s, trying for 16m 38s more");
    broker.restart();
    wait_for("connected to ");
    input.write_all(b"line\n").unwrap();
    wait_for("1 001 messages");
    // This is the last writer of the fifo, so emit-log reads the end of its input.
    drop(input);
    terminal.wait().success();
    let shown = shown();
    let left = final_screen(&shown);
    let is_note = |line: &&str| line.starts_with("emit-log: ") || line.starts_with("Sent 1001 m");
    assert!(left.iter().all(is_note) && left.len() >= 3, "{left:#?}");
}

#[test]
fn no_progress_is_drawn_over_typed_input() {
    let (exchange, screen) = (unique("typed"), TempFile::new("screen"));
    let receiver = receive_logs().args(["-e", &exchange]).start().ready();
    let (reader, mut keyboard) = std::io::pipe().unwrap();
    let command = format!("exec {:?} -l -e {exchange}", binary("emit-log"));
    let terminal = terminal(&command, screen.path()).env("AMQP_URL", url()).env("TERM", "xterm");
    let terminal = terminal.stdin(reader).start();
    let started = Instant::now();
    keyboard.write_all(b"typed\n").unwrap();
    receiver.wait_for_stdout(b" [x] \"typed\"\n");
    wait_until("the line would have been drawn", || started.elapsed() > Duration::from_millis(600));
    keyboard.write_all(b"\x04").unwrap();
    terminal.wait().success();
    let shown = String::from_utf8_lossy(&screen.read().unwrap()).into_owned();
    assert!(shown.contains("typed") && !shown.contains("unconfirmed"), "{shown:?}");
    assert!(!shown.contains("\x1b["), "{shown:?}");
}

#[test]
fn large_batches_do_not_fill_the_memory_of_a_receiver() {
    let exchange = unique("backlog");
    let (mut reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
    let receiver = receive_logs().args(["-e", &exchange, "-r", "-n", "200000"]);
    let receiver = receiver.stdout(std::os::fd::OwnedFd::from(writer)).start_redirected().ready();
    let mut line = vec![b'x'; 999];
    line.push(b'\n');
    let input = TempFile::with("input", &line.repeat(200_000));
    let emitter = emit_log().args(["-e", &exchange, "-l", "--batch"]);
    emitter.stdin(File::open(input.path()).unwrap()).run().success();
    // The broker has all lines. It has sent as many as it can when the receiver stops reading.
    let mut before = 0;
    wait_until("the receiver stops reading", || {
        thread::sleep(Duration::from_millis(200));
        let now = receiver.try_peak_memory().unwrap();
        std::mem::replace(&mut before, now) == now
    });
    assert!(before < 90_000_000, "{before} bytes");
    let copy = thread::spawn(move || {
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        received
    });
    assert_eq!(receiver.wait().success().stderr_text(), BANNER);
    assert!(copy.join().unwrap() == input.read().unwrap());
}

#[test]
fn other_receivers_see_the_records_of_a_batch_as_lines() {
    let exchange = unique("peer");
    let peer = Peer::connect();
    let input = TempFile::with("input", b"one\ntwo\n");
    let options = amiquip::ExchangeDeclareOptions::default();
    let channel = peer.channel();
    channel.exchange_declare(amiquip::ExchangeType::Fanout, &exchange, options).unwrap();
    let queue = channel.queue_declare(&exchange, amiquip::QueueDeclareOptions::default()).unwrap();
    channel.queue_bind(queue.name(), &exchange, "", amiquip::FieldTable::new()).unwrap();
    let emitter = emit_log().args(["-e", &exchange, "-l", "--batch"]);
    emitter.stdin(File::open(input.path()).unwrap()).run().success();
    let message = queue.get(true).unwrap().expect("a message");
    assert_eq!(message.delivery.body, b"one\ntwo");
    assert_eq!(message.delivery.properties.type_().as_deref(), Some("lines"));
    channel.queue_delete(&exchange, amiquip::QueueDeleteOptions::default()).unwrap();
}
