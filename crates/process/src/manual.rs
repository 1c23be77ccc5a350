//! The man page and shell completions of a tool, made from its options.
//!
//! `--generate man|bash|zsh|fish` prints them. Packages use it; it is hidden from help and completions.

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
    /// The exit statuses that do not mean the same in both tools; the others are added.
    pub statuses: &'static [(Status, &'static str)],
    /// The environment variables of this tool alone; the others are added.
    pub environment: Entries,
    /// Files that are read or written.
    pub files: Entries,
    /// Signals, and what they do.
    pub signals: Entries,
    /// Commands, and what they are for.
    pub examples: Entries,
    /// Other man pages.
    pub see_also: &'static str,
}

/// The exit statuses that mean the same in both tools.
const SHARED_STATUSES: [(Status, &str); 5] = [
    (Status::Usage, "The command line or the environment is wrong."),
    (
        Status::Protocol,
        "Not an AMQP 0-9-1 broker. Of several URIs, 76, 77 and 78 are only given where no node is merely down.",
    ),
    (Status::Permission, "Login refused, or a permission is missing."),
    (
        Status::Config,
        "The broker is set up otherwise than asked for (no such vhost, an exchange or a queue of another \
         type), or a certificate or the password file is not right.",
    ),
    (Status::Other, "Any other error."),
];

/// The environment variables that mean the same in both tools.
const SHARED_ENVIRONMENT: Entries = &[
    (
        "AMQP_URL",
        "The broker where --uri names none; several, separated by spaces, are the nodes of a cluster.",
    ),
    (
        "RUST_LOG",
        "What to say on stderr; goes before --quiet and --verbose: error, warn, info, debug or trace, for all or \
         for a module, such as amqp=trace. No level shows a password.",
    ),
    (
        "SSL_CERT_FILE, SSL_CERT_DIR",
        "With amqps://, authorities to trust in place of the system's, as for OpenSSL. --cacert goes first.",
    ),
];

/// Prints what the command line asks for, if that begins with `--generate`. Returns the exit status: 0, or
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

/// The argument as shells complete it: by one of its values, by a file where the value's name is FILE or
/// DIR, or not at all. Without a hint, they offer files for everything.
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

/// clap_complete does not escape double quotes in the help of a value, where they end the text.
fn single_quoted(value: PossibleValue) -> PossibleValue {
    match value.get_help().map(|help| help.to_string().replace('"', "'")) {
        Some(help) => value.help(help),
        None => value,
    }
}

fn man_page(command: Command, manual: &Manual) -> io::Result<Vec<u8>> {
    // clap_mangen leaves out the first line of an option's help where -h leaves out the option.
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
    // clap_mangen breaks the line before and after an empty line, of which mandoc warns.
    Ok(String::from_utf8_lossy(&text).replace("\n.br\n\n.br\n", "\n\n").into_bytes())
}

fn add_section<'a>(roff: &mut Roff, title: &str, entries: impl Iterator<Item = (String, &'a str)>) {
    roff.control("SH", [title]);
    for (term, meaning) in entries {
        roff.control("TP", []).text([bold(term)]).text([roman(meaning)]);
    }
}

/// The day in `SOURCE_DATE_EPOCH`, by which builds become reproducible, or none.
fn date() -> String {
    let seconds = env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse::<u64>().ok());
    let time = seconds.map(|seconds| time::format(i128::from(seconds) * 1000, Precision::Seconds));
    time.map(|text| text.chars().take_while(|character| *character != 'T').collect())
        .unwrap_or_default()
}
