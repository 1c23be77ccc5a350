//! Outages of the broker: receivers subscribe again, and get the lines that `emit-log` held during the outage.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use logs_tests::{Broker, Running, emit_log, receive_logs, wait_until};

/// Lines that are written during an outage.
const HELD_BACK: u64 = 300;

/// Checks that a receiver has written each line so far, once and in order.
fn has_all(receiver: &Running, lines: u64) -> bool {
    let text = receiver.stdout_so_far();
    let expected = (1..=lines).map(|number| format!("line {number}"));
    String::from_utf8_lossy(&text).lines().map(str::to_string).eq(expected)
}

#[test]
fn lines_of_an_outage_reach_every_receiver() {
    let broker = Broker::start();
    let receivers =
        [(); 3].map(|()| receive_logs().args(["-r", "-u", broker.url()]).start().ready());
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-u", broker.url(), "-l", "--retry", "forever"]);
    let emitter = emitter.stdin(reader).start();
    let mut lines = 0;
    let mut feed = |count: u64| {
        for _ in 0..count {
            lines += 1;
            writeln!(writer, "line {lines}").unwrap();
        }
        lines
    };
    let mut outages = Vec::new();
    // A node needs additional seconds to start. A node in which only the broker was stopped is back sooner.
    for (kills, seconds) in
        [(false, 0), (false, 0), (false, 1), (true, 0), (true, 0), (true, 1), (true, 2)]
            .into_iter()
            .chain([(true, 5), (true, 9), (true, 13)])
    {
        let before = feed(10);
        wait_until("all lines are received", || receivers.iter().all(|one| has_all(one, before)));
        let begun = Instant::now();
        if kills {
            broker.kill();
        } else {
            broker.ctl(["stop_app"]);
        }
        let all = feed(HELD_BACK);
        thread::sleep(Duration::from_secs(seconds));
        if kills {
            broker.restart();
        } else {
            broker.ctl(["start_app"]);
        }
        outages.push(begun.elapsed().as_secs());
        for receiver in &receivers {
            let what = format!("the held lines are received; outages in seconds: {outages:?}");
            wait_until(&what, || {
                let missed = receiver.stderr_so_far();
                assert!(!missed.contains("missed"), "{outages:?}: {missed}");
                has_all(receiver, all)
            });
        }
    }
    drop(writer);
    emitter.wait().success();
    for receiver in receivers {
        receiver.stop().success();
    }
}

#[test]
fn receivers_subscribe_to_a_late_broker_before_messages() {
    let broker = Broker::start();
    broker.kill();
    let retry = ["-u", broker.url(), "--retry", "forever"];
    let receivers = [(); 2].map(|()| receive_logs().args(retry).start());
    let emitter = emit_log().args(retry).arg("first").start();
    for tool in receivers.iter().chain([&emitter]) {
        tool.wait_for_stderr("trying again", 1);
    }
    broker.restart();
    emitter.wait().success();
    for receiver in receivers {
        receiver.wait_for_stdout(b" [x] \"first\"\n");
        receiver.stop().success();
    }
}
