//! Differences between versions of RabbitMQ: how often a queue delivers a message, how long it waits for an
//! acknowledgement, and which features a node refuses.

use std::io::{PipeReader, Read};

use amiquip::{AmqpValue, FieldTable, Publish, QueueDeclareOptions};
use logs_tests::{
    BANNER, Broker, Peer, Proxy, Running, TempFile, Tool, emit_log, rabbitmqctl, receive_logs,
    skip, unique, wait_until,
};

/// More than the capacity of a pipe.
const LARGE: usize = 200_000;

fn on_queue(queue: &str) -> Tool {
    receive_logs().args(["-r", "-e", queue, "--queue", queue])
}

/// Starts a receiver of a large message, and waits until its output blocks.
fn start_stuck(receiver: Tool) -> (Running, PipeReader) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let receiver = receiver.stdout(writer).start_redirected();
    reader.read_exact(&mut [0]).unwrap();
    (receiver, reader)
}

/// Kills receivers of a large message, one after another, before they have written the message.
fn kill_receivers(receiver: impl Fn() -> Tool, times: usize) {
    for _ in 0..times {
        let (receiver, _reader) = start_stuck(receiver());
        receiver.kill();
    }
}

fn large_line() -> String {
    "x".repeat(LARGE)
}

/// Lines for the standard input of emit-log.
fn emit_lines(emitter: Tool, lines: &str) {
    let input = TempFile::with("input", lines.as_bytes());
    let input = std::fs::File::open(input.path()).unwrap();
    emitter.arg("--lines").stdin(input).run().success();
}

#[test]
fn a_message_that_is_never_written_stays_in_its_queue() {
    let queue = unique("fatal");
    on_queue(&queue).start().ready().stop().success();
    emit_lines(emit_log().args(["-e", &queue]), &large_line());
    kill_receivers(|| on_queue(&queue), 25);
    let ended = on_queue(&queue).args(["-n", "1"]).run().success();
    assert_eq!(ended.stdout_text(), large_line() + "\n");
    let stderr = ended.stderr_text();
    assert!(stderr.contains("1 message may be repeated: delivered before"), "{stderr}");
    rabbitmqctl(["delete_queue", &queue]);
}

/// A queue of another program has the default delivery limit of RabbitMQ 4, which the broker does not report to
/// receivers.
#[test]
fn a_foreign_queue_drops_a_message_delivered_too_often() {
    let peer = Peer::connect();
    let (queue, dead) = (unique("limited"), unique("dead"));
    let text = |text: &str| AmqpValue::LongString(text.into());
    let mut arguments = FieldTable::new();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(&dead));
    let durable = || QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let dead_letters = peer.channel().queue_declare(&*dead, durable()).unwrap();
    let options = QueueDeclareOptions { arguments, ..durable() };
    peer.channel().queue_declare(&*queue, options).unwrap();
    emit_log().args(["-e", &queue, "an exchange"]).run().success();
    on_queue(&queue).run().fails_with(78, &["declare queue", "PRECONDITION_FAILED", "--passive"]);
    let passive = || on_queue(&queue).arg("--passive");

    let publish = |body: &str| {
        let body = Publish::new(body.as_bytes(), &*queue);
        peer.channel().basic_publish("", body).unwrap();
    };
    publish(&large_line());
    kill_receivers(passive, 21);
    publish("next");
    let is_limited = peer.broker_version() >= (4, 0);
    let ended = passive().args(["-n", "1"]).run().success();
    if is_limited {
        assert_eq!((ended.stdout_text(), ended.stderr_text()), ("next\n".into(), BANNER.into()));
        let dead = dead_letters.get(true).unwrap().expect("a dead letter").delivery;
        assert_eq!(dead.body, large_line().as_bytes());
        let headers = dead.properties.headers().as_ref().unwrap();
        let reason = headers.get("x-first-death-reason");
        assert_eq!(reason, Some(&text("delivery_limit")));
    } else {
        assert_eq!(ended.stdout_text(), large_line() + "\n");
    }
    for queue in [&queue, &dead] {
        rabbitmqctl(["delete_queue", queue]);
    }
}

/// RabbitMQ closes the channel of a receiver that does not acknowledge in time. From 4.3 on, only a quorum queue has a
/// time limit, and it cancels the consumer.
#[test]
fn a_consumer_timeout_is_not_a_deleted_queue() {
    let config = TempFile::with("rabbitmq.conf", b"consumer_timeout = 3000\n");
    let broker = Broker::start_with(config.path());
    // The broker checks for such receivers once a minute.
    broker.ctl(["eval", "application:set_env(rabbit, channel_tick_interval, 200)."]);
    let cancels = Peer::connect_to(broker.url()).broker_version() >= (4, 3);
    let kinds = ["quorum", "classic"];
    let on = |kind| {
        let receiver = receive_logs().args(["-r", "-u", broker.url()]);
        receiver.args(["--queue", kind, "--queue-type", kind])
    };
    for kind in kinds {
        on(kind).start().ready().stop().success();
    }
    emit_lines(emit_log().args(["-u", broker.url()]), &(large_line() + "\nnext\n"));
    let receivers = kinds.map(|kind| (kind, start_stuck(on(kind))));
    let waiting = |kind| {
        let peer = Peer::connect_to(broker.url());
        let queue = peer.channel().queue_declare_passive(kind).unwrap();
        queue.declared_message_count().unwrap()
    };
    let returned = if cancels { [2, 0] } else { [2, 2] };
    wait_until("the messages are back in the queue", || kinds.map(waiting) == returned);
    for (kind, (receiver, mut reader)) in receivers {
        let reason = match (cancels, kind) {
            (false, _) => "its consumer_timeout); subscribing again\n",
            (true, "quorum") => "the broker cancelled the consumer, and keeps the queue; ",
            (true, _) => "",
        };
        let mut written = vec![0; LARGE + "\nnext\n".len() - 1];
        reader.read_exact(&mut written).unwrap();
        assert!(written.ends_with(b"x\nnext\n"));
        let rest = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        let interruptions = usize::from(!reason.is_empty());
        receiver.wait_for_stderr(reason, 1);
        receiver.wait_for_stderr("Subscribed again", interruptions);
        wait_until("no message waits", || waiting(kind) == 0);
        let stderr = receiver.stop().success().stderr_text();
        rest.join().unwrap().unwrap();
        assert_eq!(waiting(kind), 0, "all messages are acknowledged");
        assert_eq!(stderr.matches("Subscribed again").count(), interruptions, "{stderr}");
        for wrong in ["deleted", "created again", "missed"] {
            assert!(!stderr.contains(wrong), "{stderr}");
        }
    }
}

/// Transient queues remain allowed if they are exclusive, and the tools use no other deprecated feature.
#[test]
fn both_tools_work_without_the_deprecated_features() {
    let version = Peer::connect().broker_version();
    if version < (3, 13) {
        let (major, minor) = version;
        return skip(&format!("RabbitMQ {major}.{minor} cannot switch features off"));
    }
    let features =
        ["amqp_address_v1", "global_qos", "queue_master_locator", "transient_nonexcl_queues"];
    let config = features.map(|name| format!("deprecated_features.permit.{name} = false\n"));
    let config = TempFile::with("rabbitmq.conf", config.concat().as_bytes());
    let broker = Broker::start_with(config.path());
    let peer = Peer::connect_to(broker.url());
    let refused = peer.channel().queue_declare("transient", QueueDeclareOptions::default());
    let refusal = refused.err().expect("a refusal").to_string();
    assert!(refusal.contains("transient_nonexcl_queues"), "{refusal}");

    let proxy = Proxy::start(broker.url());
    let receivers = [
        &[][..],
        &["--max-backlog", "1MB"],
        &["--queue", "quorum"],
        &["--queue", "classic", "--queue-type", "classic"],
        &["--stream", "stream"],
    ];
    let receivers =
        receivers.map(|options| receive_logs().args(["-r", "-u", proxy.url()]).args(options));
    let receivers = receivers.map(|receiver| receiver.start().ready());
    let emitter = || emit_log().args(["-u", broker.url(), "--mandatory"]);
    proxy.reset();
    receivers.iter().for_each(|receiver| receiver.wait_for_stderr("Subscribed again", 1));
    emitter().arg("one").run().success();
    emit_lines(emitter().arg("--batch"), "two\nthree\n");
    for receiver in receivers {
        receiver.wait_for_stdout(b"one\ntwo\nthree\n");
        receiver.stop().success();
    }
}
