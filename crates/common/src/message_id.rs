//! The property `message_id` of what `emit-log --lines` publishes, by which receivers see what is
//! missing and what comes twice.

use std::fmt::Write;

/// `emit-log/RUN/NUMBER`: RUN has 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageId {
    /// One run of the program; drawn at random.
    pub run: u64,
    /// The number of the first record in the message, counted from 1 within the run.
    pub number: u64,
}

impl MessageId {
    /// Reads one; `None` for what another program has put there.
    pub fn parse(text: &str) -> Option<MessageId> {
        let (run, number) = text.strip_prefix("emit-log/")?.split_at_checked(16)?;
        let run = run.bytes().try_fold(0, |run, byte| Some(run << 4 | hex_digit(byte)?))?;
        let number = number.strip_prefix('/').filter(|number| !number.starts_with('+'))?;
        // More than any run can have, so that counting on from it is safe.
        let number = number.parse().ok().filter(|number| *number <= i64::MAX as u64)?;
        Some(MessageId { run, number })
    }
}

/// The value of a digit as it is written below.
fn hex_digit(digit: u8) -> Option<u64> {
    match digit {
        b'0'..=b'9' => Some((digit - b'0').into()),
        b'a'..=b'f' => Some((digit - b'a' + 10).into()),
        _ => None,
    }
}

impl From<MessageId> for String {
    fn from(id: MessageId) -> String {
        const LONGEST: usize = "emit-log/0123456789abcdef/9223372036854775807".len();
        let mut text = String::with_capacity(LONGEST);
        // A string takes whatever is written.
        let _ = write!(text, "emit-log/{:016x}/{}", id.run, id.number);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        for id in [
            MessageId { run: 0, number: 1 },
            MessageId { run: 0xfedc_ba98_7654_3210, number: i64::MAX as u64 },
        ] {
            assert_eq!(MessageId::parse(&String::from(id)), Some(id));
        }
    }

    #[test]
    fn other_texts_are_none() {
        for text in [
            "",
            "7",
            "emit-log/1/2",
            "emit-log/0123456789abcdef/",
            "emit-log/0123456789abcdef/+2",
            "emit-log/0123456789ABCDEF/2",
            "emit-log/+123456789abcdef/2",
            "emit-log/0123456789abcdef/9223372036854775808",
            "emit-log/0123456789abcdef/18446744073709551616",
            "emit-log/0123456789abcdef/1/2",
            "Emit-log/0123456789abcdef/1",
        ] {
            assert_eq!(MessageId::parse(text), None, "{text}");
        }
    }
}
