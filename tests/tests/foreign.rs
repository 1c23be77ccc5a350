//! Another program answers at the port of the broker for a while, as a load balancer without a node does.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use logs_tests::{Broker, Tool, emit_log, receive_logs, wait_until};

const ANSWER: &[u8] = b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n";

/// An HTTP server. Dropping it stops it.
struct HttpServer {
    address: String,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl HttpServer {
    fn start_at(port: &str) -> HttpServer {
        let address = format!("127.0.0.1:{port}");
        let mut bound = None;
        wait_until("the port is free", || {
            bound = TcpListener::bind(&address).ok();
            bound.is_some()
        });
        let listener = bound.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let is_over = Arc::<AtomicBool>::default();
        let ends_here = Arc::clone(&is_over);
        let thread = thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                if ends_here.load(Ordering::SeqCst) {
                    break;
                }
                client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                // The client may have disconnected.
                let _ = client.read(&mut [0; 8]);
                let _ = client.write_all(ANSWER);
            }
        });
        HttpServer { address, is_over, thread: Some(thread) }
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The note about an attempt that has reached an HTTP server.
const FOREIGN: &str = "an HTTP server answers, not an AMQP 0-9-1 broker; trying again\n";

/// Asserts that a foreign answer in the middle of the input ends neither tool.
fn assert_tolerated(prepare: impl Fn(Tool) -> Tool) {
    let broker = Broker::start();
    let receiver = receive_logs().args(["-r", "-u", broker.url()]).start().ready();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = prepare(emit_log().args(["-l", "-u", broker.url()])).stdin(reader).start();
    writeln!(writer, "before").unwrap();
    receiver.wait_for_stdout(b"before\n");
    broker.kill();
    let server = HttpServer::start_at(broker.port());
    writeln!(writer, "meanwhile").unwrap();
    emitter.wait_for_stderr(FOREIGN, 1);
    receiver.wait_for_stderr(FOREIGN, 1);
    drop(server);
    broker.restart();
    drop(writer);
    emitter.wait().success();
    receiver.wait_for_stdout(b"before\nmeanwhile\n");
    receiver.stop().success();
}

#[test]
fn a_foreign_answer_in_the_middle_of_the_input_is_an_outage() {
    assert_tolerated(|tool| tool);
}

#[test]
fn with_a_spool_a_foreign_answer_is_an_outage() {
    let dir = tempfile::tempdir().unwrap();
    assert_tolerated(|tool| tool.arg("--spool").arg(dir.path().join("spool")));
}

#[test]
fn with_a_spool_the_first_answer_may_be_foreign() {
    let broker = Broker::start();
    broker.kill();
    let server = HttpServer::start_at(broker.port());
    let dir = tempfile::tempdir().unwrap();
    let spool = dir.path().join("spool");
    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().args(["-l", "-u", broker.url(), "--spool"]).arg(&spool);
    let emitter = emitter.stdin(reader).start();
    emitter.wait_for_stderr(FOREIGN, 1);
    writeln!(writer, "line").unwrap();
    drop(server);
    broker.restart();
    drop(writer);
    emitter.wait().success();
}

#[test]
fn foreign_answers_end_a_spool_after_the_input() {
    let server = HttpServer::start_at("0");
    let url = format!("amqp://{}", server.address);
    let dir = tempfile::tempdir().unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    writeln!(writer, "kept").unwrap();
    drop(writer);
    let emitter = emit_log().args(["-l", "-u", &url, "--retry", "500ms", "--spool"]);
    let ended = emitter.arg(dir.path().join("spool")).stdin(reader).run().exits_with(69);
    assert!(ended.stderr_text().contains("1 left in the spool"), "{ended:?}");
    assert!(ended.stderr_text().contains(FOREIGN), "{ended:?}");
}

#[test]
fn without_a_spool_a_foreign_first_answer_is_an_error() {
    let server = HttpServer::start_at("0");
    let url = format!("amqp://{}", server.address);
    for args in [&["hello"][..], &["-l"], &["-l", "--retry", "forever"]] {
        let ended = emit_log().args(["-u", &url]).args(args).run();
        ended.fails_with(76, &["log in to ", "an HTTP server answers"]);
    }
}
