//! From a device that was reset to one that works.

use devices::pci::PciFunction;

use super::{MSIX_TABLE, Rig, Subject};

/// MSI-X message control: on.
const MSIX_ENABLE: u16 = 1 << 15;

impl<S: Subject> Rig<S> {
    /// All that a driver does before it works (virtio 1.2 section 3.1.1), with those of the
    /// offered features that `wanted` names.
    pub(super) fn initialize(&mut self, wanted: u64, size: u16) {
        self.common(0x14, &[0]);
        self.forget();
        self.common(0x14, &[3]);
        let mut features = 1 << 32;
        for half in [0_u32, 1] {
            self.common(0x00, &half.to_le_bytes());
            let mut offered = [0; 4];
            self.pci.read_bar(0, 0x04, &mut offered);
            let offered = u64::from(u32::from_le_bytes(offered)) << (32 * half);
            features |= offered & wanted;
        }
        for half in [0_u32, 1] {
            self.common(0x08, &half.to_le_bytes());
            let bits = (features >> (32 * half)) as u32;
            self.common(0x0c, &bits.to_le_bytes());
        }
        self.common(0x14, &[11]);
        self.common(0x10, &[0, 0]);
        for queue in 0..S::QUEUES {
            self.common(0x16, &queue.to_le_bytes());
            let mut max = [0; 2];
            self.pci.read_bar(0, 0x18, &mut max);
            let size = size.min(u16::from_le_bytes(max));
            self.common(0x18, &size.to_le_bytes());
            self.common(0x1a, &(queue + 1).to_le_bytes());
            let ring = &mut self.rings[usize::from(queue)];
            ring.set_size(&mut self.memory, size);
            for (register, address) in (0x20..).step_by(8).zip(ring.addresses()) {
                self.common(register, &address.to_le_bytes());
            }
            self.common(0x1c, &[1, 0]);
        }
        let msix = self.msix_control();
        self.pci.write_config(msix, &MSIX_ENABLE.to_le_bytes());
        for vector in 0..=u64::from(S::QUEUES) {
            self.pci
                .write_bar(0, MSIX_TABLE + 16 * vector, &0xfee0_0000_u64.to_le_bytes());
            self.pci
                .write_bar(0, MSIX_TABLE + 16 * vector + 8, &vector.to_le_bytes());
        }
        self.common(0x14, &[15]);
    }

    fn common(&self, offset: u64, data: &[u8]) {
        self.pci.write_bar(0, offset, data);
    }

    /// Where MSI-X message control lies: the capability after all of virtio's.
    fn msix_control(&self) -> u16 {
        let byte = |at: u16| {
            let mut data = [0];
            self.pci.read_config(at, &mut data);
            u16::from(data[0])
        };
        let mut at = byte(0x34);
        while at != 0 && byte(at) != 0x11 {
            at = byte(at + 1);
        }
        assert_ne!(at, 0, "the capability list ends before MSI-X");
        at + 2
    }
}
