//! Whatever is in a file of a spool: each sound entry is found, and nothing else is taken for an entry.
//!
//! An input is the bytes before an entry and after it; the entry in between has to be found.
#![no_main]

#[path = "../../crates/emit-log/src/spool/entry.rs"]
#[allow(dead_code)]
mod entry;

use entry::{Decoded, Entry, FILE_HEADER, FileHeader, decode, decode_file_header, file_header};
use libfuzzer_sys::fuzz_target;
use logs_common::wire::Packing;

fuzz_target!(|input: &[u8]| {
    if let FileHeader::Known(records) = decode_file_header(input) {
        assert_eq!(file_header(records), input[..FILE_HEADER]);
    }
    for start in 0..input.len() {
        match decode(&input[start..]) {
            Decoded::Whole(entry) => check_encoded(entry, &input[start..]),
            Decoded::Part(length) => assert!(length > input.len() - start),
            Decoded::Damaged => {}
        }
    }

    let [packing, cut, body @ ..] = input else { return };
    let packing = [Packing::Single, Packing::Lines, Packing::Nul][usize::from(packing % 3)];
    let number = u64::from(*cut);
    let entry = Entry { run: !number, number, timestamp: number << 56, packing, body };
    let mut bytes = Vec::new();
    entry.encode(&mut bytes);
    assert_eq!(decode(&bytes), Decoded::Whole(entry));
    let part = usize::from(*cut) % bytes.len();
    assert!(matches!(decode(&bytes[..part]), Decoded::Part(length) if length > part));
    // Any single byte that is not as it was is noticed.
    bytes[part] ^= 1 << (cut % 8);
    assert!(!matches!(decode(&bytes), Decoded::Whole(_)));
});

/// Two successive entries do not overlap in their bytes, as each is exactly what it encodes to.
fn check_encoded(entry: Entry<'_>, bytes: &[u8]) {
    let mut encoded = Vec::new();
    entry.encode(&mut encoded);
    assert!(bytes.starts_with(&encoded));
}
