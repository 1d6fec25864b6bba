//! What the driver reads and writes (section 4.1.4).

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::super::capabilities::{
    BAR, COMMON, DEVICE, ISR, MSIX_PBA, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER,
};
use super::super::common;
use super::{Inner, VirtioPci};

impl VirtioPci {
    /// Follows the driver through initialization (section 3.1.1).
    fn write_status(&self, inner: &mut Inner, status: u8) {
        if status == 0 {
            return self.reset_transport(inner);
        }
        let mut new = status & !common::STATUS_NEEDS_RESET;
        if new & inner.status != inner.status {
            // Bits are only ever added.
            return;
        }
        let added = new & !inner.status;
        if added & common::STATUS_FEATURES_OK != 0 {
            let offered = Self::offered_features(inner);
            let version_1 = inner.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
            if inner.driver_features & !offered != 0 || !version_1 {
                new &= !common::STATUS_FEATURES_OK;
            }
        }
        if added & common::STATUS_DRIVER_OK != 0 && new & common::STATUS_FEATURES_OK == 0 {
            new &= !common::STATUS_DRIVER_OK;
        }
        inner.status = new;
        if new & added & common::STATUS_DRIVER_OK != 0
            && let Err(error) = self.activate(inner)
        {
            self.interrupt.device_error(&error);
        }
    }

    fn read_common(&self, inner: &Inner, offset: u64, data: &mut [u8]) {
        let select = usize::from(inner.queue_select);
        let queue = inner.queues.get(select);
        let half = |value: u64, high: bool| {
            if high {
                value >> 32
            } else {
                value & 0xffff_ffff
            }
        };
        let value = match (offset, data.len()) {
            (common::DEVICE_FEATURE_SELECT, 4) => u64::from(inner.device_feature_select),
            (common::DEVICE_FEATURE, 4) => match inner.device_feature_select {
                select @ (0 | 1) => half(Self::offered_features(inner), select == 1),
                _ => 0,
            },
            (common::DRIVER_FEATURE_SELECT, 4) => u64::from(inner.driver_feature_select),
            (common::DRIVER_FEATURE, 4) => match inner.driver_feature_select {
                select @ (0 | 1) => half(inner.driver_features, select == 1),
                _ => 0,
            },
            (common::CONFIG_MSIX_VECTOR, 2) => u64::from(self.interrupt.config_vector()),
            (common::NUM_QUEUES, 2) => inner.queues.len() as u64,
            (common::DEVICE_STATUS, 1) => u64::from(self.status(inner)),
            (common::CONFIG_GENERATION, 1) => u64::from(self.interrupt.config_generation()),
            (common::QUEUE_SELECT, 2) => u64::from(inner.queue_select),
            (common::QUEUE_SIZE, 2) => queue.map_or(0, |queue| u64::from(queue.size)),
            (common::QUEUE_MSIX_VECTOR, 2) => {
                u64::from(self.interrupt.queue_vector(inner.queue_select))
            }
            (common::QUEUE_ENABLE, 2) => queue.map_or(0, |queue| u64::from(queue.enabled)),
            (common::QUEUE_NOTIFY_OFF, 2) => u64::from(inner.queue_select),
            (common::QUEUE_DESC | common::QUEUE_DRIVER | common::QUEUE_DEVICE, 8) => {
                queue.map_or(0, |queue| queue.address(offset))
            }
            (common::QUEUE_DESC..=0x37, 4) if offset.is_multiple_of(4) => {
                let address = queue.map_or(0, |queue| queue.address(offset & !7));
                half(address, offset & 4 != 0)
            }
            _ => 0,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn status(&self, inner: &Inner) -> u8 {
        let error = if self.interrupt.needs_reset() {
            common::STATUS_NEEDS_RESET
        } else {
            0
        };
        inner.status | error
    }

    fn write_common(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        match (offset, data) {
            (common::DEVICE_STATUS, &[status]) => self.write_status(inner, status),
            (_, &[a, b]) => self.write_common16(inner, offset, u16::from_le_bytes([a, b])),
            (_, &[a, b, c, d]) => {
                Self::write_common32(inner, offset, u32::from_le_bytes([a, b, c, d]));
            }
            // Drivers shall write addresses in halves (section 4.1.3.1); some do not.
            (_, &[a, b, c, d, e, f, g, h]) => {
                Self::write_common32(inner, offset, u32::from_le_bytes([a, b, c, d]));
                Self::write_common32(inner, offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_common16(&self, inner: &mut Inner, offset: u64, value: u16) {
        let select = inner.queue_select;
        let running = inner.status & common::STATUS_DRIVER_OK != 0;
        let queue = inner.queues.get_mut(usize::from(select));
        match offset {
            common::CONFIG_MSIX_VECTOR => self.interrupt.set_config_vector(value),
            common::QUEUE_SELECT => inner.queue_select = value,
            common::QUEUE_MSIX_VECTOR => self.interrupt.set_queue_vector(select, value),
            common::QUEUE_SIZE => {
                if let Some(queue) = queue.filter(|queue| !queue.enabled) {
                    queue.set_size(value);
                }
            }
            common::QUEUE_ENABLE if value == 1 && !running => {
                if let Some(queue) = queue {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write_common32(inner: &mut Inner, offset: u64, value: u32) {
        let features_open = inner.status & common::STATUS_FEATURES_OK == 0;
        match offset {
            common::DEVICE_FEATURE_SELECT => inner.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => inner.driver_feature_select = value,
            common::DRIVER_FEATURE if features_open => match inner.driver_feature_select {
                0 => set_half(&mut inner.driver_features, false, value),
                1 => set_half(&mut inner.driver_features, true, value),
                _ => {}
            },
            common::QUEUE_DESC..=0x37 if offset.is_multiple_of(4) => {
                let queue = inner.queues.get_mut(usize::from(inner.queue_select));
                let register = queue
                    .filter(|queue| !queue.enabled)
                    .and_then(|queue| queue.address_mut(offset & !7));
                if let Some(address) = register {
                    set_half(address, offset & 4 != 0, value);
                }
            }
            _ => {}
        }
    }

    /// Without an ioeventfd, or where a driver writes through the configuration window.
    fn ring(inner: &Inner, offset: u64) {
        let queue = usize::try_from(offset / NOTIFY_MULTIPLIER).ok();
        if let Some(queue) = queue.and_then(|index| inner.queues.get(index)) {
            // The counter saturating means that the device has a signal it has not yet seen.
            let _ = queue.doorbell.write(1);
        }
    }

    pub(super) fn read_area(&self, inner: &Inner, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let len = data.len();
        if let Some(at) = COMMON.relative(offset, len) {
            self.read_common(inner, at, data);
        } else if let (Some(_), Some(byte)) = (ISR.relative(offset, len), data.first_mut()) {
            *byte = self.interrupt.take_isr();
        } else if let Some(at) = DEVICE.relative(offset, len) {
            inner.device.read_config(at, data);
        } else if let Some(at) = MSIX_TABLE.relative(offset, len) {
            inner.msix.read_table(at, data);
        } else if let Some(at) = MSIX_PBA.relative(offset, len) {
            inner.msix.read_pba(at, data);
        }
    }

    pub(super) fn write_area(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let len = data.len();
        if let Some(at) = COMMON.relative(offset, len) {
            self.write_common(inner, at, data);
        } else if let Some(at) = DEVICE.relative(offset, len) {
            inner.device.write_config(at, data);
        } else if let Some(at) = NOTIFY.relative(offset, len) {
            Self::ring(inner, at);
        } else if let Some(at) = MSIX_TABLE.relative(offset, len) {
            inner.msix.write_table(at, data);
        }
    }

    /// The BAR offset and length that the driver has put into the configuration window
    /// (section 4.1.4.9); `None` when they make no sense.
    pub(super) fn window(&self, inner: &Inner) -> Option<(u64, usize)> {
        let field = |at: u8| {
            let low = u32::from(inner.config.u16_at(self.capabilities.pci_cfg + at));
            let high = u32::from(inner.config.u16_at(self.capabilities.pci_cfg + at + 2));
            high << 16 | low
        };
        let bar = (field(4) & 0xff) as u8;
        let (offset, len) = (field(8), field(12));
        let sane = bar == BAR.index && matches!(len, 1 | 2 | 4) && offset % len == 0;
        sane.then_some((u64::from(offset), len as usize))
    }

    /// Offset of the window's data register.
    pub(super) fn window_data(&self) -> u16 {
        u16::from(self.capabilities.pci_cfg) + 16
    }
}

fn set_half(target: &mut u64, high: bool, value: u32) {
    *target = if high {
        *target & 0xffff_ffff | u64::from(value) << 32
    } else {
        *target & !0xffff_ffff | u64::from(value)
    };
}
