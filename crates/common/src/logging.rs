//! Notes on stderr, and what must never get there.

use std::fmt::Display;
use std::io::{self, Write};
use std::panic;
use std::thread;

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::cli::Verbosity;
use crate::exit::one_line;

/// The thread in which amiquip runs a connection.
const IO_THREAD: &str = "amiquip-io";

/// Sets up the `log` macros to write lines `program: text` to stderr, as many as `verbosity` or
/// the environment variable `RUST_LOG` ask for, and silences panics of amiquip's I/O thread,
/// which its caller sees as a lost connection.
pub fn init(program: &'static str, verbosity: &Verbosity) {
    let mut builder = env_logger::Builder::new();
    let own = verbosity.level();
    builder.filter_level(own.min(LevelFilter::Info));
    // What these say of an error comes with the error.
    builder.filter_module("amiquip", LevelFilter::Off).filter_module("rustls", LevelFilter::Off);
    for module in ["logs_common", "emit_log", "receive_logs"] {
        builder.filter_module(module, own);
    }
    if own > LevelFilter::Warn {
        builder.filter_module("amiquip", LevelFilter::Info);
    }
    builder.parse_default_env();
    builder.format(move |out, record| {
        let text = one_line(&record.args().to_string());
        match record.level() {
            Level::Info | Level::Warn => writeln!(out, "{program}: {text}"),
            level => writeln!(out, "{program}: [{level} {}] {text}", record.target()),
        }
    });
    let logger = Redacted(builder.build());
    log::set_max_level(logger.0.filter());
    // Fails only where a logger is set already; then that one serves.
    let _ = log::set_boxed_logger(Box::new(logger));

    let default_hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if thread::current().name() == Some(IO_THREAD) {
            log::debug!("{info}");
        } else {
            default_hook(info);
        }
    }));
}

/// Writes ` [!] text` to stderr, whatever the verbosity: it is about messages that may be lost.
pub fn alert(text: impl Display) {
    // Nobody is left to tell if stderr cannot be written.
    let _ = writeln!(io::stderr(), " [!] {}", one_line(&text.to_string()));
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
