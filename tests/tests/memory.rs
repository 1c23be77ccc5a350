//! The memory of the tools is limited, for messages of any size and any end of a receiver.

use std::io::Write;
use std::thread;
use std::time::Duration;

use logs_tests::{
    Peer, Running, TempFile, Tool, emit_log, python, rabbitmqctl, receive_logs, unique, url,
    wait_until, wait_until_full,
};
use rustix::process::Signal;

/// The limit of docs/performance.md for a receiver whose messages are smaller than the limit.
const BOUND: u64 = 64 * 1024 * 1024;

const MIB: usize = 1024 * 1024;

/// Publishes this number of messages of this size. The text format must escape them.
fn publish(exchange: &str, messages: usize, size: usize) {
    let peer = Peer::connect();
    peer.channel().enable_publisher_confirms().unwrap();
    let confirms = peer.channel().listen_for_publisher_confirms().unwrap();
    let body: Vec<u8> = (0..size).map(|index| 0x80 | index as u8).collect();
    (0..messages).for_each(|_| peer.publish(exchange, &body));
    let mut confirmed = 0;
    while confirmed < messages as u64 {
        match confirms.recv_timeout(Duration::from_secs(60)).unwrap() {
            amiquip::Confirm::Ack(ack) => confirmed = confirmed.max(ack.delivery_tag),
            amiquip::Confirm::Nack(nack) => panic!("{nack:?}"),
        }
    }
}

/// Waits for the end with status 0. Returns the peak memory before it.
fn peak_until_the_end(mut receiver: Running) -> u64 {
    let mut peak = 0;
    while receiver.is_running() {
        peak = receiver.try_peak_memory().unwrap_or(0).max(peak);
        thread::sleep(Duration::from_millis(1));
    }
    receiver.wait().success();
    peak
}

fn assert_limited(peak: u64, what: &str) {
    assert!(peak < BOUND, "{what}: {peak} bytes");
}

#[test]
fn the_end_of_a_receiver_needs_no_more_memory() {
    let name = unique("ends");
    let receiver = |options: &[&str]| receive_logs().args(["-r", "-e", &name]).args(options);
    let (stream, queue) = (format!("{name}-stream"), format!("{name}-queue"));
    let make = |options: &[&str]| drop(receiver(options).start().ready().stop().success());
    make(&["--stream", &stream]);
    let classic = ["--queue", &queue, "--queue-type", "classic"];
    make(&classic);
    publish(&name, 2200, 400_000);
    for options in [
        &["--stream", &stream, "--from-start", "-n", "1"][..],
        &["--stream", &stream, "-n", "1", "--tail", "1"],
        &["--queue", &queue, "--queue-type", "classic", "-n", "2001"],
        &["--queue", &queue, "--queue-type", "classic", "-n", "1"],
    ] {
        let output = TempFile::new("log");
        let peak = peak_until_the_end(receiver(options).stdout(output.create()).start_redirected());
        assert_limited(peak, &format!("{options:?}"));
    }
    rabbitmqctl(["delete_queue", &queue]);
    let gone = receiver(&["--stream", &stream, "--from-start"]);
    let (reader, writer) = std::io::pipe().unwrap();
    let receiver = gone.stdout(writer).start_redirected().ready();
    wait_until_full(&reader);
    drop(reader);
    assert_limited(peak_until_the_end(receiver), "the reader has exited");
    rabbitmqctl(["delete_queue", &stream]);
}

/// With a short heartbeat, a receiver reads its socket often, even while its output blocks.
fn impatient_url() -> String {
    format!("{}?heartbeat=1", url())
}

/// Waits until the process needs more memory than `filled`, and its memory does not grow any more.
fn settled_memory(receiver: &Running, filled: u64) -> u64 {
    let mut before = 0;
    wait_until("the receiver has received what it can hold", || {
        thread::sleep(Duration::from_millis(500));
        let now = receiver.peak_memory();
        now > filled && std::mem::replace(&mut before, now) == now
    });
    assert!(
        !receiver.stderr_so_far().contains("subscribing again"),
        "{}",
        receiver.stderr_so_far()
    );
    before
}

#[test]
fn large_messages_wait_in_the_broker_for_a_stopped_reader() {
    for format in ["raw", "text", "json"] {
        let exchange = unique("stopped");
        let (reader, writer) = std::io::pipe().unwrap();
        let receiver = receive_logs().args(["-u", &impatient_url(), "-e", &exchange, "-f", format]);
        let receiver = receiver.stdout(writer).start_redirected().ready();
        publish(&exchange, 12, 16 * MIB);
        wait_until_full(&reader);
        assert_limited(settled_memory(&receiver, BOUND / 2), format);
    }
}

#[test]
fn a_signal_writes_the_received_large_messages() {
    let (exchange, output) = (unique("signal"), TempFile::new("log"));
    let receiver = receive_logs().args(["-e", &exchange]);
    let receiver = receiver.stdout(output.create()).start_redirected().ready();
    let load = {
        let exchange = exchange.clone();
        thread::spawn(move || publish(&exchange, 1600, MIB / 4))
    };
    wait_until("messages are written", || output.read().unwrap().len() > 8 * MIB);
    receiver.signal(Signal::TERM);
    assert_limited(peak_until_the_end(receiver), "a signal");
    let written = output.read().unwrap();
    let record = written.split_inclusive(|byte| *byte == b'\n').next().unwrap();
    assert!(written.chunks(record.len()).all(|other| other == record), "a record is incomplete");
    load.join().unwrap();
}

/// The limit of docs/performance.md for emit-log with the largest records of the default limit.
#[test]
fn records_of_16_mib_need_at_most_five_times_their_size() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-l", "-q", "-e", &unique("large")]).stdin(reader).start();
    let mut record = vec![b'x'; 16 * MIB];
    record.push(b'\n');
    (0..8).for_each(|_| writer.write_all(&record).unwrap());
    let peak = emitter.peak_memory();
    assert!(peak > 16 * MIB as u64 && peak < 96 * MIB as u64, "{peak} bytes");
    drop(writer);
    emitter.wait().success();
}

/// Reads 400 KB a second.
fn slow_reader() -> Tool {
    python().args(["-c", "import os, time\nwhile os.read(0, 8192): time.sleep(0.02)"])
}

#[test]
fn messages_that_cannot_be_written_in_time_are_counted() {
    let exchange = unique("slow");
    let (reader, writer) = std::io::pipe().unwrap();
    let slow = slow_reader().stdin(reader).start();
    let receiver = receive_logs().args(["-u", &impatient_url(), "-r", "-e", &exchange]);
    let receiver = receiver.stdout(writer).start_redirected().ready();
    publish(&exchange, 1000, 16 * 1024);
    settled_memory(&receiver, 16 * 1024 * 1024);
    receiver.signal(Signal::TERM);
    let ended = receiver.wait().exits_with(74);
    let stderr = ended.stderr_text();
    assert!(stderr.contains("received messages were not written in time"), "{stderr}");
    slow.wait().success();
}
