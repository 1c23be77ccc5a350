//! The `log` macros, printed as notes on stderr without passwords.

use std::fmt::Display;
use std::io::Write;
use std::panic;

use env_logger::Target;
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::escape::one_line;
use crate::notes::{Notes, note};
use crate::verbosity::Verbosity;

/// Libraries that log only if `RUST_LOG` names them (`RUST_LOG=mio=debug`). They return their errors.
const LIBRARIES: [&str; 4] = ["amiquip", "mio", "rustls", "rustls_platform_verifier"];

/// Sets up the `log` macros to write lines `program: text` to stderr, at the level of `verbosity` or of the environment
/// variable `RUST_LOG`, and silences the panics of amiquip that crate `amqp` turns into errors.
pub fn init(program: &'static str, verbosity: &Verbosity) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(verbosity.level());
    for library in LIBRARIES {
        builder.filter_module(library, LevelFilter::Off);
    }
    builder.parse_default_env();
    builder.format(move |out, record| {
        let text = one_line(&record.args().to_string());
        match record.level() {
            Level::Info | Level::Warn => writeln!(out, "{program}: {text}"),
            level => writeln!(out, "{program}: [{level} {}] {text}", record.target()),
        }
    });
    builder.target(Target::Pipe(Box::new(Notes)));
    let logger = Redacted(builder.build());
    log::set_max_level(logger.0.filter());
    // Fails only if a logger is already set.
    let _ = log::set_boxed_logger(Box::new(logger));

    let default_hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if amqp::is_expected_panic() {
            log::debug!("{info}");
        } else {
            default_hook(info);
        }
    }));
}

/// Writes ` [!] text` to stderr, even with --quiet: an alert is about messages that may be lost.
pub fn alert(text: impl Display) {
    note(format_args!(" [!] {text}"));
}

/// A logger without amiquip's debug messages: they show the password.
struct Redacted(env_logger::Logger);

fn may_hold_a_password(metadata: &Metadata<'_>) -> bool {
    metadata.level() > Level::Info && metadata.target().starts_with("amiquip")
}

impl Log for Redacted {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        !may_hold_a_password(metadata) && self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !may_hold_a_password(record.metadata()) {
            self.0.log(record);
        }
    }

    fn flush(&self) {
        self.0.flush();
    }
}
