//! What the man page says besides the options.

use logs_process::Status;
use logs_process::manual::Manual;

pub const MANUAL: Manual = Manual {
    statuses: &[
        (
            Status::Ok,
            "Stopped as asked: by --count, a signal, a time limit while the broker was there, or because the \
             reader of standard output went away.",
        ),
        (
            Status::Unavailable,
            "No broker can be reached, or it was lost and did not come back in time (--retry, --timeout, \
             --idle-timeout).",
        ),
        (Status::Io, "The output or another file cannot be written or read."),
        (Status::TimeLimit, "A time limit passed before --count was reached."),
    ],
    environment: &[
        (
            "NO_COLOR, CLICOLOR, CLICOLOR_FORCE, TERM",
            "With --color auto: no colour where NO_COLOR is set, CLICOLOR is 0, or TERM is dumb or not set; colour \
             wherever CLICOLOR_FORCE is set.",
        ),
        (
            "NOTIFY_SOCKET",
            "Set by systemd for Type=notify, and told when messages are received and when not.",
        ),
    ],
    files: &[
        (
            "FILE of --output",
            "Only appended to; with --resume, cut back first to the message up to which the position is noted.",
        ),
        (
            "FILE of --resume",
            "The position in the stream, written every second and at the end, and locked meanwhile. Keep it with \
             the output: a position of another stream, exchange or broker is refused.",
        ),
        (
            "FILE of --ready-file",
            "Has the process id in it while messages are received; removed at the end.",
        ),
    ],
    signals: &[
        (
            "SIGINT, SIGTERM",
            "Stop: write all that was received, and end with status 0. Where the output does not take that within \
             2 s, a note tells so, and the signal ends the process, as a second one does at once (the \
             same one only after half a second). \
             Before the waiting has begun, the signal ends the process. A signal that was ignored at the start, \
             as under nohup, stays ignored. As process 1 of a container, the exit status is then 128 and the \
             signal's number.",
        ),
        ("SIGHUP", "With --output: open the file anew, after logrotate has renamed it."),
        ("SIGUSR1", "Tell on stderr how it goes, in one line."),
    ],
    examples: &[
        ("receive-logs > logs_from_rabbit.log", "Write to a file."),
        (
            "receive-logs --raw | grep --line-buffered error",
            "The messages as they were sent, live.",
        ),
        (
            "receive-logs --format json | jq -r .headers.Host",
            "All that the broker knows of a message.",
        ),
        (
            "receive-logs -n 1 --timeout 5s || echo \"nothing came\"",
            "One message, for a script: status 75 when none comes.",
        ),
        (
            "receive-logs --raw -o /var/log/rabbit/all.log --durable --queue archive",
            "What comes while no receiver runs waits in a queue.",
        ),
        ("receive-logs --stream logs-history --since 10m", "The last ten minutes, then live."),
    ],
    see_also: "emit-log(1), rabbitmqctl(8), logrotate(8), systemd.service(5)",
};
