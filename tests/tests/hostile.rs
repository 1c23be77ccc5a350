//! Hostile bytes from the network crash neither tool.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use amiquip::QueueDeleteOptions;
use logs_tests::raw::{METHOD, RawPublisher, block, method, method_of, read_frame, short_string};
use logs_tests::{
    Broker, Peer, SECRET, TempFile, emit_log, rabbitmqctl, receive_logs, unique, url, wait_until,
};

/// Nested tables or arrays.
fn nested(levels: usize, kind: u8) -> Vec<u8> {
    let name: &[u8] = if kind == b'F' { b"\x01k" } else { b"" };
    let mut value = [name, &[kind], &block(b"")].concat();
    for _ in 1..levels {
        value = [name, &[kind], &block(&value)].concat();
    }
    match kind {
        b'F' => block(&value),
        _ => block(&[b"\x01a", &value[..]].concat()),
    }
}

/// Properties that the broker passes on, and that break a client without checks.
fn hostile_properties() -> Vec<(u16, Vec<u8>)> {
    let mut all = vec![(0, vec![])];
    // Each property that is a short string and that the broker does not read.
    for index in [0, 1, 5, 6, 8, 10, 12, 13] {
        all.push((0x8000 >> index, short_string(b"\xff\xfe")));
    }
    for levels in [10, 31, 32, 33, 100, 1000, 10_000] {
        all.push((0x2000, nested(levels, b'F')));
        all.push((0x2000, nested(levels, b'A')));
    }
    all.push((0x2000, nested(18_000, b'F')));
    all.push((0x2000, nested(26_000, b'A')));
    let mut every_type = Vec::new();
    for (name, value) in (b'a'..).zip([
        &b"V"[..],
        b"t\x01",
        b"b\xff",
        b"B\xff",
        b"s\xff\xff",
        b"u\xff\xff",
        b"I\xff\xff\xff\xff",
        b"i\xff\xff\xff\xff",
        b"l\xff\xff\xff\xff\xff\xff\xff\xff",
        b"f\x3f\x80\0\0",
        b"d\x3f\xf0\0\0\0\0\0\0",
        b"D\xff\xff\xff\xff\xff",
        b"T\xff\xff\xff\xff\xff\xff\xff\xff",
        b"x\0\0\0\x01\xff",
        b"S\0\0\0\x01s",
        b"A\0\0\0\x02t\0",
        b"F\0\0\0\x04\x01kt\0",
    ]) {
        every_type.extend([&[1, name], value].concat());
    }
    all.push((0x2000, block(&every_type)));
    all.push((0x2000, block(b"\x01kS\0\0\0\x01\xff")));
    all.push((0x2000, block(b"\x02\xff\xfeV")));
    let many: Vec<u8> = (0..12_000).flat_map(|_| *b"\x01kt\x01").collect();
    all.push((0x2000, block(&many)));
    all
}

#[test]
fn hostile_messages_are_written_like_others() {
    const ROUNDS: usize = 140;
    let (exchange, properties) = (unique("hostile"), hostile_properties());
    for format in ["raw", "text", "json"] {
        let receiver = receive_logs().args(["-e", &exchange, "-f", format]).start().ready();
        let mut hostile = RawPublisher::connect(&url());
        let mut expected = Vec::new();
        for round in 0..ROUNDS {
            // The deepest nesting is tested once.
            for (index, (flags, bytes)) in properties.iter().enumerate() {
                if round > 0 && bytes.len() > 10_000 {
                    continue;
                }
                let body = format!("{round}.{index}");
                let routing_key: &[u8] = if index % 2 == 0 { b"\xff\xc3" } else { b"" };
                hostile.publish(&exchange, routing_key, (*flags, bytes), body.as_bytes());
                expected.push(body);
            }
        }
        hostile.flush();
        let lines = || receiver.stdout_so_far().iter().filter(|byte| **byte == b'\n').count();
        wait_until("everything is written", || lines() >= expected.len());
        let ended = receiver.stop().success();
        let stderr = ended.stderr_text();
        assert!(!stderr.contains("[!]"), "{stderr}");
        assert_eq!(stderr.matches("properties").count(), 1, "one warning: {stderr}");
        let text = ended.stdout_text();
        let written = text.lines().map(|line| match format {
            "raw" => line.to_string(),
            "text" => line[6..line.len() - 1].to_string(),
            _ => serde_json::from_str::<serde_json::Value>(line).unwrap()["body"]
                .as_str()
                .unwrap()
                .to_string(),
        });
        assert!(written.eq(expected), "{format}");
    }
}

/// Publishes `hostile` between two other messages. Returns the expected output of a receiver.
fn publish_among_others(
    raw: &mut RawPublisher,
    exchange: &str,
    hostile: &[(u16, Vec<u8>)],
) -> String {
    let mut expected = String::new();
    for (index, (flags, properties)) in hostile.iter().enumerate() {
        for (body, properties) in [
            (format!("before {index}"), (0, &[][..])),
            (format!("hostile {index}"), (*flags, &properties[..])),
            (format!("after {index}"), (0, &[])),
        ] {
            raw.publish(exchange, b"", properties, body.as_bytes());
            expected += &format!("{body}\n");
        }
    }
    raw.flush();
    expected
}

/// Headers of `size` bytes, including the size of the table.
fn headers_of(size: usize) -> (u16, Vec<u8>) {
    let text = vec![b'h'; size - 4 - 3 - 4];
    (0x2000, block(&[b"\x01kS", &block(&text)[..]].concat()))
}

#[test]
fn a_stream_continues_after_unreadable_properties() {
    let stream = unique("hostile-stream");
    let receiver = || receive_logs().args(["-r", "-e", &stream, "--stream", &stream]);
    let live = receiver().start().ready();
    let mut raw = RawPublisher::connect(&url());
    // RabbitMQ itself reads the properties of a message for a stream, and rejects some of the others.
    let mut hostile: Vec<_> =
        [0, 1, 5, 6, 8, 10, 12].map(|index| (0x8000 >> index, short_string(b"a\xff\xfe"))).into();
    hostile.push((0x2000, block(b"\x01kS\0\0\0\x02a\xff")));
    hostile.push((0x2000, block(b"\x02\xff\xfeS\0\0\0\x01a")));
    hostile.push((0x2000, nested(40, b'F')));
    let expected = publish_among_others(&mut raw, &stream, &hostile);
    let all = receiver().args(["--from-start", "--no-follow"]).run().success();
    assert_eq!(all.stdout_text(), expected);
    raw.publish(&stream, b"", (0x8, &short_string(b"\xff")), b"the last");
    raw.flush();
    let last = receiver().args(["--tail", "1", "--no-follow"]).run().success();
    assert_eq!(last.stdout_text(), "the last\n");
    live.wait_for_stdout(format!("{expected}the last\n").as_bytes());
    let stderr = live.stop().success().stderr_text();
    assert!(!stderr.contains("subscribing again"), "{stderr}");
    rabbitmqctl(["delete_queue", &stream]);
}

#[test]
fn a_forged_id_does_not_suppress_other_lines() {
    let exchange = unique("forged");
    let receiver = receive_logs().args(["-e", &exchange, "-f", "json"]).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-l", "-e", &exchange]).stdin(reader).start();
    writeln!(writer, "line 1").unwrap();
    let objects = || -> Vec<serde_json::Value> {
        let text = receiver.stdout_so_far();
        text.split_inclusive(|byte| *byte == b'\n').flat_map(serde_json::from_slice).collect()
    };
    wait_until("the first line is written", || objects().len() == 1);
    let id = objects()[0]["properties"]["message_id"].as_str().unwrap().to_string();
    let next = format!("{}2", id.strip_suffix('1').unwrap());
    // 5000 lines that claim the numbers of later lines.
    let properties = [short_string(next.as_bytes()), short_string(b"lines")].concat();
    let mut raw = RawPublisher::connect(&url());
    raw.publish(&exchange, b"", (0x00a0, &properties), &[b'\n'; 4999]);
    raw.flush();
    wait_until("the forged lines are written", || objects().len() == 5001);
    (2..=1000).for_each(|number| writeln!(writer, "line {number}").unwrap());
    drop(writer);
    emitter.wait().success();
    wait_until("all lines are written", || objects().len() == 6000);
    let real = objects().into_iter().map(|object| object["body"].as_str().unwrap().to_string());
    let real = real.filter(|body| !body.is_empty());
    assert!(real.eq((1..=1000).map(|number| format!("line {number}"))));
    receiver.wait_for_stderr("999 messages written with the number of another message", 1);
    receiver.stop().success();
}

/// Runs receivers of each kind of queue while `publish` publishes. Asserts that all write the text that it returns,
/// within the memory limit of a receiver.
fn assert_all_kinds_write(url: &str, publish: impl Fn(&str) -> String) {
    let name = unique("large");
    let (quorum, stream) = (format!("{name}-quorum"), format!("{name}-stream"));
    let kinds = [vec![], vec!["--queue", &quorum], vec!["--stream", &stream]];
    let start = |kind: &Vec<&str>| {
        receive_logs().args(["-u", url, "-r", "-e", &name]).args(kind).start().ready()
    };
    let receivers: Vec<_> = kinds.iter().map(start).collect();
    let expected = publish(&name);
    for receiver in receivers {
        receiver.wait_for_stdout(expected.as_bytes());
        let peak = receiver.peak_memory();
        assert!(peak < 64 * 1024 * 1024, "{peak} bytes");
        let stderr = receiver.stop().success().stderr_text();
        assert!(!stderr.contains("subscribing again"), "{stderr}");
    }
    // Written messages are acknowledged.
    let again = receive_logs().args(["-u", url, "-r", "-e", &name, "--queue", &quorum]);
    let again = again.args(["--idle-timeout", "500ms"]).run().success();
    assert_eq!(again.stdout_text(), "");
    let peer = Peer::connect_to(url);
    for queue in [&quorum, &stream] {
        peer.channel().queue_delete(queue, QueueDeleteOptions::default()).unwrap();
    }
}

#[test]
fn headers_that_nearly_fill_a_frame_are_received() {
    // A content header has 14 bytes before the properties, and its frame 8 bytes around them.
    let full = 128 * 1024 - 14 - 8;
    let hostile: Vec<_> = [full - 100, full - 20, full].map(headers_of).into();
    assert_all_kinds_write(&url(), |exchange| {
        publish_among_others(&mut RawPublisher::connect(&url()), exchange, &hostile)
    });
}

#[test]
fn redelivered_headers_may_fill_a_frame() {
    let queue = unique("redelivered");
    let receiver = || receive_logs().args(["-r", "-e", &queue, "--queue", &queue]);
    receiver().start().ready().stop().success();
    let full = headers_of(128 * 1024 - 14 - 8);
    let expected = publish_among_others(&mut RawPublisher::connect(&url()), &queue, &[full]);
    // The broker adds a delivery count to messages that are returned to the queue.
    let peer = Peer::connect();
    let lines = expected.lines().count();
    (0..lines).for_each(|_| assert!(peer.channel().basic_get(&queue, false).unwrap().is_some()));
    drop(peer);
    let ended = receiver().args(["-n", &lines.to_string(), "--timeout", "10s"]).run().success();
    assert_eq!(ended.stdout_text(), expected);
    let ended = receiver().args(["--idle-timeout", "500ms"]).run().success();
    assert_eq!(ended.stdout_text(), "");
    rabbitmqctl(["delete_queue", &queue]);
}

#[test]
fn headers_larger_than_a_frame_are_received() {
    let config = TempFile::with("rabbitmq.conf", b"frame_max = 16777216\n");
    let broker = Broker::start_with(config.path());
    let sizes = [1_000_000, 5_000_000, 1_000_000, 16_000_000];
    let mut hostile: Vec<_> = sizes.map(headers_of).into();
    // A small table in bytes that needs much memory.
    let many: Vec<u8> =
        (0..300_000_u32).flat_map(|n| [&[4], &n.to_be_bytes()[..], b"V"].concat()).collect();
    hostile.push((0x2000, block(&many)));
    assert_all_kinds_write(broker.url(), |exchange| {
        let mut raw = RawPublisher::connect_with(broker.url(), 16 * 1024 * 1024);
        publish_among_others(&mut raw, exchange, &hostile)
    });
}

/// A server that calls `act` with each connection. Returns its URL.
fn server(act: impl Fn(TcpStream) + Send + Sync + Clone + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let act = act.clone();
            thread::spawn(move || act(socket));
        }
    });
    format!("amqp://u:{SECRET}@{address}/?connection_timeout=1500")
}

/// A server that sends `bytes` to each client, and waits until it disconnects.
fn server_that_sends(bytes: impl AsRef<[u8]> + Send + Sync + Clone + 'static) -> String {
    server(move |mut socket| {
        let _ = socket.write_all(bytes.as_ref());
        let _ = socket.read_to_end(&mut Vec::new());
    })
}

/// Asserts that both tools fail soon, with one line that has all `parts`, and without much memory.
fn assert_both_fail(url: &str, status: i32, parts: &[&str]) {
    for tool in [emit_log().arg("hi"), receive_logs()] {
        let running = tool.args(["-u", url]).start();
        let mut peak = 0;
        while let Some(memory) = running.try_peak_memory() {
            peak = peak.max(memory);
            thread::sleep(Duration::from_millis(1));
        }
        assert!(peak < 20_000_000, "{peak} bytes");
        let ended = running.wait().fails_with(status, parts);
        assert!(ended.elapsed < Duration::from_secs(4), "{ended:?}");
    }
}

#[test]
fn a_server_that_is_not_a_broker_is_named() {
    for (greeting, name) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "an HTTP server"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", "an SSH server"),
        (b"AMQP\0\x01\0\0", "an AMQP 1.0 server"),
        (b"AMQP\0\0\x09\x01", "another version of AMQP"),
        (b"\x01\0\0\x4d\x7c\x6d\0garbage", "a frame of 1300000000 bytes"),
        (b"220 mail.example.com ESMTP\r\n", "something else"),
    ] {
        assert_both_fail(&server_that_sends(greeting), 76, &["log in to", name]);
    }
    // While the server keeps the connection open, this alert may be the start of any protocol.
    let alert = b"\x15\x03\x03\0\x02\x02\x46";
    let closing = server(|mut socket| {
        let _ = socket.read(&mut [0; 8]);
        let _ = socket.write_all(alert);
    });
    let resetting = server(|mut socket| {
        // Unread bytes in a socket that is closed reset the connection.
        let _ = socket.peek(&mut [0]);
        let _ = socket.write_all(alert);
    });
    for url in [closing, resetting] {
        assert_both_fail(&url, 76, &["log in to", "a TLS server"]);
    }
    let random: Vec<u8> = (0..100_000_u64).map(|n| (n * n * 31 + n / 7) as u8).collect();
    assert_both_fail(&server_that_sends(random), 76, &["log in to"]);
}

#[test]
fn a_connection_lost_in_the_login_is_not_a_refusal() {
    // The first frame of a broker.
    let start = include_bytes!("../../crates/amqp/tests/data/received.bin");
    let size = u32::from_be_bytes(start[3..7].try_into().unwrap()) as usize;
    let url = server(move |mut socket| {
        let _ = socket.write_all(&start[..size + 8]);
        let _ = socket.read_exact(&mut [0; 8]);
        let _ = read_frame(&mut socket);
    });
    assert_both_fail(&url, 69, &["log in to", "connection closed without a word"]);
}

#[test]
fn the_first_refusal_is_reported() {
    // The broker refuses the declaration. The answer to the declaration arrives inside a message.
    let start = include_bytes!("../../crates/amqp/tests/data/received.bin");
    let size = u32::from_be_bytes(start[3..7].try_into().unwrap()) as usize;
    let text = |text: &str| short_string(text.as_bytes());
    let refusal = [&[1, 0x93], &text("ACCESS_REFUSED - not you")[..], &[0, 40, 0, 10]].concat();
    let breach = [&[1, 0xf9], &text("UNEXPECTED_FRAME - what?")[..], &[0, 60, 0, 40]].concat();
    let refusals = [method(1, (20, 40), &refusal), method(0, (10, 50), &breach)].concat();
    let url = server(move |mut socket| {
        let _ = socket.read_exact(&mut [0; 8]);
        let mut answer = start[..size + 8].to_vec();
        while socket.write_all(&answer).is_ok() {
            let Ok((kind, payload)) = read_frame(&mut socket) else { break };
            answer = match method_of(&payload) {
                _ if kind != METHOD => vec![],
                // start-ok, open, open of a channel, declaration of an exchange
                (10, 11) => method(0, (10, 30), &[7, 0xff, 0, 2, 0, 0, 0, 0]),
                (10, 40) => method(0, (10, 41), b"\0"),
                (20, 10) => method(1, (20, 11), &block(b"")),
                (40, 10) => refusals.clone(),
                _ => vec![],
            };
        }
    });
    let ended = emit_log().args(["-u", &url, "hi"]).run();
    ended.fails_with(77, &["declare exchange 'logs': ACCESS_REFUSED - not you"]);
}

#[test]
fn incomplete_answers_end_at_the_time_limit() {
    let silent = server(|mut socket| drop(socket.read_to_end(&mut Vec::new())));
    let closing = server(drop);
    let dripping = server(|mut socket| {
        for byte in b"\x01\0\0\0\0\x10\0" {
            if socket.write_all(&[*byte]).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(500));
        }
        let _ = socket.read_to_end(&mut Vec::new());
    });
    for url in [silent, closing, dripping] {
        assert_both_fail(&url, 69, &["log in to"]);
    }
}
