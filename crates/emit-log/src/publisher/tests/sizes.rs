//! Messages that are too large for the broker.

use super::*;

#[test]
fn a_single_too_large_message_is_reported_without_counts() {
    let broker = ScriptedBroker::start();
    let run = Run::publish(connect(QUICK, &broker, &[]), vec![single(1, "large")]);
    let session = accept(&broker, &["large"]);
    too_large(&session, 5, 4);
    let text = too_large_text(5, 4);
    run.fails_with(&format!("publish to exchange 'logs': {text}{TOO_LARGE_HINT}"));
}

#[test]
fn a_too_large_record_ends_it_after_earlier_confirms() {
    for position in 1..=3 {
        let broker = ScriptedBroker::start();
        let mut messages = numbered(1..=3);
        messages[position - 1] = single(position as u64, "large");
        let run = Run::start(&broker, &[], messages);
        let session = broker.accept();
        session.expect_publishes(3);
        too_large(&session, 5, 4);
        let _session = (position > 1).then(|| {
            let session = accept(&broker, &["1", "2"][..position - 1]);
            session.ack(position as u64 - 1, true);
            session
        });
        let (confirmed, not_sent) = (position - 1, 4 - position);
        run.fails_with(&format!(
            "{confirmed} confirmed, 0 in doubt, {not_sent} read and not sent: record {position}: \
             publish to exchange 'logs': {}{TOO_LARGE_HINT}",
            too_large_text(5, 4)
        ));
    }
}

#[test]
fn a_lower_limit_may_reject_an_earlier_record() {
    let (broker, session, run) =
        send(&[], vec![single(1, "a"), single(2, "bbb"), single(3, "large")]);
    too_large(&session, 5, 4);
    let session = accept(&broker, &["a", "bbb"]);
    too_large(&session, 3, 2);
    let session = accept(&broker, &["a"]);
    session.ack(1, false);
    run.fails_with(&format!(
        "1 confirmed, 0 in doubt, 2 read and not sent: record 2: publish to exchange 'logs': {}\
         {TOO_LARGE_HINT}",
        too_large_text(3, 2)
    ));
}

#[test]
fn a_loss_before_a_too_large_record_is_retried() {
    let (broker, session, run) = send(&[], vec![single(1, "a"), single(2, "large")]);
    too_large(&session, 5, 4);
    let session = accept(&broker, &["a"]);
    session.cut();
    let session = accept(&broker, &["a"]);
    session.ack(1, false);
    run.fails_with(&format!(
        "1 confirmed, 0 in doubt, 1 read and not sent: record 2: publish to exchange 'logs': {}\
         {TOO_LARGE_HINT}",
        too_large_text(5, 4)
    ));
}

#[test]
fn a_too_large_batch_and_later_ones_are_split() {
    let (broker, session, run) = send(&[], vec![batch(1, "a\nb\nc\nd"), batch(5, "e\nf\ng")]);
    too_large(&session, 7, 3);
    let session = broker.accept();
    let published = expect(&session, &["a\nb", "c\nd", "e\nf", "g"]);
    assert_eq!(published[3].message_type, None);
    session.ack(4, true);
    session.expect_close();
    run.succeeds_with("7 confirmed, 0 in doubt");
}

#[test]
fn a_batch_larger_than_a_known_limit_is_split_before_it_is_sent() {
    let Here { broker, session, mut publisher } = send_here(QUICK, &[], 0);
    publisher.publish([batch(1, "a\nb")]).expect("publish");
    expect(&session, &["a\nb"]);
    too_large(&session, 3, 2);
    act_until(&mut publisher, |publisher| max_body(publisher) == 2 && publisher.is_ready());
    let split = broker.accept();
    expect(&split, &["a", "b"]);
    publisher.publish([batch(3, "c\nd")]).expect("publish");
    expect(&split, &["c", "d"]);
    split.ack(4, true);
    Run::finish(publisher).succeeds_with("4 confirmed, 0 in doubt");
}

#[test]
fn a_too_large_record_in_a_batch_ends_it_after_earlier_ones() {
    for (body, before, record) in
        [("large\nb\nc", None, 1), ("a\nlarge\nc", Some("a"), 2), ("a\nb\nlarge", Some("a\nb"), 3)]
    {
        let (broker, session, run) = send(&[], vec![batch(1, body), single(4, "d")]);
        too_large(&session, 9, 4);
        let _session = before.map(|before| {
            let session = accept(&broker, &[before]);
            session.ack(1, false);
            session
        });
        run.fails_with(&format!(
            "{} confirmed, 0 in doubt, {} read and not sent: record {record}: publish to exchange \
             'logs': {}{TOO_LARGE_HINT}",
            record - 1,
            5 - record,
            too_large_text(9, 4)
        ));
    }
}

#[test]
fn the_broker_may_lower_its_limit() {
    let (broker, session, run) = send(&[], vec![batch(1, "a\nb\ncccc"), batch(4, "d\ne")]);
    too_large(&session, 8, 4);
    let session = accept(&broker, &["a\nb", "cccc", "d\ne"]);
    session.ack(1, false);
    run.reaches("2 confirmed, 3 in doubt");
    too_large(&session, 4, 2);
    run.fails_with(&format!(
        "2 confirmed, 0 in doubt, 3 read and not sent: record 3: publish to exchange 'logs': {}\
         {TOO_LARGE_HINT}",
        too_large_text(4, 2)
    ));
}

#[test]
fn a_limit_that_no_message_exceeds_ends_the_publisher() {
    let (_broker, session, run) = send(&[], vec![single(1, "a"), batch(2, "b\nc")]);
    session.ack(1, false);
    run.reaches("1 confirmed, 2 in doubt");
    too_large(&session, 9, 8);
    run.fails_with(&format!(
        "1 confirmed, 2 in doubt: publish to exchange 'logs': {}{TOO_LARGE_HINT}",
        too_large_text(9, 8)
    ));
}
