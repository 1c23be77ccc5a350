//! Parses a command line. Errors carry tips and never repeat a password.

use std::env;
use std::ffi::OsString;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

use crate::exit::{self, Failure};

/// A command line with tips for users of other tools.
pub trait Tips: Parser {
    /// Arguments, as clap names them, and the tip if they are unknown or missing.
    const TIPS: &[(&[&str], &str)];
}

/// Represents any argument without a dash in [`Tips`].
pub const WORD: &str = "";

/// The tips of both tools.
const SHARED_TIPS: &[(&[&str], &str)] = &[(
    &["--host", "--server", "--broker", "--port", "--user", "--vhost", "-s", "-b", "-p"],
    "--uri has all of these: --uri amqp://user:password@host:port/vhost",
)];

/// Parses the command line of a tool.
///
/// # Errors
///
/// The exit status, after printing the help or the error: 0 or [`Io`](exit::Status::Io) for help,
/// [`Usage`](exit::Status::Usage) for an error. An argument with a password in the wrong place is printed without it.
pub fn parse<C: Tips>() -> Result<C, ExitCode> {
    C::try_parse().map_err(|mut error| {
        if !error.use_stderr() {
            return exit::report(C::command().get_name(), print_help(&error));
        }
        if let Some(option) = option_without_utf8::<C>(&error, &env::args_os().collect::<Vec<_>>())
        {
            error = C::command().error(error.kind(), format!("the value of {option} is not UTF-8"));
        }
        redact(&mut error);
        add_tip::<C>(&mut error);
        // If stderr cannot be written, there is no other place to report that.
        let _ = error.print();
        ExitCode::from(error.exit_code() as u8)
    })
}

/// The option whose value is not UTF-8. clap's error does not name it.
fn option_without_utf8<C: Parser>(error: &clap::Error, args: &[OsString]) -> Option<String> {
    let is_wrong = |error: &clap::Error| error.kind() == clap::error::ErrorKind::InvalidUtf8;
    if !is_wrong(error) {
        return None;
    }
    let lossy: Vec<_> = args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
    // Words and paths may have any bytes, so each argument is tested while the others are converted to UTF-8.
    let place = (1..args.len()).find(|&place| {
        let mut alone: Vec<_> = lossy.iter().map(OsString::from).collect();
        alone[place].clone_from(&args[place]);
        C::try_parse_from(alone).is_err_and(|error| is_wrong(&error))
    })?;
    let option = match &lossy[place] {
        long if long.starts_with("--") => long.split('=').next()?,
        short if short.starts_with('-') => short.get(..2)?,
        _ => &lossy[place - 1],
    };
    Some(option.into())
}

/// Replaces clap's suggestions with the tip for the argument, if there is one.
fn add_tip<C: Tips>(error: &mut clap::Error) {
    let argument = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(argument)) => argument.as_str(),
        Some(ContextValue::Strings(arguments)) => arguments.first().map_or("", String::as_str),
        _ => return,
    };
    let argument = if argument.starts_with('-') { argument } else { WORD };
    let mut tips = C::TIPS.iter().chain(SHARED_TIPS);
    let Some((_, tip)) = tips.find(|(arguments, _)| arguments.contains(&argument)) else { return };
    error.remove(ContextKind::SuggestedArg);
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![(*tip).into()]));
}

/// Prints the help or the version, which clap returns as an error.
fn print_help(help: &clap::Error) -> anyhow::Result<()> {
    match help.print().and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io("write to stdout", &error).into())
        }
        _ => Ok(()),
    }
}

/// Removes possible passwords from the arguments that an error repeats.
fn redact(error: &mut clap::Error) {
    let has_login = |(_, value): &(_, &ContextValue)| value.to_string().contains('@');
    let suspects: Vec<_> = error.context().filter(has_login).map(|(kind, _)| kind).collect();
    for kind in suspects {
        // Other strings are suggestions that repeat the argument.
        if let Some(ContextValue::String(argument)) = error.remove(kind) {
            error.insert(kind, ContextValue::String(without_login(&argument)));
        }
    }
}

/// Replaces the text before its last `@`, except the scheme, with `***`. A password may contain `@`.
fn without_login(text: &str) -> String {
    let end = text.rfind('@').unwrap_or(0);
    let start = text[..end].find("://").map_or(0, |scheme| scheme + 3);
    format!("{}***{}", &text[..start], &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[arg(long, value_parser = humantime::parse_duration)]
        retry: Option<std::time::Duration>,
        #[arg(short)]
        uri: Option<String>,
    }

    #[test]
    fn a_password_in_a_wrong_place_is_not_repeated() {
        for (args, printed) in [
            (&["amqp://u:my s3c@r3t@h/v"][..], "'amqp://***@h/v'"),
            (&["u:s3cr3t@h:5672"], "'***@h:5672'"),
            (&["--secret=u:s3cr3t@h"], "'--secret'"),
            (&["-u:s3cr3t@h", "-s3cr3t@h"], "'-s'"),
            (&["--retry", "u:s3cr3t@h"], "'***@h'"),
        ] {
            let mut error = Cli::try_parse_from([&["test"], args].concat()).err().unwrap();
            redact(&mut error);
            let text = error.to_string();
            assert!(!text.contains("s3c") && text.contains(printed), "{text}");
        }
    }
}
