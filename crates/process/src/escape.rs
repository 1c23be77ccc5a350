//! Escapes bytes from the network, so that no message can control the terminal or imitate output of this program.

use std::io::{self, Write};

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
    write_escaped(out, text, is_plain_in_quotes)
}

/// Writes the message with all invisible characters escaped.
///
/// # Errors
///
/// Those of `out`.
pub fn write_visible(out: &mut impl Write, message: &[u8]) -> io::Result<()> {
    write_escaped(out, message, is_plain)
}

/// Whether a character is visible after a letter. It must be assigned by Unicode, and be neither a control character
/// nor a format character such as a bidirectional override.
pub fn is_visible(character: char) -> bool {
    matches!(character, ' '..='~') || character.is_alphanumeric() || {
        let text = String::from_iter(['a', character]);
        text.escape_debug().eq(text.chars())
    }
}

fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~')
}

fn is_plain_in_quotes(byte: u8) -> bool {
    is_plain(byte) && byte != b'"' && byte != b'\\'
}

/// Writes runs of `plain` bytes as they are, other visible characters too, bytes that are not
/// UTF-8 as `\xNN`, and the rest with Rust's escapes: `\n`, `\u{202e}`.
fn write_escaped(out: &mut impl Write, bytes: &[u8], plain: fn(u8) -> bool) -> io::Result<()> {
    for chunk in bytes.utf8_chunks() {
        let mut rest = chunk.valid();
        while !rest.is_empty() {
            let run = rest.bytes().position(|byte| !plain(byte)).unwrap_or(rest.len());
            // A combining mark is visible only together with the letter before it.
            let letter = usize::from(rest[..run].ends_with(|c: char| c.is_ascii_alphanumeric()));
            let (run, other) = rest.split_at(run - letter);
            out.write_all(run.as_bytes())?;
            let end = other[letter..].find(|c: char| c.is_ascii() && plain(c as u8));
            let (other, next) = other.split_at(end.map_or(other.len(), |end| letter + end));
            write!(out, "{}", other.escape_debug())?;
            rest = next;
        }
        for byte in chunk.invalid() {
            let digit = |value: u8| b"0123456789abcdef"[usize::from(value)];
            out.write_all(&[b'\\', b'x', digit(byte >> 4), digit(byte & 15)])?;
        }
    }
    Ok(())
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

    #[test]
    fn text_from_the_network_stays_on_one_line() {
        assert_eq!(one_line("a\nb\x1b[31m"), "a b [31m");
    }
}
