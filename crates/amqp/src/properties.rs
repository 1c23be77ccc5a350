//! The properties of a message. The broker passes most of them on unread, so they may hold anything.
//!
//! Text that is not UTF-8 is repaired, tables that are nested too deep are kept as bytes, and the rest of a table or
//! of the properties is left out from the first value that cannot be read.
//!
//! The types are those of [RabbitMQ](https://www.rabbitmq.com/docs/amqp-0-9-1-errata#section_3).

use std::mem;

use amq_protocol::types::DecimalValue;

use crate::declare::STREAM_OFFSET;
use crate::{Properties, Table, Value};

/// Levels of nested tables and arrays. The parser calls itself for each.
const DEEPEST: usize = 32;

/// Values that a message may have in its headers; a table counts as [`TABLE`] values. A frame of the usual size has
/// room for fewer.
const MOST_VALUES: usize = 64 * 1024;

/// The memory that a table needs, in values.
const TABLE: usize = 6;

/// The most memory of a value with its name, in bytes, without their texts.
const VALUE: usize = 128;

/// How to add a property to others, by its type.
enum Add {
    Text(fn(Properties, String) -> Properties),
    Octet(fn(Properties, u8) -> Properties),
    Time(fn(Properties, u64) -> Properties),
    Headers(fn(Properties, Table) -> Properties),
}

/// The properties in their order on the wire, from the highest flag down.
const PROPERTIES: [Add; 14] = [
    Add::Text(Properties::with_content_type),
    Add::Text(Properties::with_content_encoding),
    Add::Headers(Properties::with_headers),
    Add::Octet(Properties::with_delivery_mode),
    Add::Octet(Properties::with_priority),
    Add::Text(Properties::with_correlation_id),
    Add::Text(Properties::with_reply_to),
    Add::Text(Properties::with_expiration),
    Add::Text(Properties::with_message_id),
    Add::Time(Properties::with_timestamp),
    Add::Text(Properties::with_type_),
    Add::Text(Properties::with_user_id),
    Add::Text(Properties::with_app_id),
    Add::Text(Properties::with_cluster_id),
];

/// The flags that stand for no property.
const UNDEFINED: u16 = 3;

/// What was read.
#[derive(Debug)]
pub struct Read<T> {
    /// As far as it could be read.
    pub value: T,
    /// Whether anything was repaired or left out.
    pub is_repaired: bool,
    /// The most memory that the value takes, in bytes.
    pub memory: usize,
}

/// Reads the properties of a message from flags and values, as in a content header.
pub fn read_properties(bytes: &[u8], properties: &mut Properties) -> Read<()> {
    Reader::default().read(bytes, |reader, bytes| reader.properties(bytes, properties))
}

/// Reads the content of a table.
pub fn read_table(content: &[u8]) -> Read<Table> {
    Reader::default().read(content, |reader, content| reader.table(content, 1))
}

/// The text, with U+FFFD for each sequence of bytes that is not UTF-8.
pub fn read_text(bytes: &[u8]) -> String {
    match str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => String::from_utf8_lossy(bytes).into_owned(),
    }
}

/// The next `length` bytes; `None` if there are fewer.
pub fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    bytes.split_off(..length)
}

/// The next bytes of a number.
pub fn number<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*number)
}

/// A short string: its length in a byte, and its bytes.
pub fn take_short<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let [length] = number(bytes)?;
    take(bytes, length.into())
}

/// A long string, a table or an array: its length in four bytes, and its bytes.
pub fn take_long<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32::from_be_bytes(number(bytes)?);
    take(bytes, length as usize)
}

#[derive(Default)]
struct Reader {
    is_repaired: bool,
    /// Values read so far.
    values: usize,
    /// Bytes by which repaired text is longer than it was.
    growth: usize,
}

impl Reader {
    fn read<T>(mut self, bytes: &[u8], read: impl FnOnce(&mut Reader, &[u8]) -> T) -> Read<T> {
        let value = read(&mut self, bytes);
        let memory = bytes.len() + self.growth + VALUE * self.values;
        Read { value, is_repaired: self.is_repaired, memory }
    }

    fn properties(&mut self, mut bytes: &[u8], properties: &mut Properties) {
        let flags = number(&mut bytes).map_or(UNDEFINED, u16::from_be_bytes);
        if flags & UNDEFINED != 0 {
            self.is_repaired = true;
            return;
        }
        for (index, add) in PROPERTIES.iter().enumerate() {
            if flags & (0x8000 >> index) == 0 {
                continue;
            }
            if self.add(add, properties, &mut bytes).is_none() {
                self.is_repaired = true;
                return;
            }
        }
        self.is_repaired |= !bytes.is_empty();
    }

    /// Adds the next property to others; `None` if there are not enough bytes.
    fn add(&mut self, add: &Add, properties: &mut Properties, bytes: &mut &[u8]) -> Option<()> {
        let mut is_whole = true;
        *properties = match add {
            Add::Text(with) => {
                let text = self.text(take_short(bytes)?);
                with(mem::take(properties), text)
            }
            Add::Octet(with) => {
                let [octet] = number(bytes)?;
                with(mem::take(properties), octet)
            }
            Add::Time(with) => {
                let time = u64::from_be_bytes(number(bytes)?);
                with(mem::take(properties), time)
            }
            Add::Headers(with) => {
                let content = take_long(bytes).unwrap_or_else(|| {
                    // The headers are cut off: read the rest of the bytes.
                    is_whole = false;
                    mem::take(bytes)
                });
                let headers = self.table(content, 1);
                with(mem::take(properties), headers)
            }
        };
        is_whole.then_some(())
    }

    /// Reads the content of a table at this level of nesting.
    fn table(&mut self, mut content: &[u8], depth: usize) -> Table {
        let mut table = Table::new();
        if !content.is_empty() && self.values < MOST_VALUES {
            self.values += TABLE;
        }
        while !content.is_empty() {
            let Some((name, value)) = self.entry(&mut content, depth) else {
                self.is_repaired = true;
                break;
            };
            // The broker's header is always kept: a receiver of a stream continues at this offset.
            if self.has_room() || depth == 1 && name == STREAM_OFFSET.as_bytes() {
                table.insert(self.text(name), value);
            }
        }
        table
    }

    fn entry<'a>(&mut self, bytes: &mut &'a [u8], depth: usize) -> Option<(&'a [u8], Value)> {
        Some((take_short(bytes)?, self.value(bytes, depth)?))
    }

    fn array(&mut self, mut content: &[u8], depth: usize) -> Vec<Value> {
        let mut values = Vec::new();
        while !content.is_empty() {
            let Some(value) = self.value(&mut content, depth) else {
                self.is_repaired = true;
                break;
            };
            if self.has_room() {
                values.push(value);
            }
        }
        values
    }

    /// Whether there is room for one more value.
    fn has_room(&mut self) -> bool {
        let has_room = self.values < MOST_VALUES;
        match has_room {
            true => self.values += 1,
            false => self.is_repaired = true,
        }
        has_room
    }

    /// Reads a type and a value, in a table or array at this level of nesting.
    fn value(&mut self, bytes: &mut &[u8], depth: usize) -> Option<Value> {
        let [kind] = number(bytes)?;
        Some(match kind {
            b'V' => Value::Void,
            b't' => Value::Boolean(number::<1>(bytes)? != [0]),
            b'b' => Value::ShortShortInt(i8::from_be_bytes(number(bytes)?)),
            b'B' => Value::ShortShortUInt(u8::from_be_bytes(number(bytes)?)),
            b's' | b'U' => Value::ShortInt(i16::from_be_bytes(number(bytes)?)),
            b'u' => Value::ShortUInt(u16::from_be_bytes(number(bytes)?)),
            b'I' => Value::LongInt(i32::from_be_bytes(number(bytes)?)),
            b'i' => Value::LongUInt(u32::from_be_bytes(number(bytes)?)),
            b'L' | b'l' => Value::LongLongInt(i64::from_be_bytes(number(bytes)?)),
            b'f' => Value::Float(f32::from_be_bytes(number(bytes)?)),
            b'd' => Value::Double(f64::from_be_bytes(number(bytes)?)),
            b'D' => {
                let [scale] = number(bytes)?;
                let value = u32::from_be_bytes(number(bytes)?);
                Value::DecimalValue(DecimalValue { scale, value })
            }
            b'T' => Value::Timestamp(u64::from_be_bytes(number(bytes)?)),
            b'S' => {
                let text = take_long(bytes)?;
                Value::LongString(self.text(text))
            }
            b'x' => Value::ByteArray(take_long(bytes)?.to_vec()),
            b'F' | b'A' if depth == DEEPEST => {
                self.is_repaired = true;
                Value::ByteArray(take_long(bytes)?.to_vec())
            }
            b'F' => {
                let content = take_long(bytes)?;
                Value::FieldTable(self.table(content, depth + 1))
            }
            b'A' => {
                let content = take_long(bytes)?;
                Value::FieldArray(self.array(content, depth + 1))
            }
            _ => return None,
        })
    }

    fn text(&mut self, bytes: &[u8]) -> String {
        let mut text = read_text(bytes);
        if text.as_bytes() != bytes {
            self.is_repaired = true;
            text.shrink_to_fit();
            self.growth += text.len().saturating_sub(bytes.len());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::protocol::basic::gen_properties;

    use super::*;

    fn short(text: &[u8]) -> Vec<u8> {
        [&[text.len() as u8], text].concat()
    }

    fn block(content: &[u8]) -> Vec<u8> {
        [&(content.len() as u32).to_be_bytes(), content].concat()
    }

    fn read(flags: u16, values: &[u8]) -> Read<Properties> {
        read_bytes(&[&flags.to_be_bytes(), values].concat())
    }

    fn read_bytes(bytes: &[u8]) -> Read<Properties> {
        let mut value = Properties::default();
        let Read { is_repaired, memory, .. } = read_properties(bytes, &mut value);
        Read { value, is_repaired, memory }
    }

    fn headers(values: &[u8]) -> Read<Properties> {
        read(0x2000, values)
    }

    fn header(read: &Read<Properties>, name: &str) -> Option<Value> {
        read.value.headers().as_ref()?.get(name).cloned()
    }

    /// A table in a table and so on, `levels` deep.
    fn nested(levels: usize) -> Vec<u8> {
        (1..levels).fold(block(b""), |inner, _| block(&[b"\x01kF", &inner[..]].concat()))
    }

    #[test]
    fn sound_properties_are_read_as_they_are() {
        let values = b"\x01at\x01\x01bb\xff\x01cB\xff\x01ds\xff\xff\x01eu\0\x01\x01fI\xff\0\0\x01\x01gi\xff\0\0\x01\
            \x01hl\xff\0\0\0\0\0\0\x01\x01if\x3f\x80\0\0\x01jd\x3f\xf0\0\0\0\0\0\0\x01kD\x02\0\0\0\x01\
            \x01lS\0\0\0\x05gr\xc3\xbcn\x01mA\0\0\0\x03b\x01V\x01nT\0\0\0\0\0\0\0\x09\x01oF\0\0\0\x03\x01kV\
            \x01px\0\0\0\x01\xff\x01qV";
        let texts = |count| short("gr\u{fc}n".as_bytes()).repeat(count);
        let all =
            [texts(2), block(values), vec![2, 3], texts(4), vec![0, 0, 0, 0, 0, 0, 0, 4], texts(4)];
        let all = all.concat();
        let read = read(0xfffc, &all);
        assert!(!read.is_repaired);
        assert_eq!(read.value.headers().as_ref().map(Table::len), Some(17));
        // As the library of the client writes them.
        let mut written = vec![0; 1000];
        let (_, length) = gen_properties((&mut written, 0), &read.value).unwrap();
        let expected = [&[0xff, 0xfc], &all[..]].concat();
        assert_eq!(String::from_utf8_lossy(&written[..length]), String::from_utf8_lossy(&expected));
    }

    #[test]
    fn text_is_repaired_and_the_rest_is_kept() {
        for index in [0, 1, 5, 6, 7, 8, 10, 11, 12] {
            let values = [short(b"a\xff\xfeb"), short(b"ok")].concat();
            let read = read(0x8000 >> index | 0x0004, &values);
            assert!(read.is_repaired);
            assert_eq!(read.value.cluster_id().as_deref(), Some("ok"), "after property {index}");
            let text = format!("{:?}", "a\u{fffd}\u{fffd}b");
            assert!(format!("{:?}", read.value).contains(&text), "{:?}", read.value);
        }
        let read = headers(&block(b"\x02a\xffS\0\0\0\x02b\xff\x01kt\x01"));
        assert!(read.is_repaired);
        assert_eq!(header(&read, "a\u{fffd}"), Some(Value::LongString("b\u{fffd}".into())));
        assert_eq!(header(&read, "k"), Some(Value::Boolean(true)));
    }

    #[test]
    fn what_follows_an_unreadable_value_in_its_table_is_left_out() {
        for bad in [
            &b"\x01k?"[..],
            b"\x01kS\0\0\0\x02x",
            b"\x01k",
            b"\x05k",
            b"\x01kF\0\0\0\x09",
            b"\x01kI",
        ] {
            let values = [block(&[b"\x01aV", bad].concat()), vec![2]].concat();
            let read = read(0x2000 | 0x1000, &values);
            assert!(read.is_repaired, "{bad:?}");
            assert_eq!(header(&read, "a"), Some(Value::Void), "{bad:?}");
            assert_eq!(*read.value.delivery_mode(), Some(2), "{bad:?}");
        }
        // The length of an inner table is known.
        let read = headers(&block(b"\x01aF\0\0\0\x03\x01k?\x01bV"));
        assert_eq!(header(&read, "b"), Some(Value::Void));
    }

    #[test]
    fn properties_that_end_too_early_are_left_out() {
        for (flags, values) in [
            (0x8000, &b""[..]),
            (0x8000, b"\x05x"),
            (0x8000, b"\x01xy"),
            (0x0040, &[0; 7]),
            (0x1000, b""),
            (0x0001, b""),
            (0x0002, b""),
        ] {
            assert!(read(flags, values).is_repaired, "{flags:#x} {values:?}");
        }
        assert!(read_bytes(b"\x80").is_repaired);
        let read = headers(&block(b"\x01aV\x01kS\0\0\0\x09xx")[..12]);
        assert_eq!(header(&read, "a"), Some(Value::Void), "headers that are cut off");
    }

    #[test]
    fn tables_are_read_down_to_a_depth() {
        assert!(!headers(&nested(32)).is_repaired);
        for levels in [33, 34, 1000, 18_000] {
            let read = headers(&nested(levels));
            assert!(read.is_repaired);
            assert!(matches!(header(&read, "k"), Some(Value::FieldTable(_))));
        }
    }

    #[test]
    fn of_too_many_values_the_offset_in_a_stream_is_kept() {
        let entry = |number: u32| [&[4], &number.to_be_bytes()[..], b"V"].concat();
        let mut many: Vec<u8> = (0..MOST_VALUES as u32 + 10).flat_map(entry).collect();
        many.extend(b"\x0fx-stream-offsetl\0\0\0\0\0\0\0\x07\x01zV");
        let read = headers(&block(&many));
        assert!(read.is_repaired);
        assert_eq!(header(&read, STREAM_OFFSET), Some(Value::LongLongInt(7)));
        assert_eq!(header(&read, "z"), None);
        assert!(read.memory < 9 * 1024 * 1024 + many.len());
        let tables: Vec<u8> = (0..100_000).flat_map(|_| *b"\x01kF\0\0\0\x03\x01kV").collect();
        assert!(headers(&block(&tables)).memory < 9 * 1024 * 1024 + tables.len());
    }

    #[test]
    fn the_memory_of_repaired_text_is_counted() {
        let text = [&b"\x01kS"[..], &block(&[0xff; 1000])].concat();
        assert!(headers(&block(&text)).memory >= 3000);
    }
}
