//! Addresses of PCI functions.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where a PCI function is: domain, bus, device and function, written `0000:41:00.4`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// A text is no address of a PCI function.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the address of a PCI function, such as 0000:41:00.0")]
pub struct InvalidBdf(String);

impl Bdf {
    /// Whether both are functions of one device.
    #[must_use]
    pub fn is_beside(self, other: Self) -> bool {
        let slot = |bdf: Self| (bdf.domain, bdf.bus, bdf.device);
        slot(self) == slot(other)
    }
}

impl FromStr for Bdf {
    type Err = InvalidBdf;

    /// With or without a domain, which is 0 then.
    fn from_str(text: &str) -> Result<Self, InvalidBdf> {
        parse(text).ok_or_else(|| InvalidBdf(text.chars().take(64).collect()))
    }
}

fn parse(text: &str) -> Option<Bdf> {
    let (head, function) = text.rsplit_once('.')?;
    let (head, device) = head.rsplit_once(':')?;
    let (domain, bus) = head.rsplit_once(':').unwrap_or(("0000", head));
    let hex = |digits: &str, least: usize, most: usize| {
        let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        let fits = is_hex && (least..=most).contains(&digits.len());
        fits.then(|| u32::from_str_radix(digits, 16).ok())?
    };
    let bdf = Bdf {
        // Domains of more than 16 bits are those of volume management devices.
        domain: hex(domain, 4, 8)?,
        bus: u8::try_from(hex(bus, 2, 2)?).ok()?,
        device: u8::try_from(hex(device, 2, 2)?).ok()?,
        function: u8::try_from(hex(function, 1, 1)?).ok()?,
    };
    (bdf.device < 32 && bdf.function < 8).then_some(bdf)
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Bdf {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bdf {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_they_are_read() {
        for (text, written) in [
            ("0000:41:00.4", "0000:41:00.4"),
            ("41:1f.7", "0000:41:1f.7"),
            ("10000:E1:00.0", "10000:e1:00.0"),
        ] {
            assert_eq!(text.parse::<Bdf>().unwrap().to_string(), written);
        }
        for text in [
            "",
            "41",
            "0000:41:00",
            "0000:41:20.0",
            "0000:41:00.8",
            "000:41:00.0",
            "0000:141:00.0",
            "0000:41:00.-1",
            "+000:41:00.0",
            "1:0000:41:00.0",
            "123456789:41:00.0",
        ] {
            assert!(text.parse::<Bdf>().is_err(), "{text}");
        }
    }

    #[test]
    fn functions_of_one_device_are_beside_each_other() {
        let [one, two, other] = ["0000:41:00.0", "0000:41:00.1", "0001:41:00.0"]
            .map(|text| text.parse::<Bdf>().unwrap());
        assert!(one.is_beside(two));
        assert!(!one.is_beside(other));
    }
}
