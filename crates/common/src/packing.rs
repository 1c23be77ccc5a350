//! Several records in one message: the wire format that both tools agree on.
//!
//! A message whose property `type` is `lines` holds records joined by newlines, one of `records`
//! holds records joined by NUL. Any other message is one record, whatever its bytes.

use std::iter;

use memchr::memchr_iter;

/// How records are put into a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// The message is the record.
    Single,
    /// Records joined by newlines.
    Lines,
    /// Records joined by NUL.
    Nul,
}

impl Packing {
    /// For records that end in `separator`.
    pub fn separated_by(separator: u8) -> Packing {
        match separator {
            b'\0' => Packing::Nul,
            _ => Packing::Lines,
        }
    }

    /// The packing that the property `type` of a message stands for.
    pub fn of(message_type: Option<&str>) -> Packing {
        match message_type {
            Some("lines") => Packing::Lines,
            Some("records") => Packing::Nul,
            _ => Packing::Single,
        }
    }

    /// The property `type` that tells of it.
    pub fn message_type(self) -> Option<&'static str> {
        match self {
            Packing::Single => None,
            Packing::Lines => Some("lines"),
            Packing::Nul => Some("records"),
        }
    }

    /// The records in the body of a message, at least one.
    pub fn records(self, body: &[u8]) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.separators(body).chain(iter::once(body.len())).map(move |end| {
            let record = &body[start..end];
            start = end + 1;
            record
        })
    }

    /// How many records there are.
    pub fn count(self, body: &[u8]) -> u64 {
        self.separators(body).count() as u64 + 1
    }

    /// What stands between two records.
    pub fn separator(self) -> Option<u8> {
        match self {
            Packing::Single => None,
            Packing::Lines => Some(b'\n'),
            Packing::Nul => Some(b'\0'),
        }
    }

    /// Where one record ends and another begins.
    fn separators(self, body: &[u8]) -> impl Iterator<Item = usize> {
        self.separator().map(|separator| memchr_iter(separator, body)).into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(message_type: Option<&str>, body: &'static [u8]) -> Vec<&'static [u8]> {
        let packing = Packing::of(message_type);
        let records: Vec<_> = packing.records(body).collect();
        assert_eq!(packing.count(body), records.len() as u64);
        records
    }

    #[test]
    fn the_type_of_a_message_tells_how_to_take_it_apart() {
        assert_eq!(records(None, b"a\nb\0"), [b"a\nb\0"]);
        assert_eq!(records(Some("greeting"), b"a\nb"), [b"a\nb"]);
        assert_eq!(records(Some("lines"), b"a\n\nb\0c\n"), [&b"a"[..], b"", b"b\0c", b""]);
        assert_eq!(records(Some("records"), b"a\nb\0c"), [&b"a\nb"[..], b"c"]);
        assert_eq!(records(Some("lines"), b""), [b""]);
        assert_eq!(records(None, b""), [b""]);
    }

    #[test]
    fn each_packing_is_told_by_its_type() {
        for packing in [Packing::Single, Packing::Lines, Packing::Nul] {
            assert_eq!(Packing::of(packing.message_type()), packing);
        }
    }
}
