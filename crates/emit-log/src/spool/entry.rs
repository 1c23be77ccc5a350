//! The bytes of a spool file: a header, and an entry for each message. `docs/spool.md` describes them.
//!
//! This module depends on no other of the program, so that the fuzzer can take it alone.

use crc32fast::Hasher;
use logs_common::wire::Packing;

/// Bytes before the first entry.
pub const FILE_HEADER: usize = 20;

/// Bytes of an entry before its body.
pub const ENTRY_HEADER: usize = 37;

/// The first bytes of each entry, which no UTF-8 text contains.
pub const MARKER: [u8; 4] = *b"\xf5rec";

const MAGIC: [u8; 7] = *b"emitlog";
const VERSION: u8 = 1;

/// The start of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileHeader {
    /// A file of this format, and how many records were ever written to the spool before this file.
    Known(u64),
    /// A sound header of another version.
    OtherVersion(u8),
    /// Not a sound header.
    Damaged,
}

/// The header of a file before which `records` records were written.
pub fn file_header(records: u64) -> [u8; FILE_HEADER] {
    let mut header = [0; FILE_HEADER];
    header[..7].copy_from_slice(&MAGIC);
    header[7] = VERSION;
    header[8..16].copy_from_slice(&records.to_le_bytes());
    let checksum = crc32fast::hash(&header[..16]);
    header[16..].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// Reads the header at the start of a file.
pub fn decode_file_header(bytes: &[u8]) -> FileHeader {
    let is_sound = bytes.len() >= FILE_HEADER
        && bytes[..7] == MAGIC
        && crc32fast::hash(&bytes[..16]) == u32_at(bytes, 16);
    match is_sound {
        true if bytes[7] == VERSION => FileHeader::Known(u64_at(bytes, 8)),
        true => FileHeader::OtherVersion(bytes[7]),
        false => FileHeader::Damaged,
    }
}

/// A message in a spool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'b> {
    /// The run of emit-log that has read the message.
    pub run: u64,
    /// The number of the first record in its run.
    pub number: u64,
    /// When the message was made, in seconds since 1970.
    pub timestamp: u64,
    /// How the records are joined.
    pub packing: Packing,
    /// The bytes of the message.
    pub body: &'b [u8],
}

/// What the bytes at a place of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded<'b> {
    /// A sound entry.
    Whole(Entry<'b>),
    /// The start of an entry of this many bytes, if the entry is sound.
    Part(usize),
    /// No sound entry.
    Damaged,
}

impl Entry<'_> {
    /// Bytes of the entry in a file.
    pub fn length(&self) -> usize {
        ENTRY_HEADER + self.body.len()
    }

    /// Appends the bytes of the entry.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let packing = match self.packing {
            Packing::Single => 0,
            Packing::Lines => 1,
            Packing::Nul => 2,
        };
        out.extend(MARKER);
        out.extend((self.body.len() as u32).to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.run.to_le_bytes());
        out.extend(self.number.to_le_bytes());
        out.extend(self.timestamp.to_le_bytes());
        out.push(packing);
        out.extend(self.body);
        let checksum = checksum(&out[start..]).to_le_bytes();
        out[start + 8..start + 12].copy_from_slice(&checksum);
    }
}

/// Decodes the entry at the start of `bytes`.
pub fn decode(bytes: &[u8]) -> Decoded<'_> {
    let known = bytes.len().min(MARKER.len());
    if bytes[..known] != MARKER[..known] {
        return Decoded::Damaged;
    }
    if bytes.len() < ENTRY_HEADER {
        return Decoded::Part(ENTRY_HEADER);
    }
    let length = ENTRY_HEADER + u32_at(bytes, 4) as usize;
    let Some(bytes) = bytes.get(..length) else {
        return Decoded::Part(length);
    };
    let packing = match bytes[36] {
        0 => Packing::Single,
        1 => Packing::Lines,
        2 => Packing::Nul,
        _ => return Decoded::Damaged,
    };
    if checksum(bytes) != u32_at(bytes, 8) {
        return Decoded::Damaged;
    }
    Decoded::Whole(Entry {
        run: u64_at(bytes, 12),
        number: u64_at(bytes, 20),
        timestamp: u64_at(bytes, 28),
        packing,
        body: &bytes[ENTRY_HEADER..],
    })
}

/// The checksum of an entry covers all but the marker and the checksum.
fn checksum(entry: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(&entry[4..8]);
    hasher.update(&entry[12..]);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at + 4)) << 32 | u64::from(u32_at(bytes, at))
}
