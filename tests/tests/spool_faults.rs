//! Faults during `emit-log --spool`: full and slow disks, a lack of descriptors, damage, and kills.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use logs_tests::spool::{Dir, SmallDisk, line, nowhere, number_of, numbers, pipe, wait_for, write};
use logs_tests::{
    Broker, Proxy, Running, TempFile, Tool, Way, binary, receive_logs, skip, unique, url,
    wait_until,
};
use rustix::process::Signal;

/// Leaves lines in a spool, by running emit-log without a broker.
fn leave(dir: &Dir, last: u64) {
    let (reader, mut writer) = pipe();
    let emitter = dir.emitter(&nowhere()).args(["--retry", "1ms"]).stdin(reader).start();
    write(&mut writer, 1..=last);
    drop(writer);
    assert_eq!(emitter.wait().status.code(), Some(69));
}

fn fill_up(dir: &Dir) -> File {
    let mut rest = File::create(dir.path().join("rest")).unwrap();
    while rest.write_all(&[0; 4096]).is_ok() {}
    rest
}

/// Seconds of processor time that a process has used.
fn processor_time(process: &Running) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.id())).expect("it runs");
    let fields: Vec<_> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect(ticks)).sum();
    ticks as f64 / 100.0
}

/// The number before a word in the last line of stderr, or 0 without this word.
fn count(text: &str, word: &str) -> u64 {
    let last = text.lines().last().expect("a last line");
    let Some((before, _)) = last.split_once(word) else { return 0 };
    before.rsplit(' ').find_map(|word| word.parse().ok()).expect(last)
}

#[test]
fn a_short_retry_sends_a_backlog_to_a_healthy_broker() {
    for retry in ["0s", "1s", "3s"] {
        let (dir, exchange) = (Dir::temporary(), unique("spool"));
        leave(&dir, 100);
        let rest = dir.emitter(&url()).args(["-e", &exchange, "--retry", retry]).run().success();
        assert!(rest.stderr_text().contains("100 records of an earlier run"), "{rest:?}");
        assert_eq!(dir.records(), 0);
    }
}

#[test]
fn lingering_lines_are_on_disk_in_time() {
    let dir = Dir::temporary();
    let (reader, mut writer) = pipe();
    let options = ["--batch", "--linger", "1h"];
    let emitter = dir.emitter(&nowhere()).args(options).stdin(reader).start();
    write(&mut writer, 1..=100);
    wait_until("all are on disk", || dir.holds(&line(100)));
    emitter.kill();
    assert_eq!(dir.records(), 100);
}

/// While emit-log waits for the disk, it reads nothing, so a kill loses no line.
#[test]
fn a_kill_while_the_disk_is_busy_loses_no_line() {
    if !Tool::new("strace").args(["-D", "--seccomp-bpf", "-f", "true"]).run().status.success() {
        return skip("strace may not slow down another program");
    }
    let slow = ["-D", "--seccomp-bpf", "-f", "-o", "/dev/null", "-e", "trace=fsync,fdatasync"];
    let slow = [&slow[..], &["-e", "inject=fsync,fdatasync:delay_enter=1000000"]].concat();
    let is_long = |since: &Instant| since.elapsed() > Duration::from_millis(600);
    for (stalls, is_new) in [(1, false), (2, true)] {
        let dir = Dir::temporary();
        if !is_new {
            dir.emitter(&nowhere()).run().success();
        }
        let (mut reader, mut writer) = pipe();
        let emitter = Tool::new("strace").args(&slow).arg(binary("emit-log"));
        let emitter = emitter.args(["-l", "--batch", "--linger", "40ms", "-u", &nowhere()]);
        let emitter = emitter.arg("--spool").arg(dir.path()).stdin(reader.try_clone().unwrap());
        let emitter = emitter.start();
        let (mut last, mut stalled) = (1, 0);
        write(&mut writer, [last]);
        wait_until("the first line is read", || rustix::io::ioctl_fionread(&reader).unwrap() == 0);
        let mut read_at = Instant::now();
        wait_until("the disk is busy again", || {
            if rustix::io::ioctl_fionread(&reader).unwrap() == 0 {
                stalled += u64::from(is_long(&read_at));
                read_at = Instant::now();
            }
            last += 1;
            write(&mut writer, [last]);
            stalled + 1 == stalls && is_long(&read_at)
        });
        emitter.kill();
        drop(writer);
        let mut unread = String::new();
        reader.read_to_string(&mut unread).unwrap();
        let first = unread.lines().next().map_or(last + 1, number_of);
        assert_eq!(dir.numbers(), (1..first).collect::<Vec<_>>(), "stall {stalls}");
    }
}

#[test]
fn a_stop_without_confirms_loses_no_line() {
    let (broker, exchange) = (Broker::start(), unique("spool"));
    let receiver = receive_logs().args(["-r", "-e", &exchange, "-u", broker.url()]).start().ready();
    let (mut last, dir) = (0, Dir::temporary());
    for milliseconds in [100, 200, 300, 460, 600] {
        let proxy = Proxy::start(broker.url());
        let (reader, mut writer) = pipe();
        let emitter = dir.emitter(proxy.url()).args(["-e", &exchange]).stdin(reader).start();
        last += 1;
        write(&mut writer, [last]);
        wait_for(&receiver, last);
        proxy.stall_one(Way::FromBroker);
        write(&mut writer, last + 1..=last + 2000);
        last += 2000;
        wait_until("the last line is read", || {
            rustix::io::ioctl_fionread(&writer).is_ok_and(|bytes| bytes == 0)
        });
        // The test varies the time of the signal relative to the work of the spool.
        thread::sleep(Duration::from_millis(milliseconds));
        emitter.signal(Signal::TERM);
        assert_eq!(emitter.wait().signal(), Some(Signal::TERM.as_raw()));
    }
    let rest = dir.emitter(broker.url()).args(["-e", &exchange]).run().success();
    assert!(rest.stderr_text().contains("of an earlier run"), "{rest:?}");
    wait_until("all lines are received", || numbers(&receiver).len() as u64 >= last);
    assert_eq!(numbers(&receiver), (1..=last).collect::<Vec<_>>());
}

#[test]
fn a_lack_of_descriptors_loses_no_line() {
    let (broker, dir) = (Broker::start(), Dir::temporary());
    let receiver = receive_logs().args(["-r", "-u", broker.url()]).start().ready();
    let (reader, mut writer) = pipe();
    let emitter = dir.emitter(broker.url()).stdin(reader).start();
    write(&mut writer, 1..=100);
    wait_for(&receiver, 100);
    broker.kill();
    emitter.wait_for_stderr("trying again", 1);
    let limit = |files: &str| {
        let limit = format!("--nofile={files}");
        let pid = emitter.id().to_string();
        Tool::new("prlimit").args(["--pid", &pid, &limit]).run().success();
    };
    limit("4:1024");
    write(&mut writer, 101..=30_000);
    emitter.wait_for_stderr("Too many open files", 1);
    write(&mut writer, 30_001..=60_000);
    wait_until("the last line is on disk", || dir.holds(&line(60_000)));
    limit("1024:1024");
    broker.restart();
    wait_for(&receiver, 60_000);
    drop(writer);
    emitter.wait().success();
    assert_eq!(numbers(&receiver), (1..=60_000).collect::<Vec<_>>());
}

#[test]
fn a_full_disk_in_an_outage_blocks_and_loses_no_line() {
    let Some(SmallDisk(ref dir)) = SmallDisk::mount() else { return };
    let broker = Broker::start();
    let receiver = receive_logs().args(["-r", "-u", broker.url()]).start().ready();
    dir.emitter(broker.url()).run().success();
    let rest = fill_up(dir);
    let (reader, mut writer) = pipe();
    let emitter = dir.emitter(broker.url()).stdin(reader).start();
    write(&mut writer, [1]);
    wait_for(&receiver, 1);
    broker.kill();
    let producer = thread::spawn(move || write(&mut writer, 2..=20_000));
    emitter.wait_for_stderr("cannot be used (database or disk is full)", 1);
    assert!(!producer.is_finished());
    let (started, before) = (Instant::now(), processor_time(&emitter));
    broker.restart();
    producer.join().unwrap();
    wait_for(&receiver, 20_000);
    let (passed, used) = (started.elapsed().as_secs_f64(), processor_time(&emitter) - before);
    assert!(used < 0.4 * passed, "{used} s of {passed} s");
    emitter.wait().success();
    assert_eq!(numbers(&receiver), (1..=20_000).collect::<Vec<_>>());
    drop(rest);
}

#[test]
fn a_full_disk_and_late_confirms_keep_memory_and_counts() {
    for policy in ["block", "drop-oldest", "drop-newest"] {
        let Some(SmallDisk(ref dir)) = SmallDisk::mount() else { return };
        let exchange = unique("spool");
        let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
        dir.emitter(&url()).args(["-e", &exchange]).run().success();
        let _rest = fill_up(dir);
        let proxy = Proxy::start(&url());
        let (reader, mut writer) = pipe();
        let emitter = dir.emitter(proxy.url()).args(["-v", "-e", &exchange, "--when-full", policy]);
        let emitter = emitter.stdin(reader).start();
        emitter.wait_for_stderr("publishing to exchange", 1);
        write(&mut writer, [1]);
        wait_for(&receiver, 1);
        let producer = thread::spawn(move || write(&mut writer, 2..=40_000));
        while !producer.is_finished() {
            // Confirms take longer than a message may be only in memory.
            proxy.stall_one(Way::FromBroker);
            thread::sleep(Duration::from_millis(120));
            proxy.resume();
            thread::sleep(Duration::from_millis(30));
        }
        producer.join().unwrap();
        let memory = emitter.peak_memory();
        let ended = emitter.wait();
        assert!(memory < 40 << 20, "{policy}: {memory}");
        let text = ended.stderr_text();
        let dropped = count(&text, " dropped (");
        match dropped {
            0 => assert_eq!(ended.status.code(), Some(0), "{ended:?}"),
            _ => {
                assert_eq!((ended.status.code(), policy != "block"), (Some(69), true), "{ended:?}");
                assert_eq!(count(&text, " confirmed,") + dropped, 40_000, "{ended:?}");
            }
        }
        wait_until("all other lines are received", || {
            numbers(&receiver).len() as u64 >= 40_000 - dropped
        });
        assert_eq!(numbers(&receiver).len() as u64, 40_000 - dropped);
        assert!(numbers(&receiver).is_sorted_by(|a, b| a < b));
    }
}

/// Runs `emit-log` from a shell, with a spool and without a broker.
fn in_shell(dir: &Dir, script: &str) -> Tool {
    let shell = Tool::new("bash").args(["-c", script]).arg(binary("emit-log"));
    shell.args(["-l", "-u", &nowhere(), "--spool"]).arg(dir.path())
}

#[test]
fn an_unwritable_disk_uses_little_cpu() {
    let dir = Dir::temporary();
    let (reader, mut writer) = pipe();
    let limited = in_shell(&dir, "ulimit -f 600; exec \"$0\" \"$@\"");
    let emitter = limited.args(["--retry", "1s"]).stdin(reader).start();
    // The emitter ends before it has read all lines.
    let producer = thread::spawn(move || {
        (1..=20_000).try_for_each(|number| writer.write_all(line(number).as_bytes())).is_err()
    });
    emitter.wait_for_stderr("cannot be used", 1);
    let (started, before) = (Instant::now(), processor_time(&emitter));
    thread::sleep(Duration::from_secs(2));
    let (passed, used) = (started.elapsed().as_secs_f64(), processor_time(&emitter) - before);
    assert!(used < 0.4 * passed, "{used} s of {passed} s");
    emitter.signal(Signal::TERM);
    let ended = emitter.wait();
    // SIGXFSZ does not end it. The lines that were read and could not be written are counted.
    assert_eq!(ended.status.code(), Some(69), "{ended:?}");
    assert!(count(&ended.stderr_text(), " dropped (") > 0, "{ended:?}");
    let left = count(&ended.stderr_text(), " left in the spool");
    assert_eq!(dir.records(), left, "{ended:?}");
    assert!(left > 0, "{ended:?}");
    assert!(producer.join().unwrap(), "the producer was blocked");
}

#[test]
fn a_removed_spool_is_reported() {
    let dir = Dir::temporary();
    let (reader, mut writer) = pipe();
    let emitter = dir.emitter(&nowhere()).args(["--retry", "1ms"]).stdin(reader).start();
    write(&mut writer, 1..=10);
    wait_until("all are on disk", || dir.holds(&line(10)));
    fs::remove_dir_all(dir.path()).unwrap();
    write(&mut writer, 11..=20);
    drop(writer);
    let ended = emitter.wait();
    assert_eq!(ended.status.code(), Some(69), "{ended:?}");
    assert!(ended.stderr_text().contains("spool.db was removed"), "{ended:?}");
    assert!(ended.stderr_text().contains("0 confirmed, 0 in doubt, 20 dropped"), "{ended:?}");
}

#[test]
fn an_unusable_spool_is_rejected_at_once() {
    let refuse = |prepare: &dyn Fn(&Dir), what: &str| {
        let dir = Dir::temporary();
        fs::create_dir(dir.path()).unwrap();
        prepare(&dir);
        let ended = dir.emitter(&url()).stdin(Stdio::null()).run();
        ended.fails_with(78, &["open the spool ", what]);
        dir
    };
    refuse(&|dir| fs::write(dir.database(), [b'x'; 5000]).unwrap(), "is not a database (move ");
    refuse(&|dir| fs::create_dir(dir.database()).unwrap(), "is not a regular file");
    refuse(&|dir| drop(Tool::new("mkfifo").arg(dir.database()).run()), "is not a regular file");
    let file = TempFile::with("target", b"precious");
    refuse(&|dir| symlink(file.path(), dir.database()).unwrap(), "is not a regular file");
    assert_eq!(file.read().unwrap(), b"precious");
    let old = |dir: &Dir| fs::write(dir.path().join("00000001.spool"), b"").unwrap();
    refuse(&old, "00000001.spool is a file of emit-log 0.2 (send it with that version");
    let cut = refuse(
        &|dir| {
            leave(dir, 3000);
            let file = File::options().write(true).open(dir.database()).unwrap();
            file.set_len(100_000).unwrap();
        },
        "spool.db is damaged",
    );
    assert_eq!(fs::metadata(cut.database()).unwrap().len(), 100_000, "nothing has changed");
    // SQLite must not follow a symbolic link at the names of its other files.
    for name in ["spool.db-wal", "spool.db-shm"] {
        let dir = Dir::temporary();
        leave(&dir, 10);
        symlink(file.path(), dir.path().join(name)).unwrap();
        let ended = dir.emitter(&url()).stdin(Stdio::null()).run();
        assert!(matches!(ended.status.code(), Some(0 | 74 | 78)), "{ended:?}");
        assert_eq!(file.read().unwrap(), b"precious");
    }
}

#[test]
fn a_stopped_run_reports_the_lines_left() {
    let (broker, dir) = (Broker::start(), Dir::temporary());
    let (screen, spool, binary) = (TempFile::new("screen"), dir.path(), binary("emit-log"));
    let url = broker.url();
    let script = format!(
        "(seq 7; while [ ! -e {spool:?}.down ]; do sleep 0.1; done; seq 12; exec sleep 1000) | \
         exec {binary:?} -l -u {url} --spool {spool:?}"
    );
    let (typed, mut keyboard) = pipe();
    let terminal = Tool::new("script").args(["-qec", &script]).arg(screen.path()).stdin(typed);
    let terminal = terminal.start();
    let shown = || String::from_utf8_lossy(&screen.read().unwrap_or_default()).into_owned();
    wait_until("seven are confirmed", || shown().contains("7 messages"));
    broker.kill();
    wait_until("the loss is noticed", || shown().contains("trying again"));
    File::create(format!("{}.down", spool.display())).unwrap();
    wait_until("all are on disk", || shown().contains("12 in the spool"));
    keyboard.write_all(b"\x03").unwrap();
    wait_until("it has ended", || shown().contains("stopped by SIGINT"));
    terminal.wait();
    assert!(shown().contains("7 confirmed, 0 in doubt, 12 left in the spool"), "{}", shown());
    assert!(!shown().contains("all confirmed"), "{}", shown());
}
