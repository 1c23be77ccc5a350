//! The sections of the man page besides the options.

use logs_process::Status;
use logs_process::manual::Manual;

pub const MANUAL: Manual = Manual {
    statuses: &[
        (
            Status::Ok,
            "--count was reached, --no-follow reached its end, a signal arrived, a time limit passed while connected, \
             or the reader of standard output has exited.",
        ),
        (
            Status::Unavailable,
            "No broker is reachable, or the broker was lost and did not return in time (--retry, --timeout, \
             --idle-timeout).",
        ),
        (Status::Io, "The output or another file cannot be written or read."),
        (Status::TimeLimit, "A time limit passed before --count was reached."),
    ],
    environment: &[
        (
            "NO_COLOR, CLICOLOR, CLICOLOR_FORCE, TERM",
            "With --color auto: NO_COLOR turns colours off, and CLICOLOR_FORCE turns them on everywhere. They are also \
             off if CLICOLOR is 0, or if TERM is dumb or not set.",
        ),
        (
            "NOTIFY_SOCKET",
            "Set by systemd for Type=notify: receive-logs reports there whether it receives messages.",
        ),
    ],
    files: &[
        (
            "FILE of --output",
            "receive-logs appends to this file. With --resume, it first truncates the file to the recorded position.",
        ),
        (
            "FILE of --resume",
            "The position in the stream, written every second and at the end. It is locked while receive-logs runs. \
             Keep it with the output. A position of another stream, exchange or broker is an error.",
        ),
        ("FILE of --ready-file", "Contains the process id. It exists while messages are received."),
    ],
    signals: &[
        (
            "SIGINT, SIGTERM",
            "Write all received messages, and exit with status 0. If the output cannot be written within 2 s, \
             receive-logs prints a warning and the signal ends the process. A second signal ends the process at once; \
             the same signal does so only after half a second. Before \"Waiting for logs\", the first signal ends the \
             process. If receive-logs is process 1 of a container, its exit status is then 128 plus the signal's \
             number. A signal that is ignored at the start, as under nohup, remains ignored.",
        ),
        (
            "SIGHUP",
            "With --output: reopen the file, after logrotate has renamed it. Without --output, as at the end of a \
             terminal: write all received messages, and end by the signal.",
        ),
        ("SIGUSR1", "Print a status line to stderr."),
    ],
    examples: &[
        ("receive-logs > logs_from_rabbit.log", "Write to a file."),
        (
            "receive-logs --raw | grep --line-buffered error",
            "Filter the exact bytes of live messages.",
        ),
        ("receive-logs --format json | jq -r .headers.Host", "Print one header of each message."),
        (
            "receive-logs -n 1 --timeout 5s || echo \"no message\"",
            "Wait for one message in a script. The status is 75 if none arrives.",
        ),
        (
            "receive-logs --raw -o /var/log/rabbit/all.log --durable --queue archive",
            "Keep messages in a queue while no receiver runs.",
        ),
        (
            "receive-logs --stream logs-history --since 10m",
            "Write the last ten minutes, then live messages.",
        ),
    ],
    see_also: "emit-log(1), rabbitmqctl(8), logrotate(8), systemd.service(5)",
};
