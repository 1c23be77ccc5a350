//! Escapes bytes from the network, so that no message can control the terminal or imitate output of this program.

use std::io::{self, Write};
use std::mem;

/// Replaces line breaks and other control characters with spaces, because an error may contain text from the network.
pub fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// Writes the message in quotes, on a single line, as both tools print messages. `"` and `\` are
/// escaped too, so that the quotes show where the message begins and ends.
///
/// # Errors
///
/// Those of `out`.
pub fn write_quoted(out: &mut impl Write, message: &[u8]) -> io::Result<()> {
    out.write_all(b"\"")?;
    write_unquoted(out, message)?;
    out.write_all(b"\"")
}

/// Writes the text escaped as in quotes, without the quotes.
///
/// # Errors
///
/// Those of `out`.
pub fn write_unquoted(out: &mut impl Write, text: &[u8]) -> io::Result<()> {
    Escape::new(Quotes::Escaped, Target::Pipe).write(out, text)
}

/// Writes the message with all invisible characters escaped.
///
/// # Errors
///
/// Those of `out`.
pub fn write_visible(out: &mut impl Write, message: &[u8]) -> io::Result<()> {
    Escape::new(Quotes::Plain, Target::Pipe).write(out, message)
}

/// Whether `"` and `\` are escaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quotes {
    /// The text stands in quotes.
    Escaped,
    /// The text stands for itself.
    Plain,
}

/// Where the text is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Programs read the text: the same bytes have the same form everywhere.
    Pipe,
    /// A person reads the text on a terminal. Tabs, spaces of all widths, and the joiners inside words and emoji are
    /// unchanged.
    Terminal(Colors),
}

/// The colours that a text has of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colors {
    /// The colours are unchanged. [`Escape::end`] resets them.
    Shown,
    /// The colours are removed.
    Removed,
}

/// Escapes a text that is written in pieces. Visible characters are unchanged, bytes that are not UTF-8 become `\xNN`,
/// and the rest has Rust's escapes: `\n`, `\u{202e}`.
pub struct Escape {
    quotes: Quotes,
    target: Target,
    /// The last character, if a mark or a joiner after it is visible together with it.
    base: Option<char>,
    /// Whether a colour of the text is in effect.
    is_colored: bool,
}

impl Escape {
    /// An escape for one text.
    pub fn new(quotes: Quotes, target: Target) -> Escape {
        Escape { quotes, target, base: None, is_colored: false }
    }

    /// Writes the next piece of the text.
    ///
    /// # Errors
    ///
    /// Those of `out`.
    pub fn write(&mut self, out: &mut impl Write, piece: &[u8]) -> io::Result<()> {
        for chunk in piece.utf8_chunks() {
            let mut rest = chunk.valid();
            while !rest.is_empty() {
                let run = rest.bytes().position(|byte| !self.is_plain(byte)).unwrap_or(rest.len());
                if run > 0 {
                    out.write_all(&rest.as_bytes()[..run])?;
                    let last = char::from(rest.as_bytes()[run - 1]);
                    self.base = Some(last).filter(char::is_ascii_alphanumeric);
                    rest = &rest[run..];
                }
                if let Some(character) = rest.chars().next() {
                    let length = self.write_character(out, character, rest)?;
                    rest = &rest[length..];
                }
            }
            for byte in chunk.invalid() {
                let digit = |value: u8| b"0123456789abcdef"[usize::from(value)];
                out.write_all(&[b'\\', b'x', digit(byte >> 4), digit(byte & 15)])?;
                self.base = None;
            }
        }
        Ok(())
    }

    /// Ends the text: resets its colours.
    ///
    /// # Errors
    ///
    /// Those of `out`.
    pub fn end(&mut self, out: &mut impl Write) -> io::Result<()> {
        match mem::take(&mut self.is_colored) {
            true => out.write_all(b"\x1b[0m"),
            false => Ok(()),
        }
    }

    fn is_plain(&self, byte: u8) -> bool {
        match byte {
            b'"' | b'\\' => self.quotes == Quotes::Plain,
            b'\t' => self.target != Target::Pipe,
            _ => matches!(byte, b' '..=b'~'),
        }
    }

    /// Writes the first `character` of `text`, which is not plain, or the colour that it begins. Returns the number of
    /// bytes written.
    fn write_character(
        &mut self,
        out: &mut impl Write,
        character: char,
        text: &str,
    ) -> io::Result<usize> {
        if let Target::Terminal(colors) = self.target
            && let Some(length) = length_of_color(text.as_bytes())
        {
            if colors == Colors::Shown {
                out.write_all(&text.as_bytes()[..length])?;
                self.is_colored = true;
            }
            return Ok(length);
        }
        let length = character.len_utf8();
        let (this, next) = text.split_at(length);
        if self.is_shown(character, next) {
            out.write_all(this.as_bytes())?;
            self.base = Some(character);
        } else {
            write!(out, "{}", character.escape_debug())?;
            self.base = None;
        }
        Ok(length)
    }

    /// Whether a character is visible here, between the characters already written and the `next` ones.
    fn is_shown(&self, character: char, next: &str) -> bool {
        let is_terminal = self.target != Target::Pipe;
        match character {
            ZERO_WIDTH_NON_JOINER | ZERO_WIDTH_JOINER => {
                let is_joined = |neighbour: char| !neighbour.is_ascii() && is_visible(neighbour);
                is_terminal && self.base.is_some_and(is_joined) && next.starts_with(is_joined)
            }
            _ if is_mark(character) => self.base.is_some(),
            _ => {
                !character.is_ascii()
                    && (is_visible(character) || is_terminal && is_space(character))
            }
        }
    }
}

const ZERO_WIDTH_NON_JOINER: char = '\u{200c}';
const ZERO_WIDTH_JOINER: char = '\u{200d}';

/// Whether a character is visible after a letter. It must be assigned by Unicode, and be neither a control character
/// nor a format character such as a bidirectional override.
pub fn is_visible(character: char) -> bool {
    matches!(character, ' '..='~') || character.is_alphanumeric() || {
        let mut text = [b'a'; 5];
        let length = character.encode_utf8(&mut text[1..]).len();
        str::from_utf8(&text[..=length]).is_ok_and(|text| text.escape_debug().eq(text.chars()))
    }
}

/// Whether a character is visible only together with the character before it.
fn is_mark(character: char) -> bool {
    !character.is_ascii() && character.escape_debug().len() > 1 && is_visible(character)
}

/// Whether a character is a space of any width, but no line break.
fn is_space(character: char) -> bool {
    character.is_whitespace()
        && !character.is_control()
        && !matches!(character, '\u{2028}' | '\u{2029}')
}

/// The length of the colour at the beginning of `text`: a control sequence of digits, `;` and `:` that ends in `m`
/// (SGR: ECMA-48, section 8.3.117).
pub fn length_of_color(text: &[u8]) -> Option<usize> {
    let parameters = text.strip_prefix(b"\x1b[")?;
    let length = parameters.iter().position(|byte| !matches!(byte, b'0'..=b'9' | b';' | b':'))?;
    (parameters[length] == b'm').then_some(b"\x1b[".len() + length + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quoted(message: &[u8]) -> String {
        let mut out = Vec::new();
        write_quoted(&mut out, message).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn visible(message: &[u8]) -> String {
        let mut out = Vec::new();
        write_visible(&mut out, message).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn text_is_shown_as_it_is() {
        for text in ["", "info: hi", "it's 5 °C", "日本語", "cafe\u{301}", "a~ b", "\u{1f600}"]
        {
            assert_eq!(quoted(text.as_bytes()), format!("\"{text}\""));
            assert_eq!(visible(text.as_bytes()), text);
        }
    }

    #[test]
    fn invisible_characters_are_escaped() {
        for (bytes, escaped) in [
            (&b"a\nb\r\tc"[..], r"a\nb\r\tc"),
            (b"\x1b[31mred\x07\0\x7f", r"\u{1b}[31mred\u{7}\0\u{7f}"),
            (
                "\u{202e}evil\u{200b}\u{feff}\u{85}\u{2028}".as_bytes(),
                r"\u{202e}evil\u{200b}\u{feff}\u{85}\u{2028}",
            ),
            (b"caf\xe9 \xff\xfe \xe2\x82", r"caf\xe9 \xff\xfe \xe2\x82"),
        ] {
            assert_eq!(visible(bytes), escaped);
            assert_eq!(quoted(bytes), format!("\"{escaped}\""));
        }
    }

    #[test]
    fn letters_marks_and_symbols_are_visible() {
        for visible in [' ', '"', '\\', '\'', 'ä', '日', '\u{301}', '°', '\u{1f600}'] {
            assert!(is_visible(visible), "{visible:?}");
        }
        for hidden in ['\n', '\x7f', '\u{9b}', '\u{61c}', '\u{200d}', '\u{2029}', '\u{e0001}'] {
            assert!(!is_visible(hidden), "{hidden:?}");
        }
    }

    #[test]
    fn quotes_and_backslashes_are_escaped_in_quotes_only() {
        assert_eq!(quoted(br#"say "x\n""#), r#""say \"x\\n\"""#);
        assert_eq!(visible(br#"say "x\n""#), r#"say "x\n""#);
    }

    fn on_terminal(message: &[u8], colors: Colors) -> String {
        let mut out = Vec::new();
        let mut escape = Escape::new(Quotes::Escaped, Target::Terminal(colors));
        escape.write(&mut out, message).unwrap();
        escape.end(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_terminal_shows_text_of_all_scripts() {
        for text in [
            "a\tb",
            "\u{3000}全角",
            "5\u{a0}°C",
            "\u{645}\u{6cc}\u{200c}\u{62e}\u{648}\u{627}\u{647}\u{645}",
            "\u{9b0}\u{200d}\u{9cd}\u{9af}",
            "\u{1f469}\u{200d}\u{1f4bb}",
            "\u{2764}\u{fe0f}\u{200d}\u{1f525}",
            "e\u{301}",
        ] {
            assert_eq!(on_terminal(text.as_bytes(), Colors::Removed), text);
        }
    }

    #[test]
    fn a_terminal_is_not_controlled() {
        for (text, escaped) in [
            ("a\u{200d}b", r"a\u{200d}b"),
            ("日\u{200c}", r"日\u{200c}"),
            ("\u{200d}日", r"\u{200d}日"),
            (
                "\u{202e}x\u{2066}\u{200b}\u{feff}\u{2028}",
                r"\u{202e}x\u{2066}\u{200b}\u{feff}\u{2028}",
            ),
            ("\u{9b}31m", r"\u{9b}31m"),
            ("\u{301}", r"\u{301}"),
            ("a\rb\n\x07", r"a\rb\n\u{7}"),
            (
                "\x1b[2J\x1b]0;t\x07\x1b[>4;2m\x1b[?1m\x1b[31",
                r"\u{1b}[2J\u{1b}]0;t\u{7}\u{1b}[>4;2m\u{1b}[?1m\u{1b}[31",
            ),
        ] {
            for colors in [Colors::Shown, Colors::Removed] {
                assert_eq!(on_terminal(text.as_bytes(), colors), escaped);
            }
        }
    }

    #[test]
    fn colors_are_shown_and_reset_or_removed() {
        let text = b"\x1b[1;38:5:9mERROR\x1b[m: no";
        assert_eq!(on_terminal(text, Colors::Shown), "\x1b[1;38:5:9mERROR\x1b[m: no\x1b[0m");
        assert_eq!(on_terminal(text, Colors::Removed), "ERROR: no");
    }

    #[test]
    fn pieces_are_escaped_as_the_whole() {
        let text = "a\u{301}\u{645}\u{200c}\u{62e}";
        let (mut whole, mut pieces) = (Vec::new(), Vec::new());
        let target = Target::Terminal(Colors::Shown);
        Escape::new(Quotes::Plain, target).write(&mut whole, text.as_bytes()).unwrap();
        let mut escape = Escape::new(Quotes::Plain, target);
        for piece in text.split_inclusive(['a', '\u{645}']) {
            escape.write(&mut pieces, piece.as_bytes()).unwrap();
        }
        assert_eq!(pieces, whole);
        assert_eq!(whole, text.as_bytes());
    }

    #[test]
    fn text_from_the_network_stays_on_one_line() {
        assert_eq!(one_line("a\nb\x1b[31m"), "a b [31m");
    }
}
