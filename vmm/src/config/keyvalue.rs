//! `key=value` lists of the command line, read into the same types as the configuration file.
//!
//! ```text
//! path=disk.img,readonly,queues=2,serial="a,b"
//! ```
//! A key alone is `true`. A value in double quotes or square brackets may contain commas. The
//! first item may be a bare value for the type's main key: `--memory 4G,prefault`.

use std::fmt;

use serde::de::value::MapDeserializer;
use serde::de::{self, DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

/// A list that cannot be read into the wanted type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KeyValueError(String);

impl de::Error for KeyValueError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

/// Reads `text` into a `T`. `main_key` is the key of a bare first value; `None` when the type has
/// no such key.
///
/// # Errors
/// [`KeyValueError`] in words that name the key and the value.
pub fn from_key_values<T: DeserializeOwned>(
    text: &str,
    main_key: Option<&'static str>,
) -> Result<T, KeyValueError> {
    let mut pairs: Vec<(&str, Value<'_>)> = Vec::new();
    for (item, index) in split_items(text)?.into_iter().zip(0..) {
        let pair = match (item.split_once('='), main_key) {
            (Some((key, value)), _) => (key, value),
            (None, Some(main)) if index == 0 => (main, item),
            (None, _) => (item, "true"),
        };
        if pair.0.is_empty() {
            return Err(KeyValueError(format!("{item:?} has no key before '='")));
        }
        if pairs.iter().any(|(key, _)| *key == pair.0) {
            return Err(KeyValueError(format!("key {:?} is given twice", pair.0)));
        }
        let value = Value {
            key: pair.0,
            text: unquote(pair.1),
        };
        pairs.push((pair.0, value));
    }
    T::deserialize(MapDeserializer::new(pairs.into_iter()))
}

/// Splits at commas outside quotes and brackets.
fn split_items(text: &str) -> Result<Vec<&str>, KeyValueError> {
    let mut items = Vec::new();
    let (mut quoted, mut depth, mut start) = (false, 0_u32, 0);
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '[' if !quoted => depth += 1,
            ']' if !quoted => depth = depth.saturating_sub(1),
            ',' if !quoted && depth == 0 => {
                items.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted || depth > 0 {
        return Err(KeyValueError(format!(
            "{text:?} has an unclosed quote or bracket"
        )));
    }
    items.push(&text[start..]);
    match items.iter().position(|item| item.is_empty()) {
        Some(index) => Err(KeyValueError(format!("item {} is empty", index + 1))),
        None => Ok(items),
    }
}

fn unquote(text: &str) -> &str {
    let inner = |open, close| text.strip_prefix(open)?.strip_suffix(close);
    inner('"', '"').or_else(|| inner('[', ']')).unwrap_or(text)
}

/// A value that becomes whatever type is asked for.
#[derive(Clone, Copy)]
struct Value<'a> {
    key: &'a str,
    text: &'a str,
}

impl Value<'_> {
    fn wrong(&self, expected: &str) -> KeyValueError {
        KeyValueError(format!(
            "{} is {:?}, expected {expected}",
            self.key, self.text
        ))
    }

    /// Says which key an error from within a type belongs to.
    fn name<T>(&self, result: Result<T, KeyValueError>) -> Result<T, KeyValueError> {
        result.map_err(|KeyValueError(message)| KeyValueError(format!("{}: {message}", self.key)))
    }
}

impl<'de> IntoDeserializer<'de, KeyValueError> for Value<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $kind:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
            let number = self.text.parse::<$kind>();
            let number = number.map_err(|_| {
                self.wrong(&format!("a whole number from {} to {}", <$kind>::MIN, <$kind>::MAX))
            })?;
            let result = visitor.$visit(number);
            self.name(result)
        }
    )*};
}

impl<'de> Deserializer<'de> for Value<'_> {
    type Error = KeyValueError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
        let result = visitor.visit_str(self.text);
        self.name(result)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
        match self.text {
            "on" | "true" | "yes" => visitor.visit_bool(true),
            "off" | "false" | "no" => visitor.visit_bool(false),
            _ => Err(self.wrong("on or off")),
        }
    }

    numbers! {
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16,
        deserialize_u32 visit_u32 u32, deserialize_u64 visit_u64 u64
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, KeyValueError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, KeyValueError> {
        let result = visitor.visit_enum(self.text.into_deserializer());
        self.name(result)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, KeyValueError> {
        let items = self.text.split(',').map(|text| Value {
            key: self.key,
            text,
        });
        visitor.visit_seq(de::value::SeqDeserializer::new(items))
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::config::{ByteSize, HostCpus};

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Sample {
        size: ByteSize,
        #[serde(default)]
        flag: bool,
        count: Option<u16>,
        mode: Option<Mode>,
        pin: Option<HostCpus>,
        #[serde(default)]
        nodes: Vec<u32>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        IoUring,
    }

    fn parse(text: &str) -> Result<Sample, KeyValueError> {
        from_key_values(text, Some("size"))
    }

    #[test]
    fn values_become_the_types_asked_for() {
        let sample = parse("4G,flag,count=7,mode=io-uring,pin=[0-1,5],nodes=[0,1]").unwrap();
        let expected = Sample {
            size: ByteSize(4 << 30),
            flag: true,
            count: Some(7),
            mode: Some(Mode::IoUring),
            pin: Some("0-1,5".parse().unwrap()),
            nodes: vec![0, 1],
        };
        assert_eq!(sample, expected);
        assert_eq!(
            parse("flag=off,size=\"1M\"").unwrap().size,
            ByteSize(1 << 20)
        );
    }

    #[test]
    fn errors_name_key_and_value() {
        let cases = [
            ("", "item 1 is empty"),
            ("1M,", "item 2 is empty"),
            (
                "1M,count=70000",
                "count is \"70000\", expected a whole number from 0 to 65535",
            ),
            ("1M,flag=maybe", "flag is \"maybe\", expected on or off"),
            ("1M,flag,flag", "key \"flag\" is given twice"),
            ("1M,size=2M", "key \"size\" is given twice"),
            ("1M,=3", "\"=3\" has no key before '='"),
            (
                "1M,pin=[0",
                "\"1M,pin=[0\" has an unclosed quote or bracket",
            ),
            (
                "1X",
                "size: \"1X\" is not a size: expected a whole number of bytes, or of K, M, G or T, such as 512M",
            ),
            (
                "1M,mode=aio",
                "mode: unknown variant `aio`, expected `io-uring`",
            ),
            (
                "1M,speed=3",
                "unknown field `speed`, expected one of `size`, `flag`, `count`, `mode`, `pin`, `nodes`",
            ),
            (
                "flag",
                "size: \"flag\" is not a size: expected a whole number of bytes, or of K, M, G or T, such as 512M",
            ),
            ("flag=on", "missing field `size`"),
        ];
        for (text, message) in cases {
            assert_eq!(parse(text).unwrap_err().to_string(), message, "{text:?}");
        }
    }
}
