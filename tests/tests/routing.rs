//! Direct and topic exchanges: routing keys, bindings, and the account of losses for each key.

use std::io::Write;

use logs_tests::spool::Dir;
use logs_tests::{
    Broker, Ended, Proxy, Running, TempFile, Tool, emit_log, project, python, rabbitmqctl,
    receive_logs, unique, url, url_with, wait_until,
};
use rustix::process::Signal;

fn topic<'a>(exchange: &'a str, options: &[&'a str]) -> Vec<&'a str> {
    [&["-e", exchange, "--exchange-type", "topic"], options].concat()
}

fn receiver(exchange: &str, keys: &[&str]) -> Running {
    let bindings: Vec<_> = keys.iter().flat_map(|key| ["-b", key]).collect();
    receive_logs().args(topic(exchange, &["--raw"])).args(bindings).start().ready()
}

/// Publishes lines with `--lines` and these options.
fn emit(exchange: &str, options: &[&str], lines: &str) -> Ended {
    let input = TempFile::with("lines", lines.as_bytes());
    let tool = emit_log().args(topic(exchange, &["--lines"])).args(options);
    tool.stdin(std::fs::File::open(input.path()).unwrap()).run()
}

const LINES: &str = "info: one\nerror: two\nthree\n[CRITICAL] four\nerror: five\nwarning: six\n";

#[test]
fn a_topic_receiver_gets_the_lines_of_its_keys_in_order() {
    for options in [&[][..], &["--batch"], &["--batch", "--linger", "50ms"]] {
        let exchange = unique("topic");
        let severe = receiver(&exchange, &["*.error", "*.critical"]);
        let (all, none) = (receiver(&exchange, &[]), receiver(&exchange, &["web.none"]));
        let elsewhere = receiver(&exchange, &["db.#"]);
        let key = [&["--tag", "web", "-k", "{tag}.{severity}"], options].concat();
        emit(&exchange, &key, LINES).success();
        severe.wait_for_stdout(b"error: two\n[CRITICAL] four\nerror: five\n");
        all.wait_for_stdout(LINES.as_bytes());
        none.wait_for_stdout(b"three\n");
        for running in [severe, all, none, elsewhere] {
            let ended = running.stop().success();
            assert!(!ended.stderr_text().contains("missed"), "{ended:?}");
        }
    }
}

#[test]
fn a_direct_receiver_gets_whole_keys() {
    let exchange = unique("direct");
    let direct = |tool: Tool| tool.args(["-e", &exchange, "--exchange-type", "direct"]);
    let receiver = direct(receive_logs()).args(["-b", "error", "-b", "fatal"]).start().ready();
    for (key, word) in [("error", "one"), ("info", "two"), ("error.x", "three"), ("fatal", "four")]
    {
        direct(emit_log()).args(["-k", key, word]).run().success();
    }
    receiver.wait_for_stdout(b" [x] \"one\"\n [x] \"four\"\n");
    receiver.stop().success();
    let unroutable = direct(emit_log()).args(["-m", "-k", "nobody", "x"]).run();
    unroutable.fails_with(67, &["NO_ROUTE"]);
    // A single message has a severity too.
    let receiver = direct(receive_logs()).args(["-b", "warning"]).start().ready();
    direct(emit_log()).args(["-k", "{severity}", "warn: hot"]).run().success();
    receiver.wait_for_stdout(b" [x] \"warn: hot\"\n");
}

/// Checks that a tool exits with status 2 and an error with these parts.
fn wrong(tool: Tool, parts: &[&str]) {
    let ended = tool.run().exits_with(2);
    let stderr = ended.stderr_text();
    assert!(parts.iter().all(|part| stderr.contains(part)), "{parts:?}: {stderr}");
}

#[test]
fn options_that_do_not_fit_the_type_are_wrong_usage() {
    for (options, parts) in [
        (&["-b", "x"][..], &["--bind", "fanout", "--exchange-type"][..]),
        (&["--exchange-type", "direct"], &["direct", "--bind"]),
        (&["--exchange-type", "headers"], &["headers", "fanout, direct, topic"]),
        (&["--exchange-type", "topic", "-b", &"x".repeat(256)], &["longer than 255 bytes"]),
    ] {
        wrong(receive_logs().args(options), parts);
    }
    let long = "x".repeat(250);
    for (options, parts) in [
        (&["--exchange-type", "topic", "x"][..], &["topic", "--routing-key"][..]),
        (&["--exchange-type", "topic", "-k", "{tag}", "x"], &["{tag} requires --tag"]),
        (&["--exchange-type", "topic", "-k", &format!("{long}{{severity}}"), "x"], &["255 bytes"]),
    ] {
        wrong(emit_log().args(options), parts);
    }
    let exchange = unique("key-and-fanout");
    let sent = emit_log().args(["-e", &exchange, "-k", "a.b", "x"]).run().success();
    assert!(sent.stderr_text().contains("has type fanout, which ignores routing keys"), "{sent:?}");
}

#[test]
fn an_exchange_of_another_type_is_an_error_that_names_both() {
    let exchange = unique("types");
    emit_log().args(topic(&exchange, &["-k", "a", "x"])).run().success();
    let parts = ["inequivalent arg 'type'", "current is 'topic'", "--exchange-type"];
    emit_log().args(["-e", &exchange, "x"]).run().fails_with(78, &parts);
    receive_logs().args(["-e", &exchange]).run().fails_with(78, &parts);
}

#[test]
fn reserved_exchanges_are_used_and_never_declared() {
    let receiver = receive_logs().args(["-e", "amq.topic", "-b", "reserved.#"]).start().ready();
    emit_log().args(["-e", "amq.topic", "-k", "reserved.x", "hi"]).run().success();
    receiver.wait_for_stdout(b" [x] \"hi\"\n");
    let name = unique("amq.missing");
    let parts = ["no exchange", "reserved prefix"];
    receive_logs().args(["-e", &name]).run().fails_with(78, &parts);
    emit_log().args(["-e", &name, "x"]).run().fails_with(78, &parts);
}

#[test]
fn events_logs_and_traces_of_the_broker_are_received() {
    let config = TempFile::with("conf", b"log.exchange = true\nlog.exchange.level = info\n");
    let broker = Broker::start_by(|tool| {
        tool.args(["--plugins", "rabbitmq_event_exchange", "--config"]).arg(config.path())
    });
    let receiver = |exchange: &str| {
        let tool = receive_logs().args(["-u", broker.url(), "-e", exchange, "-f", "json"]);
        tool.start().ready()
    };
    let arrives = |receiver: Running, text: &str, cause: &dyn Fn()| {
        wait_until("the broker publishes it", || {
            cause();
            String::from_utf8_lossy(&receiver.stdout_so_far()).contains(text)
        });
        let stdout = receiver.stop().success().stdout_text();
        stdout.lines().find(|line| line.contains(text)).unwrap().to_string()
    };
    let emit = || drop(emit_log().args(["-u", broker.url(), "traced"]).run().success());
    let line = arrives(receiver("amq.rabbitmq.event"), "connection.created", &emit);
    assert!(line.contains("\"user\":\"guest\""), "headers: {line}");
    // RabbitMQ declares this exchange some time after its start.
    wait_until("the exchange exists", || {
        broker.ctl(["list_exchanges"]).contains("amq.rabbitmq.log")
    });
    let line = arrives(receiver("amq.rabbitmq.log"), "accepting AMQP connection", &emit);
    assert!(line.contains("\"routing_key\":\"info\""), "{line}");
    assert!(line.contains("\"headers\":{\"node\":\"test-"), "headers: {line}");
    broker.ctl(["trace_on"]);
    let line = arrives(receiver("amq.rabbitmq.trace"), "traced", &emit);
    assert!(line.contains("\"routing_key\":\"publish.logs\""), "{line}");
}

#[test]
fn one_receiver_can_have_several_exchanges() {
    let (fanout, durable) = (unique("fanout"), unique("durable"));
    emit_log().args(["-e", &durable, "--durable", "before"]).run().success();
    let queue = unique("several");
    let proxy = Proxy::start(&url());
    let exchanges =
        ["-e", &fanout, "-e", &durable, "-e", "amq.topic", "-b", "several.*", "-f", "json"];
    let receiver = receive_logs().args(exchanges).args(["--queue", &queue, "-u", proxy.url()]);
    let receiver = receiver.start().ready();
    let warning = format!("exchange '{durable}' exists and is durable");
    receiver.wait_for_stderr(&warning, 1);
    let emit = || {
        emit_log().args(["-e", &fanout, "one"]).run().success();
        emit_log().args(["-e", &durable, "two"]).run().success();
        emit_log().args(["-e", "amq.topic", "-k", "several.x", "three"]).run().success();
        emit_log().args(["-e", "amq.topic", "-k", "other.x", "four"]).run().success();
    };
    let has_lines = |count: usize| {
        wait_until("the lines arrive", || {
            receiver.stdout_so_far().iter().filter(|byte| **byte == b'\n').count() == count
        });
    };
    emit();
    has_lines(3);
    proxy.reset();
    receiver.wait_for_stderr("Subscribed again", 1);
    emit();
    has_lines(6);
    let ended = receiver.stop().success();
    let line = |line: &str| -> serde_json::Value { serde_json::from_str(line).unwrap() };
    let object = |object: serde_json::Value| format!("{} {}", object["exchange"], object["body"]);
    let lines: Vec<_> = ended.stdout_text().lines().map(line).map(object).collect();
    let expected = [(&*fanout, "one"), (&durable, "two"), ("amq.topic", "three")];
    let expected = expected.map(|(exchange, body)| format!("{exchange:?} {body:?}"));
    assert_eq!(lines, [&expected[..], &expected].concat());
    let warnings = ended.stderr_text().matches(" exists and ").count();
    assert_eq!(warnings, 1, "{ended:?}");
    rabbitmqctl(["delete_queue", &queue]);
}

#[test]
fn an_error_names_the_exchange_that_has_it() {
    let (good, other) = (unique("good"), unique("other"));
    emit_log().args(topic(&other, &["-k", "a", "x"])).run().success();
    for exchanges in [["-e", &good, "-e", &other], ["-e", &other, "-e", &good]] {
        let text = format!("declare exchange '{other}': ");
        receive_logs().args(exchanges).run().fails_with(78, &[&text, "'topic'"]);
    }
    let missing = unique("amq.missing");
    let text = format!("to exchange '{missing}'");
    let receiver = receive_logs().args(["-e", &missing, "-e", "amq.topic", "-e", &good]);
    receiver.run().fails_with(78, &[&text, "reserved prefix"]);
}

#[test]
fn a_durable_queue_has_all_its_bindings_again_after_a_loss() {
    let (exchange, queue) = (unique("rebind"), unique("rebind-queue"));
    let proxy = Proxy::start(&url());
    let options = ["-b", "a.*", "-b", "*.z", "--queue", &queue, "--raw"];
    let receiver = receive_logs().args(topic(&exchange, &options)).args(["-u", proxy.url()]);
    let receiver = receiver.start().ready();
    rabbitmqctl([
        "eval",
        &format!(
            "rabbit_exchange:delete(rabbit_misc:r(<<\"/\">>, exchange, <<\"{exchange}\">>), false, <<\"test\">>)."
        ),
    ]);
    proxy.reset();
    receiver.wait_for_stderr("Subscribed again", 1);
    for (key, line) in [("a.b", "one"), ("b.b", "two"), ("b.z", "three")] {
        emit_log().args(topic(&exchange, &["-k", key, line])).run().success();
    }
    receiver.wait_for_stdout(b"one\nthree\n");
    rabbitmqctl(["delete_queue", &queue]);
}

/// A receiver whose connection is cut reports the gap of each key that it missed, and of no other.
#[test]
fn a_gap_is_reported_for_the_keys_that_have_it() {
    let exchange = unique("gaps");
    let proxy = Proxy::start(&url());
    let errors = receive_logs().args(topic(&exchange, &["--raw", "-b", "app.error"]));
    let errors = errors.args(["-u", proxy.url()]).start().ready();
    let infos = receiver(&exchange, &["app.info"]);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let options = ["--lines", "--tag", "app", "-k", "{tag}.{severity}"];
    let emitter = emit_log().args(topic(&exchange, &options)).stdin(reader).start();
    writer.write_all(b"error: 1\ninfo: 1\n").unwrap();
    errors.wait_for_stdout(b"error: 1\n");
    // While the receiver is stopped, it does not reconnect.
    errors.signal(Signal::STOP);
    proxy.reset();
    wait_until("its queue is gone", || {
        let bindings = rabbitmqctl(["list_bindings", "source_name", "routing_key"]);
        !bindings.contains(&format!("{exchange}\tapp.error"))
    });
    writer.write_all(b"error: 2\ninfo: 2\nerror: 3\ninfo: 3\n").unwrap();
    infos.wait_for_stdout(b"info: 1\ninfo: 2\ninfo: 3\n");
    errors.signal(Signal::CONT);
    errors.wait_for_stderr("Subscribed again", 1);
    writer.write_all(b"error: 4\ninfo: 4\n").unwrap();
    errors.wait_for_stdout(b"error: 1\nerror: 4\n");
    errors.wait_for_stderr("missed 2 messages", 1);
    infos.wait_for_stdout(b"info: 1\ninfo: 2\ninfo: 3\ninfo: 4\n");
    drop(writer);
    emitter.wait().success();
    assert!(!infos.stop().success().stderr_text().contains("missed"));
    errors.stop().success();
}

/// 100,000 lines over 56 keys, and two cut connections: each line of the receiver's keys is written or counted as
/// missed.
#[test]
fn a_flood_over_many_keys_is_counted_exactly() {
    const APPS: usize = 8;
    const ROUND: usize = 2_500;
    let exchange = unique("flood");
    let proxy = Proxy::start(&url());
    let options = ["--raw", "-v", "-b", "*.error", "-b", "*.info"];
    let receiver = receive_logs().args(topic(&exchange, &options)).args(["-u", proxy.url()]);
    let receiver = receiver.start().ready();
    let severities = ["error", "info", "debug", "warning", "critical", "notice", "trace"];
    let (mut pipes, mut emitters) = (Vec::new(), Vec::new());
    for app in 0..APPS {
        let (reader, writer) = std::io::pipe().unwrap();
        let options = ["--lines", "--tag", &format!("app{app}"), "-k", "{tag}.{severity}"];
        emitters.push(emit_log().args(topic(&exchange, &options)).stdin(reader).start());
        pipes.push(writer);
    }
    let mut sent = 0;
    let mut write = |round: usize| {
        for pipe in &mut pipes {
            for number in round * ROUND..(round + 1) * ROUND {
                let severity = severities[number % severities.len()];
                sent += usize::from(["error", "info"].contains(&severity));
                pipe.write_all(format!("{severity}: {number}\n").as_bytes()).unwrap();
            }
        }
    };
    for cut in 1..=2 {
        write(2 * cut - 2);
        wait_until("messages pass", || receiver.stdout_so_far().len() > cut * 1000);
        proxy.reset();
        // Lines of this round are sent while the receiver has no queue.
        write(2 * cut - 1);
        receiver.wait_for_stderr("Subscribed again", cut);
    }
    write(4);
    drop(pipes);
    emitters.into_iter().for_each(|emitter| drop(emitter.wait().success()));
    let last = format!("info: {}\n", (4 * ROUND..5 * ROUND).rfind(|n| n % 7 == 1).unwrap());
    wait_until("the last lines arrive", || {
        String::from_utf8_lossy(&receiver.stdout_so_far()).matches(&last).count() == APPS
    });
    let ended = receiver.stop().success();
    let (stdout, stderr) = (ended.stdout_text(), ended.stderr_text());
    let written = stdout.lines().count();
    assert!(stdout.lines().all(|line| line.starts_with("error: ") || line.starts_with("info: ")));
    let numbers = stderr.lines().last().unwrap().split(' ').filter_map(|word| word.parse().ok());
    let counts: Vec<usize> = numbers.collect();
    assert_eq!(counts[..2], [written, sent - written], "{stderr}");
    assert!(counts[1] > 0, "no line was lost: {stderr}");
}

#[test]
fn a_spool_keeps_keys_and_their_runs_across_a_restart() {
    let (exchange, dir) = (unique("spooled-keys"), Dir::temporary());
    let errors = receiver(&exchange, &["*.error"]);
    let all = receiver(&exchange, &["#"]);
    let path = dir.path();
    let options = ["--tag", "app", "-k", "{tag}.{severity}", "--retry", "100ms", "--spool"];
    let options = [&options[..], &[path.to_str().unwrap()]].concat();
    // The first run has no broker.
    let away = [&["-u", "amqp://127.0.0.1:1"], &options[..]].concat();
    emit(&exchange, &away, "error: 1\ninfo: 1\nerror: 2\n").exits_with(69);
    emit(&exchange, &options, "error: 3\n").success();
    errors.wait_for_stdout(b"error: 1\nerror: 2\nerror: 3\n");
    all.wait_for_stdout(b"error: 1\ninfo: 1\nerror: 2\nerror: 3\n");
    for receiver in [errors, all] {
        assert!(!receiver.stop().success().stderr_text().contains("missed"));
    }
}

/// Needs a vhost of its own, because these programs know only the exchanges of the tutorials.
#[test]
fn works_with_the_programs_of_tutorials_four_and_five() {
    let vhost = unique("tutorials");
    rabbitmqctl(["add_vhost", &vhost]);
    rabbitmqctl(["set_permissions", "-p", &vhost, "guest", ".*", ".*", ".*"]);
    let url = url_with("guest", "guest", &vhost);
    let here = |tool: Tool| tool.env("AMQP_URL", &url);
    for (kind, binding, key, other) in
        [("direct", "error", "error", "info"), ("topic", "kern.*", "kern.critical", "cron.info")]
    {
        let exchange = format!("{kind}_logs");
        let script = |name: &str| {
            let path = project().join(format!("tests/pika/{name}_routed.py"));
            here(python()).arg(path).arg(kind)
        };
        let ours = here(receive_logs()).args(["-e", &exchange, "--exchange-type", kind]);
        let ours = ours.args(["-b", binding]).start().ready();
        let theirs = script("receive_logs").arg(binding).start();
        let banner = " [*] Waiting for logs. To exit press CTRL+C\n";
        wait_until("their receiver is waiting", || theirs.stdout_so_far() == banner.as_bytes());
        let emit = || here(emit_log()).args(["-e", &exchange, "--exchange-type", kind]);
        for routing_key in [other, key] {
            emit().args(["-k", routing_key, "from us"]).run().success();
            script("emit_log").args([routing_key, "from them"]).run().success();
        }
        ours.wait_for_stdout(b" [x] \"from us\"\n [x] \"from them\"\n");
        theirs.wait_for_stdout(
            format!("{banner} [x] {key}:from us\n [x] {key}:from them\n").as_bytes(),
        );
        ours.stop().success();
        theirs.kill();
    }
    rabbitmqctl(["delete_vhost", &vhost]);
}
