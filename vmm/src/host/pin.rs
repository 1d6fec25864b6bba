//! Binding threads to host CPUs.

#![expect(unsafe_code)]

use std::io;

/// Binds the calling thread, and threads it starts later, to `cpus`.
///
/// # Errors
/// The kernel's refusal: no such CPU, or none that this process may use.
pub fn pin_current_thread(cpus: &[u32]) -> io::Result<()> {
    // SAFETY: cpu_set_t is an array of integers, for which all zeroes is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in cpus {
        let cpu = usize::try_from(*cpu).map_err(io::Error::other)?;
        if cpu >= 8 * size_of::<libc::cpu_set_t>() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the number is within the set, as checked above.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the set outlives the call and its size is given; 0 means the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Where a thread may run.
#[derive(Clone)]
pub struct Affinity(libc::cpu_set_t);

impl Affinity {
    /// The calling thread's.
    ///
    /// # Errors
    /// The kernel's refusal: the host has more CPUs than the set has room for.
    pub fn of_current_thread() -> io::Result<Self> {
        // SAFETY: cpu_set_t is an array of integers, for which all zeroes is a value.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set outlives the call and its size is given; 0 means the calling thread.
        let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
        if result == 0 {
            Ok(Self(set))
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// How many CPUs it has.
    #[must_use]
    pub fn cpus(&self) -> usize {
        // SAFETY: the set is initialized.
        let count = unsafe { libc::CPU_COUNT(&self.0) };
        usize::try_from(count).unwrap_or(0)
    }

    /// Gives it to the calling thread, and to threads that it starts later.
    ///
    /// # Errors
    /// The kernel's refusal: none of the CPUs is left.
    pub fn apply(&self) -> io::Result<()> {
        // SAFETY: the set outlives the call and its size is given; 0 means the calling thread.
        let result = unsafe { libc::sched_setaffinity(0, size_of_val(&self.0), &raw const self.0) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinity_is_given_back_as_it_was() {
        std::thread::spawn(|| {
            let allowed = || {
                let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
                let line = status.lines().find(|l| l.starts_with("Cpus_allowed:"));
                line.map(str::to_owned).unwrap()
            };
            let before = allowed();
            let affinity = Affinity::of_current_thread().unwrap();
            pin_current_thread(&[0]).unwrap();
            affinity.apply().unwrap();
            assert_eq!(allowed(), before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn thread_runs_where_it_is_bound() {
        std::thread::spawn(|| {
            pin_current_thread(&[0]).unwrap();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let allowed = status
                .lines()
                .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
            assert_eq!(allowed.map(str::trim), Some("0"));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn cpus_that_do_not_exist_are_refused() {
        for cpu in [1023, 5000] {
            assert!(pin_current_thread(&[cpu]).is_err(), "{cpu}");
        }
    }
}
