//! Outputs without a reader or without space, and outputs that are reopened.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::symlink;
use std::path::Path;

use logs_tests::{CANCEL, Message, ScriptedBroker, TempFile, wait_until_full};

use super::harness::{
    DURABLE, FORCED, Run, To, assert_content, batch, large_batch, pipe, read_exactly,
    wait_for_content,
};
use crate::receiver::Stop;
use crate::testing::{environment, limited_file};

#[test]
fn an_idle_receiver_ends_when_its_reader_exits() {
    let broker = ScriptedBroker::start();
    let (mut reader, _writer, path) = pipe();
    let (run, session) = Run::start(&broker, DURABLE, Path::new(&path));
    session.deliver(&Message::new("a"));
    assert_eq!(read_exactly(&mut reader, 2), "a\n");
    drop(reader);
    run.ends_with(Ok(Stop::ReaderGone));
    assert_eq!(session.acks_to_the_end(), [1]);
}

#[test]
fn messages_left_in_a_pipe_are_not_acknowledged() {
    let broker = ScriptedBroker::start();
    let (reader, _writer, path) = pipe();
    let (run, session) = Run::start(&broker, DURABLE, Path::new(&path));
    session.deliver(&large_batch());
    wait_until_full(&reader);
    drop(reader);
    run.ends_with(Ok(Stop::ReaderGone));
    assert_eq!(session.acks_to_the_end(), [0; 0]);
}

#[test]
fn on_a_full_disk_the_messages_in_the_file_are_acknowledged() {
    let (broker, file, link) =
        (ScriptedBroker::start(), TempFile::with("log", b""), TempFile::new("link"));
    symlink(file.path(), link.path()).unwrap();
    let (run, session) = Run::start(&broker, DURABLE, link.path());
    session.deliver(&Message::new("a"));
    session.deliver(&batch("b\nc"));
    wait_for_content(file.path(), "a\nb\nc\n");
    fs::remove_file(link.path()).unwrap();
    symlink("/dev/full", link.path()).unwrap();
    run.reopen();
    session.deliver(&Message::new("d"));
    let text = format!("write to {:?}: No space left on device (os error 28)", link.path());
    run.ends_with(Err(&text));
    assert_eq!(session.acks_to_the_end(), [2]);
    assert_content(file.path(), "a\nb\nc\n");
    assert_eq!(run.alerts(), [""; 0]);
}

#[test]
fn on_a_full_disk_the_messages_before_a_batch_remain() {
    let broker = ScriptedBroker::start();
    let file = limited_file(2 * 4096);
    let to = To::File(file.try_clone().unwrap());
    let (run, session) = Run::start_with(environment().retry, &broker, DURABLE, to);
    // Deliveries that arrive during a cancellation are written together.
    broker.withhold(CANCEL);
    run.stop();
    session.expect_cancel();
    session.deliver(&batch("a\nb"));
    session.deliver(&large_batch());
    session.confirm_cancel();
    run.ends_with(Err("write to stdout: Operation not permitted (os error 1)"));
    assert_eq!(session.acks_to_the_end(), [1]);
    let mut text = String::new();
    (&file).seek(SeekFrom::Start(0)).unwrap();
    (&file).read_to_string(&mut text).unwrap();
    assert_eq!(text, "a\nb\n");
}

#[test]
fn a_full_disk_at_a_lost_connection_ends_the_receiver() {
    let broker = ScriptedBroker::start();
    let (run, session) = Run::start(&broker, &[], Path::new("/dev/full"));
    session.in_one_piece(|session| {
        session.deliver(&Message::new("a"));
        session.close(320, FORCED);
    });
    run.ends_with(Err("write to \"/dev/full\": No space left on device (os error 28)"));
    assert_eq!(run.alerts(), [""; 0]);
}

#[test]
fn the_output_is_reopened_during_an_outage() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let run = Run::start_and_lose(&broker, file.path());
    let renamed = file.path().with_extension("1");
    fs::rename(file.path(), &renamed).unwrap();
    run.reopen();
    wait_for_content(file.path(), "");
    assert_content(&renamed, "a\n");
    run.stops();
}
