//! Lost connections and outages.

use super::*;

#[test]
fn unconfirmed_messages_are_sent_again_in_order() {
    for end in ENDS {
        let (broker, session, run) = send(&[], numbered(1..=4));
        session.ack(3, false);
        session.ack(1, false);
        run.reaches("2 confirmed, 2 in doubt");
        end(session);
        let session = accept(&broker, &["2", "4"]);
        run.reaches("2 confirmed, 2 in doubt");
        session.ack(2, true);
        session.expect_close();
        run.succeeds_with("4 confirmed, 0 in doubt");
    }
}

#[test]
fn a_session_may_be_lost_while_messages_are_sent_again() {
    for end in ENDS {
        let broker = ScriptedBroker::start();
        let run = Run::start(&broker, &[], numbered(1..=3));
        for confirmed in 0..3 {
            let left: Vec<_> = (1 + confirmed..=3).map(|number| number.to_string()).collect();
            let session = accept(&broker, &left);
            session.ack(1, false);
            run.reaches(&format!("{} confirmed, {} in doubt", confirmed + 1, 2 - confirmed));
            end(session);
        }
        run.succeeds_with("3 confirmed, 0 in doubt");
    }
}

#[test]
fn a_publisher_retries_until_the_broker_returns() {
    let (broker, session, run) = send(&["--retry", "forever"], numbered(1..=2));
    broker.go_down();
    session.cut();
    broker.wait_for_attempts(3);
    broker.come_back();
    let session = accept(&broker, &["1", "2"]);
    session.ack(2, true);
    run.succeeds_with("2 confirmed, 0 in doubt");
}

#[test]
fn a_broker_that_does_not_return_in_time_ends_the_publisher() {
    let (broker, session, run) = send(&["--retry", "50ms"], numbered(1..=3));
    session.ack(1, false);
    run.reaches("1 confirmed, 2 in doubt");
    broker.go_down();
    session.cut();
    let text = run.outcome().unwrap_err();
    assert!(text.starts_with("1 confirmed, 2 in doubt: log in to "), "{text}");
}

#[test]
fn no_message_is_sent_in_a_session_lost_during_a_hold() {
    for end in ENDS {
        let holding = Timings { time_to_subscribe: HOUR, ..QUICK };
        let Here { broker, session, mut publisher } = send_here(holding, &[], 2);
        session.cut();
        act_until(&mut publisher, |publisher| hold(publisher).is_some());
        let first = hold(&publisher);
        end(broker.accept());
        act_until(&mut publisher, |publisher| hold(publisher) > first);
        let session = broker.accept();
        drop(publisher);
        assert_eq!(session.publishes().count(), 0);
    }
}

#[test]
fn receivers_have_time_to_return_before_a_repetition() {
    let holding = Timings { time_to_subscribe: Duration::from_millis(200), ..QUICK };
    let Here { broker, session, publisher } = send_here(holding, &[], 2);
    let lost = Instant::now();
    session.cut();
    let run = Run::finish(publisher);
    let session = accept(&broker, &["1", "2"]);
    assert!(lost.elapsed() > holding.time_to_subscribe);
    session.ack(2, true);
    run.succeeds_with("2 confirmed, 0 in doubt");
}

#[test]
fn a_late_first_broker_starts_a_hold() {
    for durable in [false, true] {
        let broker = ScriptedBroker::start();
        broker.go_down();
        broker.set_exchange(durable);
        let holding = Timings { time_to_subscribe: Duration::from_millis(200), ..QUICK };
        let options = &["--retry", "forever"];
        let (run, back) = thread::scope(|scope| {
            let run = scope.spawn(|| Run::start_with(holding, &broker, options, numbered(1..=1)));
            broker.wait_for_attempts(1);
            let back = Instant::now();
            broker.come_back();
            (run.join().expect("no panic"), back)
        });
        let _refused = durable.then(|| broker.accept());
        let session = accept(&broker, &["1"]);
        assert!(back.elapsed() > holding.time_to_subscribe);
        session.ack(1, false);
        run.succeeds_with("1 confirmed, 0 in doubt");
    }
}

#[test]
fn a_stop_is_noticed_during_an_outage() {
    let pausing = Timings { first_delay: HOUR, longest_delay: HOUR, ..QUICK };
    let Here { session, mut publisher, .. } = send_here(pausing, &["--retry", "forever"], 1);
    session.cut();
    act_until(&mut publisher, |publisher| publisher.counts().outage().is_some());
    let (sender, stop) = Mailbox::open().unwrap();
    let stopping = thread::spawn(move || sender.send(15));
    publisher.wait(None, Some(&stop), None).expect("a stop");
    assert_eq!(stop.try_recv(), Some(15));
    stopping.join().expect("no panic");
    assert_eq!(publisher.counts().to_string(), "0 confirmed, 1 in doubt");
    assert!(!publisher.is_ready());
}

#[test]
fn an_outage_ends_when_messages_are_sent_again() {
    let Here { broker, session, mut publisher } = send_here(QUICK, &["--retry", "1h"], 1);
    let counts = publisher.counts();
    assert!(counts.outage().is_none());
    session.cut();
    act_until(&mut publisher, |publisher| hold(publisher).is_some());
    let outage = counts.outage().expect("an outage until messages are sent");
    assert_eq!(outage.until, Some(outage.since + HOUR));
    act_until(&mut publisher, Publisher::is_ready);
    assert!(counts.outage().is_none());
    let session = accept(&broker, &["1"]);
    session.ack(1, false);
    Run::finish(publisher).succeeds_with("1 confirmed, 0 in doubt");
}

#[test]
fn an_outage_may_begin_during_an_immediate_reconnect() {
    let Here { broker, session, mut publisher } = send_here(QUICK, &["--retry", "forever"], 0);
    publisher.publish([batch(1, "a\nb")]).expect("publish");
    expect(&session, &["a\nb"]);
    broker.go_down();
    too_large(&session, 3, 2);
    let counts = publisher.counts();
    act_until(&mut publisher, |_| counts.outage().is_some());
    assert!(counts.outage().is_some_and(|outage| outage.until.is_none()));
    broker.come_back();
    let run = Run::finish(publisher);
    let session = accept(&broker, &["a", "b"]);
    session.ack(2, true);
    session.expect_close();
    run.succeeds_with("2 confirmed, 0 in doubt");
    assert!(counts.outage().is_none());
}

#[test]
fn a_publisher_without_messages_finishes_without_a_broker() {
    let Here { broker, session, mut publisher } = send_here(QUICK, &["--retry", "forever"], 1);
    session.ack(1, false);
    act_until(&mut publisher, |publisher| publisher.counts().done() == 1);
    broker.go_down();
    session.cut();
    act_until(&mut publisher, |publisher| publisher.counts().outage().is_some());
    Run::finish(publisher).succeeds_with("1 confirmed, 0 in doubt");
}

#[test]
fn an_idle_publisher_has_the_whole_retry_at_each_loss() {
    let Here { broker, session, mut publisher } = send_here(QUICK, &[], 0);
    session.cut();
    act_until(&mut publisher, |publisher| health(publisher).failing_since.is_some());
    act_until(&mut publisher, Publisher::is_ready);
    assert!(health(&publisher).failing_since.is_none());
    let session = broker.accept();
    publisher.publish([single(1, "1")]).expect("publish");
    expect(&session, &["1"]);
    session.cut();
    act_until(&mut publisher, |publisher| health(publisher).failing_since.is_some());
    act_until(&mut publisher, Publisher::is_ready);
    assert!(health(&publisher).failing_since.is_some(), "only a confirm ends the failures");
    let session = accept(&broker, &["1"]);
    session.ack(1, false);
    act_until(&mut publisher, |publisher| health(publisher).failing_since.is_none());
}
