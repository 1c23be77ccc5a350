//! Files that one process uses at a time: the next process waits for the lock.

use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use logs_tests::{
    Running, TempFile, Tool, emit_log, rabbitmqctl, receive_logs, unique, wait_until,
};

/// Starts a process that holds the lock of a file for this number of seconds.
fn hold(file: &Path, seconds: &str) -> Running {
    let script = "echo locked; exec sleep \"$0\"";
    let holder = Tool::new("flock").arg("--no-fork").arg(file);
    let holder = holder.args(["sh", "-c", script, seconds]).start();
    holder.wait_for_stdout(b"locked\n");
    holder
}

fn receiver(position: &TempFile, stream: &str) -> Tool {
    let reads = ["--stream", stream, "-e", stream, "--from-start", "--no-follow", "--resume"];
    receive_logs().args(reads).arg(position.path())
}

#[test]
fn a_receiver_waits_for_the_lock_of_the_position() {
    let (position, stream) = (TempFile::with("position", b""), unique("locked"));
    let receiver = receiver(&position, &stream);
    let _ending = hold(position.path(), "1");
    receiver.run().success();
    rabbitmqctl(["delete_queue", &stream]);
}

#[test]
fn an_emitter_waits_for_the_lock_of_the_spool() {
    let (spool, exchange) = (tempfile::tempdir().unwrap(), unique("locked"));
    let emitter = || emit_log().args(["-l", "-e", &exchange, "--spool"]).arg(spool.path());
    let (reader, writer) = io::pipe().unwrap();
    let first = emitter().stdin(reader).start();
    wait_until("the first has the spool", || spool.path().join("spool.db-wal").exists());
    let second = emitter().start();
    thread::sleep(Duration::from_secs(1));
    drop(writer);
    first.wait().success();
    second.wait().success();
}

#[test]
fn many_emitters_use_a_new_spool_in_turn() {
    let (parent, exchange) = (tempfile::tempdir().unwrap(), unique("locked"));
    for round in 0..10 {
        // Each spool is new for the first process only.
        let spool = parent.path().join((round / 2).to_string());
        let emitter = || emit_log().args(["-l", "-e", &exchange, "--spool"]).arg(&spool).start();
        let emitters = [(); 4].map(|()| emitter());
        for emitter in emitters {
            emitter.wait().success();
        }
    }
}

#[test]
fn a_lock_that_is_not_released_ends_the_next_process() {
    let position = TempFile::with("position", b"");
    let receiver = receiver(&position, &unique("locked"));
    let _holder = hold(position.path(), "infinity");
    receiver.run().fails_with(78, &["resume from ", "another receiver uses it"]);
}
