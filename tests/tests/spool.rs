//! `emit-log --spool`: the producer does not wait for a broker, and each line that was read is confirmed, on disk, or
//! counted as dropped.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use logs_tests::spool::{Dir, SmallDisk, line, nowhere, numbers, pipe, wait_for, write};
use logs_tests::{Broker, receive_logs, unique, url, wait_until};
use memchr::memmem;
use rustix::process::Signal;

/// How long a record may be only in memory.
const IN_MEMORY: Duration = Duration::from_millis(100);

#[test]
fn no_line_is_on_disk_while_the_broker_keeps_up() {
    let (dir, exchange) = (Dir::temporary(), unique("spool"));
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let (reader, mut writer) = pipe();
    let emitter = dir.emitter(&url()).args(["-e", &exchange]).stdin(reader).start();
    let mut not_on_disk = 0;
    for number in 1..=500 {
        write(&mut writer, [number]);
        wait_for(&receiver, number);
        not_on_disk += u32::from(!dir.holds(&line(number)));
    }
    // The first lines are read before the login, and a busy machine may delay others.
    assert!(not_on_disk > 250, "{not_on_disk}");
    drop(writer);
    assert_eq!(emitter.wait().success().stderr_text(), "");
}

#[test]
fn a_producer_does_not_wait_for_a_broker_that_restarts() {
    let (broker, dir) = (Broker::start(), Dir::temporary());
    let receiver = receive_logs().args(["-r", "-u", broker.url()]).start().ready();
    let (reader, mut writer) = pipe();
    let emitter = dir.emitter(broker.url()).stdin(reader).start();
    let mut last = 1000;
    write(&mut writer, 1..=last);
    wait_for(&receiver, last);
    for _ in 0..2 {
        broker.kill();
        // These lines exceed the pipe and the window. Without a spool, the producer would wait for the end of the
        // outage.
        write(&mut writer, last + 1..=last + 60_000);
        last += 60_000;
        broker.restart();
        wait_for(&receiver, last);
    }
    drop(writer);
    emitter.wait().success();
    assert_eq!(numbers(&receiver), (1..=last).collect::<Vec<_>>());
    assert_eq!(dir.records(), 0);
}

#[test]
fn a_producer_does_not_wait_for_a_stuck_broker() {
    let (broker, dir) = (Broker::start(), Dir::temporary());
    let receiver = receive_logs().args(["-r", "-u", broker.url()]).start().ready();
    let (reader, mut writer) = pipe();
    let emitter = dir.emitter(broker.url()).stdin(reader).start();
    write(&mut writer, 1..=100);
    wait_for(&receiver, 100);
    // During an alarm, RabbitMQ stops reading from connections that publish.
    broker.ctl(["set_vm_memory_high_watermark", "0"]);
    write(&mut writer, 101..=60_000);
    broker.ctl(["set_vm_memory_high_watermark", "0.4"]);
    wait_for(&receiver, 60_000);
    // The broker is silent for less than the time between two heartbeats.
    broker.freeze();
    write(&mut writer, 60_001..=120_000);
    wait_until("the last line is on disk", || dir.holds(&line(120_000)));
    broker.thaw();
    wait_for(&receiver, 120_000);
    drop(writer);
    emitter.wait().success();
    assert_eq!(numbers(&receiver), (1..=120_000).collect::<Vec<_>>());
}

#[test]
fn without_a_broker_a_signal_leaves_all_lines_on_disk() {
    let (dir, exchange) = (Dir::temporary(), unique("spool"));
    for (signal, lines) in [(Signal::TERM, 1..=5000), (Signal::INT, 5001..=5100)] {
        let (reader, mut writer) = pipe();
        let emitter = dir.emitter(&nowhere()).args(["--retry", "forever"]).stdin(reader).start();
        let last = *lines.end();
        write(&mut writer, lines);
        wait_until("the last line is on disk", || dir.holds(&line(last)));
        let started = Instant::now();
        emitter.signal(signal);
        let ended = emitter.wait();
        assert!(started.elapsed() < Duration::from_secs(2), "{ended:?}");
        assert_eq!(ended.status.signal(), Some(signal.as_raw()), "{ended:?}");
        let left =
            format!("0 confirmed, 0 in doubt, {last} left in the spool {}", dir.path().display());
        assert!(ended.stderr_text().contains(&left), "{ended:?}");
    }
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let (reader, mut writer) = pipe();
    let emitter = dir.emitter(&url()).args(["-e", &exchange]).stdin(reader).start();
    write(&mut writer, 5101..=5200);
    drop(writer);
    let ended = emitter.wait().success();
    assert!(ended.stderr_text().contains("5100 records of an earlier run"), "{ended:?}");
    wait_for(&receiver, 5200);
    assert_eq!(numbers(&receiver), (1..=5200).collect::<Vec<_>>());
    assert_eq!(receiver.stop().stderr_text().matches("missed").count(), 0);
}

#[test]
fn lines_left_at_the_end_of_the_input_are_reported() {
    let (dir, exchange) = (Dir::temporary(), unique("spool"));
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let (reader, mut writer) = pipe();
    write(&mut writer, 1..=10);
    drop(writer);
    let ended = dir.emitter(&nowhere()).args(["--retry", "100ms"]).stdin(reader).run();
    assert_eq!(ended.status.code(), Some(69), "{ended:?}");
    let left = format!("0 confirmed, 0 in doubt, 10 left in the spool {}: ", dir.path().display());
    assert!(ended.stderr_text().contains(&left), "{ended:?}");
    dir.send_rest(&exchange);
    wait_for(&receiver, 10);
    assert_eq!(numbers(&receiver), (1..=10).collect::<Vec<_>>());
}

#[test]
fn a_refused_login_leaves_all_lines_on_disk() {
    let (dir, exchange) = (Dir::temporary(), unique("spool"));
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let (reader, mut writer) = pipe();
    write(&mut writer, 1..=10);
    drop(writer);
    let wrong = logs_tests::url_with("guest", "wrong", "%2f");
    let ended = dir.emitter(&wrong).stdin(reader).run();
    assert_eq!(ended.status.code(), Some(77), "{ended:?}");
    assert!(ended.stderr_text().contains("10 left in the spool"), "{ended:?}");
    dir.send_rest(&exchange);
    wait_for(&receiver, 10);
}

/// Emitters are killed one after another while they read from one pipe. Only lines that were read just before a kill
/// may be missing.
#[test]
fn a_kill_loses_only_lines_read_just_before() {
    let (broker, dir) = (Broker::start(), Dir::temporary());
    let receiver = receive_logs().args(["-r", "-u", broker.url()]).start().ready();
    let (reader, mut writer) = pipe();
    let start = || dir.emitter(broker.url()).stdin(reader.try_clone().unwrap()).start();
    let (mut last, mut kills, mut random) = (0, Vec::new(), 7_u64);
    for round in 0..50 {
        if round == 20 {
            broker.kill();
        }
        if round == 30 {
            broker.restart();
        }
        let emitter = start();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let end = Instant::now() + Duration::from_millis(50 + (random >> 33) % 300);
        let mut written = Vec::new();
        while Instant::now() < end {
            last += 1;
            write(&mut writer, [last]);
            written.push((Instant::now(), last));
            thread::sleep(Duration::from_micros(500));
        }
        emitter.kill();
        let killed = Instant::now();
        let recent = |(time, _): &&(Instant, u64)| killed - *time < 2 * IN_MEMORY;
        kills.extend(written.iter().filter(recent).map(|(_, number)| *number));
    }
    let emitter = start();
    write(&mut writer, [last + 1]);
    wait_for(&receiver, last + 1);
    drop(writer);
    emitter.wait().success();
    let received = numbers(&receiver);
    assert!(received.is_sorted_by(|a, b| a < b), "without duplicates, in order");
    let missing: Vec<_> = (1..=last).filter(|n| received.binary_search(n).is_err()).collect();
    let wrong: Vec<_> = missing.iter().filter(|n| !kills.contains(n)).collect();
    assert!(wrong.is_empty(), "{} of {}, from {}", wrong.len(), missing.len(), wrong[0]);
    println!("{} of {last} lines went with the kills", missing.len());
}

#[test]
fn two_processes_do_not_share_a_spool() {
    let (dir, exchange) = (Dir::temporary(), unique("spool"));
    let (reader, writer) = pipe();
    let first = dir.emitter(&url()).args(["-e", &exchange]).stdin(reader).start();
    wait_until("the first has the spool", || dir.path().join("spool.db-wal").exists());
    let second = dir.emitter(&url()).args(["-e", &exchange]).run();
    let text = format!(
        "emit-log: open the spool {}: another emit-log is using it\n",
        dir.path().display()
    );
    assert_eq!((second.status.code(), second.stderr_text()), (Some(74), text));
    first.kill();
    dir.emitter(&url()).args(["-e", &exchange]).run().success();
    drop(writer);
}

/// Writes more lines than fit into a spool while there is no broker. Returns the numbers of the lines that a later run
/// sends, and the counts of lines that emit-log reports as left and as dropped.
fn overfill(policy: &str, dir: &Dir, size: &str) -> (Vec<u64>, u64, u64) {
    const LINES: u64 = 40_000;
    let exchange = unique("spool");
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let (reader, mut writer) = pipe();
    let emitter = dir.emitter(&nowhere());
    let emitter = emitter.args(["--spool-size", size, "--when-full", policy, "--retry", "1ms"]);
    let emitter = emitter.stdin(reader).start();
    write(&mut writer, 1..=LINES);
    drop(writer);
    let ended = emitter.wait();
    assert_eq!(ended.status.code(), Some(69), "{ended:?}");
    let text = ended.stderr_text();
    assert!(text.contains(" [!] spool "), "reported at once: {ended:?}");
    let count = |end: &str| -> u64 {
        let last = text.lines().last().expect("a last line");
        let (before, _) = last.split_once(end).expect(last);
        before.rsplit(' ').next().and_then(|count| count.parse().ok()).expect(last)
    };
    let (left, dropped) = (count(" left in the spool"), count(" dropped ("));
    assert_eq!(left + dropped, LINES, "{ended:?}");
    dir.send_rest(&exchange);
    wait_until("all lines left are received", || numbers(&receiver).len() as u64 >= left);
    (numbers(&receiver), left, dropped)
}

#[test]
fn the_newest_lines_are_dropped_and_counted() {
    let (received, left, _) = overfill("drop-newest", &Dir::temporary(), "1MiB");
    assert_eq!(received, (1..=left).collect::<Vec<_>>());
}

#[test]
fn the_oldest_lines_are_dropped_and_counted() {
    let (received, _, dropped) = overfill("drop-oldest", &Dir::temporary(), "1MiB");
    assert_eq!(received, (dropped + 1..=40_000).collect::<Vec<_>>());
}

#[test]
fn a_full_spool_that_blocks_loses_no_line() {
    let (broker, dir) = (Broker::start(), Dir::temporary());
    let receiver = receive_logs().args(["-r", "-u", broker.url()]).start().ready();
    let (reader, mut writer) = pipe();
    let watched = reader.try_clone().unwrap();
    let emitter = dir.emitter(broker.url()).args(["--spool-size", "1MiB"]).stdin(reader).start();
    write(&mut writer, [1]);
    wait_for(&receiver, 1);
    broker.kill();
    let producer = thread::spawn(move || write(&mut writer, 2..=40_000));
    logs_tests::wait_until_full(&watched);
    assert!(!producer.is_finished());
    assert!(dir.size() < 1024 * 1024 + 256 * 1024, "{}", dir.size());
    broker.restart();
    producer.join().unwrap();
    wait_for(&receiver, 40_000);
    emitter.wait().success();
    assert_eq!(numbers(&receiver), (1..=40_000).collect::<Vec<_>>());
}

#[test]
fn a_full_disk_does_not_stop_lines_that_are_confirmed() {
    let Some(SmallDisk(ref dir)) = SmallDisk::mount() else { return };
    let exchange = unique("spool");
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    // The database is created before the disk is full.
    dir.emitter(&url()).args(["-e", &exchange]).run().success();
    let mut rest = File::create(dir.path().join("rest")).unwrap();
    while rest.write_all(&[0; 4096]).is_ok() {}
    let (reader, mut writer) = pipe();
    let emitter = dir.emitter(&url()).args(["-e", &exchange]).stdin(reader).start();
    write(&mut writer, 1..=20_000);
    drop(writer);
    emitter.wait().success();
    wait_for(&receiver, 20_000);
    assert_eq!(numbers(&receiver), (1..=20_000).collect::<Vec<_>>());
}

#[test]
fn a_full_disk_is_a_full_spool() {
    for policy in ["drop-newest", "drop-oldest"] {
        let Some(SmallDisk(ref dir)) = SmallDisk::mount() else { return };
        let (received, left, _) = overfill(policy, dir, "8MiB");
        assert_eq!(received.len() as u64, left);
        assert!(received.is_sorted_by(|a, b| a < b));
    }
}

#[test]
fn a_damaged_spool_sends_all_sound_records() {
    let (dir, exchange) = (Dir::temporary(), unique("spool"));
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let (reader, mut writer) = pipe();
    write(&mut writer, 1..=100);
    drop(writer);
    let ended = dir.emitter(&nowhere()).args(["--retry", "1ms"]).stdin(reader).run();
    assert_eq!(ended.status.code(), Some(69), "{ended:?}");
    let mut bytes = fs::read(dir.database()).unwrap();
    let place = memmem::find(&bytes, line(50).as_bytes().trim_ascii_end()).expect("line 50");
    bytes[place + 20] ^= 1;
    fs::write(dir.database(), bytes).unwrap();
    let rest = dir.emitter(&url()).args(["-e", &exchange]).stdin(Stdio::null()).run();
    let (status, stderr) = (rest.status.code(), rest.stderr_text());
    assert_eq!(status, Some(69), "{rest:?}");
    assert!(stderr.contains("records that are missing or damaged: 1;"), "{rest:?}");
    assert!(stderr.contains("emit-log: 99 confirmed, 0 in doubt, 1 dropped (0 B): "), "{rest:?}");
    wait_for(&receiver, 100);
    let expected: Vec<_> = (1..=100).filter(|number| *number != 50).collect();
    assert_eq!(numbers(&receiver), expected);
    dir.send_rest(&exchange);
}
