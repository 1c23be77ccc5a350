//! Samples of each format. The severity of each line is written down by hand.

use logs_severity::Severity::{self, Critical, Debug, Error, Info, Notice, Trace, Warning};

use crate::severity;

#[track_caller]
fn check(samples: &[(&str, Severity, &str)]) {
    for (word, expected, line) in samples {
        assert_eq!(severity(line), Some((*word, *expected)), "{line}");
    }
}

#[test]
fn the_first_word_is_the_severity() {
    check(&[
        ("error", Error, "error: no"),
        ("WARN", Warning, "[WARN] disk is full"),
        ("Info", Info, "Info"),
        ("crit", Critical, "\"crit\""),
        ("notice", Notice, "notice - the disk is nearly full"),
        ("panic", Critical, "panic: runtime problem, index out of range"),
    ]);
}

#[test]
fn syslog_is_recognised() {
    check(&[
        (
            "error",
            Error,
            "Jan 31 12:00:00 web1 sshd[123]: error: kex_exchange_identification: closed",
        ),
        ("WARNING", Warning, "Jan 31 12:00:00 web1 kernel: WARNING: CPU: 0 PID: 1"),
        ("Info", Info, "dovecot: imap-login: Info: Aborted login"),
        ("WARNING", Warning, "backup: WARNING the last run is a week old"),
        ("error", Error, "app:\terror: behind a tab"),
        ("fatal", Critical, "Jan  1 00:00:01 mail postfix/smtpd[77]: fatal: no SASL mechanisms"),
        ("warning", Warning, "Jan  1 00:00:01 mail postfix/smtpd[77]: warning: hostname unknown"),
        ("DEBUG", Debug, "2026-01-31T12:00:00.123456+01:00 web1 app[9]: DEBUG: error count 0"),
        ("alert", Critical, "Jan 31 12:00:00 web1 named[5]: alert: zone expired"),
    ]);
}

#[test]
fn syslog_with_a_priority_is_recognised() {
    check(&[
        ("11", Error, "<11>Jan 31 12:00:00 web1 app[1]: the disk is gone"),
        ("13", Notice, "<13>Jan 31 12:00:00 web1 root: hello"),
        ("30", Info, "<30>Jan 31 12:00:00 web1 systemd[1]: Started a unit, no ERROR"),
        ("165", Notice, "<165>1 2026-01-31T12:00:00.003Z web1 app 123 ID47 - started"),
        ("0", Critical, "<0>Jan 31 12:00:00 web1 kernel: out of everything"),
        ("191", Debug, "<191>1 2026-01-31T12:00:00Z web1 app - - - details"),
        ("6", Info, "<6>[    0.000000] Command line: quiet"),
        ("3", Error, "<3>cannot open the socket"),
        ("12", Warning, "web-1  | <12>Jan 31 12:00:00 web1 app: slow"),
    ]);
}

#[test]
fn journald_short_is_recognised() {
    check(&[
        ("ERROR", Error, "Jan 31 12:00:00 web1 app[812]: ERROR: cannot bind to port 80"),
        (
            "warn",
            Warning,
            "Jan 31 12:00:00 web1 dockerd[9]: time=\"2026-01-31\" level=warn msg=\"an ERROR\"",
        ),
        (
            "warning",
            Warning,
            "Jan 31 12:00:00 web1 systemd-resolved[4]: warning: using degraded feature set",
        ),
        (
            "E",
            Error,
            "Jan 31 12:00:00 node1 kubelet[99]: E0131 12:00:00.123456      99 kubelet.go:10] x",
        ),
        (
            "info",
            Info,
            "Jan 31 12:00:00 web1 app[1]: {\"msg\":\"after an ERROR\",\"level\":\"info\"}",
        ),
        (
            "CRITICAL",
            Critical,
            "Jan 31 12:00:00.123456 web1 backup[7]: [CRITICAL] no space is left",
        ),
        ("INFO", Info, "Jan 31 12:00:00 web1 java[5]: 2026-01-31 12:00:00 INFO  Main - ready"),
    ]);
}

#[test]
fn nginx_error_is_recognised() {
    check(&[
        ("error", Error, "2026/01/31 12:00:00 [error] 123#123: *1 open() failed"),
        ("emerg", Critical, "2026/01/31 12:00:00 [emerg] 1#1: bind() to 0.0.0.0:80 failed"),
        ("alert", Critical, "2026/01/31 12:00:00 [alert] 7#7: worker process 8 exited on signal 9"),
        (
            "crit",
            Critical,
            "2026/01/31 12:00:00 [crit] 7#7: *2 SSL_do_handshake() failed, error:141",
        ),
        ("warn", Warning, "2026/01/31 12:00:00 [warn] 7#7: *3 upstream response is buffered"),
        ("notice", Notice, "2026/01/31 12:00:00 [notice] 1#1: start worker processes"),
        ("info", Info, "2026/01/31 12:00:00 [info] 7#7: *4 client closed connection, error 104"),
        ("debug", Debug, "2026/01/31 12:00:00 [debug] 7#7: *5 http cleanup"),
    ]);
}

#[test]
fn apache_error_is_recognised() {
    check(&[
        (
            "error",
            Error,
            "[Sat Jan 31 12:00:00.123456 2026] [core:error] [pid 1] AH00126: Invalid URI",
        ),
        ("notice", Notice, "[Sat Jan 31 12:00:00 2026] [notice] child process started"),
        ("warn", Warning, "[Sat Jan 31 12:00:00.1 2026] [ssl:warn] [pid 9] AH01909: name mismatch"),
        ("crit", Critical, "[Sat Jan 31 12:00:00.1 2026] [core:crit] [pid 9] AH00136: no memory"),
        ("info", Info, "[Sat Jan 31 12:00:00.1 2026] [ssl:info] [pid 9] AH01964: error 0"),
    ]);
}

#[test]
fn postgres_is_recognised() {
    check(&[
        ("ERROR", Error, "2026-01-31 12:00:00.123 UTC [123] ERROR:  relation \"x\" does not exist"),
        (
            "FATAL",
            Critical,
            "2026-01-31 12:00:00.123 UTC [124] FATAL:  role \"app\" does not exist",
        ),
        (
            "WARNING",
            Warning,
            "2026-01-31 12:00:00 CET [9] app@db WARNING:  no transaction in progress",
        ),
        ("PANIC", Critical, "2026-01-31 12:00:00.123 UTC [1] PANIC:  could not write to file"),
        (
            "NOTICE",
            Notice,
            "2026-01-31 12:00:00 UTC [5] NOTICE:  table \"t\" does not exist, skipping",
        ),
        ("INFO", Info, "2026-01-31 12:00:00 UTC [5] INFO:  vacuuming \"public.error\""),
    ]);
}

#[test]
fn other_servers_are_recognised() {
    check(&[
        ("Warning", Warning, "2026-01-31T12:00:00.123456Z 0 [Warning] [MY-010068] [Server] CA"),
        ("ERROR", Error, "2026-01-31T12:00:00.123456Z 8 [ERROR] [MY-010119] [Server] Aborting"),
        ("info", Info, "2026-01-31 12:00:00.123456+00:00 [info] <0.222.0> Server startup complete"),
        (
            "error",
            Error,
            "2026-01-31 12:00:00.123456+00:00 [error] <0.9.0> closing AMQP connection",
        ),
        ("info", Info, "[2026-01-31 12:00:00.123][1][info][main] [source/server.cc:10] started"),
        ("error", Error, "main.c:10:5: error: expected ';' before '}' token"),
        ("ERROR", Error, "[1234:5678:0131/120000.123456:ERROR:file.cc(10)] no bus"),
    ]);
}

#[test]
fn log4j_is_recognised() {
    check(&[
        ("INFO", Info, "2026-01-31 12:00:00,123 INFO  [main] com.example.App - no error"),
        ("ERROR", Error, "12:00:00.123 [http-nio-8080-exec-1] ERROR c.example.App - boom"),
        (
            "WARN",
            Warning,
            "2026-01-31T12:00:00.123+01:00  WARN 12345 --- [      main] c.e.App : hm",
        ),
        ("ERROR", Error, "[2026-01-31 12:00:00,123] ERROR [KafkaApi-1] Failed (kafka.server)"),
        ("INFO", Info, "[2026-01-31T12:00:00,123][INFO ][o.e.n.Node ] [node-1] started"),
        ("FATAL", Critical, "2026-01-31 12:00:00,123 [main] FATAL com.example.App - no memory"),
        ("TRACE", Trace, "26/01/31 12:00:00 TRACE scheduler.Task: an ERROR is retried"),
        ("SEVERE", Error, "SEVERE: servlet threw exception"),
    ]);
}

#[test]
fn python_logging_is_recognised() {
    check(&[
        ("WARNING", Warning, "WARNING:root:an error"),
        ("ERROR", Error, "2026-01-31 12:00:00,123 - my.app - ERROR - boom"),
        ("INFO", Info, "[2026-01-31 12:00:00 +0000] [1234] [INFO] Listening at: http://0.0.0.0:80"),
        ("WARNING", Warning, "[2026-01-31 12:00:00,123: WARNING/MainProcess] hm"),
        ("CRITICAL", Critical, "CRITICAL:app.db:no connection"),
        ("DEBUG", Debug, "2026-01-31 12:00:00,123 DEBUG app.db query took 3 ms, no ERROR"),
        ("INFO", Info, "INFO:     127.0.0.1:5000 - \"GET /error HTTP/1.1\" 200 OK"),
    ]);
}

#[test]
fn ruby_and_rust_are_recognised() {
    check(&[
        ("ERROR", Error, "E, [2026-01-31T12:00:00.123456 #1234] ERROR -- : boom"),
        ("INFO", Info, "I, [2026-01-31T12:00:00.123456 #1234]  INFO -- : Started GET \"/error\""),
        ("WARN", Warning, "[2026-01-31T12:00:00Z WARN  my_app] hm"),
        ("INFO", Info, "2026-01-31T12:00:00.123456Z  INFO my_app: error count 0"),
        ("TRACE", Trace, "2026-01-31T12:00:00.123456Z TRACE my_app::pool: idle"),
    ]);
}

#[test]
fn slog_json_is_recognised() {
    check(&[
        ("ERROR", Error, r#"{"time":"2026-01-31T12:00:00.1Z","level":"ERROR","msg":"boom"}"#),
        ("INFO", Info, r#"{"time":"2026-01-31T12:00:00.1Z","level":"INFO","msg":"ERROR: none"}"#),
        ("WARN", Warning, r#"{"time":"2026-01-31T12:00:00.1Z","level":"WARN","msg":"hm","n":3}"#),
        ("DEBUG", Debug, r#"{"time":"2026-01-31T12:00:00.1Z","level":"DEBUG","msg":"q"}"#),
        (
            "ERROR",
            Error,
            r#"{"time":"2026-01-31T12:00:00.1Z","level":"ERROR","source":{"file":"a.go"},"msg":"x"}"#,
        ),
    ]);
}

#[test]
fn slog_text_is_recognised() {
    check(&[
        ("ERROR", Error, "time=2026-01-31T12:00:00.123Z level=ERROR msg=boom"),
        ("INFO", Info, "time=2026-01-31T12:00:00.123Z level=INFO msg=\"no ERROR\" n=3"),
        ("WARN", Warning, "time=2026-01-31T12:00:00.123Z level=WARN source=a.go:3 msg=hm"),
        ("DEBUG", Debug, "time=2026-01-31T12:00:00.123Z level=DEBUG msg=q"),
        ("ERROR", Error, "level=ERROR msg=\"without a time\""),
        ("INFO", Info, "2026/01/31 12:00:00 INFO hello count=3"),
    ]);
}

#[test]
fn zap_is_recognised() {
    check(&[
        (
            "error",
            Error,
            r#"{"level":"error","ts":1769860800.1,"caller":"main.go:10","msg":"boom"}"#,
        ),
        ("info", Info, r#"{"level":"info","ts":1769860800.1,"msg":"error: none"}"#),
        ("warn", Warning, r#"{"level":"warn","ts":"2026-01-31T12:00:00Z","msg":"an ERROR"}"#),
        ("debug", Debug, r#"{"level":"debug","ts":1769860800.1,"logger":"db","msg":"q"}"#),
        ("fatal", Critical, r#"{"level":"fatal","ts":1769860800.1,"msg":"no port"}"#),
        ("error", Error, "2026-01-31T12:00:00.000Z\terror\tmain.go:10\tboom"),
        ("ERROR", Error, "2026-01-31T12:00:00.000Z\tERROR\tmain.go:10\tboom"),
    ]);
}

#[test]
fn other_json_is_recognised() {
    check(&[
        ("error", Error, r#"{"time":"2026-01-31T12:00:00Z","level":"error","msg":"x"}"#),
        (
            "WARNING",
            Warning,
            r#"{"asctime": "12:00:00", "levelname": "WARNING", "message": "ERROR"}"#,
        ),
        ("info", Info, r#"{"msg":"error: none","log.level":"info"}"#),
        ("warn", Warning, r#"{"msg":"error: none","log-level":"warn"}"#),
        ("CRITICAL", Critical, r#"{"severity": "CRITICAL", "message": "boom"}"#),
        ("Error", Error, r#"{"Timestamp":"2026-01-31T12:00:00Z","Level":"Error","Message":"x"}"#),
        ("error", Error, r#"{"log":"{\"level\":\"error\",\"msg\":\"x\"}\n","stream":"stderr"}"#),
        (
            "warn",
            Warning,
            r#"{"level":"\u001b[33mwarn\u001b[39m","message":"coloured by winston"}"#,
        ),
    ]);
}

#[test]
fn numbers_of_pino_and_bunyan_are_recognised() {
    check(&[
        ("30", Info, r#"{"level":30,"time":1769860800000,"pid":1,"hostname":"web1","msg":"x"}"#),
        ("50", Error, r#"{"level":50,"time":1769860800000,"pid":1,"msg":"x","v":1}"#),
        ("10", Trace, r#"{"level": 10, "time": "2026-01-31T12:00:00Z", "msg": "x"}"#),
        ("40", Warning, r#"{"name":"app","hostname":"web1","pid":1,"level":40,"msg":"x","v":0}"#),
        ("60", Critical, r#"{"name":"app","hostname":"web1","pid":1,"level":60,"msg":"ERROR"}"#),
        ("20", Debug, r#"web-1  | {"level":20,"time":1769860800000,"msg":"x"}"#),
    ]);
}

#[test]
fn logfmt_is_recognised() {
    check(&[
        ("warn", Warning, "time=2026-01-31T12:00:00Z level=warn msg=\"no error\""),
        ("info", Info, "time=\"2026-01-31T12:00:00Z\" level=info msg=\"an ERROR\""),
        ("error", Error, "ts=1769860800.1 caller=main.go:1 lvl=error err=\"exit 1\""),
        ("fatal", Critical, "level=fatal msg=\"no port\" service=api"),
        ("debug", Debug, "at=2026-01-31 severity=debug path=/error status=200"),
        ("trace", Trace, "app=api level=\"trace\" msg=x"),
    ]);
}

#[test]
fn android_logcat_is_recognised() {
    check(&[
        ("E", Error, "01-31 12:00:00.123  1234  1234 E ActivityManager: no activity"),
        ("W", Warning, "01-31 12:00:00.123  1234  5678 W PackageManager: ERROR in a manifest"),
        (
            "I",
            Info,
            "2026-01-31 12:00:00.123  1000  1234  1234 I chatty  : uid=1000 expire 3 lines",
        ),
        ("D", Debug, "01-31 12:00:00.123   123   123 D wifi_hal: warning: none"),
        ("V", Trace, "01-31 12:00:00.123  1234  1234 V Window Manager: layout"),
        ("F", Critical, "01-31 12:00:00.123  1234  1234 F libc    : signal 11 in tid 5"),
        ("E", Error, "E/ActivityManager( 1234): no activity"),
        ("W", Warning, "W/art     (12345): Verification took 100 ms, error 0"),
        ("I", Info, "01-31 12:00:00.123 I/SystemServer( 1234): ready"),
        ("D", Debug, "D/dalvikvm(  99): GC freed 100 K"),
    ]);
}

#[test]
fn hdfs_is_recognised() {
    check(&[
        (
            "INFO",
            Info,
            "081109 203615 148 INFO dfs.DataNode$PacketResponder: terminating, no ERROR",
        ),
        (
            "WARN",
            Warning,
            "081109 214043 2561 WARN dfs.DataNode$DataXceiver: exception in a transfer",
        ),
        ("INFO", Info, "081111 000001 35 INFO dfs.FSNamesystem: block map is updated"),
        ("ERROR", Error, "081231 235959 13 ERROR dfs.DataNode: closing"),
        ("FATAL", Critical, "260131 120000 1 FATAL dfs.NameNode: shutting down"),
        ("DEBUG", Debug, "260131 120000 DEBUG ipc.Client: connecting"),
    ]);
}

#[test]
fn bgl_is_recognised() {
    check(&[
        (
            "INFO",
            Info,
            "- 1117838570 2005.06.03 R02-M1-N0-C:J12-U11 2005-06-03-15.42.50.363779 R02-M1-N0-C:J12-U11 RAS \
             KERNEL INFO cache parity error corrected",
        ),
        (
            "FATAL",
            Critical,
            "KERNDTLB 1117838571 2005.06.03 R30-M0-N9-C:J16-U01 2005-06-03-15.42.51.749199 R30-M0-N9-C:J16-U01 RAS \
             KERNEL FATAL data error of the translation buffer",
        ),
        (
            "ERROR",
            Error,
            "- 1117838573 2005.06.03 R20-M0 2005-06-03-15.42.53.276129 R20-M0 RAS MMCS ERROR a link is lost",
        ),
        (
            "WARNING",
            Warning,
            "- 1117838573 2005.06.03 R63-M0-L0 2005-06-03-15.42.53.1 R63-M0-L0 RAS DISCOVERY WARNING a card has moved",
        ),
        (
            "SEVERE",
            Error,
            "- 1117838573 2005.06.03 R63-M0-L0 2005-06-03-15.42.53.100000 UNKNOWN_LOCATION NULL DISCOVERY SEVERE x",
        ),
        (
            "FATAL",
            Critical,
            "APPREAD 1117838573 2005.06.03 R01-M0 2005-06-03-23.59.59.100000 R01-M0 RAS APP FATAL ciod: Error reading x",
        ),
    ]);
}

#[test]
fn klog_is_recognised() {
    check(&[
        ("E", Error, "E0131 12:00:00.123456       1 main.go:10] no leader"),
        ("I", Info, "I0131 12:00:00.123456       1 controller.go:99] \"ERROR\" err=\"none\""),
        ("W", Warning, "W1231 23:59:59.000001   12345 reflector.go:1] watch closed: ERROR: EOF"),
        ("F", Critical, "F0101 00:00:00.000000       1 server.go:5] no certificate"),
        ("E", Error, "E20260131 12:00:00.123456  1234 main.cc:10] glog has the year"),
        ("I", Info, "api-1  | I0131 12:00:00.123456       1 main.go:10] ready"),
        ("E", Error, r#"{"log":"E0131 12:00:00.123456 1 main.go:10] x\n","stream":"stderr"}"#),
    ]);
}

#[test]
fn docker_compose_is_recognised() {
    check(&[
        ("ERROR", Error, "web-1  | 2026-01-31 12:00:00 ERROR boom"),
        ("error", Error, "web_1 | error: boom"),
        ("info", Info, "db.primary-1            | [info] ready"),
        ("warn", Warning, "api-1  | {\"level\":\"warn\",\"msg\":\"ERROR\"}"),
        ("FATAL", Critical, "db-1   | 2026-01-31 12:00:00.123 UTC [1] FATAL:  no role"),
        ("DEBUG", Debug, "\x1b[36mweb-1  | \x1b[0mDEBUG: x"),
        ("error", Error, "\x1b[36mweb_1  |\x1b[0m error: boom"),
    ]);
}

#[test]
fn words_behind_colors_are_recognised() {
    check(&[
        ("ERROR", Error, "\x1b[31mERROR\x1b[0m: x"),
        ("ERR", Error, "\x1b[90m12:00:00\x1b[0m \x1b[31mERR\x1b[0m msg"),
        (
            "INF",
            Info,
            "\x1b[90m3:04PM\x1b[0m \x1b[32mINF\x1b[0m \x1b[1mready\x1b[0m \x1b[36mn=\x1b[0m1",
        ),
        ("WARN", Warning, "\x1b[33mWARN\x1b[0m[0001] disk is slow    \x1b[33mms\x1b[0m=9"),
        (
            "error",
            Error,
            "\x1b[1mmain.c:1:5:\x1b[0m \x1b[01;31m\x1b[Kerror: \x1b[m\x1b[Kexpected ';'",
        ),
        (
            "error",
            Error,
            "\x1b[0m\x1b[1m\x1b[38;5;9merror[E0131]\x1b[0m\x1b[1m: not generic\x1b[0m",
        ),
        ("INFO", Info, "[\x1b[2m2026-01-31T12:00:00Z\x1b[0m \x1b[32mINFO \x1b[0m app] hm"),
        ("WARN", Warning, "main [\x1b[33mWARN\x1b[0m] hm"),
        ("WARN", Warning, "main [\x1b[33mWARN \x1b[0m] hm"),
        ("error", Error, "app: \x1b[31merror\x1b[0m: x"),
        ("debug", Debug, "\x1b[2mtime\x1b[0m=12 \x1b[2mlevel\x1b[0m=\x1b[34mdebug\x1b[0m"),
        ("WRN", Warning, "[12:00:00 \x1b[38;5;0011mWRN\x1b[0m] hm"),
    ]);
}
