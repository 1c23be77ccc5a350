//! The RabbitMQ node under test, and nodes for a single test.

use std::env;
use std::ffi::OsStr;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use crate::{Ended, Tool, project, unique};

/// The URL of the node under test.
pub fn url() -> String {
    env::var("AMQP_URL")
        .expect("AMQP_URL names no broker: run ./scripts/test, or ./scripts/broker run cargo test")
}

/// The URL of the node under test with other credentials or another vhost.
pub fn url_with(user: &str, password: &str, vhost: &str) -> String {
    let url = url();
    let (_, place) = url.split_once('@').expect("credentials in AMQP_URL");
    let (address, _) = place.split_once('/').expect("a vhost in AMQP_URL");
    format!("amqp://{user}:{password}@{address}/{vhost}")
}

/// `rabbitmqctl` on the node under test.
pub fn rabbitmqctl<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> String {
    let ctl = Tool::new(project().join("scripts/broker")).inherit_env();
    ctl.args(["ctl", "-q"]).args(args).run().success().stdout_text()
}

/// A RabbitMQ node for a single test, for changes that would disturb other tests.
pub struct Broker {
    name: String,
    url: String,
}

impl Broker {
    /// A node with the default configuration.
    pub fn start() -> Broker {
        Broker::start_by(|tool| tool)
    }

    /// A node with lines added to its rabbitmq.conf.
    pub fn start_with(config: &Path) -> Broker {
        Broker::start_by(|tool| tool.arg("--config").arg(config))
    }

    /// A node in the cluster of `other`.
    pub fn start_beside(other: &Broker) -> Broker {
        Broker::start_by(|tool| tool.args(["--join", &other.name]))
    }

    /// A node started by `scripts/broker start` with `options`.
    pub fn start_by(options: impl FnOnce(Tool) -> Tool) -> Broker {
        let name = unique("test");
        let started = options(script("start", &name)).run().success();
        let url = started.stdout_text().trim_end().to_string();
        Broker { name, url }
    }

    /// The URL of the node.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The port of the node.
    pub fn port(&self) -> &str {
        let place = self.url.rsplit(':').next().expect("a port");
        place.split('/').next().expect("a port")
    }

    /// Kills the node. Its data remains.
    pub fn kill(&self) {
        script("kill", &self.name).run().success();
    }

    /// Writes the log of Mnesia to the disk. Mnesia does so only later, so a broker that is killed right after a
    /// declaration may lose it.
    pub fn sync(&self) {
        // Newer brokers have another database, which writes at once.
        self.ctl(["eval", "catch mnesia:sync_log()."]);
    }

    /// Starts the node again, at the same address and with the same data.
    pub fn restart(&self) {
        self.try_restart().success();
    }

    /// The same, if the start may fail.
    pub fn try_restart(&self) -> Ended {
        script("start", &self.name).run()
    }

    /// The value of `name` in the output of `scripts/broker status`.
    pub fn status(&self, name: &str) -> Option<String> {
        let status = script("status", &self.name).run().success().stdout_text();
        let mut lines = status.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(this, _)| *this == name).map(|(_, value)| value.to_string())
    }

    /// Stops the process of the node (SIGSTOP): connections stay open, and get no answer.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Continues the process of the node (SIGCONT).
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = self.status("pid").and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        let pid = pid.expect("a pid");
        kill_process(pid, signal).expect("a running broker");
    }

    /// `rabbitmqctl` on this node.
    pub fn ctl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        script("ctl", &self.name).arg("-q").args(args).run().success().stdout_text()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        script("stop", &self.name).run();
    }
}

fn script(action: &str, name: &str) -> Tool {
    Tool::new(project().join("scripts/broker")).inherit_env().args([action, "--name", name])
}
