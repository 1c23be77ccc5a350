//! The sections of the man page besides the options.

use logs_process::Status;
use logs_process::manual::Manual;

pub const MANUAL: Manual = Manual {
    statuses: &[
        (Status::Ok, "The broker has confirmed every message."),
        (
            Status::Data,
            "A message is larger than the broker accepts, or a record is larger than --max-record.",
        ),
        (Status::NoReceiver, "With --mandatory: a message was not routed to any queue."),
        (
            Status::Unavailable,
            "No broker is reachable, or the broker was lost and did not return in time (--retry). With --spool: \
             records are left in the spool, or were dropped.",
        ),
        (
            Status::Io,
            "Standard input, a followed file, the spool or another file cannot be read or written.",
        ),
    ],
    environment: &[],
    files: &[
        (
            "DIR of --spool",
            "spool.db is an SQLite database with the records that the broker has not confirmed. While emit-log \
             runs, spool.db-wal has the records that were written last.",
        ),
        (
            "FILE of --position",
            "Has the position in each followed file up to which the broker has confirmed all lines. The default is \
             in $STATE_DIRECTORY, $XDG_STATE_HOME/emit-log or ~/.local/state/emit-log.",
        ),
    ],
    signals: &[
        (
            "SIGHUP, SIGINT, SIGTERM",
            "With --lines or --follow: stop reading, send the lines that are read, wait up to 5 s for confirms, print the \
             counts, and end by the signal. A second signal ends emit-log at once; the same signal counts as a \
             second one after half a second. With --spool, unconfirmed lines are written to disk at once. With \
             words: end at once. A signal that was ignored at the start, as under nohup, stays ignored. \
             As process 1 of a container, emit-log exits with status 128 plus the number of the signal.",
        ),
        ("SIGUSR1", "Print a status line to stderr."),
    ],
    examples: &[
        (
            "emit-log \"warning: disk is 91 % full\"",
            "Send a message; return when the broker has confirmed it.",
        ),
        ("app 2>&1 | emit-log --lines", "Send every line that a program prints, as it is printed."),
        (
            "app 2>&1 | emit-log --lines --spool /var/spool/app-logs",
            "The same; an outage does not block the program.",
        ),
        (
            "emit-log --follow /var/log/app.log --join --tag app",
            "Send each line of a file as it grows, and each stack trace as one record.",
        ),
        ("emit-log --lines --batch < big.log", "Send a file as fast as possible."),
        (
            "emit-log --mandatory \"error: disk is full\" || mail -s \"log receiver is down\" root < /dev/null",
            "Run another command if no receiver gets the message.",
        ),
    ],
    see_also: "receive-logs(1), journalctl(1), rabbitmqctl(8)",
};
