//! Each error prints one line with its reason, without a password, and has an exit status for scripts.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use amiquip::{ExchangeDeclareOptions, ExchangeType};
use logs_tests::raw::{RawBroker, block};
use logs_tests::{
    Broker, Ended, Peer, Proxy, SECRET, ScriptedBroker, TempFile, Tool, binary, emit_log,
    free_port, project, rabbitmqctl, receive_logs, unique, url, url_with,
};
use socket2::{Domain, Socket, Type};

/// Runs both tools with these arguments.
fn both(args: &[&str]) -> [Ended; 2] {
    [emit_log(), receive_logs()].map(|tool| tool.args(args).run())
}

/// An address without a listener. The bound socket keeps other programs from using it.
fn closed_address() -> (String, Socket) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let address: SocketAddr = "127.0.0.1:0".parse().unwrap();
    socket.bind(&address.into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (address.to_string(), socket)
}

#[test]
fn an_unreachable_broker_is_reported() {
    let (address, _socket) = closed_address();
    for ended in both(&["-u", &format!("amqp://{address}")]) {
        let ended = ended.fails_with(69, &[&format!("connect to {address}: "), "refused", "--uri"]);
        assert!(ended.elapsed < Duration::from_secs(1), "{ended:?}");
    }
}

#[test]
fn every_broker_that_was_tried_is_named() {
    let ((first, _one), (second, _two)) = (closed_address(), closed_address());
    let uris = format!("amqp://{first} amqp://{second}");
    emit_log().env("AMQP_URL", uris).run().fails_with(69, &[&first, &second]);
}

#[test]
fn the_second_broker_serves_when_the_first_is_gone() {
    let (closed, _socket) = closed_address();
    let uris = format!("amqp://{closed} {}", url());
    emit_log().env("AMQP_URL", uris).args(["-e", &unique("second")]).run().success();
}

#[test]
fn a_node_that_is_not_a_broker_does_not_exclude_others() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
            let _ = socket.read(&mut [0; 8]);
        }
    });
    let other = format!("amqp://{address}");
    // The tools begin with a random node.
    for _ in 0..8 {
        let uris = format!("{other} {}", url());
        emit_log().env("AMQP_URL", uris).args(["-e", &unique("other")]).run().success();
    }
    let (closed, _socket) = closed_address();
    let uris = format!("{other} amqp://{closed}");
    // The closed node may return, so this is status 69.
    let parts = ["log in to", "an HTTP server", "refused"];
    emit_log().env("AMQP_URL", uris).run().fails_with(69, &parts);
    emit_log().args(["-u", &other, "-u", &other]).run().fails_with(76, &["an HTTP server"]);
}

#[test]
fn an_empty_uri_is_not_the_default() {
    for ended in both(&["-u", ""]) {
        ended.fails_with(2, &["--uri", "empty"]);
    }
    emit_log().env("AMQP_URL", "nonsense").run().fails_with(2, &["AMQP_URL", "not a URI"]);
}

#[test]
fn quotes_around_a_uri_are_reported() {
    for uri in ["\"amqp://u:s3cr3t-p4ss@h\"", "'amqp://h'", "\"amqp://h amqp://i\"", "amqp://h\""] {
        for tool in [emit_log(), receive_logs()] {
            tool.env("AMQP_URL", uri).run().fails_with(2, &["AMQP_URL: ", "quotes"]);
        }
    }
}

/// cron ends a command at the first `%`, and passes the rest as standard input.
#[test]
fn a_percent_sign_of_a_crontab_is_explained() {
    let escaped = "write % as \\%";
    for ended in both(&["-u", &url_with("guest", "guest", "")]) {
        ended.fails_with(78, &["vhost ''", escaped]);
    }
    for ended in both(&["-u", "amqp://guest:p"]) {
        ended.fails_with(2, &["not a URI", escaped]);
    }
    let rest = TempFile::with("rest", b"2f 'backup failed'\n");
    let rest = File::open(rest.path()).unwrap();
    emit_log().stdin(rest).run().fails_with(2, &["nothing is sent", escaped]);
}

/// A peer that offers these mechanisms of login to a client, and its URI.
fn offering(mechanisms: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("amqp://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let mut broker = RawBroker::new(socket);
            broker.socket().read_exact(&mut [0; 8]).unwrap();
            let version_and_properties = [b"\0\x09", &block(b"")[..]].concat();
            let arguments = [version_and_properties, block(mechanisms), block(b"en_US")];
            broker.send(0, (10, 10), &arguments.concat());
            broker.wait_for_end();
        }
    });
    uri
}

#[test]
fn a_missing_login_mechanism_is_not_a_wrong_password() {
    let external = |uri: String| format!("{uri}?auth_mechanism=external");
    for (uri, parts) in [
        (offering(b"AMQPLAIN"), ["offers AMQPLAIN, not PLAIN", "auth_mechanisms"]),
        (offering(b"EXTERNAL AMQPLAIN"), ["not PLAIN", "?auth_mechanism=external"]),
        (
            external(offering(b"PLAIN AMQPLAIN")),
            ["offers PLAIN AMQPLAIN, not EXTERNAL", "rabbitmq_auth_mechanism_ssl"],
        ),
    ] {
        for ended in both(&["-u", &uri]) {
            let ended = ended.fails_with(77, &["log in to 127.0.0.1:", parts[0], parts[1]]);
            assert!(!ended.stderr_text().contains("check user"), "{ended:?}");
        }
    }
}

/// The URI of the broker under test with parameters.
fn url_and(parameters: &str) -> String {
    format!("{}?{parameters}", url())
}

#[test]
fn limits_in_the_uri_are_negotiated() {
    let exchange = unique("limits");
    let uri = url_and("channel_max=7&frame_max=4096");
    let receiver = receive_logs().args(["-u", &uri, "-e", &exchange, "-r"]).start().ready();
    let limits = rabbitmqctl(["list_connections", "channel_max", "frame_max"]);
    assert!(limits.lines().any(|line| line == "7\t4096"), "{limits}");
    let long = "x".repeat(100_000);
    emit_log().args(["-u", &uri, "-e", &exchange, &long]).run().success();
    receiver.wait_for_stdout(format!("{long}\n").as_bytes());
    receiver.stop().success();

    let (one, queue) = (url_and("channel_max=1"), unique("one-channel"));
    emit_log().args(["-u", &one, "-e", &exchange]).run().success();
    let ended = receive_logs().args(["-u", &one, "-e", &exchange, "--queue", &queue]).run();
    ended.fails_with(
        78,
        &["open a channel: channel_max of the broker or of the URI is less than 2"],
    );
    rabbitmqctl(["delete_queue", &queue]);
}

#[test]
fn unknown_parameters_of_the_uri_are_named() {
    let unknown = url_and("retries=3&heartbeat=5&locale=en_US");
    for ended in both(&["-u", &unknown]) {
        ended.fails_with(2, &["--uri: unknown after '?': retries, locale (known: heartbeat"]);
    }
    let skipped = "amqps://127.0.0.1?verify=verify_none";
    for ended in both(&["-u", skipped]) {
        ended.fails_with(2, &["verify=verify_none", "always checked", "--cacert"]);
    }
}

#[test]
fn a_silent_broker_is_a_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let uri = format!("amqp://{address}?connection_timeout=700");
    for ended in both(&["-u", &uri]) {
        let ended = ended.fails_with(69, &[&format!("log in to {address}"), "timeout"]);
        let elapsed = ended.elapsed;
        assert!(elapsed >= Duration::from_millis(700), "{ended:?}");
        assert!(elapsed < Duration::from_millis(2700), "{ended:?}");
    }
}

#[test]
fn a_silent_broker_leaves_time_for_the_next_one() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("amqp://{}?connection_timeout=2000", listener.local_addr().unwrap());
    let uris = format!("{silent} {}", url());
    emit_log().env("AMQP_URL", uris).args(["-e", &unique("silent")]).run().success();
}

#[test]
fn each_broker_has_its_own_connection_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("amqp://{}?connection_timeout=300", listener.local_addr().unwrap());
    let uris = format!("{silent} {}", url());
    let exchange = unique("own-timeout");
    // Each run begins with a random node.
    let silent_first = (0..20).filter(|_| {
        let emitter = emit_log().env("AMQP_URL", &uris).args(["-e", &exchange]);
        let ended = emitter.run().success();
        assert!(ended.elapsed < Duration::from_secs(3), "{ended:?}");
        ended.elapsed >= Duration::from_millis(300)
    });
    assert!(silent_first.count() > 0, "the silent one was never the first");
}

#[test]
fn a_connection_closed_at_once_is_reported() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("amqp://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            drop(listener.accept().unwrap());
        }
    });
    for ended in both(&["-u", &uri]) {
        ended.fails_with(69, &["log in to 127.0.0.1", "closed without an answer"]);
    }
    server.join().unwrap();
}

/// This test has a node of its own, because the shared node has no management plugin.
#[test]
fn the_port_of_another_service_is_recognised() {
    let port = free_port();
    let config = format!("management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {port}\n");
    let config = TempFile::with("rabbitmq.conf", config.as_bytes());
    let options = |tool: Tool| tool.args(["--plugins", "rabbitmq_management", "--config"]);
    let _broker = Broker::start_by(|tool| options(tool).arg(config.path()));
    let address = format!("127.0.0.1:{port}");
    for ended in both(&["-u", &format!("amqp://{address}")]) {
        let operation = format!("log in to {address}");
        ended.fails_with(69, &[&operation, "closed without an answer", "5672", "amqps:// 5671"]);
    }
}

#[test]
fn a_wrong_password_is_a_refused_login() {
    for ended in both(&["-u", &url_with("guest", SECRET, "%2f")]) {
        ended.fails_with(77, &["log in to", "'guest'", "ACCESS_REFUSED - Login was refused"]);
    }
}

#[test]
fn the_password_file_keeps_the_password_off_the_command_line() {
    let user = unique("user");
    rabbitmqctl(["add_user", &user, SECRET]);
    rabbitmqctl(["set_permissions", &user, ".*", ".*", ".*"]);
    let right = TempFile::with("right", format!("{SECRET}\n").as_bytes());
    let wrong = TempFile::with("wrong", b"else\n");
    let uri = url_with(&user, "unknown", "%2f");
    let args = ["-u", &uri, "-e", &unique("password"), "--password-file"];
    let receiver = receive_logs().args(args).arg(right.path()).start().ready();
    let shown = receiver.command_line();
    assert!(shown.contains(&uri) && !shown.contains(SECRET), "{shown}");
    emit_log().args(args).arg(right.path()).run().success();
    receiver.stop().success();
    emit_log().args(args).arg(wrong.path()).run().fails_with(77, &["ACCESS_REFUSED"]);
    emit_log().args(args).arg("/nonexistent").run().fails_with(74, &["/nonexistent"]);
    // An editor on Windows writes a byte order mark and CR LF.
    let marked = TempFile::with("marked", format!("\u{feff}{SECRET}\r\n").as_bytes());
    emit_log().args(args).arg(marked.path()).run().success();

    let from = |tool: Tool, file: &str| {
        let stdin = File::open(right.path()).unwrap();
        tool.args(args).arg(file).stdin(stdin).run()
    };
    for tool in [emit_log(), receive_logs()] {
        from(tool, "-").fails_with(2, &["--password-file -: ", "/dev/stdin"]);
    }
    from(emit_log(), "/dev/stdin").success();
    for file in ["-", "/dev/stdin"] {
        from(emit_log().arg("-l"), file).fails_with(2, &["--password-file: ", "the messages"]);
    }
    rabbitmqctl(["delete_user", &user]);
}

/// Checks that a tool works, or prints one line and exits with a documented status. Returns whether it works.
fn works_or_reports_why(tool: Tool, limit: &str) -> bool {
    let ended = tool.run();
    match ended.status.code() {
        Some(0) => return true,
        Some(1 | 69) => {}
        _ => panic!("{limit}: {ended:?}"),
    }
    let stderr = ended.stderr_text();
    assert!(stderr.lines().count() == 1 && !stderr.contains("panicked"), "{limit}: {ended:?}");
    false
}

/// Both tools and `emit-log --lines`, run by a program that sets a limit.
fn limited(exchange: &str, limit: impl Fn() -> Tool) -> [Tool; 3] {
    let tool = |name, args: &[&str]| {
        let tool = limit().arg(binary(name)).env("AMQP_URL", url());
        tool.args(["-e", exchange, "--retry", "0s"]).args(args)
    };
    let lines = TempFile::with("lines", b"one\ntwo\n");
    let lines = tool("emit-log", &["-l"]).stdin(File::open(lines.path()).unwrap());
    [tool("emit-log", &["hi"]), tool("receive-logs", &["--timeout", "100ms", "-q"]), lines]
}

/// The system limits the processes and threads of each user except root. Root therefore runs the tools as a user that
/// no other test uses, with the right to read the project.
#[test]
fn a_thread_limit_is_reported_in_one_line() {
    let user = format!("--reuid={}", 100_000 + std::process::id());
    let is_root = rustix::process::getuid().is_root();
    let as_user = || match is_root {
        true => Tool::new("setpriv").arg(&user).args([
            "--clear-groups",
            "--inh-caps=+dac_override",
            "--ambient-caps=+dac_override",
            "prlimit",
        ]),
        false => Tool::new("prlimit"),
    };
    let exchange = unique("threads");
    let works = |threads: u32| {
        let limit = format!("--nproc={threads}");
        let tools = limited(&exchange, || as_user().arg(&limit));
        tools.map(|tool| works_or_reports_why(tool, &limit))
    };
    assert_eq!(works(1), [false; 3]);
    if is_root {
        for threads in 2..9 {
            works(threads);
        }
        assert_eq!(works(9), [true; 3]);
    }
}

/// Without memory, Rust aborts, or the loader of the system fails before Rust starts. A thread that cannot be created
/// is an ordinary error.
#[test]
fn a_tool_without_more_memory_does_not_panic() {
    let exchange = unique("memory");
    let mut ends = Vec::new();
    for kilobytes in (10_000..24_000).step_by(1000) {
        let limit = format!("ulimit -v {kilobytes}; exec \"$0\" \"$@\"");
        for tool in limited(&exchange, || Tool::new("bash").args(["-c", &limit])) {
            let ended = tool.run();
            let stderr = ended.stderr_text();
            match (ended.status.code(), ended.signal()) {
                (Some(0), _) => {}
                (Some(1 | 69 | 127), _) => {
                    // Another thread may be about to abort when the main thread exits.
                    let is_abort = |line: &&str| line.starts_with("memory allocation of ");
                    let lines = stderr.lines().filter(|line| !is_abort(line)).count();
                    assert_eq!(lines, 1, "{ended:?}");
                }
                (_, Some(_)) => {}
                _ => panic!("{limit}: {ended:?}"),
            }
            ends.push(ended.status.code());
        }
    }
    for code in [0, 69] {
        assert!(ends.contains(&Some(code)), "none ended with {code}: {ends:?}");
    }
}

#[test]
fn a_password_file_without_a_password_is_named() {
    for (content, reason) in [
        (&b""[..], "is empty"),
        (b"\npassword in the second line\n", "is empty"),
        (b"\xff\n", "is not UTF-8"),
    ] {
        let file = TempFile::with("password", content);
        for tool in [emit_log(), receive_logs()] {
            let ended = tool.arg("--password-file").arg(file.path()).run();
            ended.fails_with(78, &["read password file", "/password\"", reason]);
        }
    }
    // The memory is limited, because a reader without a limit would fill it.
    let limited = Tool::new("bash").args(["-c", "ulimit -v 1000000; exec \"$0\" \"$@\""]);
    let endless = limited.arg(binary("emit-log")).args(["--password-file", "/dev/zero"]);
    endless.run().fails_with(78, &["read password file", "/dev/zero", "longer than 64 KiB"]);
}

/// The memory is limited, because a reader without a limit would fill it.
#[test]
fn a_large_file_is_neither_position_nor_ready_file() {
    let large = TempFile::new("large");
    large.create().set_len(4 << 30).unwrap();
    for (options, status, reason) in [
        (&["--stream", "large", "--resume"][..], 78, "it holds no position"),
        (&["--ready-file"], 74, "it exists and is not a ready file"),
    ] {
        let limited = Tool::new("bash").args(["-c", "ulimit -v 1000000; exec \"$0\" \"$@\""]);
        let receiver = limited.arg(binary("receive-logs")).args(options).arg(large.path());
        receiver.run().fails_with(status, &["large\"", reason]);
    }
}

/// The tools send requests before the login is complete.
#[test]
fn a_reached_limit_is_a_refused_login() {
    let user = unique("limited");
    rabbitmqctl(["add_user", &user, SECRET]);
    rabbitmqctl(["set_permissions", &user, ".*", ".*", ".*"]);
    let uri = url_with(&user, SECRET, "%2f");
    for (limit, words) in [
        ("{\"max-connections\": 0}", "connection limit (0) is reached"),
        ("{\"max-channels\": 0}", "maximum allowed user limit of (0)"),
    ] {
        rabbitmqctl(["clear_user_limits", &user, "all"]);
        rabbitmqctl(["set_user_limits", &user, limit]);
        let login = format!(" as '{user}', vhost '/': NOT_ALLOWED");
        for tool in
            [emit_log().arg("words"), emit_log().args(["--no-confirm", "words"]), receive_logs()]
        {
            let ended = tool.args(["-u", &uri]).run();
            let stderr = ended.stderr_text();
            assert!(stderr.contains("log in to ") && stderr.contains(&login), "{limit}: {stderr}");
            assert!(stderr.contains(words), "{limit}: {stderr}");
            assert!(!stderr.contains("in doubt"), "{limit}: {stderr}");
        }
    }
    rabbitmqctl(["delete_user", &user]);
}

#[test]
fn a_missing_or_forbidden_vhost_is_reported() {
    for ended in both(&["-u", &url_with("guest", "guest", "nope")]) {
        ended.fails_with(78, &["log in to", "'nope'", "NOT_ALLOWED - vhost nope not found"]);
    }
    for ended in both(&["-u", &url_with("guest", "guest", "")]) {
        let ended = ended.fails_with(78, &["log in to", "vhost ''"]);
        // This advice is the first one, because other clients use an empty vhost as the default vhost.
        assert!(ended.stderr_text().contains("(leave out the final '/'"), "{ended:?}");
    }
    let vhost = unique("closed");
    rabbitmqctl(["add_vhost", &vhost]);
    for ended in both(&["-u", &url_with("guest", "guest", &vhost)]) {
        ended.fails_with(77, &["log in to", &vhost, "refused for user 'guest'"]);
    }
    rabbitmqctl(["delete_vhost", &vhost]);
}

#[test]
fn a_missing_permission_is_reported() {
    let user = unique("user");
    rabbitmqctl(["add_user", &user, SECRET]);
    rabbitmqctl(["set_permissions", &user, "^$", "^$", ".*"]);
    let exchange = unique("forbidden");
    let args = ["-u", &url_with(&user, SECRET, "%2f"), "-e", &exchange];
    for ended in both(&args) {
        let operation = format!("declare exchange '{exchange}': ACCESS_REFUSED");
        ended.fails_with(77, &[&operation, "set_permissions"]);
    }

    // With permission to declare, and none to publish.
    rabbitmqctl(["set_permissions", &user, ".*", "^$", ".*"]);
    let operation = format!("publish to exchange '{exchange}': ACCESS_REFUSED");
    for option in ["-q", "--no-confirm"] {
        emit_log().args(args).arg(option).run().fails_with(77, &[&operation]);
    }
    rabbitmqctl(["delete_user", &user]);
}

#[test]
fn a_reserved_name_is_not_a_missing_permission() {
    for ended in both(&["-e", "amq.of-our-own"]) {
        // Such an exchange is not declared.
        let reason = "NOT_FOUND - no exchange 'amq.of-our-own'";
        let ended = ended.fails_with(78, &[reason, "reserved prefix", "use another name"]);
        assert!(!ended.stderr_text().contains("permission"), "{ended:?}");
    }
}

#[test]
fn an_exchange_of_another_type_is_reported() {
    let exchange = unique("direct");
    let peer = Peer::connect();
    let options = ExchangeDeclareOptions::default();
    peer.channel().exchange_declare(ExchangeType::Direct, &exchange, options).unwrap();
    for ended in both(&["-e", &exchange]) {
        let operation = format!("declare exchange '{exchange}': PRECONDITION_FAILED");
        ended.fails_with(78, &[&operation, "'type'", "--exchange"]);
    }
    emit_log().args(["-e", &exchange, "--passive"]).run().success();
    peer.channel().exchange_delete(&exchange, false).unwrap();
}

/// Words in a name that RabbitMQ uses for causes that pass.
#[test]
fn a_name_in_an_error_does_not_change_its_kind() {
    let peer = Peer::connect();
    let exchange = "acknowledgements";
    let options = ExchangeDeclareOptions::default();
    peer.channel().exchange_declare(ExchangeType::Direct, exchange, options).unwrap();
    for ended in both(&["-e", exchange, "--retry", "forever"]) {
        ended.fails_with(78, &["declare exchange 'acknowledgements': PRECONDITION_FAILED"]);
    }
    peer.channel().exchange_delete(exchange, false).unwrap();

    let uri = url_with("guest", "guest", "limits");
    for ended in both(&["-u", &uri, "--retry", "forever"]) {
        ended.fails_with(78, &["NOT_ALLOWED - vhost limits not found"]);
    }
}

/// Checks that both tools use an exchange with these options, and say that it is `found`.
fn assert_used_as_it_is(exchange: &str, options: &[&str], found: &str) {
    let args = [&["-e", exchange], options].concat();
    let note = format!("exchange '{exchange}' exists and {found}");
    let receiver = receive_logs().args(&args).start().ready();
    assert_eq!(receiver.stderr_so_far().matches(&note).count(), 1);
    for option in ["-m", "--no-confirm"] {
        let ended = emit_log().args(&args).args([option, "--", option]).run().success();
        assert_eq!(ended.stderr_text().matches(&note).count(), 1, "{ended:?}");
        assert_eq!(ended.stderr_text().lines().count(), 1, "{ended:?}");
    }
    let input = TempFile::with("input", b"one\ntwo\n");
    let input = std::fs::File::open(input.path()).unwrap();
    emit_log().args(&args).arg("-l").stdin(input).run().success();
    let sent = ["-m", "--no-confirm", "one", "two"].map(|text| format!(" [x] \"{text}\"\n"));
    receiver.wait_for_stdout(sent.concat().as_bytes());
    receiver.stop().success();
    // Nothing that is left out with --quiet.
    emit_log().args(&args).args(["-q", "quiet"]).run().success();
}

#[test]
fn an_exchange_of_the_other_durability_is_used_as_it_is() {
    let peer = Peer::connect();
    let exchange = unique("durable");
    emit_log().args(["-e", &exchange, "--durable"]).run().success();
    emit_log().args(["-e", &exchange, "--durable"]).run().success();
    assert_used_as_it_is(&exchange, &[], "is durable");
    peer.channel().exchange_delete(&exchange, false).unwrap();

    let exchange = unique("transient");
    emit_log().args(["-e", &exchange]).run().success();
    assert_used_as_it_is(&exchange, &["--durable"], "is not durable");
    peer.channel().exchange_delete(&exchange, false).unwrap();
}

#[test]
fn a_transient_exchange_that_is_not_permitted_is_declared_durable() {
    let note =
        "no longer permits exchanges that are not durable: exchange 'logs' is declared durable";
    let broker = ScriptedBroker::start();
    broker.refuse_transient_exchanges();
    let receiver = receive_logs().args(["-u", &broker.url()]).start().ready();
    assert_eq!(receiver.stderr_so_far().matches(note).count(), 1);
    receiver.stop().success();
    broker.forget_sessions();
    let emitter = emit_log().args(["-u", &broker.url(), "words"]).start();
    let [_refused, session] = [(); 2].map(|()| broker.accept());
    session.expect_publishes(1);
    session.ack(1, false);
    let ended = emitter.wait().success();
    assert_eq!(ended.stdout_text(), " [x] Sent \"words\"\n");
    assert_eq!(ended.stderr_text().matches(note).count(), 1);
    assert_eq!(broker.declarations(), [false, true, false, true]);
}

#[test]
fn passive_does_not_create_a_missing_exchange() {
    let exchange = unique("missing");
    for ended in both(&["-e", &exchange, "--passive"]) {
        ended.fails_with(78, &[&format!("to exchange '{exchange}': NOT_FOUND"), "--passive"]);
    }
}

/// This test has a node of its own, because the limit applies to the whole node.
#[test]
fn a_too_large_message_is_reported() {
    let config = TempFile::with("rabbitmq.conf", b"max_message_size = 1000\n");
    let broker = Tool::new(project().join("scripts/broker"));
    let broker = broker.args(["run", "--config"]).arg(config.path());
    let ended = broker.arg(binary("emit-log")).arg("x".repeat(1001)).run();
    let stderr = ended.stderr_text();
    assert_eq!(ended.status.code(), Some(65), "{ended:?}");
    let line = stderr.lines().find(|line| line.starts_with("emit-log: ")).expect("a line");
    assert!(
        line.contains("publish to exchange 'logs': PRECONDITION_FAILED - message size"),
        "{line}"
    );
}

#[test]
fn an_unroutable_message_is_reported() {
    let exchange = unique("unroutable");
    for option in ["--mandatory", "-m"] {
        let text = format!("publish to exchange '{exchange}'");
        emit_log()
            .args(["-e", &exchange, option])
            .run()
            .fails_with(67, &[&text, "not routed to any queue"]);
    }
    emit_log().args(["-e", &exchange, "-m", "--no-confirm"]).run().fails_with(67, &["not routed"]);
    let _receiver = receive_logs().args(["-e", &exchange]).start().ready();
    emit_log().args(["-e", &exchange, "-m"]).run().success();
    emit_log().args(["-e", &exchange, "-m", "--no-confirm"]).run().success();
}

/// A file that cannot be written.
fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

#[test]
fn help_that_cannot_be_written_is_an_error() {
    for option in ["--help", "-h", "--version"] {
        for tool in [emit_log(), receive_logs()] {
            let ended = tool.arg(option).stdout(full()).start_redirected().wait();
            ended.fails_with(74, &["write to stdout", "No space left on device"]);
        }
        for tool in [emit_log(), receive_logs()] {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            tool.arg(option).stdout(writer).start_redirected().wait().success();
        }
    }
}

#[test]
fn a_usage_error_that_cannot_be_written_keeps_its_status() {
    for argument in ["amqp://u:p@host", "--no-such-option"] {
        let to_full = Tool::new("bash").args(["-c", "exec \"$0\" \"$@\" 2>/dev/full"]);
        to_full.arg(binary("receive-logs")).arg(argument).run().exits_with(2);
    }
}

#[test]
fn a_full_output_is_reported() {
    let exchange = unique("full");
    let receiver = receive_logs().args(["-e", &exchange, "-q"]).stdout(full()).start_redirected();
    let bound = format!("{exchange}\t");
    logs_tests::wait_until("the receiver is bound", || {
        rabbitmqctl(["list_bindings", "source_name", "destination_name"]).contains(&bound)
    });
    emit_log()
        .args(["-e", &exchange])
        .stdout(full())
        .start_redirected()
        .wait()
        .fails_with(74, &["message sent", "stdout", "No space left on device"]);
    receiver.wait().fails_with(74, &["write to stdout", "No space left on device"]);
}

#[test]
fn dev_stdout_that_cannot_be_opened_has_another_name() {
    let (socket, _other) = UnixStream::pair().unwrap();
    let receiver = receive_logs().args(["-o", "/dev/stdout"]).stdout(OwnedFd::from(socket));
    receiver.start_redirected().wait().fails_with(74, &["open \"/dev/stdout\"", "-o -"]);
}

#[test]
fn the_option_whose_value_is_not_utf8_is_named() {
    let uri = [b"amqp://u:", SECRET.as_bytes(), b"\xff@h"].concat();
    let uri_in_one = [b"-u", &uri[..]].concat();
    let shared: &[(&[&[u8]], &str)] = &[
        (&[b"-e", b"\xff"], "-e"),
        (&[b"--exchange=\xff"], "--exchange"),
        (&[b"-q", b"--retry", b"\xff", b"-e", b"\xff"], "--retry"),
        (&[b"-u", &uri], "-u"),
        (&[&uri_in_one], "-u"),
    ];
    let emit: &[(&[&[u8]], &str)] = &[
        (&[b"-H", b"Name: \xff"], "-H"),
        (&[b"-t\xff"], "-t"),
        (&[b"a word \xff", b"--app-id", b"\xff"], "--app-id"),
    ];
    let receive: &[(&[&[u8]], &str)] =
        &[(&[b"-o", b"a path \xff", b"--queue", b"\xff"], "--queue")];
    let tools = [(receive_logs as fn() -> Tool, receive), (emit_log, emit)];
    for (tool, own) in tools {
        for (args, option) in shared.iter().chain(own) {
            let args = args.iter().map(|arg| OsStr::from_bytes(arg));
            let ended = tool().args(args).run().exits_with(2);
            let text = format!("error: the value of {option} is not UTF-8\n");
            assert!(ended.stderr_text().starts_with(&text), "{option}: {ended:?}");
        }
    }
    let words = OsStr::from_bytes(b"a word \xff");
    emit_log().args(["-e", &unique("words")]).arg(words).run().success();
}

#[test]
fn wrong_usage_is_status_2() {
    let long = "x".repeat(256);
    for args in [
        &["--no-such-option"][..],
        &["-e", ""],
        &["-e", &long],
        // The broker declares "ab".
        &["-e", "a\nb"],
        &["-e", "a\rb"],
        &["--retry", "soon"],
        &["-q", "-v"],
        &["--passive", "--durable"],
    ] {
        for ended in both(args) {
            ended.exits_with(2);
        }
    }
    for args in [&["-H", "no colon"][..], &["--content-type", &long], &["--app-id", &long]] {
        emit_log().args(args).run().exits_with(2);
    }
    for args in
        [&["-n", "0"][..], &["--timeout", "0s"], &["-r", "-f", "text"], &["-f", "xml"], &["-0"]]
    {
        receive_logs().args(args).run().exits_with(2);
    }
    for option in ["--queue", "--stream"] {
        let ended = receive_logs().args([option, "a\nb"]).run().exits_with(2);
        assert!(ended.stderr_text().contains("line break"), "{ended:?}");
    }
}

#[test]
fn a_password_is_never_shown() {
    // Every test checks every output for the password. This test adds cases in which a password could appear.
    let unresolvable = format!("amqp://u:{SECRET}@no-such-host.invalid");
    let (closed, _socket) = closed_address();
    let uris = [
        format!("amqp://u:{SECRET}^@localhost"),
        format!("amqp://u:12/{SECRET}@localhost"),
        format!("http://u:{SECRET}@localhost"),
        format!("amqps://u:{SECRET}@localhost"),
        format!("amqp://u:{SECRET}@{closed}"),
        unresolvable.clone(),
        url_with("guest", SECRET, "%2f"),
    ];
    for uri in &uris {
        for tool in [emit_log(), receive_logs()] {
            let ended = tool.env("RUST_LOG", "trace").args(["-v", "-u", uri]).run();
            assert!(!ended.status.success(), "{ended:?}");
        }
        // The option -u is missing.
        receive_logs().arg(uri).run().exits_with(2);
        let ended = emit_log().env("AMQP_URL", uri).arg("--help").run().success();
        assert!(ended.stdout_text().contains("amqp://guest:guest@localhost:5672/%2f"));
    }
    receive_logs().arg(format!("amqp://u:no {SECRET}@h")).run().exits_with(2);
    let login = format!("u:{SECRET}@h:5672");
    for slip in [&[&login][..], &[&"--timeout".into(), &login], &[&"-e".into(), &uris[4]]] {
        receive_logs().args(slip).run().exits_with(2);
    }
    emit_log()
        .env("AMQP_URL", unresolvable)
        .run()
        .fails_with(69, &["look up no-such-host.invalid"]);

    // A successful login logs the most details.
    let user = unique("user");
    rabbitmqctl(["add_user", &user, SECRET]);
    rabbitmqctl(["set_permissions", &user, ".*", ".*", ".*"]);
    let uri = url_with(&user, SECRET, "%2f");
    let args = ["-u", &uri, "-e", &unique("trace")];
    for filter in ["trace", "amiquip=trace", "amiquip::io_loop::handshake_state=trace"] {
        emit_log().env("RUST_LOG", filter).args(args).run().success();
        let receiver = receive_logs().env("RUST_LOG", filter).args(args).start().ready();
        receiver.stop().success();
    }
    rabbitmqctl(["delete_user", &user]);
}

/// Runs emit-log, and receive-logs until it is ready. Returns their stderr.
fn notes(prepare: impl Fn(Tool) -> Tool) -> [String; 2] {
    let emitter = prepare(emit_log()).run().success();
    let receiver = prepare(receive_logs()).start().ready().stop().success();
    [emitter.stderr_text(), receiver.stderr_text()]
}

#[test]
fn verbose_shows_the_broker_and_the_user() {
    let (user, exchange) = (unique("user"), unique("verbose"));
    rabbitmqctl(["add_user", &user, SECRET]);
    rabbitmqctl(["set_permissions", &user, ".*", ".*", ".*"]);
    let uri = url_with(&user, SECRET, "%2f");
    let (_, place) = uri.split_once('@').unwrap();
    let (address, _) = place.split_once('/').unwrap();
    let args = ["-u", &uri, "-e", &exchange];
    let notes = notes(|tool| tool.args(args).arg("-v"));
    let connected = format!("connected to {address} as '{user}', vhost '/', RabbitMQ ");
    for stderr in &notes {
        assert!(stderr.contains(&connected), "{stderr}");
    }
    let [_, receiver] = notes;
    let consuming = format!("' bound to exchange '{exchange}'\n");
    assert!(receiver.contains("receive-logs: consuming queue 'amq.gen-"), "{receiver}");
    assert!(receiver.contains(&consuming), "{receiver}");
    rabbitmqctl(["delete_user", &user]);
}

#[test]
fn rust_log_shows_libraries_only_by_name() {
    let exchange = unique("rust-log");
    let with = |filter: &str| notes(|tool| tool.env("RUST_LOG", filter).args(["-e", &exchange]));
    for stderr in with("debug").into_iter().chain(with("trace")) {
        assert!(stderr.contains("connected to "), "{stderr}");
        for library in ["amiquip", "mio", "rustls"] {
            assert!(!stderr.contains(&format!(" {library}")), "{library}: {stderr}");
        }
    }
    let [emitter, _] = with("mio=trace");
    assert!(emitter.contains("[TRACE mio"), "{emitter}");
}

#[test]
fn a_short_retry_does_not_shorten_the_wait_for_a_confirm() {
    for _ in 0..5 {
        emit_log().args(["--retry", "0s", "-e", &unique("retry")]).run().success();
    }
}

#[test]
fn headers_may_fill_a_frame() {
    let value = format!("Name: {}", "x".repeat(40_000));
    let args = ["-H", &value, "-H", &value.replace("Name", "Other")];
    emit_log().args(args).run().fails_with(2, &["--header"]);
}

#[test]
fn a_time_limit_ends_the_wait_for_a_first_broker() {
    let (address, _socket) = closed_address();
    for limit in ["--timeout", "--idle-timeout"] {
        let options = ["-n", "1", "--retry", "forever", limit, "300ms"];
        let receiver = receive_logs().args(["-u", &format!("amqp://{address}")]).args(options);
        receiver.run().exits_with(69);
    }
}

#[test]
fn retry_waits_for_a_broker() {
    let (address, socket) = closed_address();
    let uri = format!("amqp://{address}");
    let ended = emit_log().args(["-u", &uri, "--retry", "700ms"]).run().exits_with(69);
    assert!(ended.elapsed >= Duration::from_millis(700), "{ended:?}");
    assert!(ended.elapsed < Duration::from_millis(2700), "{ended:?}");

    // A proxy to the real broker starts a little later.
    let emitter = emit_log().args(["-u", &uri, "--retry", "20s", "-e", &unique("retry")]).start();
    logs_tests::wait_until("the first attempt has failed", || {
        emitter.stderr_so_far().contains("trying again")
    });
    socket.listen(1).unwrap();
    let _proxy = Proxy::start_on(TcpListener::from(socket), &url());
    emitter.wait().success();
}
