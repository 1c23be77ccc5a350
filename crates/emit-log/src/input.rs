//! Where messages come from.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

const DEFAULT_MESSAGE: &[u8] = b"info: Hello World!";

/// The message made of the words on the command line, byte for byte.
pub fn message(words: &[OsString]) -> Vec<u8> {
    if words.is_empty() {
        return DEFAULT_MESSAGE.to_vec();
    }
    let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
    words.join(&b' ')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn words_are_joined_by_a_space_and_kept_as_they_are() {
        let words = [b"caf\xe9".to_vec(), b"  two  ".to_vec(), Vec::new()];
        assert_eq!(message(&words.map(OsString::from_vec)), b"caf\xe9   two   ");
        assert_eq!(message(&[OsString::new()]), b"");
        assert_eq!(message(&[]), b"info: Hello World!");
    }
}
