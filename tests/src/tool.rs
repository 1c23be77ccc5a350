//! Programs that tests run, their output, and their end.

use std::env;
use std::ffi::OsStr;
use std::fmt::{self, Debug};
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memchr::memmem;
use rustix::process::{Pid, Signal, kill_process};

use crate::{BANNER, PATIENCE, SECRET, project, url, wait_until};

/// One of the two binaries, built with the profile of the tests.
pub fn binary(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let directory = BUILT.get_or_init(|| {
        let test = env::current_exe().expect("the test has a path");
        let profile = test.ancestors().nth(2).expect("target/PROFILE/deps/test").to_path_buf();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "emit-log", "-p", "receive-logs"]);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        // Variables that cargo sets for this test would make the build compile ring again.
        for (name, _) in env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
                build.env_remove(&*name);
            }
        }
        let built = build.current_dir(project()).status().expect("run cargo");
        assert!(built.success(), "cargo build: {built}");
        profile
    });
    directory.join(name)
}

/// `emit-log` with the node under test.
pub fn emit_log() -> Tool {
    Tool::new(binary("emit-log")).env("AMQP_URL", url())
}

/// `receive-logs` with the node under test.
pub fn receive_logs() -> Tool {
    Tool::new(binary("receive-logs")).env("AMQP_URL", url())
}

/// A Python with pika.
pub fn python() -> Tool {
    let python = project().join("target/venv/bin/python");
    assert!(python.exists(), "{python:?} is missing: run ./scripts/setup test");
    Tool::new(python).env("AMQP_URL", url())
}

/// A command in an environment without the settings of the caller.
pub struct Tool {
    command: Command,
    /// The destination of stderr; by default the test.
    stderr: Option<Stdio>,
}

impl Tool {
    /// A program to be run.
    pub fn new(program: impl AsRef<OsStr>) -> Tool {
        let mut command = Command::new(program);
        command.env_clear().stdin(Stdio::null());
        for name in ["PATH", "HOME", "LANG"] {
            if let Some(value) = env::var_os(name) {
                command.env(name, value);
            }
        }
        Tool { command, stderr: None }
    }

    /// Passes on the whole environment of the test.
    pub fn inherit_env(mut self) -> Tool {
        self.command.envs(env::vars_os());
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Tool {
        self.command.env(name, value);
        self
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Tool {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Tool {
        self.command.args(args);
        self
    }

    /// Sets standard input.
    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Tool {
        self.command.stdin(stdin);
        self
    }

    /// Redirects stdout.
    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Tool {
        self.command.stdout(stdout);
        self
    }

    /// Redirects stderr.
    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Tool {
        self.stderr = Some(stderr.into());
        self
    }

    /// Starts the program.
    pub fn start(self) -> Running {
        self.start_with(Some(Stdio::piped()))
    }

    /// Starts the program with the stdout that was set.
    pub fn start_redirected(self) -> Running {
        self.start_with(None)
    }

    fn start_with(mut self, stdout: Option<Stdio>) -> Running {
        if let Some(stdout) = stdout {
            self.command.stdout(stdout);
        }
        let shown = format!("{:?}", self.command);
        let started = Instant::now();
        self.command.stderr(self.stderr.unwrap_or_else(Stdio::piped));
        let mut child = self.command.spawn().expect(&shown);
        Running {
            stdout: child.stdout.take().map(Collected::start),
            stderr: child.stderr.take().map(Collected::start),
            started,
            shown,
            child,
        }
    }

    /// Runs the program until it exits.
    pub fn run(self) -> Ended {
        self.start().wait()
    }
}

/// Output that a thread reads while the process runs.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Collected {
    fn start(mut pipe: impl Read + Send + 'static) -> Collected {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&bytes);
        let reader = thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(length @ 1..) = pipe.read(&mut buffer) {
                shared.lock().expect("no panic").extend_from_slice(&buffer[..length]);
            }
        });
        Collected { bytes, reader }
    }

    fn so_far(&self) -> Vec<u8> {
        self.bytes.lock().expect("no panic").clone()
    }

    fn is_complete(&self) -> bool {
        self.reader.is_finished()
    }

    fn all(self) -> Vec<u8> {
        let Collected { bytes, reader } = self;
        reader.join().expect("no panic");
        let mut bytes = bytes.lock().expect("no panic");
        std::mem::take(&mut *bytes)
    }
}

/// A running process. Dropping it kills it.
pub struct Running {
    child: Child,
    stdout: Option<Collected>,
    stderr: Option<Collected>,
    started: Instant,
    shown: String,
}

impl Running {
    /// Waits for the banner of receive-logs.
    pub fn ready(mut self) -> Running {
        let what = format!("{} prints its banner", self.shown);
        wait_until(&what, || {
            // The banner may be read only after the receiver has exited, and with --no-follow an exit is no failure.
            // stderr is complete when its reader has ended.
            let complete = self.stderr.as_ref().is_none_or(Collected::is_complete);
            let status = self.child.try_wait().expect("wait");
            let waiting = self.stderr_so_far().contains(BANNER);
            if let Some(status) = status.filter(|_| complete && !waiting) {
                panic!("{}: {status}: {}", self.shown, self.stderr_so_far());
            }
            waiting
        });
        self
    }

    /// Waits until stdout is exactly `expected`.
    pub fn wait_for_stdout(&self, expected: &[u8]) {
        let start = Instant::now();
        while self.stdout_so_far() != expected {
            assert!(
                start.elapsed() < PATIENCE,
                "{}: expected {:?}, got {:?}",
                self.shown,
                String::from_utf8_lossy(expected),
                String::from_utf8_lossy(&self.stdout_so_far()),
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until stderr contains `text` this number of times.
    pub fn wait_for_stderr(&self, text: &str, times: usize) {
        let start = Instant::now();
        while self.stderr_so_far().matches(text).count() < times {
            let stderr = self.stderr_so_far();
            let in_time = start.elapsed() < 3 * PATIENCE;
            assert!(in_time, "{}: {times} times {text:?}, got {stderr}", self.shown);
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Kills the process (SIGKILL).
    pub fn kill(mut self) {
        self.child.kill().expect(&self.shown);
        self.child.wait().expect(&self.shown);
    }

    /// The command line that other users can see (Linux).
    pub fn command_line(&self) -> String {
        let bytes = fs::read(format!("/proc/{}/cmdline", self.id())).expect("a running process");
        String::from_utf8_lossy(&bytes).replace('\0', " ")
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process has not exited.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// The output on stdout so far.
    pub fn stdout_so_far(&self) -> Vec<u8> {
        self.stdout.as_ref().map(Collected::so_far).unwrap_or_default()
    }

    /// The output on stderr so far.
    pub fn stderr_so_far(&self) -> String {
        let bytes = self.stderr.as_ref().map(Collected::so_far).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect(&self.shown);
    }

    /// Stops a receiver (SIGTERM) and waits until it exits.
    pub fn stop(self) -> Ended {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// The peak memory of the process in bytes (Linux).
    pub fn peak_memory(&self) -> u64 {
        self.try_peak_memory().expect("a running process")
    }

    /// The same; `None` if the process has exited.
    pub fn try_peak_memory(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
        let kilobytes = line.split_whitespace().nth(1).expect("VmHWM: N kB");
        Some(1024 * kilobytes.parse::<u64>().expect("VmHWM: N kB"))
    }

    /// Waits until the process exits.
    ///
    /// # Panics
    ///
    /// When it does not exit within three times [`PATIENCE`].
    pub fn wait(mut self) -> Ended {
        let called = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                break status;
            }
            let so_far = self.stderr_so_far();
            assert!(called.elapsed() < 3 * PATIENCE, "{} does not end: {so_far}", self.shown);
            thread::sleep(Duration::from_millis(2));
        };
        let ended = Ended {
            elapsed: self.started.elapsed(),
            shown: self.shown.clone(),
            stdout: self.stdout.take().map(Collected::all).unwrap_or_default(),
            stderr: self.stderr.take().map(Collected::all).unwrap_or_default(),
            status,
        };
        let is_in = |output: &[u8]| memmem::find(output, SECRET.as_bytes()).is_some();
        assert!(!is_in(&ended.stdout) && !is_in(&ended.stderr), "a password: {ended:?}");
        ended
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The process may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that has exited.
pub struct Ended {
    /// The exit status.
    pub status: ExitStatus,
    /// The output on stdout.
    pub stdout: Vec<u8>,
    /// How long the process ran.
    pub elapsed: Duration,
    stderr: Vec<u8>,
    shown: String,
}

impl Ended {
    /// Asserts status 0.
    pub fn success(self) -> Ended {
        self.exits_with(0)
    }

    /// Asserts the exit status.
    pub fn exits_with(self, code: i32) -> Ended {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        self
    }

    /// Asserts the exit status, and that stderr is one line of `program` with all `parts` in it.
    pub fn fails_with(self, code: i32, parts: &[&str]) -> Ended {
        let ended = self.exits_with(code);
        let stderr = ended.stderr_text();
        assert_eq!(stderr.matches('\n').count(), 1, "one line: {ended:?}");
        for part in parts {
            assert!(stderr.contains(part), "{part:?}: {ended:?}");
        }
        ended
    }

    /// The signal that ended the process.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// stdout as text.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// stderr as text.
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

impl Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{}\n{} after {:?}", self.shown, self.status, self.elapsed)?;
        let stdout = self.stdout_text();
        writeln!(f, "--- stdout\n{}", stdout.chars().take(2000).collect::<String>())?;
        write!(f, "--- stderr\n{}", self.stderr_text())
    }
}
