//! The bytes between two words. Colours are not part of them.

/// Kinds of bytes. A gap has a set of them.
pub mod kind {
    /// A byte of a word.
    pub const WORD: u8 = 0;
    /// A space, or other white space.
    pub const SPACE: u8 = 1;
    /// `:` or `=`
    pub const SEPARATOR: u8 = 1 << 1;
    /// `"`
    pub const DOUBLE_QUOTE: u8 = 1 << 2;
    /// `'` or `\`
    pub const QUOTE: u8 = 1 << 3;
    /// `[`
    pub const BRACKET: u8 = 1 << 4;
    /// `{`
    pub const BRACE: u8 = 1 << 5;
    /// Any other byte.
    pub const OTHER: u8 = 1 << 6;
    /// The byte may begin a colour or an escape such as `\t`.
    pub const ESCAPE: u8 = 1 << 7;
}

/// The kinds of each byte.
static KINDS: [u8; 256] = {
    let mut kinds = [kind::OTHER; 256];
    let mut byte = 0;
    while byte < 256 {
        kinds[byte] = match byte as u8 {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'_' | 0x80.. => kind::WORD,
            b' ' | b'\t' | b'\n' | b'\r' | b'\x0c' => kind::SPACE,
            b':' | b'=' => kind::SEPARATOR,
            b'"' => kind::DOUBLE_QUOTE,
            b'\'' => kind::QUOTE,
            b'\\' => kind::QUOTE | kind::ESCAPE,
            b'[' => kind::BRACKET,
            b'{' => kind::BRACE,
            b'\x1b' => kind::OTHER | kind::ESCAPE,
            _ => kind::OTHER,
        };
        byte += 1;
    }
    kinds
};

/// The beginnings of a colour: the bytes themselves, and in JSON.
const INTRODUCERS: [&[u8]; 2] = [b"\x1b[", b"\\u001b["];

/// The bytes between two words.
#[derive(Clone, Copy, Default)]
pub struct Gap {
    kinds: u8,
    /// The number of bytes. An escape such as `\t` is one byte.
    pub length: usize,
    /// The last byte that is not white space; 0 if there is none.
    pub last: u8,
}

impl Gap {
    /// Reads the gap at the beginning of `text`. Returns it with the position of the word after it, or with the length
    /// of the text.
    pub fn read(text: &[u8]) -> (Gap, usize) {
        let mut gap = Gap::default();
        let mut position = 0;
        while let Some(&byte) = text.get(position) {
            match KINDS[usize::from(byte)] {
                kind::WORD => break,
                kind if kind & kind::ESCAPE == 0 => {
                    gap.add(byte, kind);
                    position += 1;
                }
                _ => position += gap.read_escape(&text[position..]),
            }
        }
        (gap, position.min(text.len()))
    }

    /// Reads a colour, or a character that is escaped as in JSON. Returns its length.
    fn read_escape(&mut self, text: &[u8]) -> usize {
        if let Some(length) = length_of_color(text) {
            return length;
        }
        match text {
            [b'\\', b't' | b'n' | b'r', ..] => self.add(b' ', kind::SPACE),
            [b'\\', byte, ..] => match KINDS[usize::from(*byte)] {
                kind::WORD => self.add(0, kind::OTHER),
                kind => self.add(*byte, kind & !kind::ESCAPE),
            },
            _ => {
                self.add(text[0], kind::OTHER);
                return 1;
            }
        }
        2
    }

    fn add(&mut self, byte: u8, kind: u8) {
        self.kinds |= kind;
        self.length += 1;
        if kind != kind::SPACE {
            self.last = byte;
        }
    }

    /// Whether the gap has a byte of one of the `kinds`.
    pub fn has(self, kinds: u8) -> bool {
        self.kinds & kinds != 0
    }

    /// Whether all bytes are of the `kinds`.
    pub fn is_all(self, kinds: u8) -> bool {
        self.kinds & !kinds == 0
    }

    /// Whether the gap is this one byte.
    pub fn is(self, byte: u8) -> bool {
        self.length == 1 && self.last == byte
    }
}

/// The length of the word at the beginning of `text`.
pub fn length_of_word(text: &[u8]) -> usize {
    let is_end = |byte: &u8| KINDS[usize::from(*byte)] != kind::WORD;
    text.iter().position(is_end).unwrap_or(text.len())
}

/// The text after the colours at its beginning.
pub fn skip_colors(mut text: &[u8]) -> &[u8] {
    while let Some(length) = length_of_color(text) {
        text = &text[length..];
    }
    text
}

/// The length of the control sequence at the beginning of `text`: parameters in 0x20 to 0x3f and a final byte in 0x40
/// to 0x7e (ECMA-48, section 5.4). Colours are such sequences (SGR), and the "erase in line" that gcc prints with them.
fn length_of_color(text: &[u8]) -> Option<usize> {
    if !matches!(text, [b'\x1b' | b'\\', ..]) {
        return None;
    }
    let begins = |introducer: &&&[u8]| {
        text.get(..introducer.len()).is_some_and(|start| start.eq_ignore_ascii_case(introducer))
    };
    let start = INTRODUCERS.iter().find(begins)?.len();
    let length = text[start..].iter().position(|byte| !matches!(byte, 0x20..=0x3f))?;
    matches!(text[start + length], 0x40..=0x7e).then_some(start + length + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of bytes of the gap, its last byte, and the rest of the text.
    fn read(text: &str) -> (usize, char, &str) {
        let (gap, length) = Gap::read(text.as_bytes());
        (gap.length, gap.last.into(), &text[length..])
    }

    #[test]
    fn a_gap_ends_at_a_word() {
        assert_eq!(read("] : a"), (4, ':', "a"));
        assert_eq!(read("é"), (0, '\0', "é"));
        assert_eq!(read("  "), (2, '\0', ""));
    }

    #[test]
    fn colors_are_not_part_of_a_gap() {
        for color in ["\x1b[31m", "\x1b[1;38:5:9m", "\x1b[m\x1b[K", r"\u001B[0m"] {
            assert_eq!(read(&format!("[{color}a")), (1, '[', "a"), "{color:?}");
            assert_eq!(read(&format!("{color}[a")), (1, '[', "a"), "{color:?}");
        }
        assert_eq!(read("\x1b[31"), (2, '[', "31"));
        assert_eq!(read("\x1ba"), (1, '\x1b', "a"));
    }

    #[test]
    fn an_escape_is_one_byte() {
        for (text, expected) in [
            (r":\ta", (2, ':', "a")),
            (r#"\"a"#, (1, '"', "a")),
            (r"\\a", (1, '\\', "a")),
            (r"\xff", (1, '\0', "ff")),
            (r"\", (1, '\\', "")),
        ] {
            assert_eq!(read(text), expected, "{text}");
        }
    }
}
