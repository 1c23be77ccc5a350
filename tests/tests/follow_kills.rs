//! A file is copied over RabbitMQ exactly once, whatever is killed: `emit-log --follow`, `receive-logs --stream --resume
//! --output`, and the broker.
//!
//! `FOLLOW_KILLS` is the number of kills, and `FOLLOW_SEED` chooses them: `scripts/soak follow`.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use logs_tests::{Broker, Running, emit_log, receive_logs};
use tempfile::TempDir;

const KILLS: u64 = 12;

/// How long the last lines may take.
const PATIENCE: Duration = Duration::from_secs(120);

fn setting(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

struct Copying {
    broker: Broker,
    directory: TempDir,
    emit: &'static [&'static str],
}

impl Copying {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn emitter(&self) -> Running {
        let tool = emit_log().args(["-u", self.broker.url(), "--durable", "--mandatory"]);
        let tool = tool
            .args(["--retry", "forever"])
            .args(self.emit)
            .arg("--position")
            .arg(self.path("position"));
        tool.args(["--from-start", "--follow"]).arg(self.path("app.log")).start()
    }

    fn receiver(&self) -> Running {
        let tool = receive_logs().args(["-u", self.broker.url(), "--durable", "--raw"]);
        let tool = tool.args(["--stream", "copy", "--from-start", "--retry", "forever"]);
        let tool = tool.arg("--resume").arg(self.path("resume"));
        tool.arg("-o").arg(self.path("copy.log")).start()
    }

    /// Writes numbered lines until `is_over` is set, and rotates the file by renaming it. Returns all lines.
    fn write(&self, is_over: &AtomicBool) -> String {
        let open = || {
            let file = OpenOptions::new().create(true).append(true).open(self.path("app.log"));
            file.unwrap()
        };
        let (mut file, mut all, mut files) = (open(), String::new(), 0);
        for number in 1.. {
            if is_over.load(Ordering::Relaxed) {
                break;
            }
            let line = format!("info: line {number}\n");
            file.write_all(line.as_bytes()).unwrap();
            all += &line;
            if number % 20 == 0 {
                thread::sleep(Duration::from_millis(5));
            }
            if number % 5000 == 0 {
                files += 1;
                fs::rename(self.path("app.log"), self.path(&format!("app.log.{files}"))).unwrap();
                file = open();
            }
        }
        all
    }

    /// Waits until more lines are copied.
    fn wait_for_more(&self) {
        let (before, begun) = (self.copied().len(), Instant::now());
        while self.copied().len() <= before {
            assert!(begun.elapsed() < PATIENCE, "the broker recovers the stream");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn copied(&self) -> String {
        fs::read_to_string(self.path("copy.log")).unwrap_or_default()
    }
}

/// Kills the programs in turns that the seed chooses, while a writer writes.
fn copy_under_kills(emit: &'static [&'static str]) {
    let (kills, seed) = (setting("FOLLOW_KILLS", KILLS), setting("FOLLOW_SEED", 1));
    let mut random = fastrand::Rng::with_seed(seed);
    let copying =
        Copying { broker: Broker::start(), directory: tempfile::tempdir().unwrap(), emit };
    // The stream and its binding exist before the first line.
    let receiver = copying.receiver().ready();
    let emitter = copying.emitter();
    let is_over = AtomicBool::new(false);
    let (written, emitter, receiver) = thread::scope(|scope| {
        let (mut emitter, mut receiver) = (emitter, receiver);
        let writer = scope.spawn(|| copying.write(&is_over));
        for _ in 0..kills {
            thread::sleep(Duration::from_millis(random.u64(50..1500)));
            let turn = random.u8(0..8);
            let kills_broker = turn >= 6;
            if kills_broker {
                copying.broker.kill();
            }
            if turn < 3 || turn == 7 {
                emitter.kill();
                emitter = copying.emitter();
            }
            if (3..6).contains(&turn) || turn == 7 {
                receiver.kill();
                receiver = copying.receiver();
            }
            if kills_broker {
                copying.broker.restart();
                // RabbitMQ 3.10 may never recover a stream if it is killed again while it starts.
                copying.wait_for_more();
            }
        }
        is_over.store(true, Ordering::Relaxed);
        (writer.join().unwrap(), emitter, receiver)
    });
    // A new receiver first removes what was written after its recorded position.
    let receiver = receiver.ready();
    let begun = Instant::now();
    while copying.copied().len() < written.len() && begun.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(50));
    }
    emitter.signal(rustix::process::Signal::TERM);
    let (emitter, receiver) = (emitter.wait(), receiver.stop().success());
    let copied = copying.copied();
    let lines = written.lines().count();
    let first = written.lines().zip(copied.lines()).position(|(a, b)| a != b);
    assert!(
        copied == written,
        "seed {seed}: {} of {lines} lines, first difference at {first:?}\n{emitter:?}\n{receiver:?}",
        copied.lines().count()
    );
    println!("seed {seed}: {kills} kills, {lines} lines, none lost, none twice");
}

#[test]
fn a_file_is_copied_exactly_once_under_kills() {
    copy_under_kills(&[]);
}

#[test]
fn a_file_is_copied_exactly_once_in_batches_under_kills() {
    copy_under_kills(&["--batch"]);
}
