//! Additions to the `connection.start-ok` of amiquip, which has no options for them.

use crate::frame::{HEADER, METHOD};
use crate::method::START_OK;

/// The `connection.start-ok` frame that amiquip wrote, with two additions: the name under which the broker
/// lists the connection, and the capability `authentication_failure_close`. With that the broker answers a
/// refused login with a reason, at once, instead of a silent end three seconds later. `None` if
/// `frame` is another frame.
pub fn extend_start_ok(frame: &[u8], connection_name: &str) -> Option<Vec<u8>> {
    const TABLE: usize = HEADER + START_OK.len();
    const CAPABILITIES: &[u8] = b"\x0ccapabilitiesF";

    if frame.first() != Some(&METHOD) || frame.get(HEADER..TABLE) != Some(&START_OK) {
        return None;
    }
    let mut extended = frame.to_vec();
    // The later place first, so that the earlier does not move.
    let capabilities = CAPABILITIES.len()
        + frame.windows(CAPABILITIES.len()).position(|bytes| bytes == CAPABILITIES)?;
    let added = insert(&mut extended, capabilities, b"\x1cauthentication_failure_closet\x01")?;
    grow(&mut extended, TABLE, added)?;

    let length = (connection_name.len() as u32).to_be_bytes();
    let name = [&length, connection_name.as_bytes()].concat();
    let name = field("connection_name", b'S', &name);
    let added = added + insert(&mut extended, TABLE, &name)?;
    grow(&mut extended, HEADER - 4, added)?;
    Some(extended)
}

/// An entry of a table: name, type and value.
fn field(name: &str, kind: u8, value: &[u8]) -> Vec<u8> {
    [&[name.len() as u8], name.as_bytes(), &[kind], value].concat()
}

/// Puts an entry at the start of the table whose 4-byte size is at `at`; returns its length.
fn insert(frame: &mut Vec<u8>, at: usize, entry: &[u8]) -> Option<usize> {
    grow(frame, at, entry.len())?;
    frame.splice(at + 4..at + 4, entry.iter().copied());
    Some(entry.len())
}

/// Adds to the 4-byte size at `at`.
fn grow(frame: &mut [u8], at: usize, by: usize) -> Option<()> {
    let size = frame.get_mut(at..)?.first_chunk_mut()?;
    *size = u32::from_be_bytes(*size).checked_add(by as u32)?.to_be_bytes();
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `start-ok` frame with one capability, as far as `extend_start_ok` looks at it.
    fn start_ok() -> Vec<u8> {
        let capabilities = b"\x12connection.blockedt\x01";
        let mut table = b"\x0ccapabilitiesF".to_vec();
        table.extend((capabilities.len() as u32).to_be_bytes());
        table.extend(capabilities);
        let mut payload = START_OK.to_vec();
        payload.extend((table.len() as u32).to_be_bytes());
        payload.extend(table);
        payload.extend(b"\x05PLAIN");
        let mut frame = vec![METHOD, 0, 0];
        frame.extend((payload.len() as u32).to_be_bytes());
        frame.extend(payload);
        frame.push(0xce);
        frame
    }

    fn size_at(frame: &[u8], at: usize) -> usize {
        u32::from_be_bytes(frame[at..at + 4].try_into().unwrap()) as usize
    }

    #[test]
    fn an_extended_start_ok_has_consistent_sizes() {
        let frame = extend_start_ok(&start_ok(), "emit-log").unwrap();
        assert_eq!(size_at(&frame, 3) + 8, frame.len());
        let table_end = 15 + size_at(&frame, 11);
        assert_eq!(&frame[table_end..], b"\x05PLAIN\xce");
        let named = b"\x0fconnection_nameS\x00\x00\x00\x08emit-log";
        assert!(frame[15..].starts_with(named));
        let capabilities = 15 + named.len() + 14;
        assert_eq!(capabilities + 4 + size_at(&frame, capabilities), table_end);
        assert!(frame[capabilities + 4..].starts_with(b"\x1cauthentication_failure_closet\x01"));
    }

    #[test]
    fn other_bytes_are_not_taken_for_a_start_ok() {
        assert_eq!(extend_start_ok(b"AMQP\x00\x00\x09\x01", "x"), None);
        assert_eq!(extend_start_ok(b"", "x"), None);
        for length in 0..33 {
            assert_eq!(extend_start_ok(&start_ok()[..length], "x"), None);
        }
        for size in [3, 11, 29] {
            let mut frame = start_ok();
            frame[size..size + 4].fill(0xff);
            assert_eq!(extend_start_ok(&frame, "x"), None);
        }
    }
}
