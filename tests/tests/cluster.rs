//! A cluster of three nodes: the loss of any node.

use std::collections::BTreeMap;
use std::io::Write;
use std::ptr;
use std::time::Duration;

use logs_tests::{Broker, Running, TempFile, emit_log, receive_logs, wait_until};

const AGAIN: &str = " [!] Subscribed again after ";

/// Three nodes. Each client has the URLs of all of them.
struct Cluster {
    nodes: Vec<Broker>,
}

impl Cluster {
    fn start() -> Cluster {
        let first = Broker::start();
        let others = [(); 2].map(|()| Broker::start_beside(&first));
        // The nodes are dropped in this order, because all of them use the epmd of the first one.
        Cluster { nodes: others.into_iter().chain([first]).collect() }
    }

    fn urls(&self) -> String {
        self.nodes.iter().map(Broker::url).collect::<Vec<_>>().join(" ")
    }

    /// The nodes that these clients are connected to.
    fn nodes_of(&self, clients: &[&Running]) -> Vec<&Broker> {
        let mut nodes = None;
        wait_until("the clients are connected", || {
            let list = self.nodes[0].ctl(["list_connections", "port", "client_properties"]);
            let node_of = |client: &&Running| {
                let name = format!(":{})", client.id());
                let line = list.lines().find(|line| line.contains(&name))?;
                let port = line.split('\t').next()?;
                self.nodes.iter().find(|node| node.port() == port)
            };
            nodes = clients.iter().map(node_of).collect();
            nodes.is_some()
        });
        nodes.expect("the clients are connected")
    }

    /// Kills the node of the emitter, checks the receivers, and starts the node again.
    fn lose_the_node_of(&self, emitter: &Running, receivers: &[Running]) {
        let clients: Vec<_> = [emitter].into_iter().chain(receivers).collect();
        let nodes = self.nodes_of(&clients);
        let node = nodes[0];
        let mut there = Vec::new();
        let mut elsewhere = Vec::new();
        for (receiver, its_node) in receivers.iter().zip(&nodes[1..]) {
            let group = if ptr::eq(*its_node, node) { &mut there } else { &mut elsewhere };
            group.push(receiver);
        }
        let times = |receivers: &[&Running]| -> Vec<usize> {
            receivers.iter().map(|receiver| absences(receiver).len()).collect()
        };
        let (before, undisturbed) = (times(&there), times(&elsewhere));
        node.kill();
        for (receiver, before) in there.iter().zip(before) {
            receiver.wait_for_stderr(AGAIN, before + 1);
            let away = absences(receiver)[before];
            assert!(away < Duration::from_secs(5), "{away:?}");
        }
        node.restart();
        assert_eq!(times(&elsewhere), undisturbed);
    }
}

/// The durations of the outages that a receiver reports.
fn absences(receiver: &Running) -> Vec<Duration> {
    let stderr = receiver.stderr_so_far();
    let said = stderr.lines().filter_map(|line| line.strip_prefix(AGAIN));
    let times = said.map(|rest| rest.split(" s;").next().unwrap().parse().unwrap());
    times.map(Duration::from_secs_f64).collect()
}

#[test]
fn a_lost_node_loses_no_line() {
    const LINES: u64 = 40_000;
    let cluster = Cluster::start();
    let receive = || receive_logs().env("AMQP_URL", cluster.urls()).args(["-r", "--durable"]);
    // This run declares and binds the queue, which then keeps later messages.
    let all = || receive().args(["--queue", "all"]);
    all().args(["--idle-timeout", "1ms"]).run().success();
    let receivers: Vec<_> = (0..6).map(|_| receive().start().ready()).collect();

    let (reader, mut writer) = std::io::pipe().unwrap();
    let emitter = emit_log().env("AMQP_URL", cluster.urls()).args(["-l", "--durable"]);
    let emitter = emitter.stdin(reader).start();
    for part in 0..3 {
        for number in part * LINES / 3 + 1..=(part + 1) * LINES / 3 {
            writeln!(writer, "line {number}").unwrap();
        }
        if part < 2 {
            cluster.lose_the_node_of(&emitter, &receivers);
        }
    }
    drop(writer);
    let ended = emitter.wait().success();
    assert!(ended.stderr_text().matches(" again; ").count() >= 2, "{ended:?}");
    drop(receivers);

    let file = TempFile::new("all.log");
    all().args(["--idle-timeout", "3s", "-o"]).arg(file.path()).run().success();
    let mut seen = BTreeMap::<u64, u32>::new();
    for line in String::from_utf8(file.read().unwrap()).unwrap().lines() {
        *seen.entry(line.strip_prefix("line ").unwrap().parse().unwrap()).or_default() += 1;
    }
    let missing: Vec<_> = (1..=LINES).filter(|number| !seen.contains_key(number)).collect();
    assert!(missing.is_empty(), "{} lost, from {:?}", missing.len(), missing.first());
}
