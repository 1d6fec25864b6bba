//! Access to a configuration space kept as bytes.

/// Reads at `offset`; beyond the end, zeroes.
pub(super) fn read(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    data.fill(0);
    for (byte, value) in data.iter_mut().zip(config.iter().skip(start)) {
        *byte = *value;
    }
}

/// Replaces bytes from `offset` on; what lies beyond the end is dropped.
pub(super) fn write(config: &mut [u8], offset: u64, data: &[u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (byte, value) in config.iter_mut().skip(start).zip(data) {
        *byte = *value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_beyond_the_end_read_zero_and_write_nothing() {
        let mut config = [1, 2, 3, 4];
        write(&mut config, 3, &[9, 9]);
        write(&mut config, u64::MAX, &[7]);
        let mut data = [0xff; 4];
        read(&config, 2, &mut data);
        assert_eq!(data, [3, 9, 0, 0]);
        read(&config, u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
