//! Exchanges with the other durability, missing exchanges, and permissions.

use super::*;

#[test]
fn an_exchange_of_the_other_durability_is_declared_as_it_is() {
    for (options, declared) in [(&[][..], [false, true]), (&["--durable"], [true, false])] {
        let broker = ScriptedBroker::start();
        broker.set_exchange(declared[1]);
        let run = Run::start(&broker, options, numbered(1..=2));
        let [_refused, session] = [(); 2].map(|()| broker.accept());
        expect(&session, &["1", "2"]);
        session.ack(2, true);
        session.expect_close();
        run.succeeds_with("2 confirmed, 0 in doubt");
        assert_eq!(broker.declarations(), declared);
    }
}

#[test]
fn a_transient_exchange_that_is_not_permitted_is_declared_durable() {
    for options in [&[][..], &["--no-confirm"]] {
        let broker = ScriptedBroker::start();
        broker.refuse_transient_exchanges();
        let run = Run::start(&broker, options, numbered(1..=2));
        let [_refused, session] = [(); 2].map(|()| broker.accept());
        if !options.is_empty() {
            session.expect_question();
        }
        expect(&session, &["1", "2"]);
        session.ack(2, true);
        assert_eq!(run.outcome(), Ok(()), "{options:?}");
        assert_eq!(broker.declarations(), [false, true]);
    }
}

#[test]
fn without_confirms_the_durability_is_known_before_a_message() {
    let broker = ScriptedBroker::start();
    broker.set_exchange(true);
    let run = Run::start(&broker, &["--no-confirm"], numbered(1..=2));
    let [_refused, session] = [(); 2].map(|()| broker.accept());
    session.expect_question();
    expect(&session, &["1", "2"]);
    session.expect_question();
    session.expect_close();
    run.succeeds_with("2 sent without confirmation, 0 in doubt");
    assert_eq!(broker.declarations(), [false, true]);
}

#[test]
fn the_other_durability_is_found_again_after_a_loss() {
    let broker = ScriptedBroker::start();
    broker.set_exchange(true);
    let run = Run::start(&broker, &[], numbered(1..=2));
    let [_refused, session] = [(); 2].map(|()| broker.accept());
    expect(&session, &["1", "2"]);
    session.cut();
    let [_refused, session] = [(); 2].map(|()| broker.accept());
    expect(&session, &["1", "2"]);
    session.ack(2, true);
    run.succeeds_with("2 confirmed, 0 in doubt");
    assert_eq!(broker.declarations(), [false, true, false, true]);
}

#[test]
fn an_exchange_may_change_its_durability() {
    let broker = ScriptedBroker::start();
    let run = Run::start(&broker, &[], numbered(1..=2));
    for declared in [false, true] {
        let session = accept(&broker, &["1", "2"]);
        other_durability(&session, declared);
    }
    let session = accept(&broker, &["1", "2"]);
    session.ack(2, true);
    run.succeeds_with("2 confirmed, 0 in doubt");
    assert_eq!(broker.declarations(), [false, true, false]);
}

#[test]
fn with_passive_a_missing_exchange_ends_the_publisher() {
    let (_broker, session, run) = send(&["--passive"], numbered(1..=3));
    session.ack(1, false);
    run.reaches("1 confirmed, 2 in doubt");
    session.close_channel(404, NO_EXCHANGE, PUBLISH);
    run.fails_with(&format!(
        "1 confirmed, 2 in doubt: publish to exchange 'logs': {NO_EXCHANGE} (create it, or leave out \
         --passive so that it is declared)"
    ));
}

#[test]
fn a_missing_permission_ends_the_publisher() {
    let (_broker, session, run) = send(&[], numbered(1..=2));
    let text = "ACCESS_REFUSED - access to exchange 'logs' in vhost '/' refused for user 'guest'";
    session.close_channel(403, text, PUBLISH);
    run.fails_with(&format!(
        "0 confirmed, 2 in doubt: publish to exchange 'logs': {text} (give the user the permission: \
         rabbitmqctl set_permissions)"
    ));
}

#[test]
fn a_revoked_permission_is_retried() {
    let (broker, session, run) = send(&["--retry", "forever"], numbered(1..=2));
    session.ack(1, false);
    run.reaches("1 confirmed, 1 in doubt");
    let text = "ACCESS_REFUSED - access to exchange 'logs' in vhost '/' refused for user 'guest'";
    session.close_channel(403, text, PUBLISH);
    accept(&broker, &["2"]).close_channel(403, text, PUBLISH);
    accept(&broker, &["2"]).ack(1, false);
    run.succeeds_with("2 confirmed, 0 in doubt");
}

#[test]
fn the_other_durability_does_not_extend_a_hold() {
    let holding = Timings { time_to_subscribe: HOUR, ..QUICK };
    let Here { broker, session, mut publisher } = send_here(holding, &[], 1);
    session.cut();
    act_until(&mut publisher, |publisher| hold(publisher).is_some());
    let until = hold(&publisher);
    let session = broker.accept();
    other_durability(&session, false);
    act_until(&mut publisher, |publisher| hold(publisher).is_none());
    act_until(&mut publisher, |publisher| hold(publisher).is_some());
    assert_eq!(hold(&publisher), until);
    wait_until("it is declared as durable", || broker.declarations().last() == Some(&true));
}

#[test]
fn the_other_durability_does_not_start_a_hold() {
    let holding = Timings { time_to_subscribe: HOUR, ..QUICK };
    let Here { broker, session, mut publisher } = send_here(holding, &[], 1);
    // As if this session were the first after an outage.
    publisher.session_mut().expect("a session").health.failing_since = Some(Instant::now());
    other_durability(&session, false);
    let run = Run::finish(publisher);
    let session = accept(&broker, &["1"]);
    session.ack(1, false);
    run.succeeds_with("1 confirmed, 0 in doubt");
}

#[test]
fn a_loss_during_the_declaration_starts_a_hold() {
    let holding = Timings { time_to_subscribe: HOUR, ..QUICK };
    let Here { broker, session, mut publisher } = send_here(holding, &["--retry", "forever"], 1);
    broker.go_down();
    other_durability(&session, false);
    act_until(&mut publisher, |publisher| publisher.counts().outage().is_some());
    broker.come_back();
    act_until(&mut publisher, |publisher| hold(publisher).is_some());
    assert!(hold(&publisher).is_some_and(|until| until > Instant::now() + HOUR / 2));
}
