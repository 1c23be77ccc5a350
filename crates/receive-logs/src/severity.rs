//! The severity that a message begins with, in colour.

use anstyle::{AnsiColor, Style};

/// Colours the severity word at the start of a message, if there is a word like that, in `out` from
/// `start` on. Quotes and brackets may stand before the word: `"[WARN] disk is full"`.
pub fn color(out: &mut Vec<u8>, start: usize) {
    let message = &out[start..];
    let opening = message.iter().take(2).take_while(|byte| matches!(byte, b'"' | b'[')).count();
    let message = &message[opening..];
    let is_letter = |byte: &u8| byte.is_ascii_alphanumeric() || !byte.is_ascii() || *byte == b'_';
    let length = message.iter().position(|byte| !is_letter(byte)).unwrap_or(message.len());
    let Some(style) = style_of(&message[..length]) else {
        return;
    };
    let word = start + opening;
    // The later place comes first, so that the earlier place stays where it is.
    out.splice(word + length..word + length, style.render_reset().to_string().into_bytes());
    out.splice(word..word, style.render().to_string().into_bytes());
}

fn style_of(word: &[u8]) -> Option<Style> {
    let color = |color: AnsiColor| color.on_default();
    let style = match word.to_ascii_lowercase().as_slice() {
        b"emerg" | b"emergency" | b"panic" | b"alert" | b"fatal" | b"crit" | b"critical" => {
            color(AnsiColor::Red).bold()
        }
        b"error" | b"err" | b"severe" => color(AnsiColor::Red),
        b"warning" | b"warn" => color(AnsiColor::Yellow),
        b"notice" => color(AnsiColor::Cyan),
        b"info" => color(AnsiColor::Green),
        b"debug" => color(AnsiColor::Blue),
        b"trace" | b"verbose" => Style::new().dimmed(),
        _ => return None,
    };
    Some(style)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn colored(message: &str) -> String {
        let mut out = b"> ".to_vec();
        out.extend(message.bytes());
        color(&mut out, 2);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_first_word_is_coloured_if_it_is_a_severity() {
        assert_eq!(colored("error: no"), "> \x1b[31merror\x1b[0m: no");
        assert_eq!(colored("\"[WARN] hm\""), "> \"[\x1b[33mWARN\x1b[0m] hm\"");
        assert_eq!(colored("Info"), "> \x1b[32mInfo\x1b[0m");
        assert_eq!(colored("\"crit\""), "> \"\x1b[1m\x1b[31mcrit\x1b[0m\"");
    }

    #[test]
    fn other_words_are_left_alone() {
        for message in ["", "\"\"", "no error", "errors: 2", "infoä", "warn_once", "[[[info", "7"]
        {
            assert_eq!(colored(message), format!("> {message}"));
        }
    }
}
