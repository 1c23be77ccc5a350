//! Counts of a program in the text format of Prometheus, in a file that is replaced at intervals.
//!
//! The format: <https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>

use std::fmt::{Display, Write};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::background::{Ticks, every};
use crate::exit::Failure;
use crate::replace::Replacement;
use crate::time::now_millis;

/// The time between two versions of the file.
const INTERVAL: Duration = Duration::from_secs(10);

/// The metrics at one time.
pub struct Metrics {
    /// The name of the program with `_`.
    prefix: String,
    /// The value of the label `name`, escaped.
    name: String,
    text: String,
}

impl Metrics {
    fn new(program: &str, path: &Path) -> Metrics {
        // A collector reads the files of several processes, so their metrics must differ in a label.
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let name = stem.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
        Metrics { prefix: program.replace('-', "_"), name, text: String::new() }
    }

    /// Adds a count that only grows. Its `name` ends in `_total`.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.add("counter", name, help, value);
    }

    /// Adds a number that can fall.
    pub fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.add("gauge", name, help, value);
    }

    /// Adds a time, in seconds since 1970. Its `name` ends in `_timestamp_seconds`.
    pub fn time(&mut self, name: &str, help: &str, millis: u64) {
        self.gauge(name, help, millis as f64 / 1000.0);
    }

    fn add(&mut self, kind: &str, name: &str, help: &str, value: impl Display) {
        let Metrics { prefix, name: label, text } = self;
        // Writing to a string does not fail.
        let _ = writeln!(text, "# HELP {prefix}_{name} {help}");
        let _ = writeln!(text, "# TYPE {prefix}_{name} {kind}");
        let _ = writeln!(text, "{prefix}_{name}{{name=\"{label}\"}} {value}");
    }
}

/// A file with the metrics of this process. Dropping it writes them a last time.
#[must_use = "dropping this value ends the updates"]
pub struct MetricsFile {
    ticks: Ticks,
    update: Arc<dyn Fn() + Send + Sync>,
}

impl MetricsFile {
    /// Writes the metrics that `describe` adds, now and every ten seconds. A later error is logged once, until a write
    /// succeeds.
    ///
    /// # Errors
    ///
    /// When the file cannot be written, or the system has no thread left.
    pub fn start(
        program: &'static str,
        path: &Path,
        describe: impl Fn(&mut Metrics) + Send + Sync + 'static,
    ) -> Result<MetricsFile, Failure> {
        let (path, begun_at) = (PathBuf::from(path), now_millis());
        let write = move || {
            let mut metrics = Metrics::new(program, &path);
            metrics.time("start_timestamp_seconds", "When the process started.", begun_at);
            describe(&mut metrics);
            replace(&path, &metrics.text)
                .map_err(|error| Failure::io(format!("write metrics file {path:?}"), &error))
        };
        write()?;
        let is_failing = AtomicBool::new(false);
        let update: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            let outcome = write();
            if is_failing.swap(outcome.is_err(), Ordering::Relaxed) {
                return;
            }
            if let Err(failure) = outcome {
                log::warn!("{failure}");
            }
        });
        let tick = Arc::clone(&update);
        let ticks = every(INTERVAL, move || tick());
        let ticks = ticks.map_err(|error| Failure::io("start a thread", &error))?;
        Ok(MetricsFile { ticks, update })
    }
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        self.ticks.stop();
        (self.update)();
    }
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut new = Replacement::create(path, ".new", 0o666)?;
    new.file.write_all(text.as_bytes())?;
    new.finish().map(drop)
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::fs;
    use std::process;
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn the_file_has_the_values_of_the_start_and_of_the_end() {
        let directory = env::temp_dir().join(format!("metrics-{}", process::id()));
        fs::create_dir(&directory).unwrap();
        let path = directory.join("a\"b.prom");
        let count = Arc::new(AtomicU64::new(1));
        let counted = Arc::clone(&count);
        let describe = move |metrics: &mut Metrics| {
            let value = counted.load(Ordering::Relaxed);
            metrics.counter("records_total", "Records.", value);
            metrics.time("last_timestamp_seconds", "The last.", 1_700_000_000_250);
        };
        let file = MetricsFile::start("a-b", &path, describe).unwrap();
        let content = |count: u64| {
            format!(
                "# HELP a_b_records_total Records.\n\
                 # TYPE a_b_records_total counter\n\
                 a_b_records_total{{name=\"a\\\"b\"}} {count}\n\
                 # HELP a_b_last_timestamp_seconds The last.\n\
                 # TYPE a_b_last_timestamp_seconds gauge\n\
                 a_b_last_timestamp_seconds{{name=\"a\\\"b\"}} 1700000000.25\n"
            )
        };
        let read = || {
            let text = fs::read_to_string(&path).unwrap();
            text.lines().skip(3).flat_map(|line| [line, "\n"]).collect::<String>()
        };
        assert_eq!(read(), content(1));
        count.store(2, Ordering::Relaxed);
        drop(file);
        assert_eq!(read(), content(2));
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error_at_the_start() {
        let failure = MetricsFile::start("a-b", Path::new("/nonexistent/a.prom"), |_| {}).err();
        let text =
            "write metrics file \"/nonexistent/a.prom\": No such file or directory (os error 2)";
        assert_eq!(failure.unwrap().to_string(), text);
    }
}
