//! What the man page says besides the options.

use logs_process::Status;
use logs_process::manual::Manual;

pub const MANUAL: Manual = Manual {
    statuses: &[
        (Status::Ok, "The broker has confirmed every message."),
        (
            Status::Data,
            "A message is larger than the broker accepts, or a record than --max-record.",
        ),
        (Status::NoReceiver, "With --mandatory: nobody listens."),
        (
            Status::Unavailable,
            "No broker can be reached, or it was lost and did not come back in time (--retry). With --spool: \
             records are left in the spool, or were dropped.",
        ),
        (Status::Io, "Standard input, the spool or another file cannot be read or written."),
    ],
    environment: &[],
    files: &[(
        "DIR of --spool",
        "NNNNNNNN.spool hold what the broker has not confirmed, and mark up to where. NNNNNNNN.corrupt are put \
         aside, told, and never read again.",
    )],
    signals: &[
        (
            "SIGINT, SIGTERM",
            "With --lines: stop reading, send what was read, wait up to 5 s for its confirmation, print the \
             counts, and end by the signal; a second signal ends at once (the same one only after half a second). With --spool, what is unconfirmed is \
             written to disk at once. With words: end at once. A signal that was ignored at the start, as under \
             nohup, stays ignored. As process 1 of a container, the exit status is 128 and the signal's number.",
        ),
        ("SIGUSR1", "Tell on stderr how it goes, in one line."),
    ],
    examples: &[
        (
            "emit-log \"warning: disk is 91 % full\"",
            "Send a message; return when the broker has confirmed it.",
        ),
        ("app 2>&1 | emit-log --lines", "Send every line that a program prints, live."),
        (
            "app 2>&1 | emit-log --lines --spool /var/spool/app-logs",
            "The same, without the program ever waiting for a broker.",
        ),
        ("emit-log --lines --batch < big.log", "Send a file as fast as possible."),
        (
            "emit-log --mandatory \"error: disk is full\" || mail -s \"nobody reads the logs\" root < /dev/null",
            "Do something else where nobody listens.",
        ),
    ],
    see_also: "receive-logs(1), journalctl(1), rabbitmqctl(8)",
};
