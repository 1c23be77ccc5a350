//! `scripts/broker`: the private nodes of the tests.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::thread;

use logs_tests::Broker;

#[test]
fn plugins_listen_on_loopback_only() {
    let plugins =
        "rabbitmq_stream_management,rabbitmq_prometheus,rabbitmq_web_mqtt,rabbitmq_web_stomp";
    let broker = Broker::start_by(|tool| tool.args(["--plugins", plugins]));
    let sockets = broker.ctl([
        "eval",
        "[inet:sockname(P) || P <- erlang:ports(), erlang:port_info(P, name) =:= {name, \"tcp_inet\"}].",
    ]);
    assert!(!sockets.contains("{0,0,0,0"), "{sockets}");
    for plugin in ["management", "prometheus", "stream", "mqtt", "web_mqtt", "stomp", "web_stomp"] {
        let address = broker.status(plugin).unwrap_or_else(|| panic!("{plugin} has no address"));
        assert!(address.starts_with("127.0.0.1:"), "{address}");
        TcpStream::connect(&address).unwrap();
    }
}

#[test]
fn a_port_that_another_process_has_taken_is_named() {
    let broker = Broker::start();
    assert_eq!(broker.status("management"), None);
    broker.kill();
    let address = format!("127.0.0.1:{}", broker.port());
    let listener = TcpListener::bind(&address).unwrap();
    let other = listener.try_clone().unwrap();
    // The port answers, as that of another broker would.
    let answer = move || other.incoming().flatten().try_for_each(|mut it| it.write_all(b"AMQP"));
    thread::spawn(answer);
    let taken = format!("port {} of node '", broker.port());
    broker.try_restart().fails_with(1, &[&taken, "is taken by another process", "broker stop"]);
}
