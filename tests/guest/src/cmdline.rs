//! The kernel command line: words separated by blanks, each `key=value` or a bare `key` (value `1`).
//!
//! The last word with a key wins. `command.key=value` speaks to one command only and beats `key=value`;
//! `2.key=value` speaks to the second command of `run=` only and beats both.
//! Words nobody asks for are ignored, because VMMs append their own.
//!
//! Numbers are decimal or `0x` hexadecimal, with an optional binary suffix `K`, `M`, `G` or `T`, and `_`
//! may separate digits.

use core::fmt;

/// An argument whose value is not what its command expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadArgument {
    /// The argument's key.
    pub key: &'static str,
}

impl fmt::Display for BadArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "argument {} has a malformed value", self.key)
    }
}

impl core::error::Error for BadArgument {}

/// The whole command line.
#[derive(Clone, Copy, Debug)]
pub struct CommandLine<'a> {
    text: &'a str,
}

impl<'a> CommandLine<'a> {
    /// Wraps the text; parsing happens at each look-up.
    #[must_use]
    pub fn new(text: &'a str) -> Self {
        Self { text }
    }

    /// The commands of `run=`, in order.
    pub fn commands(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.value("", 0, "run")
            .unwrap_or("")
            .split(',')
            .filter(|name| !name.is_empty())
    }

    /// The arguments as one command sees them; `position` counts the commands of `run=` from 1.
    #[must_use]
    pub fn arguments(&self, command: &'a str, position: u64) -> Arguments<'a> {
        Arguments {
            line: *self,
            command,
            position,
        }
    }

    /// The arguments that speak to no command in particular.
    #[must_use]
    pub fn general(&self) -> Arguments<'a> {
        self.arguments("", 0)
    }

    fn value(&self, command: &str, position: u64, key: &str) -> Option<&'a str> {
        let mut general = None;
        let mut specific = None;
        let mut exact = None;
        for word in self.text.split_ascii_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, "1"));
            match name.split_once('.') {
                None if name == key => general = Some(value),
                Some((owner, rest)) if rest == key && owner == command => specific = Some(value),
                Some((owner, rest)) if rest == key && owner.parse() == Ok(position) => {
                    exact = Some(value);
                }
                _ => {}
            }
        }
        exact.or(specific).or(general)
    }
}

/// The command line seen from one command.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    line: CommandLine<'a>,
    command: &'a str,
    position: u64,
}

impl<'a> Arguments<'a> {
    /// The value of `key`, if the command line has one.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.line.value(self.command, self.position, key)
    }

    /// A number, or `default` where the key is absent.
    ///
    /// # Errors
    /// [`BadArgument`] if the value is not a number.
    pub fn number(&self, key: &'static str, default: u64) -> Result<u64, BadArgument> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    /// A number, if the key is present.
    ///
    /// # Errors
    /// [`BadArgument`] if the value is not a number.
    pub fn optional_number(&self, key: &'static str) -> Result<Option<u64>, BadArgument> {
        self.parsed(key, number)
    }

    /// A switch: absent or `0` is off, `1` is on.
    ///
    /// # Errors
    /// [`BadArgument`] for anything else.
    pub fn flag(&self, key: &'static str) -> Result<bool, BadArgument> {
        match self.text(key) {
            None | Some("0") => Ok(false),
            Some("1") => Ok(true),
            Some(_) => Err(BadArgument { key }),
        }
    }

    /// An IPv4 address in dotted notation, if the key is present.
    ///
    /// # Errors
    /// [`BadArgument`] if the value is not an address.
    pub fn ipv4(&self, key: &'static str) -> Result<Option<[u8; 4]>, BadArgument> {
        self.parsed(key, |text| octets(text, '.', 10))
    }

    /// A MAC address in colon notation, if the key is present.
    ///
    /// # Errors
    /// [`BadArgument`] if the value is not an address.
    pub fn mac(&self, key: &'static str) -> Result<Option<[u8; 6]>, BadArgument> {
        self.parsed(key, |text| octets(text, ':', 16))
    }

    /// A value that `parse` understands, if the key is present.
    ///
    /// # Errors
    /// [`BadArgument`] if `parse` refuses it.
    pub fn parsed<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&'a str) -> Option<T>,
    ) -> Result<Option<T>, BadArgument> {
        match self.text(key) {
            None => Ok(None),
            Some(text) => parse(text).map(Some).ok_or(BadArgument { key }),
        }
    }
}

/// Parses a number; `None` if it is malformed or does not fit.
#[must_use]
pub fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        b't' | b'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let (digits, radix) = match digits.strip_prefix("0x") {
        Some(hex) => (hex, 16),
        None => (digits, 10),
    };
    if !digits.starts_with(|c: char| c.is_ascii_hexdigit()) {
        return None;
    }
    let mut value = 0_u64;
    for digit in digits.chars().filter(|&c| c != '_') {
        value = value
            .checked_mul(u64::from(radix))?
            .checked_add(u64::from(digit.to_digit(radix)?))?;
    }
    value.checked_mul(1 << shift)
}

fn octets<const N: usize>(text: &str, separator: char, radix: u32) -> Option<[u8; N]> {
    let mut result = [0; N];
    let mut parts = text.split(separator);
    for octet in &mut result {
        *octet = u8::from_str_radix(parts.next()?, radix).ok()?;
    }
    parts.next().is_none().then_some(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn commands_keep_their_order_and_empty_names_vanish() {
        let line = CommandLine::new("console=ttyS0 run=mem,,blk,mem x");
        assert_eq!(line.commands().collect::<Vec<_>>(), ["mem", "blk", "mem"]);
        assert_eq!(CommandLine::new("").commands().count(), 0);
    }

    #[test]
    fn specific_key_beats_general_key_wherever_it_stands() {
        for text in ["mem.len=2M len=1M", "len=1M mem.len=2M"] {
            let line = CommandLine::new(text);
            assert_eq!(line.arguments("mem", 1).number("len", 0), Ok(2 << 20));
            assert_eq!(line.arguments("dirty", 2).number("len", 0), Ok(1 << 20));
        }
    }

    #[test]
    fn position_beats_name() {
        let line = CommandLine::new("1.op=fill op=x mem.op=y 3.op=verify");
        let op = |command, position| line.arguments(command, position).text("op");
        assert_eq!(op("mem", 1), Some("fill"));
        assert_eq!(op("mem", 2), Some("y"));
        assert_eq!(op("mem", 3), Some("verify"));
        assert_eq!(op("blk", 4), Some("x"));
        assert_eq!(line.general().text("op"), Some("x"));
    }

    #[test]
    fn last_of_equal_keys_wins() {
        let line = CommandLine::new("seed=1 seed=2");
        assert_eq!(line.arguments("mem", 1).number("seed", 0), Ok(2));
    }

    #[test]
    fn numbers_in_every_notation() {
        for (text, expected) in [
            ("0", Some(0)),
            ("18446744073709551615", Some(u64::MAX)),
            ("0x1_0000", Some(65536)),
            ("0xffM", Some(255 << 20)),
            ("4k", Some(4096)),
            ("3T", Some(3 << 40)),
            ("18446744073709551616", None),
            ("0x1ffffffffffT", None),
            ("", None),
            ("K", None),
            ("0x", None),
            ("_1", None),
            ("-1", None),
            ("1.5", None),
            ("12q", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
    }

    #[test]
    fn malformed_value_names_its_key() {
        let line = CommandLine::new("ms=soon irq=yes ip=10.0.0 mac=1:2:3:4:5:6:7");
        let arguments = line.arguments("net", 1);
        assert_eq!(arguments.number("ms", 1), Err(BadArgument { key: "ms" }));
        assert_eq!(arguments.flag("irq"), Err(BadArgument { key: "irq" }));
        assert_eq!(arguments.ipv4("ip"), Err(BadArgument { key: "ip" }));
        assert_eq!(arguments.mac("mac"), Err(BadArgument { key: "mac" }));
    }

    #[test]
    fn addresses() {
        let line = CommandLine::new("ip=10.0.2.15 mac=52:54:00:ab:Cd:ef");
        let arguments = line.arguments("net", 1);
        assert_eq!(arguments.ipv4("ip"), Ok(Some([10, 0, 2, 15])));
        assert_eq!(
            arguments.mac("mac"),
            Ok(Some([0x52, 0x54, 0, 0xab, 0xcd, 0xef]))
        );
        assert_eq!(arguments.ipv4("dst_ip"), Ok(None));
    }

    #[test]
    fn bare_word_is_a_switch() {
        let line = CommandLine::new("irq prefill=0");
        assert_eq!(line.arguments("blkbench", 1).flag("irq"), Ok(true));
        assert_eq!(line.arguments("dirty", 2).flag("prefill"), Ok(false));
    }
}
