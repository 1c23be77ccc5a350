//! The command line of `emit-log`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use amqp::{Properties, Table, Value, check_length};
use bytesize::ByteSize;
use clap::Parser;
use logs_common::wire::HOST;
use logs_common::{ConnectionArgs, ExchangeArgs};
use logs_process::args::Tips;
use logs_process::verbosity::Verbosity;
use logs_process::{Failure, Status};
use rustix::system::uname;

use crate::packer::Batch;
use crate::spool::WhenFull;

const PERSISTENT: u8 = 2;

/// Bytes of headers. All properties of a message go into a single frame, of 128 KiB by default.
const MAX_HEADERS: usize = 64 * 1024;

/// With --spool: how long a line may wait for others. It is in memory only, which is promised for 100 ms at most.
const LONGEST_LINGER: Duration = Duration::from_millis(50);

/// Publish log messages to every running receive-logs, through RabbitMQ
///
/// The words are joined by one space. With --lines, each line of standard input is a message. Exit
/// status 0 means that the broker has confirmed every message.
///
/// Without words, or with a single "-", the message is "info: Hello World!". But bytes in standard
/// input (a file before its end, a pipe or a socket that holds some) mean that --lines is missing, which
/// is status 2: nothing is sent if they are there at the start or when the message is about to be sent,
/// and "message sent, but ..." is said if they are there once it is confirmed. emit-log waits for no writer,
/// as a slow one cannot be told from one that never writes; where stderr is a terminal, a note says
/// that a pipe still open was not read. With words, standard input is left alone.
#[derive(Debug, Parser)]
#[command(version, override_usage = USAGE, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// Message; its bytes are published as they are
    #[arg(value_name = "MESSAGE")]
    words: Vec<OsString>,

    /// Publish each line of standard input, the moment it is complete; not with words
    #[arg(short, long)]
    pub lines: bool,

    /// Records of standard input end in NUL instead of newline
    #[arg(short = '0', long, requires = "lines")]
    null: bool,

    /// Pack lines into shared messages of up to 64 KiB; receive-logs takes them apart again
    ///
    /// Lines that are read together share a message. While the broker has not confirmed an earlier
    /// message, a line waits up to 5ms for more lines. Otherwise it is sent at once.
    #[arg(long, requires = "lines")]
    batch: bool,

    /// With --batch: how long each line waits for others to share its message, such as 20ms
    ///
    /// Fewer messages cost less at every receiver. Each line is delayed by up to this time (50ms at
    /// most with --spool), even if no earlier message is unconfirmed. 0s: lines do not wait.
    #[arg(long, value_name = "DURATION", requires = "batch")]
    #[arg(value_parser = humantime::parse_duration, hide_short_help = true)]
    linger: Option<Duration>,

    /// Leave out empty lines
    #[arg(long, requires = "lines", hide_short_help = true)]
    pub skip_empty: bool,

    /// Largest record of standard input
    #[arg(long, value_name = "SIZE", requires = "lines", default_value = "16MiB")]
    #[arg(value_parser = record_size, hide_short_help = true)]
    pub max_record: ByteSize,

    /// Never let the producer wait for a broker: a line that is read is confirmed, on disk in DIR, or
    /// counted as dropped
    ///
    /// What the broker does not confirm within 100 ms, and all lines while there is no broker, are
    /// written to DIR; a kill takes no line that was read earlier. A later run with the same DIR
    /// sends first what an earlier one has left, in order, under the same numbers, so that receivers
    /// repeat nothing. Then --retry counts from the end of the input: what is left then stays in DIR.
    #[arg(long, value_name = "DIR", requires = "lines", conflicts_with = "no_confirm")]
    pub spool: Option<PathBuf>,

    /// Largest size of the spool
    #[arg(long, value_name = "SIZE", requires = "spool", default_value = "1GiB")]
    #[arg(value_parser = spool_size, hide_short_help = true)]
    pub spool_size: ByteSize,

    /// What to do with a line that finds the spool full
    #[arg(long, value_enum, value_name = "POLICY", requires = "spool", default_value = "block")]
    #[arg(hide_short_help = true)]
    pub when_full: WhenFull,

    /// Fail with status 67 if no receiver's queue takes a message
    ///
    /// A stream takes every message, whether anybody reads the stream or not.
    #[arg(short, long)]
    pub mandatory: bool,

    /// Do not wait for the broker's confirmation
    #[arg(long)]
    pub no_confirm: bool,

    /// Add a header, as "Name: value"; repeatable
    #[arg(short = 'H', long = "header", value_name = "HEADER", value_parser = header)]
    headers: Vec<(String, String)>,

    /// Set the property content_type, such as text/plain
    #[arg(long, value_name = "TYPE", value_parser = short_string)]
    content_type: Option<String>,

    /// Set the property app_id
    #[arg(long, value_name = "ID", value_parser = short_string)]
    app_id: Option<String>,

    /// Say who sends: short for --app-id NAME and, unless -H sets it, a header "Host" with the name of
    /// this machine
    #[arg(short, long, value_name = "NAME", value_parser = short_string, conflicts_with = "app_id")]
    tag: Option<String>,

    #[command(flatten)]
    pub verbosity: Verbosity,

    #[command(flatten)]
    pub exchange: ExchangeArgs,

    #[command(flatten)]
    pub connection: ConnectionArgs,
}

const USAGE: &str = "\
emit-log [OPTIONS] [MESSAGE]...
       emit-log [OPTIONS] --lines < FILE";

const EXAMPLES: &str = "\
Examples:
  emit-log \"warning: disk is 91 % full\"
  app 2>&1 | emit-log --lines
  app 2>&1 | emit-log --lines --spool /var/spool/app-logs
  emit-log -m \"error: nobody may miss this\" || page-somebody
  emit-log -u amqp://app:secret@broker.example.com/logs info: started

Exit status: 0 all confirmed; 2 wrong usage; 65 too large; 67 nobody listens
(-m); 69 no broker (with --spool: records are left in DIR, or were dropped);
74 input or output; 76 not AMQP; 77 login or permission; 78 configuration;
1 anything else.";

impl Tips for Cli {
    const TIPS: &[(&[&str], &str)] = &[
        (&["-f", "--file", "-F"], "--lines publishes each line of a file: emit-log --lines < FILE"),
        (&["--tail", "--follow"], "--lines goes on for ever: tail -F FILE | emit-log --lines"),
        (&["--stdin", "-i"], "--lines publishes each line of standard input"),
        (
            &["--severity", "--level", "--priority"],
            "the message says how severe it is: emit-log \"error: disk is full\"",
        ),
        (&["--json"], "any text is a message; --content-type application/json says what it is"),
    ];
}

impl Cli {
    /// The words of the message; `-` stands for standard input by habit, and for no word here.
    pub fn words(&self) -> &[OsString] {
        match self.words.as_slice() {
            [word] if word == "-" => &[],
            words => words,
        }
    }

    /// Which lines share a message.
    pub fn batch(&self) -> Batch {
        match self.linger {
            _ if !self.batch => Batch::Off,
            None => Batch::WhileUnconfirmed,
            Some(linger) if self.spool.is_some() => Batch::Within(linger.min(LONGEST_LINGER)),
            Some(linger) => Batch::Within(linger),
        }
    }

    /// The byte that ends a record of standard input.
    pub fn separator(&self) -> u8 {
        if self.null { b'\0' } else { b'\n' }
    }

    /// The properties of each message.
    ///
    /// # Errors
    ///
    /// [`Status::Usage`] when the headers are too large for a frame.
    pub fn properties(&self) -> Result<Properties, Failure> {
        let length = |(name, value): &(String, String)| name.len() + value.len();
        if self.headers.iter().map(length).sum::<usize>() > MAX_HEADERS {
            let text = "--header: more than 64 KiB of headers";
            return Err(Failure::new(Status::Usage, text));
        }
        let mut properties = Properties::default();
        if self.exchange.durable {
            properties = properties.with_delivery_mode(PERSISTENT);
        }
        if let Some(content_type) = &self.content_type {
            properties = properties.with_content_type(content_type.clone());
        }
        if let Some(app_id) = self.app_id.as_ref().or(self.tag.as_ref()) {
            properties = properties.with_app_id(app_id.clone());
        }
        let mut table = Table::new();
        if self.tag.is_some() {
            let host = uname().nodename().to_string_lossy().into_owned();
            table.insert(HOST.into(), Value::LongString(host));
        }
        for (name, value) in &self.headers {
            table.insert(name.clone(), Value::LongString(value.clone()));
        }
        if !table.is_empty() {
            properties = properties.with_headers(table);
        }
        Ok(properties)
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("write it as \"Name: value\"")?;
    if name.is_empty() {
        return Err("the name is empty".into());
    }
    check_length(name, "name")?;
    Ok((name.into(), value.trim_start().into()))
}

fn record_size(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(size) if size > ByteSize::gib(1) => Err("larger than any broker accepts".into()),
        Ok(size) if size > ByteSize::b(0) => Ok(size),
        _ => Err("write it as 500KB, 16MiB or 1GiB".into()),
    }
}

fn spool_size(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(size) if size >= ByteSize::mib(1) => Ok(size),
        Ok(_) => Err("smaller than 1MiB".into()),
        Err(_) => Err("write it as 64MiB or 1GiB".into()),
    }
}

fn short_string(text: &str) -> Result<String, String> {
    check_length(text, "value")?;
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn headers() {
        assert_eq!(header("Host: web1:80"), Ok(("Host".into(), "web1:80".into())));
        assert_eq!(header("Empty:"), Ok(("Empty".into(), "".into())));
        assert!(header("no colon").is_err());
        assert!(header(": no name").is_err());
        assert!(header(&format!("{}: long", "n".repeat(256))).is_err());
    }

    fn properties(args: &[&str]) -> Result<Properties, Failure> {
        Cli::parse_from([&["emit-log"], args].concat()).properties()
    }

    #[test]
    fn properties_are_those_of_the_options() {
        let none = properties(&[]).unwrap();
        assert_eq!((none.delivery_mode(), none.headers()), (&None, &None));
        let args = ["--durable", "--content-type", "text/plain", "--app-id", "backup"];
        let headers = ["-H", "Host: web1", "-H", "Zone:"];
        let all = properties(&[&args[..], &headers].concat()).unwrap();
        assert_eq!(*all.delivery_mode(), Some(PERSISTENT));
        assert_eq!(all.content_type().as_deref(), Some("text/plain"));
        assert_eq!(all.app_id().as_deref(), Some("backup"));
        let headers = all.headers().as_ref().unwrap();
        assert_eq!(headers.get("Host"), Some(&Value::LongString("web1".into())));
        assert_eq!(headers.get("Zone"), Some(&Value::LongString(String::new())));
    }

    #[test]
    fn a_tag_says_which_program_sends_and_where() {
        let tagged = properties(&["--tag", "backup"]).unwrap();
        assert_eq!(tagged.app_id().as_deref(), Some("backup"));
        let host = uname().nodename().to_string_lossy().into_owned();
        assert_eq!(tagged.headers().as_ref().unwrap().get(HOST), Some(&Value::LongString(host)));
        let tagged = properties(&["-H", "Host: web1", "-t", "backup"]).unwrap();
        let host = Value::LongString("web1".into());
        assert_eq!(tagged.headers().as_ref().unwrap().get(HOST), Some(&host));
        assert!(Cli::try_parse_from(["emit-log", "--tag", "a", "--app-id", "b"]).is_err());
    }

    #[test]
    fn a_dash_is_no_word() {
        let words =
            |args: &[&str]| Cli::parse_from([&["emit-log"], args].concat()).words().to_vec();
        assert!(words(&[]).is_empty() && words(&["-"]).is_empty());
        assert_eq!(words(&["-", "-"]), ["-", "-"]);
        assert_eq!(words(&[""]), [""]);
    }

    #[test]
    fn headers_have_to_fit_into_a_frame() {
        let half = format!("H: {}", "x".repeat(MAX_HEADERS / 2 - 1));
        assert!(properties(&["-H", &half, "-H", &half]).is_ok());
        let failure = properties(&["-H", &half, "-H", &half, "-H", "A:"]).unwrap_err();
        assert_eq!(failure.status, Status::Usage);
    }

    #[test]
    fn short_strings_and_sizes_have_limits() {
        assert!(short_string(&"x".repeat(255)).is_ok());
        assert!(short_string(&"x".repeat(256)).is_err());
        assert_eq!(record_size("1KB"), Ok(ByteSize::kb(1)));
        for text in ["0", "much", "2GiB", ""] {
            assert!(record_size(text).is_err(), "{text}");
        }
    }
}
