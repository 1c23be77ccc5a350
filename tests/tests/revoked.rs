//! A login, a permission or a vhost has worked and is refused later: both tools retry within `--retry`.

use std::fs;
use std::io::Write;

use logs_tests::{Broker, SECRET, TempFile, Tool, emit_log, receive_logs};

const AGAIN: &str = " [!] Subscribed again after ";

/// A node with a user and a vhost, both named `u`.
struct Node {
    broker: Broker,
    password: TempFile,
}

impl Node {
    fn start() -> Node {
        let broker = Broker::start();
        broker.ctl(["add_user", "u", SECRET]);
        let node = Node { broker, password: TempFile::new("password") };
        node.add_vhost();
        node.write_password(SECRET);
        node
    }

    fn add_vhost(&self) {
        self.broker.ctl(["add_vhost", "u"]);
        self.permit(".*");
    }

    fn permit(&self, what: &str) {
        self.broker.ctl(["set_permissions", "-p", "u", "u", what, what, what]);
    }

    fn write_password(&self, password: &str) {
        fs::write(self.password.path(), password).unwrap();
    }

    fn change_password(&self, password: &str) {
        self.broker.ctl(["change_password", "u", password]);
    }

    fn close_connections(&self) {
        self.broker.ctl(["close_all_connections", "--global", "for a test"]);
    }

    /// One of the tools, logged in as that user.
    fn tool(&self, tool: Tool) -> Tool {
        let uri = format!("amqp://u:x@127.0.0.1:{}/u", self.broker.port());
        tool.args(["-u", &uri, "--password-file"]).arg(self.password.path())
    }

    /// Runs both tools, makes the broker refuse them by `revoke`, and permits them by `grant` after `note` is
    /// printed.
    fn assert_waits(&self, revoke: impl FnOnce(&Node), note: &str, grant: impl FnOnce(&Node)) {
        let receiver = self.tool(receive_logs().args(["-r", "--retry", "forever"])).start().ready();
        let (reader, mut writer) = std::io::pipe().unwrap();
        let emitter = emit_log().args(["-l", "--retry", "forever"]).stdin(reader);
        let emitter = self.tool(emitter).start();
        writer.write_all(b"before\n").unwrap();
        receiver.wait_for_stdout(b"before\n");
        revoke(self);
        writer.write_all(b"after\n").unwrap();
        for tool in [&receiver, &emitter] {
            tool.wait_for_stderr(note, 1);
        }
        grant(self);
        receiver.wait_for_stderr(AGAIN, 1);
        receiver.wait_for_stdout(b"before\nafter\n");
        drop(writer);
        emitter.wait().success();
        receiver.stop().success();
    }
}

#[test]
fn a_rotated_password_is_read_again() {
    let rotate = |node: &Node| {
        node.change_password("other");
        node.close_connections();
    };
    let note = "ACCESS_REFUSED - Login was refused";
    Node::start().assert_waits(rotate, note, |node| node.write_password("other"));
}

#[test]
fn an_empty_password_file_is_read_again() {
    let empty = |node: &Node| {
        node.write_password("");
        node.close_connections();
    };
    let note = "its first line is empty; trying again";
    Node::start().assert_waits(empty, note, |node| node.write_password(SECRET));
}

#[test]
fn a_deleted_vhost_is_retried() {
    let delete = |node: &Node| drop(node.broker.ctl(["delete_vhost", "u"]));
    let note = "NOT_ALLOWED - vhost u not found";
    Node::start().assert_waits(delete, note, Node::add_vhost);
}

#[test]
fn revoked_permissions_are_retried() {
    let revoke = |node: &Node| {
        node.permit("^$");
        node.close_connections();
    };
    let note = "declare exchange 'logs': ACCESS_REFUSED";
    Node::start().assert_waits(revoke, note, |node| node.permit(".*"));
}

#[test]
fn a_permanently_refused_login_ends_both_tools() {
    let node = Node::start();
    let retry = ["--retry", "1s"];
    let receiver = node.tool(receive_logs().args(retry)).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = node.tool(emit_log().arg("-l").args(retry).stdin(reader)).start();
    writer.write_all(b"before\n").unwrap();
    receiver.wait_for_stdout(b" [x] \"before\"\n");
    node.change_password("other");
    node.close_connections();
    for tool in [receiver, emitter] {
        let stderr = tool.wait().exits_with(77).stderr_text();
        let last = stderr.lines().last().unwrap();
        assert!(last.contains("ACCESS_REFUSED - Login was refused"), "{stderr}");
    }
}

#[test]
fn a_refused_first_login_is_not_retried() {
    let node = Node::start();
    node.write_password("wrong");
    for tool in [receive_logs(), emit_log().arg("words"), emit_log().arg("-l")] {
        let ended = node.tool(tool).args(["--retry", "forever"]).run();
        ended.fails_with(77, &["ACCESS_REFUSED - Login was refused"]);
    }
}
