//! One line of output: `drover-guest: word key=value ... key=value`.
//!
//! Keys and values hold no blanks, so a reader splits at blanks and at the first `=`. The one exception
//! is `message=`, always last, whose value runs to the end of the line.

use core::fmt::{self, Write};

/// What every line begins with.
pub const PREFIX: &str = "drover-guest: ";

const CAPACITY: usize = 512;

/// A line under construction. What does not fit is cut and marked by a final `~`.
#[derive(Clone, Debug)]
pub struct Line {
    bytes: [u8; CAPACITY],
    len: usize,
    cut: bool,
}

impl Line {
    /// A line that starts with the prefix and `words`.
    #[must_use]
    pub fn new(words: &str) -> Self {
        let mut line = Self {
            bytes: [0; CAPACITY],
            len: 0,
            cut: false,
        };
        line.push(PREFIX);
        line.push(words);
        line
    }

    /// A line about one command.
    #[must_use]
    pub fn of_command(name: &str) -> Self {
        let mut line = Self::new("command=");
        line.push(name);
        line
    }

    /// Adds ` key=value` with anything printable.
    pub fn put(&mut self, key: &str, value: impl fmt::Display) -> &mut Self {
        // Infallible: write_str cuts instead of failing.
        let _ = write!(self, " {key}={value}");
        self
    }

    /// Adds ` key=0x...`.
    pub fn hex(&mut self, key: &str, value: u64) -> &mut Self {
        self.put(key, format_args!("{value:#x}"))
    }

    /// Adds ` key=value` for text from outside: blanks and unprintable bytes become `_`.
    pub fn foreign(&mut self, key: &str, value: &[u8]) -> &mut Self {
        self.put(key, "");
        for &byte in value {
            let shown = if byte.is_ascii_graphic() {
                char::from(byte)
            } else {
                '_'
            };
            let _ = self.write_char(shown);
        }
        self
    }

    /// Adds a MAC address.
    pub fn mac(&mut self, key: &str, mac: [u8; 6]) -> &mut Self {
        let [a, b, c, d, e, f] = mac;
        self.put(
            key,
            format_args!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"),
        )
    }

    /// Adds a thousandth of `value` with three decimals.
    pub fn thousandths(&mut self, key: &str, value: u64) -> &mut Self {
        self.put(key, format_args!("{}.{:03}", value / 1000, value % 1000))
    }

    /// The finished line with its newline.
    #[must_use]
    pub fn finish(&mut self) -> &[u8] {
        if self.cut {
            self.bytes[self.len - 1] = b'~';
        }
        self.bytes[self.len] = b'\n';
        &self.bytes[..=self.len]
    }

    fn push(&mut self, text: &str) {
        // One byte stays free for the newline.
        let room = CAPACITY - 1 - self.len;
        let take = text.len().min(room);
        self.bytes[self.len..self.len + take].copy_from_slice(&text.as_bytes()[..take]);
        self.len += take;
        self.cut |= take < text.len();
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(line: &mut Line) -> &str {
        core::str::from_utf8(line.finish()).unwrap()
    }

    #[test]
    fn keys_and_values_are_separated_by_single_blanks() {
        let mut line = Line::of_command("mem");
        line.put("pages", 12)
            .hex("first_bad", 0x2000)
            .thousandths("ms", 12_034)
            .put("result", "ok");
        assert_eq!(
            text(&mut line),
            "drover-guest: command=mem pages=12 first_bad=0x2000 ms=12.034 result=ok\n"
        );
    }

    #[test]
    fn foreign_text_cannot_add_keys_or_lines() {
        let mut line = Line::of_command("blk");
        line.foreign("id", b"a b\n=\xff");
        assert_eq!(text(&mut line), "drover-guest: command=blk id=a_b_=_\n");
    }

    #[test]
    fn mac_is_written_in_colon_notation() {
        let mut line = Line::new("x");
        line.mac("mac", [0x52, 0x54, 0, 1, 2, 0xff]);
        assert_eq!(text(&mut line), "drover-guest: x mac=52:54:00:01:02:ff\n");
    }

    #[test]
    fn overlong_line_is_cut_and_marked() {
        let mut line = Line::new("x");
        for _ in 0..100 {
            line.put("key", "value");
        }
        let bytes = line.finish();
        assert_eq!(bytes.len(), CAPACITY);
        assert_eq!(&bytes[CAPACITY - 2..], b"~\n");
    }
}
