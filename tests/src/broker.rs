//! The RabbitMQ node under test, and nodes that a test has to itself.

use std::env;
use std::ffi::OsStr;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use crate::{Ended, Tool, project, unique};

/// The URL of the broker to test on.
pub fn url() -> String {
    env::var("AMQP_URL")
        .expect("AMQP_URL names no broker: run ./scripts/test, or ./scripts/broker run cargo test")
}

/// The URL of the broker with other credentials or another vhost.
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

/// A RabbitMQ node of one test's own, for what other tests should not see.
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

    /// A node in the cluster of another.
    pub fn start_beside(other: &Broker) -> Broker {
        Broker::start_by(|tool| tool.args(["--join", &other.name]))
    }

    /// A node with options of `scripts/broker start`.
    pub fn start_by(options: impl FnOnce(Tool) -> Tool) -> Broker {
        let name = unique("test");
        let started = options(script("start", &name)).run().success();
        let url = started.stdout_text().trim_end().to_string();
        Broker { name, url }
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The port in its URL.
    pub fn port(&self) -> &str {
        let place = self.url.rsplit(':').next().expect("a port");
        place.split('/').next().expect("a port")
    }

    /// Kills it, and keeps its data.
    pub fn kill(&self) {
        script("kill", &self.name).run().success();
    }

    /// Brings what was declared to the disk. A broker that is killed right after a declaration may forget that:
    /// Mnesia writes its log later.
    pub fn sync(&self) {
        // Newer brokers have another database, which writes at once.
        self.ctl(["eval", "catch mnesia:sync_log()."]);
    }

    /// Starts it again, at the same address with the same data.
    pub fn restart(&self) {
        self.try_restart().success();
    }

    /// The same, where that may fail.
    pub fn try_restart(&self) -> Ended {
        script("start", &self.name).run()
    }

    /// What `scripts/broker status` says after this name, if anything.
    pub fn status(&self, name: &str) -> Option<String> {
        let status = script("status", &self.name).run().success().stdout_text();
        let mut lines = status.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(this, _)| *this == name).map(|(_, value)| value.to_string())
    }

    /// Stops its process (SIGSTOP): connections stay open, and nothing answers.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = self.status("pid").and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        let pid = pid.expect("a pid");
        kill_process(pid, signal).expect("a running broker");
    }

    /// `rabbitmqctl`.
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
