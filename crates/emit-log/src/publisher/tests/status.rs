//! The status line in each state.

use tempfile::TempDir;

use super::*;

/// The status, with `BROKER` instead of the broker's address, and `N` instead of a time.
fn status(publisher: &Publisher, broker: &ScriptedBroker) -> String {
    let url = broker.url();
    let (_, address) = url.split_once('@').expect("credentials");
    let (address, _) = address.split_once('/').expect("a vhost");
    let status = publisher.counts().status().replace(address, "BROKER");
    match status.split_once(" for ").zip(status.split_once(" (")) {
        Some(((none, _), (_, rest))) if none == "broker none" => format!("{none} for N ({rest}"),
        _ => status,
    }
}

#[test]
fn the_status_has_each_state_and_all_counts() {
    let Here { broker, session, mut publisher } = send_here(QUICK, &["--retry", "forever"], 2);
    let none_confirmed = "sent 2, confirmed 0, in doubt 2, reconnections 0";
    assert_eq!(status(&publisher, &broker), format!("broker BROKER, {none_confirmed}"));
    session.block("low on memory");
    act_until(&mut publisher, is_blocked);
    assert_eq!(
        status(&publisher, &broker),
        format!("broker BROKER (blocked: low on memory), {none_confirmed}")
    );
    session.unblock();
    session.ack(1, false);
    act_until(&mut publisher, |publisher| publisher.counts().done() == 1);
    let one_confirmed = "sent 2, confirmed 1, in doubt 1, reconnections";
    assert_eq!(status(&publisher, &broker), format!("broker BROKER, {one_confirmed} 0"));
    broker.go_down();
    session.cut();
    act_until(&mut publisher, |publisher| publisher.session().is_none());
    assert_eq!(
        status(&publisher, &broker),
        format!("broker none for N (trying until there is one), {one_confirmed} 0")
    );
    broker.come_back();
    act_until(&mut publisher, |publisher| hold(publisher).is_some());
    assert_eq!(
        status(&publisher, &broker),
        format!("broker BROKER (holding messages back), {one_confirmed} 1")
    );
    act_until(&mut publisher, Publisher::is_ready);
    assert_eq!(status(&publisher, &broker), format!("broker BROKER, {one_confirmed} 1"));
}

#[test]
fn the_status_has_the_time_left_to_reconnect() {
    let Here { broker, session, mut publisher } = send_here(QUICK, &["--retry", "1h"], 1);
    broker.go_down();
    session.cut();
    act_until(&mut publisher, |publisher| publisher.session().is_none());
    let status = status(&publisher, &broker);
    assert!(status.starts_with("broker none for N (trying for 59m "), "{status}");
}

#[test]
fn without_confirms_the_status_has_no_confirmed_count() {
    let Here { broker, publisher, .. } = send_here(QUICK, &["--no-confirm"], 1);
    let expected = "broker BROKER, sent 1, in doubt 1, reconnections 0";
    assert_eq!(status(&publisher, &broker), expected);
}

#[test]
fn with_a_spool_the_status_has_its_counts() {
    let (broker, dir) = (ScriptedBroker::start(), TempDir::new().expect("a directory"));
    broker.go_down();
    let path = dir.path().to_str().expect("UTF-8");
    let mut publisher = lines_publisher(QUICK, &broker, &["--spool", path]);
    publisher.counts().add_read(3);
    publisher.publish(numbered(1..=3)).expect("no end");
    let counts = "sent 0, confirmed 0, in doubt 0, in the spool 3, dropped 0, reconnections 0";
    let none = "broker none for N (trying until there is one)";
    assert_eq!(status(&publisher, &broker), format!("{none}, {counts}"));
    broker.come_back();
    act_until(&mut publisher, |publisher| publisher.counts().sent() == 3);
    let counts = "sent 3, confirmed 0, in doubt 0, in the spool 3, dropped 0, reconnections 0";
    assert_eq!(status(&publisher, &broker), format!("broker BROKER, {counts}"));
}
