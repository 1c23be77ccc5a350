//! Whatever a peer sends, in whatever pieces: amiquip can take the bytes that the filter lets through.
//!
//! The first byte of an input says how the rest is sent (see [`sent`]), the second how many bytes
//! of it arrive at a time.
#![no_main]

use std::iter;

use amq_protocol::frame::generation::gen_frame;
use amq_protocol::frame::{AMQPFrame, parse_frame};
use amq_protocol::protocol::AMQPClass;
use amq_protocol::protocol::connection::{AMQPMethod, StartOk};
use amq_protocol::types::{AMQPValue, FieldTable};
use amqp::fuzzing::{FRAME_MAX, extend_start_ok, receive};
use libfuzzer_sys::fuzz_target;

/// The shortest `connection.start`: version, no properties, no mechanisms, no locales.
const START: &[u8] = b"\x01\0\0\0\0\0\x12\0\x0a\0\x0a\0\x09\0\0\0\0\0\0\0\0\0\0\0\0\xce";

/// The brackets in one another in the debug format of a frame: two structs, the 32 tables or arrays
/// that the filter allows, and a value with parts.
const DEEPEST: usize = 2 + 32 + 1;

fuzz_target!(|input: &[u8]| {
    let [how, chunk, data @ ..] = input else { return };
    let sent = sent(*how, data);
    let received = receive(&sent, 1);
    for chunk in [usize::from(*chunk), sent.len()] {
        let other = receive(&sent, chunk);
        assert_eq!(other.outcome, received.outcome);
        assert_eq!(other.closed, received.closed);
        match received.outcome {
            Ok(()) => {
                assert_eq!(other.passed, received.passed);
                assert_eq!(other.messages, received.messages);
            }
            // What comes in one piece with the fault is lost with it.
            Err(_) => assert!(received.passed.starts_with(&other.passed)),
        }
    }

    let mut seen = received.passed.clone();
    if received.outcome.is_ok() {
        seen.extend(&received.pending);
        assert_eq!(seen.len(), sent.len());
    }
    let mut original = &sent[..];
    for frame in frames(&seen) {
        for (at, (old, new)) in iter::zip(original, frame).enumerate() {
            assert!(old == new || is_sanitized(frame, at, *old), "byte {at} of {frame:?}");
        }
        original = &original[frame.len()..];
    }
    frames(&received.passed).for_each(check_parsed);

    // A second filter has no byte to change.
    let again = receive(&received.passed, received.passed.len());
    assert_eq!((again.outcome, again.passed), (Ok(()), received.passed));

    check_start_ok(&String::from_utf8_lossy(data));
    // Of other bytes it is only asked to come back.
    extend_start_ok(&sent, "name");
});

/// The bytes of a peer. Bit 0 of `how`: a `connection.start` comes first. Bit 1: whatever ends in
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

/// Cuts bytes into frames. Those of methods are not too long to become whole in the stream's buffer.
fn frames(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    iter::from_fn(move || {
        let length = bytes.get(3..7).map_or(bytes.len(), |size| {
            let length = u32::from_be_bytes(size.try_into().unwrap()) as usize + 8;
            let is_method = bytes[0] == 1;
            assert!(!is_method || length <= FRAME_MAX as usize, "a frame of {length} bytes");
            length.min(bytes.len())
        });
        bytes.split_off(..length).filter(|frame| !frame.is_empty())
    })
}

/// Whether the filter may have changed this byte: in the heartbeat of tune.
fn is_sanitized(frame: &[u8], at: usize, old: u8) -> bool {
    match (frame, at, frame[at]) {
        ([1, _, _, _, _, _, _, 0, 10, 0, 30, ..], 17 | 18, 0xff) => old == 0,
        _ => false,
    }
}

/// What amiquip can read of the methods does not take the parser deep into the stack.
fn check_parsed(frame: &[u8]) {
    if let ([1, ..], Ok((_, parsed))) = (frame, parse_frame(frame)) {
        let depth = depth(&format!("{parsed:?}"));
        assert!(depth <= DEEPEST, "{depth} levels in {frame:?}");
    }
}

/// How many brackets are in one another, those in strings aside.
fn depth(debug: &str) -> usize {
    let debug = debug.replace(r"\\", "").replace(r#"\""#, "");
    let depths = debug.split('"').step_by(2).flat_map(str::bytes).scan(0, |depth, byte| {
        match byte {
            b'{' | b'[' => *depth += 1,
            b'}' | b']' => *depth -= 1,
            _ => {}
        }
        Some(*depth)
    });
    depths.max().unwrap_or(0)
}

/// What amiquip writes is extended by two entries, and says the same otherwise.
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
