//! Link rates: `2Gbit`, `500Mbit`, `100M`.

use std::fmt;
use std::str::FromStr;

use super::size::ByteSize;

/// Bytes per second, written in bits (`2Gbit`, decimal, as networks count) or bytes (`100M`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkRate(u64);

/// A rate that cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a rate: expected 2Gbit, 500Mbit, or bytes per second such as 100M")]
pub struct InvalidRate(String);

const BITS: [(&str, u64); 3] = [("Gbit", 1_000_000_000), ("Mbit", 1_000_000), ("Kbit", 1000)];

impl LinkRate {
    /// Bytes per second.
    #[must_use]
    pub fn bytes_per_s(self) -> u64 {
        self.0
    }
}

impl FromStr for LinkRate {
    type Err = InvalidRate;

    fn from_str(text: &str) -> Result<Self, InvalidRate> {
        let invalid = || InvalidRate(text.to_owned());
        let lower = text.to_ascii_lowercase();
        let lower = lower.strip_suffix("/s").unwrap_or(&lower);
        for (unit, factor) in BITS {
            if let Some(number) = lower.strip_suffix(&unit.to_ascii_lowercase()) {
                let number: f64 = number.parse().map_err(|_| invalid())?;
                let bits = number * factor as f64;
                if !(8.0..=8e15).contains(&bits) {
                    return Err(invalid());
                }
                // In range, as was just checked.
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                return Ok(Self((bits / 8.0) as u64));
            }
        }
        match lower.parse::<ByteSize>() {
            Ok(size) if size.bytes() > 0 => Ok(Self(size.bytes())),
            _ => Err(invalid()),
        }
    }
}

impl fmt::Display for LinkRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.0.saturating_mul(8);
        let unit = BITS.into_iter().find(|(_, factor)| bits >= *factor);
        match unit {
            Some((unit, factor)) => write!(f, "{:.1}{unit}", bits as f64 / factor as f64),
            None => write!(f, "{bits}bit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_in_bits_and_bytes() {
        let cases = [
            ("2Gbit", 250_000_000),
            ("2.5gbit/s", 312_500_000),
            ("500Mbit", 62_500_000),
            ("100M", 100 << 20),
            ("4096", 4096),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(LinkRate(bytes)), "{text}");
        }
        for text in [
            "",
            "0",
            "0Gbit",
            "-1Gbit",
            "nanGbit",
            "infGbit",
            "2Gbyte",
            "1e300Gbit",
        ] {
            assert!(text.parse::<LinkRate>().is_err(), "{text}");
        }
        assert_eq!(LinkRate(250_000_000).to_string(), "2.0Gbit");
    }
}
