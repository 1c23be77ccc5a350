//! A single message that is sent again: receivers write it once, and an error reports whether it may have arrived.

use std::thread;
use std::time::Duration;

use amiquip::{AmqpValue, ExchangeDeclareOptions, ExchangeType, FieldTable, QueueDeclareOptions};
use logs_tests::{Ended, Peer, Proxy, Way, emit_log, receive_logs, unique, url, wait_until};

/// Bytes that the broker sends after the message may have reached it: the end of the login, a confirm, and a part of
/// its answer to the close.
const LAST_BYTES: usize = 60;

/// Runs `emit-log MESSAGE` through a connection that is cut after `bytes` bytes from the broker.
fn emit_through_cut(exchange: &str, message: &str, bytes: usize) -> Ended {
    let proxy = Proxy::start(&url());
    proxy.cut_after(Way::FromBroker, bytes);
    let mut emitter = emit_log().args(["-u", proxy.url(), "-e", exchange, message]).start();
    wait_until("the connection is lost", || {
        !emitter.is_running() || emitter.stderr_so_far().contains("trying again")
    });
    proxy.resume();
    emitter.wait()
}

#[test]
fn words_on_a_lost_connection_are_written_once() {
    let exchange = unique("cut");
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    let proxy = Proxy::start(&url());
    emit_log().args(["-u", proxy.url(), "-e", &exchange, "whole"]).run().success();
    let all = proxy.passed(Way::FromBroker);
    let mut ended: Vec<(String, Ended)> = thread::scope(|scope| {
        let cuts = (all - LAST_BYTES..all).step_by(4).map(|bytes| {
            let exchange = &exchange;
            scope.spawn(move || {
                let message = format!("cut after {bytes}");
                let ended = emit_through_cut(exchange, &message, bytes);
                (message, ended)
            })
        });
        let cuts: Vec<_> = cuts.collect();
        cuts.into_iter().map(|cut| cut.join().unwrap()).collect()
    });
    ended.push(("last".into(), emit_log().args(["-e", &exchange, "last"]).run()));
    wait_until("the last message is written", || receiver.stdout_so_far().ends_with(b"last\n"));
    let written = receiver.stop().success().stdout_text();
    let (mut repeated, mut in_doubt) = (0, 0);
    for (message, ended) in &ended {
        let count = written.lines().filter(|line| line == message).count();
        assert!(count <= 1, "{ended:?}");
        if ended.status.success() {
            assert_eq!(count, 1, "{ended:?}");
            repeated += usize::from(ended.stderr_text().contains("sent again"));
        } else {
            assert_eq!(ended.status.code(), Some(69), "{ended:?}");
            let stderr = ended.stderr_text();
            let is_in_doubt = stderr.starts_with("emit-log: 0 confirmed, 1 in doubt: log in to ");
            // If the connection ends before the message is sent, the error has no counts.
            assert!(is_in_doubt || stderr.starts_with("emit-log: log in to "), "{ended:?}");
            assert!(is_in_doubt || count == 0, "{ended:?}");
            in_doubt += usize::from(is_in_doubt);
        }
    }
    // How many logins detect the end of the connection in time differs from run to run.
    println!("{repeated} repeated, {in_doubt} in doubt");
    assert!(repeated > 0, "{ended:?}");
}

#[test]
fn words_that_one_queue_nacks_are_written_once_by_others() {
    let (exchange, peer) = (unique("full"), Peer::connect());
    let (full, all) = (unique("full"), unique("all"));
    let channel = peer.channel();
    let declared = ExchangeDeclareOptions::default();
    channel.exchange_declare(ExchangeType::Fanout, &exchange, declared).unwrap();
    let mut arguments = FieldTable::new();
    arguments.insert("x-max-length".into(), AmqpValue::LongInt(1));
    arguments.insert("x-overflow".into(), AmqpValue::LongString("reject-publish".into()));
    for (queue, arguments) in [(&full, arguments), (&all, FieldTable::new())] {
        let options = QueueDeclareOptions { exclusive: true, arguments, ..Default::default() };
        channel.queue_declare(queue, options).unwrap();
        channel.queue_bind(queue, &exchange, "", FieldTable::new()).unwrap();
    }
    let receiver = receive_logs().args(["-r", "-e", &exchange]).start().ready();
    emit_log().args(["-e", &exchange, "fills the queue"]).run().success();
    let ended = emit_log().args(["-e", &exchange, "--retry", "8s", "refused"]).run();
    let ended = ended.exits_with(69);
    let stderr = ended.stderr_text();
    let refused = format!("publish to exchange '{exchange}': nacked by a queue");
    let last = format!("emit-log: 0 confirmed, 1 in doubt: {refused}");
    assert_eq!(stderr.lines().last(), Some(&*last), "{ended:?}");
    assert!(ended.elapsed >= Duration::from_secs(8), "{ended:?}");
    // The pauses double, from 0.2 s on.
    let sent = channel.queue_declare_passive(&all).unwrap().declared_message_count();
    assert!(sent.is_some_and(|sent| (4..=12).contains(&(sent - 1))), "{sent:?}");
    emit_log().args(["-e", &exchange, "--no-confirm", "last"]).run().success();
    receiver.wait_for_stdout(b"fills the queue\nrefused\nlast\n");
    receiver.stop().success();
}
