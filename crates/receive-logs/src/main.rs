//! The program. The library of the same name does the work.

mod manual;

use std::process::ExitCode;

use logs_process::args::parse;
use logs_process::{exit, logging, status};
use receive_logs::cli::Cli;

use crate::manual::MANUAL;

fn main() -> ExitCode {
    status::listen();
    if let Some(status) = logs_process::manual::generate::<Cli>(&MANUAL) {
        return status;
    }
    let cli: Cli = match parse() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    logging::init("receive-logs", &cli.verbosity);
    exit::report("receive-logs", receive_logs::run(&cli))
}
