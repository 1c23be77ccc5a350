//! The status line.

use std::path::Path;

use logs_tests::{Message, ScriptedBroker, TempFile, wait_until_full};

use super::harness::{
    FORCED, Run, batch, large_batch, numbered, pipe, read_exactly, wait_for_status,
};
use super::streams::{Files, stream};

#[test]
fn the_status_shows_the_broker_and_the_counts() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--retry", "forever"], file.path());
    wait_for_status(&run, "broker BROKER, written 0, missed 0, reconnections 0");
    session.deliver(&numbered(1));
    session.deliver(&batch("a\nb"));
    session.deliver(&numbered(4));
    wait_for_status(&run, "broker BROKER, written 4, missed 2, reconnections 0");
    broker.go_down();
    session.close(320, FORCED);
    let none = "broker none for N (trying until there is one)";
    wait_for_status(&run, &format!("{none}, written 4, missed 2, reconnections 0"));
    broker.come_back();
    let next = broker.accept();
    next.expect_consume();
    wait_for_status(&run, "broker BROKER, written 4, missed 2, reconnections 1");
    next.deliver(&numbered(6));
    wait_for_status(&run, "broker BROKER, written 5, missed 3, reconnections 1");
    next.deliver(&numbered(5));
    wait_for_status(&run, "broker BROKER, written 6, missed 2, reconnections 1");
    run.stops();
}

#[test]
fn the_status_shows_the_count_of_a_blocked_output() {
    let broker = ScriptedBroker::start();
    let (mut reader, _writer, path) = pipe();
    let (run, session) = Run::start(&broker, &[], Path::new(&path));
    session.deliver(&Message::new("before"));
    wait_for_status(&run, "broker BROKER, written 1, missed 0, reconnections 0");
    session.deliver(&large_batch());
    wait_until_full(&reader);
    wait_for_status(&run, "broker BROKER, written 1, missed 0, reconnections 0");
    read_exactly(&mut reader, 7 + large_batch().body.len() + 1);
    wait_for_status(&run, "broker BROKER, written 40001, missed 0, reconnections 0");
    run.stops();
}

#[test]
fn the_status_shows_the_offset_of_a_stream() {
    let files = Files::new(Vec::new());
    let (run, _session) = files.run(&["--from-start"]);
    wait_for_status(&run, "broker BROKER, written 0, offset none, missed 0, reconnections 0");
    files.broker.set_stream(stream(0..=3));
    wait_for_status(&run, "broker BROKER, written 4, offset 3, missed 0, reconnections 0");
    run.stops();
}
