//! Any bytes of a peer, cut into any pieces, become the same messages, and no bytes cause a panic.
//!
//! The first byte of an input controls how the rest is sent (see [`sent`]), the second how many bytes
//! of it arrive at a time.
#![no_main]

use amq_protocol::frame::generation::gen_frame;
use amq_protocol::frame::{AMQPFrame, parse_frame};
use amq_protocol::protocol::AMQPClass;
use amq_protocol::protocol::connection::{AMQPMethod, StartOk};
use amq_protocol::types::{AMQPValue, FieldTable};
use amqp::fuzzing::{extend_start_ok, receive};
use libfuzzer_sys::fuzz_target;

/// The shortest `connection.start`: version, no properties, no mechanisms, no locales.
const START: &[u8] = b"\x01\0\0\0\0\0\x12\0\x0a\0\x0a\0\x09\0\0\0\0\0\0\0\0\0\0\0\0\xce";

fuzz_target!(|input: &[u8]| {
    let [how, chunk, data @ ..] = input else { return };
    let sent = sent(*how, data);
    let received = receive(&sent, 1);
    for chunk in [usize::from(*chunk), sent.len()] {
        let other = receive(&sent, chunk);
        // Which of two faults in a frame is found first depends on the pieces.
        assert_eq!(other.outcome.is_ok(), received.outcome.is_ok());
        assert!(received.outcome.is_err() || other.messages == received.messages);
    }
    assert!(received.messages <= received.frames);

    check_start_ok(&String::from_utf8_lossy(data));
    // Other bytes must not make it panic.
    extend_start_ok(&sent, "name");
});

/// The bytes of a peer. Bit 0 of `how`: they begin with a `connection.start`. Bit 1: whatever ends in
/// 0xCE is a frame of the right size, so that a mutation does not end all in the first frame.
fn sent(how: u8, data: &[u8]) -> Vec<u8> {
    let mut sent = if how & 1 == 0 { Vec::new() } else { START.to_vec() };
    for frame in data.split_inclusive(|byte| how & 2 != 0 && *byte == 0xce) {
        let start = sent.len();
        sent.extend(frame);
        if how & 2 != 0 && frame.len() >= 8 {
            sent[start + 3..start + 7].copy_from_slice(&(frame.len() as u32 - 8).to_be_bytes());
        }
    }
    sent
}

/// The frame of amiquip gets two more entries, and is the same otherwise.
fn check_start_ok(text: &str) {
    let entry = |key: &str, value| FieldTable::from([(key.to_string(), value)]);
    let frame = |capabilities, mut client_properties: FieldTable| {
        client_properties.append(&mut entry("capabilities", AMQPValue::FieldTable(capabilities)));
        let (mechanism, response, locale) = ("PLAIN".into(), text.into(), "en_US".into());
        let start_ok = StartOk { client_properties, mechanism, response, locale };
        AMQPFrame::Method(0, AMQPClass::Connection(AMQPMethod::StartOk(start_ok)))
    };
    let bare = frame(FieldTable::new(), FieldTable::new());
    let mut buffer = vec![0; 100 + text.len()];
    let (_, length) = gen_frame((&mut buffer, 0), &bare).unwrap();
    let extended = extend_start_ok(&buffer[..length], text).unwrap();
    let name = entry("connection_name", AMQPValue::LongString(text.into()));
    let close = entry("authentication_failure_close", AMQPValue::Boolean(true));
    assert_eq!(parse_frame(&extended), Ok((&[][..], frame(close, name))));
}
