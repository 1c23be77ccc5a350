//! One message, without `--lines`.

use super::*;

fn send_words(broker: &ScriptedBroker) -> (ScriptedSession, Run) {
    let run = Run::publish(connect(QUICK, broker, &[]), vec![single(1, "hello")]);
    (accept(broker, &["hello"]), run)
}

#[test]
fn a_message_on_a_connection_lost_during_the_login_is_in_doubt() {
    for end in [
        |session: ScriptedSession| session.close(320, "CONNECTION_FORCED - for a test"),
        ScriptedSession::cut,
        drop,
    ] {
        let broker = ScriptedBroker::start();
        broker.withhold(CHANNEL_OPEN);
        let (session, run) = send_words(&broker);
        end(session);
        let text = run.outcome().unwrap_err();
        assert!(text.starts_with("0 confirmed, 1 in doubt: log in to "), "{text}");
    }
}

const OTHER_TYPE: &str = "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'logs'";

#[test]
fn an_error_leaves_only_a_sent_message_in_doubt() {
    let refused = format!("declare exchange 'logs': {OTHER_TYPE}");
    let broker = ScriptedBroker::start();
    broker.refuse(EXCHANGE_DECLARE, 406, OTHER_TYPE);
    let run = Run::publish(connect(QUICK, &broker, &[]), vec![single(1, "hello")]);
    let text = run.outcome().unwrap_err();
    assert!(text.starts_with(&refused), "{text}");

    broker.forget_sessions();
    broker.refuse_nothing();
    let (session, run) = send_words(&broker);
    broker.refuse(EXCHANGE_DECLARE, 406, OTHER_TYPE);
    session.cut();
    let text = run.outcome().unwrap_err();
    assert!(text.starts_with(&format!("0 confirmed, 1 in doubt: {refused}")), "{text}");
}
