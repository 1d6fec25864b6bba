//! PCI addresses.

use std::fmt;
use std::str::FromStr;

/// Bus, device and function number of a PCI function within segment 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf(u16);

/// A PCI address that is out of range or not of the form `BB:DD.F`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a PCI address: expected bus:device.function such as 00:04.0")]
pub struct InvalidBdf(String);

impl Bdf {
    /// A function's address: device 0 to 31, function 0 to 7.
    ///
    /// # Errors
    /// [`InvalidBdf`] when a number is out of range.
    pub fn new(bus: u8, device: u8, function: u8) -> Result<Self, InvalidBdf> {
        if device > 31 || function > 7 {
            return Err(InvalidBdf(format!("{bus:02x}:{device:02x}.{function}")));
        }
        Ok(Self(
            u16::from(bus) << 8 | u16::from(device) << 3 | u16::from(function),
        ))
    }

    /// From the 16-bit requester id: bus in bits 15:8, device in 7:3, function in 2:0.
    #[must_use]
    pub fn from_requester_id(id: u16) -> Self {
        Self(id)
    }

    /// The 16-bit requester id.
    #[must_use]
    pub fn requester_id(self) -> u16 {
        self.0
    }

    /// Bus number.
    #[must_use]
    pub fn bus(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// Device number, 0 to 31.
    #[must_use]
    pub fn device(self) -> u8 {
        (self.0 >> 3 & 0x1f) as u8
    }

    /// Function number, 0 to 7.
    #[must_use]
    pub fn function(self) -> u8 {
        (self.0 & 7) as u8
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:02x}:{:02x}.{}",
            self.bus(),
            self.device(),
            self.function()
        )
    }
}

impl FromStr for Bdf {
    type Err = InvalidBdf;

    fn from_str(text: &str) -> Result<Self, InvalidBdf> {
        let parse = || {
            let (bus, rest) = text.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            let number = |digits: &str, max_len: usize| {
                let hex = digits.len() <= max_len && digits.chars().all(|c| c.is_ascii_hexdigit());
                hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
            };
            Self::new(number(bus, 2)?, number(device, 2)?, number(function, 1)?).ok()
        };
        parse().ok_or_else(|| InvalidBdf(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bdf_parses_what_it_prints() {
        let bdf = Bdf::new(0, 0x1f, 7).unwrap();
        assert_eq!(bdf.to_string(), "00:1f.7");
        assert_eq!("00:1f.7".parse::<Bdf>().unwrap(), bdf);
        assert_eq!(Bdf::from_requester_id(0x00ff), bdf);
    }

    #[test]
    fn bdf_refuses_numbers_out_of_range() {
        for bad in [
            "",
            "00:20.0",
            "00:00.8",
            "100:00.0",
            "00:1.+1",
            "00:01",
            "0000:00:01.0",
        ] {
            assert!(bad.parse::<Bdf>().is_err(), "{bad:?}");
        }
    }
}
