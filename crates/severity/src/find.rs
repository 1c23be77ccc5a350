//! Searches the severity of a line, word by word.

use std::ops::Range;

use crate::Severity;
use crate::gap::{Gap, length_of_word, skip_colors};
use crate::place::Place;

/// The number of bytes at the start of a line in which a severity is searched.
pub const SEARCHED: usize = 512;

/// The number of bytes that [`find`] reads: [`SEARCHED`], a word that begins there, and the bytes after the word.
pub const BEGINNING: usize = SEARCHED + 64;

/// Finds the severity of a line, and the bytes that name it.
///
/// The severity is the first word, or a later word at a place where common formats have the severity. An "error"
/// elsewhere is ordinary text.
pub fn find(line: &[u8]) -> Option<(Range<usize>, Severity)> {
    let line = &line[..line.len().min(BEGINNING)];
    let searched = line.len().min(SEARCHED);
    let mut position = start_of_record(line);
    let mut place = Place::default();
    loop {
        let (gap, length) = Gap::read(line.get(position..searched)?);
        let start = position + length;
        if start == searched {
            return None;
        }
        let end = start + length_of_word(&line[start..]);
        let (word, after) = (&line[start..end], &line[end..]);
        place.enter(gap, word, after);
        if let Some((length, severity)) = place.severity(word, after) {
            return Some((start..start + length, severity));
        }
        place.leave(line, start..end);
        position = end;
    }
}

/// The position after the prefix of docker compose, `web-1  | `.
fn start_of_record(line: &[u8]) -> usize {
    let text = skip_colors(line);
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    let name = text.iter().position(|byte| !is_name(byte)).unwrap_or(text.len());
    let record = text[name..].trim_ascii_start().strip_prefix(b"|").map(skip_colors);
    let record = record.and_then(|record| record.strip_prefix(b" ")).filter(|_| name > 0);
    line.len() - record.unwrap_or(text).len()
}
