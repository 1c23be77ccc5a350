//! Numbered messages: gaps are reported, duplicates are dropped.

use amiquip::AmqpProperties;
use logs_tests::{Peer, Running, receive_logs, unique};

const RUN: &str = "00c0ffee00c0ffee";

/// Publishes messages with the numbers of a run; the body is the number.
fn publish(peer: &Peer, exchange: &str, numbers: &[u64]) {
    for number in numbers {
        let properties =
            AmqpProperties::default().with_message_id(format!("emit-log/{RUN}/{number}"));
        peer.publish_with(exchange, number.to_string().as_bytes(), properties);
    }
}

fn start(name: &str) -> (Running, Peer, String) {
    let exchange = unique(name);
    let receiver = receive_logs().args(["-v", "-r", "-e", &exchange]).start().ready();
    (receiver, Peer::connect(), exchange)
}

fn stop(receiver: Running) -> String {
    let stderr = receiver.stop().success().stderr_text();
    let is_account = |line: &&str| line.starts_with(" [!] ") || line.contains("messages written");
    stderr.lines().filter(is_account).map(|line| format!("{line}\n")).collect()
}

#[test]
fn a_gap_is_reported_and_late_messages_are_written() {
    let (receiver, peer, exchange) = start("gap");
    publish(&peer, &exchange, &[1, 2, 6, 7, 9, 3, 4]);
    receiver.wait_for_stdout(b"1\n2\n6\n7\n9\n3\n4\n");
    let expected = format!(
        " [!] missed 3 messages from run {RUN} (3 to 5)\n \
         [!] missed 1 message from run {RUN} (8)\n \
         [!] 2 messages reported as missed arrived late\n\
         receive-logs: 7 messages written, 2 missed, 0 repeated and left out\n"
    );
    assert_eq!(stop(receiver), expected);
}

#[test]
fn duplicates_are_written_once() {
    let (receiver, peer, exchange) = start("twice");
    publish(&peer, &exchange, &[5, 6, 7, 6, 7, 5, 8]);
    receiver.wait_for_stdout(b"5\n6\n7\n8\n");
    let expected = "receive-logs: 4 messages written, 0 missed, 3 repeated and left out\n";
    assert_eq!(stop(receiver), expected);
}

#[test]
fn many_single_messages_do_not_displace_an_active_run() {
    const SINGLES: u64 = 20_000;
    let (receiver, peer, exchange) = start("singles");
    publish(&peer, &exchange, &[1, 2, 3]);
    for run in 0..SINGLES {
        let id = format!("emit-log/{run:016x}/1");
        peer.publish_with(&exchange, b"x", AmqpProperties::default().with_message_id(id));
    }
    publish(&peer, &exchange, &[3, 5]);
    let singles = "x\n".repeat(SINGLES as usize);
    receiver.wait_for_stdout(format!("1\n2\n3\n{singles}5\n").as_bytes());
    let expected = format!(
        " [!] missed 1 message from run {RUN} (4)\n\
         receive-logs: 20004 messages written, 1 missed, 1 repeated and left out\n"
    );
    assert_eq!(stop(receiver), expected);
}

#[test]
fn messages_with_another_id_or_none_are_not_counted() {
    let (receiver, peer, exchange) = start("other");
    for id in ["emit-log/7/1", "7", "emit-log/00c0ffee00c0ffee/x"] {
        for body in ["a", "b"] {
            let properties = AmqpProperties::default().with_message_id(id.into());
            peer.publish_with(&exchange, body.as_bytes(), properties);
        }
    }
    peer.publish(&exchange, b"c");
    peer.publish(&exchange, b"c");
    receiver.wait_for_stdout(b"a\nb\na\nb\na\nb\nc\nc\n");
    let expected = "receive-logs: 8 messages written, 0 missed, 0 repeated and left out\n";
    assert_eq!(stop(receiver), expected);
}

#[test]
fn a_batch_counts_as_many_as_it_has_records() {
    let (receiver, peer, exchange) = start("batch");
    for (number, body) in [(1, "1\n2\n3"), (4, "4"), (1, "1\n2\n3"), (7, "7\n8")] {
        let properties = AmqpProperties::default()
            .with_message_id(format!("emit-log/{RUN}/{number}"))
            .with_type_("lines".into());
        peer.publish_with(&exchange, body.as_bytes(), properties);
    }
    receiver.wait_for_stdout(b"1\n2\n3\n4\n7\n8\n");
    let expected = format!(
        " [!] missed 2 messages from run {RUN} (5 to 6)\n\
         receive-logs: 6 messages written, 2 missed, 3 repeated and left out\n"
    );
    assert_eq!(stop(receiver), expected);
}
