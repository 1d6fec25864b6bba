//! Sockets, cores and threads, and the APIC ids that encode them.

/// What the user asked for: a number of vCPUs and perhaps their arrangement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuCounts {
    /// vCPUs.
    pub vcpus: u32,
    /// Sockets.
    pub sockets: Option<u32>,
    /// Cores per socket.
    pub cores: Option<u32>,
    /// Threads per core.
    pub threads: Option<u32>,
}

/// An arrangement that does not add up.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// A count is zero.
    #[error("{0} is 0, at least 1 is needed")]
    Zero(&'static str),
    /// The product is not the number of vCPUs.
    #[error(
        "{sockets} sockets x {cores} cores x {threads} threads are {product} vCPUs, not {vcpus}"
    )]
    Mismatch {
        /// Sockets.
        sockets: u32,
        /// Cores per socket.
        cores: u32,
        /// Threads per core.
        threads: u32,
        /// Their product.
        product: u64,
        /// vCPUs asked for.
        vcpus: u32,
    },
}

/// A complete arrangement: `sockets * cores * threads` vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
}

impl Topology {
    /// Completes what was left open: one thread per core, then one socket, take up the rest.
    ///
    /// # Errors
    /// [`TopologyError`] when a count is zero or the numbers do not multiply up.
    pub fn new(counts: CpuCounts) -> Result<Self, TopologyError> {
        let CpuCounts {
            vcpus,
            sockets,
            cores,
            threads,
        } = counts;
        let given = [
            ("number of vCPUs", Some(vcpus)),
            ("number of sockets", sockets),
            ("number of cores", cores),
            ("number of threads", threads),
        ];
        if let Some((name, _)) = given.into_iter().find(|(_, count)| *count == Some(0)) {
            return Err(TopologyError::Zero(name));
        }
        let rest = |known: u64| u32::try_from(u64::from(vcpus) / known).unwrap_or(0).max(1);
        let threads = threads.unwrap_or_else(|| match (sockets, cores) {
            (Some(sockets), Some(cores)) => rest(u64::from(sockets) * u64::from(cores)),
            _ => 1,
        });
        let (sockets, cores) = match (sockets, cores) {
            (Some(sockets), Some(cores)) => (sockets, cores),
            (None, Some(cores)) => (rest(u64::from(cores) * u64::from(threads)), cores),
            (sockets, None) => {
                let sockets = sockets.unwrap_or(1);
                (sockets, rest(u64::from(sockets) * u64::from(threads)))
            }
        };
        let product = u64::from(sockets)
            .checked_mul(u64::from(cores))
            .and_then(|product| product.checked_mul(u64::from(threads)))
            .unwrap_or(u64::MAX);
        if product != u64::from(vcpus) {
            return Err(TopologyError::Mismatch {
                sockets,
                cores,
                threads,
                product,
                vcpus,
            });
        }
        Ok(Self {
            sockets,
            cores,
            threads,
        })
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        self.sockets * self.cores * self.threads
    }

    /// Threads per core.
    #[must_use]
    pub fn threads_per_core(&self) -> u32 {
        self.threads
    }

    /// Threads per socket.
    #[must_use]
    pub fn threads_per_socket(&self) -> u32 {
        self.cores * self.threads
    }

    /// Bits of the APIC id that number threads within a core.
    #[must_use]
    pub fn thread_bits(&self) -> u32 {
        bits_for(self.threads)
    }

    /// Bits of the APIC id that number threads within a socket.
    #[must_use]
    pub fn socket_shift(&self) -> u32 {
        self.thread_bits() + bits_for(self.cores)
    }

    /// APIC id of vCPU `index`: socket, core and thread number, each in its own bits.
    #[must_use]
    pub fn apic_id(&self, index: u32) -> u32 {
        let (socket, core, thread) = self.position(index);
        socket << self.socket_shift() | core << self.thread_bits() | thread
    }

    /// Socket, core within the socket and thread within the core of vCPU `index`.
    #[must_use]
    pub fn position(&self, index: u32) -> (u32, u32, u32) {
        let thread = index % self.threads;
        let core = index / self.threads % self.cores;
        (index / self.threads_per_socket(), core, thread)
    }

    /// The largest APIC id in use.
    #[must_use]
    pub fn max_apic_id(&self) -> u32 {
        self.apic_id(self.vcpus() - 1)
    }
}

/// Bits needed to number `count` things.
fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(vcpus: u32, sockets: u32, cores: u32, threads: u32) -> CpuCounts {
        let given = |count| (count > 0).then_some(count);
        CpuCounts {
            vcpus,
            sockets: given(sockets),
            cores: given(cores),
            threads: given(threads),
        }
    }

    #[test]
    fn open_counts_are_completed() {
        let cases = [
            (counts(4, 0, 0, 0), (1, 4, 1)),
            (counts(8, 2, 0, 2), (2, 2, 2)),
            (counts(8, 0, 2, 2), (2, 2, 2)),
            (counts(8, 2, 2, 0), (2, 2, 2)),
            (counts(6, 3, 0, 0), (3, 2, 1)),
        ];
        for (counts, (sockets, cores, threads)) in cases {
            let topology = Topology::new(counts).unwrap();
            let expected = Topology {
                sockets,
                cores,
                threads,
            };
            assert_eq!(topology, expected, "{counts:?}");
        }
    }

    #[test]
    fn counts_that_do_not_multiply_up_are_refused() {
        for bad in [
            counts(4, 3, 0, 0),
            counts(4, 2, 4, 0),
            counts(5, 0, 0, 2),
            counts(1, u32::MAX, u32::MAX, u32::MAX),
        ] {
            assert!(
                matches!(Topology::new(bad), Err(TopologyError::Mismatch { .. })),
                "{bad:?}"
            );
        }
        assert_eq!(
            Topology::new(counts(0, 0, 0, 0)),
            Err(TopologyError::Zero("number of vCPUs"))
        );
    }

    #[test]
    fn apic_ids_leave_gaps_where_counts_are_not_powers_of_two() {
        let topology = Topology::new(counts(12, 2, 3, 2)).unwrap();
        let ids: Vec<_> = (0..12).map(|index| topology.apic_id(index)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!(topology.max_apic_id(), 13);
        let large = Topology::new(counts(1024, 4, 128, 2)).unwrap();
        assert_eq!(large.max_apic_id(), 1023);
    }
}
