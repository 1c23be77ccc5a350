//! `--count` and the time limits.

use logs_tests::{Message, ScriptedBroker, TempFile};

use super::harness::{DURABLE, FORCED, LOST, Run, assert_content, batch, numbered};
use crate::receiver::Stop;

#[test]
fn a_count_ends_with_a_whole_batch_of_a_durable_queue() {
    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &["--count", "3"], file.path());
    session.deliver(&Message::new("a"));
    session.deliver(&batch("b\nc\nd\ne"));
    session.expect_close();
    run.ends_with(Ok(Stop::Count));
    assert_content(file.path(), "a\nb\nc\n");

    let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
    let (run, session) = Run::start(&broker, &[DURABLE, &["--count", "3"]].concat(), file.path());
    session.in_one_piece(|session| {
        session.deliver(&Message::new("a"));
        session.deliver(&batch("b\nc\nd\ne"));
        session.deliver(&Message::new("f"));
    });
    // Read before the acknowledgement, after which the broker would send more.
    session.expect_cancel();
    assert_eq!(session.expect_ack(), 2);
    run.ends_with(Ok(Stop::Count));
    assert_content(file.path(), "a\nb\nc\nd\ne\n");
}

#[test]
fn duplicates_do_not_count() {
    for kind in [&[][..], DURABLE] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        // Less than the time after which messages are acknowledged.
        let options = [kind, &["--count", "3", "--idle-timeout", "900ms"]].concat();
        let (run, session) = Run::start(&broker, &options, file.path());
        for _ in 0..3 {
            session.deliver(&numbered(1));
        }
        // The prefetch count is that of --count, so the broker sends more only after an acknowledgement.
        assert_eq!(session.expect_ack(), 3);
        session.deliver(&numbered(2));
        session.deliver(&numbered(3));
        run.ends_with(Ok(Stop::Count));
        assert_content(file.path(), "1\n2\n3\n");
    }
}

#[test]
fn time_limits_stop_a_receiver() {
    for limit in ["--idle-timeout", "--timeout"] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let (run, session) =
            Run::start(&broker, &[DURABLE, &[limit, "100ms"]].concat(), file.path());
        session.deliver(&Message::new("a"));
        assert_eq!(session.expect_ack(), 1);
        run.ends_with(Ok(Stop::TimeLimit));
        assert_content(file.path(), "a\n");
    }
}

#[test]
fn a_time_limit_without_a_broker_or_a_count_is_an_error() {
    let late = format!("receive from BROKER: {FORCED}; not back within the time limit");
    for (options, outcome) in [(&[][..], Err(&*late)), (&["-n", "2"], Ok(Stop::TimeLimit))] {
        let (broker, file) = (ScriptedBroker::start(), TempFile::new("log"));
        let options = [&["--idle-timeout", "100ms"], options].concat();
        let (run, session) = Run::start(&broker, &options, file.path());
        broker.go_down();
        session.close(320, FORCED);
        run.ends_with(outcome);
        assert_eq!(run.alerts(), [LOST]);
    }
}
