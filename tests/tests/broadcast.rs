//! The main promise: every running receiver gets every message, also from and to the programs of the example.

use std::fs;

use logs_tests::{
    PATIENCE, Tool, emit_log, project, python, rabbitmqctl, receive_logs, unique, wait_until,
};

#[test]
fn every_running_receiver_gets_every_message() {
    let exchange = unique("broadcast");
    let first = receive_logs().args(["-e", &exchange]).start().ready();
    let second = receive_logs().args(["-e", &exchange]).start().ready();
    let elsewhere = receive_logs().args(["-e", &unique("elsewhere")]).start().ready();

    let sent = emit_log().args(["-e", &exchange, "info:", "hi"]).run().success();
    assert_eq!(sent.stdout_text(), " [x] Sent \"info: hi\"\n");
    assert_eq!(sent.stderr_text(), "");
    emit_log().args(["-e", &exchange, "-q"]).run().success();

    let expected = b" [x] \"info: hi\"\n [x] \"info: Hello World!\"\n";
    first.wait_for_stdout(expected);
    second.wait_for_stdout(expected);
    for receiver in [first, second] {
        let ended = receiver.stop().success();
        assert_eq!(ended.stdout, expected);
        assert_eq!(ended.stderr_text(), " [*] Waiting for logs. To exit press CTRL+C\n");
    }
    assert_eq!(elsewhere.stop().success().stdout_text(), "");
}

#[test]
fn two_receivers_are_two_bindings_of_server_named_queues() {
    let exchange = unique("bindings");
    let _first = receive_logs().args(["-e", &exchange]).start().ready();
    let _second = receive_logs().args(["-e", &exchange]).start().ready();
    let bindings = rabbitmqctl(["list_bindings", "source_name", "destination_name", "routing_key"]);
    let prefix = format!("{exchange}\tamq.gen-");
    let ours: Vec<_> = bindings.lines().filter(|line| line.starts_with(&prefix)).collect();
    assert_eq!(ours.len(), 2, "{bindings}");
    assert!(ours.iter().all(|line| line.ends_with('\t')), "empty routing key: {bindings}");
}

#[test]
fn a_running_receiver_writes_at_once_to_file_and_pipe() {
    let exchange = unique("live");
    let file = logs_tests::TempFile::new("logs_from_rabbit.log");
    let to_file = receive_logs().args(["-e", &exchange]).stdout(file.create());
    let to_file = to_file.start_redirected().ready();
    let to_pipe = receive_logs().args(["-e", &exchange]).start().ready();
    for message in ["one", "two"] {
        emit_log().args(["-e", &exchange, message]).run().success();
        let line = format!(" [x] \"{message}\"\n");
        wait_until("the file has the message", || {
            String::from_utf8_lossy(&file.read().unwrap()).ends_with(&line)
        });
        wait_until("the pipe has the message", || {
            String::from_utf8_lossy(&to_pipe.stdout_so_far()).ends_with(&line)
        });
    }
    to_file.stop().success();
}

#[test]
fn a_message_sent_right_after_the_banner_is_received() {
    for _ in 0..20 {
        let exchange = unique("banner");
        let receiver = receive_logs().args(["-e", &exchange, "-n", "1"]).start().ready();
        emit_log().args(["-e", &exchange, "now"]).run().success();
        assert_eq!(receiver.wait().success().stdout_text(), " [x] \"now\"\n");
    }
}

/// Needs a vhost of its own, because the programs of the example know only the exchange `logs`.
#[test]
fn works_with_the_programs_of_the_example_both_ways() {
    let vhost = unique("pika");
    rabbitmqctl(["add_vhost", &vhost]);
    rabbitmqctl(["set_permissions", "-p", &vhost, "guest", ".*", ".*", ".*"]);
    let url = logs_tests::url_with("guest", "guest", &vhost);
    let here = |tool: Tool| tool.env("AMQP_URL", &url);
    let script = |name: &str| here(python()).arg(project().join("tests/pika").join(name));

    let ours = here(receive_logs()).start().ready();
    let theirs = script("receive_logs.py").start();
    let banner = " [*] Waiting for logs. To exit press CTRL+C\n";
    wait_until("the example's receiver is waiting", || theirs.stdout_so_far() == banner.as_bytes());

    here(emit_log()).args(["from", "us"]).run().success();
    wait_until("the first message is received", || {
        String::from_utf8_lossy(&ours.stdout_so_far()).contains("from us")
    });
    let sent = script("emit_log.py").args(["from", "them"]).run().success();
    assert_eq!(sent.stdout_text(), " [x] Sent from them\n");

    ours.wait_for_stdout(b" [x] \"from us\"\n [x] \"from them\"\n");
    theirs.wait_for_stdout(format!("{banner} [x] b'from us'\n [x] b'from them'\n").as_bytes());
    assert!(ours.stop().success().elapsed < PATIENCE);
    rabbitmqctl(["delete_vhost", &vhost]);
}

#[test]
fn with_words_standard_input_is_not_read() {
    let input = logs_tests::TempFile::with("input", b"not for emit-log\n");
    let exchange = unique("stdin");
    let receiver = receive_logs().args(["-e", &exchange, "-n", "1"]).start().ready();
    let emitter = emit_log().args(["-e", &exchange, "words"]);
    emitter.stdin(fs::File::open(input.path()).unwrap()).run().success();
    assert_eq!(receiver.wait().success().stdout_text(), " [x] \"words\"\n");
}

#[test]
fn the_broker_lists_the_connections_by_name() {
    let exchange = unique("names");
    let _receiver = receive_logs().args(["-e", &exchange]).start().ready();
    let name = concat!("receive-logs ", env!("CARGO_PKG_VERSION"), " (");
    wait_until("the connection is listed by name", || {
        let list = rabbitmqctl(["list_connections", "client_properties"]);
        list.contains("connection_name") && list.contains(name)
    });
}
