//! The man page and shell completions of a tool, generated from its options.
//!
//! `--generate man|bash|zsh|fish` prints them, for packages. It is hidden from help and completions.

use std::env;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Arg, Command, CommandFactory, ValueHint};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::exit::{self, Failure, Status};
use crate::time::{self, Precision};

/// Terms and their meanings.
pub type Entries = &'static [(&'static str, &'static str)];

/// The sections of a man page besides the options.
pub struct Manual {
    /// The exit statuses that mean something else in the other tool. [`generate`] adds the shared ones.
    pub statuses: &'static [(Status, &'static str)],
    /// The environment variables of this tool alone. [`generate`] adds the shared ones.
    pub environment: Entries,
    /// The files that the tool reads or writes, and their content.
    pub files: Entries,
    /// Signals, and their effects.
    pub signals: Entries,
    /// Commands, and their purposes.
    pub examples: Entries,
    /// Other man pages.
    pub see_also: &'static str,
}

/// The exit statuses that mean the same in both tools.
const SHARED_STATUSES: [(Status, &str); 5] = [
    (Status::Usage, "The command line or the environment is wrong."),
    (
        Status::Protocol,
        "The peer is not an AMQP 0-9-1 broker. With several URIs, 76, 77 and 78 occur only if none of the nodes is down.",
    ),
    (Status::Permission, "Login refused, or a permission is missing."),
    (
        Status::Config,
        "The broker is not set up as the command line requires (no such vhost, an exchange or a queue of another \
         type), or the content of a certificate, a password file or another file is invalid.",
    ),
    (Status::Other, "Any other error."),
];

/// The environment variables that mean the same in both tools.
const SHARED_ENVIRONMENT: Entries = &[
    (
        "AMQP_URL",
        "The URI of the broker, if there is no --uri. Separate the nodes of a cluster by spaces.",
    ),
    (
        "RUST_LOG",
        "What to print on stderr, with precedence over --quiet and --verbose: error, warn, info, debug or trace, \
         for all modules or for one, such as amqp=trace. No level prints a password.",
    ),
    (
        "SSL_CERT_FILE, SSL_CERT_DIR",
        "With amqps://, authorities to trust instead of the system's, as for OpenSSL. --cacert has precedence.",
    ),
];

/// Prints the page or the completions if the command line begins with `--generate`. Returns the exit status: 0, or
/// [`Status::Usage`], or [`Status::Io`] when standard output cannot be written.
pub fn generate<C: CommandFactory>(manual: &Manual) -> Option<ExitCode> {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let (_, args) = args.split_first().filter(|(option, _)| *option == "--generate")?;
    let text = match args {
        [what] if what == "man" => man_page(C::command(), manual),
        [what] if what == "bash" => Ok(completions(C::command(), Shell::Bash)),
        [what] if what == "zsh" => Ok(completions(C::command(), Shell::Zsh)),
        [what] if what == "fish" => Ok(completions(C::command(), Shell::Fish)),
        _ => {
            let failure = Failure::new(Status::Usage, "--generate takes man, bash, zsh or fish");
            return Some(exit::report(C::command().get_name(), Err(failure.into())));
        }
    };
    let mut out = io::stdout();
    let written = text.and_then(|text| out.write_all(&text)).and_then(|()| out.flush());
    let outcome = match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::io("write to stdout", &error).into())
        }
        _ => Ok(()),
    };
    Some(exit::report(C::command().get_name(), outcome))
}

fn completions(command: Command, shell: Shell) -> Vec<u8> {
    let name = command.get_name().to_string();
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command.mut_args(for_shells), name, &mut text);
    text
}

/// Adds a completion to an argument: its values, or files if the name of its value is FILE or DIR, or nothing. Without
/// a hint, shells offer files for every argument.
fn for_shells(arg: Arg) -> Arg {
    if !arg.get_action().takes_values() {
        return arg;
    }
    let values = arg.get_possible_values();
    if !values.is_empty() {
        return arg.value_parser(PossibleValuesParser::new(values.into_iter().map(single_quoted)));
    }
    let hint = match arg.get_value_names() {
        Some([name]) if name == "FILE" => ValueHint::FilePath,
        Some([name]) if name == "DIR" => ValueHint::DirPath,
        _ => ValueHint::Other,
    };
    arg.value_hint(hint)
}

/// Replaces double quotes in the help of a value. clap_complete does not escape them, so they would end the text.
fn single_quoted(value: PossibleValue) -> PossibleValue {
    match value.get_help().map(|help| help.to_string().replace('"', "'")) {
        Some(help) => value.help(help),
        None => value,
    }
}

fn man_page(command: Command, manual: &Manual) -> io::Result<Vec<u8>> {
    // clap_mangen omits the first line of an option's help if -h hides the option.
    let command = command.mut_args(|arg| arg.hide_short_help(false));
    let page = Man::new(command).date(date()).manual("User Commands");
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;

    let mut statuses = [manual.statuses, &SHARED_STATUSES].concat();
    statuses.sort_by_key(|(status, _)| *status as u8);
    let statuses = statuses.iter().map(|(status, meaning)| ((*status as u8).to_string(), *meaning));
    let owned = |entries: Entries| entries.iter().map(|(term, text)| (term.to_string(), *text));
    let environment = owned(manual.environment).chain(owned(SHARED_ENVIRONMENT));
    let mut roff = Roff::new();
    add_section(&mut roff, "EXIT STATUS", statuses);
    add_section(&mut roff, "ENVIRONMENT", environment);
    add_section(&mut roff, "FILES", owned(manual.files));
    add_section(&mut roff, "SIGNALS", owned(manual.signals));
    add_section(&mut roff, "EXAMPLES", owned(manual.examples));
    roff.control("SH", ["SEE ALSO"]).text([roman(manual.see_also)]);
    roff.to_writer(&mut text)?;
    // clap_mangen breaks the line before and after an empty line, and mandoc warns about that.
    Ok(String::from_utf8_lossy(&text).replace("\n.br\n\n.br\n", "\n\n").into_bytes())
}

fn add_section<'a>(roff: &mut Roff, title: &str, entries: impl Iterator<Item = (String, &'a str)>) {
    roff.control("SH", [title]);
    for (term, meaning) in entries {
        roff.control("TP", []).text([bold(term)]).text([roman(meaning)]);
    }
}

/// The day in `SOURCE_DATE_EPOCH`, which makes builds reproducible, or an empty text.
fn date() -> String {
    let seconds = env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse::<u64>().ok());
    let time = seconds.map(|seconds| time::format(i128::from(seconds) * 1000, Precision::Seconds));
    time.map(|text| text.chars().take_while(|character| *character != 'T').collect())
        .unwrap_or_default()
}
