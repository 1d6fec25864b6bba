//! Which version of the protocol two builds speak with each other.

/// Newest protocol version that this build speaks.
pub const VERSION: u16 = 3;

/// Oldest protocol version that this build speaks: always the one before the newest, once there
/// is one.
pub const OLDEST_VERSION: u16 = 2;

/// First version in which devices' states come as streams.
pub const DEVICES_VERSION: u16 = 3;

/// How often each data connection may break on average and be opened again.
pub(crate) const REOPENED_MAX: usize = 2;

/// Versions that a build speaks, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
}

/// Two builds have no version in common.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the source speaks versions {} to {}, this build {} to {}",
    source_side.oldest, source_side.newest, destination.oldest, destination.newest
)]
pub struct NoCommonVersion {
    /// The source's.
    pub source_side: Versions,
    /// This build's.
    pub destination: Versions,
}

impl Versions {
    /// Those of this build.
    pub const OURS: Self = Self {
        oldest: OLDEST_VERSION,
        newest: VERSION,
    };

    /// Whether `version` is among them.
    #[must_use]
    pub fn contain(self, version: u16) -> bool {
        (self.oldest..=self.newest).contains(&version)
    }

    /// What a destination that speaks these answers to a source that speaks `source_side`: the
    /// newest that both know.
    ///
    /// # Errors
    /// [`NoCommonVersion`], also when the source's are no range.
    pub fn choose(self, source_side: Self) -> Result<u16, NoCommonVersion> {
        let version = self.newest.min(source_side.newest);
        match self.contain(version) && source_side.contain(version) {
            true => Ok(version),
            false => Err(NoCommonVersion {
                source_side,
                destination: self,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions((oldest, newest): (u16, u16)) -> Versions {
        Versions { oldest, newest }
    }

    #[test]
    fn newest_version_that_both_speak_is_chosen() {
        for (source, destination, chosen) in [
            ((1, 1), (1, 1), 1),
            // The source is newer by one, older by one, and the like of it.
            ((1, 2), (1, 1), 1),
            ((1, 1), (1, 2), 1),
            ((2, 3), (1, 2), 2),
            ((1, 2), (2, 3), 2),
            ((2, 3), (2, 3), 3),
            // Builds that speak more than they must.
            ((1, 9), (4, 5), 5),
            ((4, 5), (1, 9), 5),
            ((0, u16::MAX), (1, 2), 2),
        ] {
            let found = versions(destination).choose(versions(source));
            assert_eq!(found, Ok(chosen), "{source:?} to {destination:?}");
        }
    }

    #[test]
    fn builds_two_versions_apart_are_refused_with_both_ranges() {
        for (source, destination) in [
            ((3, 4), (1, 2)),
            ((1, 2), (3, 4)),
            ((0, 0), (1, 1)),
            // No ranges: nothing that a build says.
            ((2, 1), (1, 2)),
            ((u16::MAX, 0), (1, 2)),
            ((3, 2), (1, 2)),
        ] {
            let refused = versions(destination).choose(versions(source)).unwrap_err();
            let said = format!(
                "the source speaks versions {} to {}, this build {} to {}",
                source.0, source.1, destination.0, destination.1
            );
            assert_eq!(refused.to_string(), said);
        }
    }

    #[test]
    fn this_build_speaks_its_version_and_the_one_before() {
        let Versions { oldest, newest } = Versions::OURS;
        assert_eq!(oldest, newest.saturating_sub(1).max(1));
    }
}
