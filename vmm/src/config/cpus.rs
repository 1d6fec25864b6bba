//! vCPUs: how many, arranged how, which features, on which host CPUs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::host_cpus::HostCpus;
use super::schema::text_schema;
use crate::arch::x86_64::features::Feature;
use crate::arch::x86_64::{CpuCounts, Topology, TopologyError};

/// vCPUs and where they run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct CpusConfig {
    /// Number of vCPUs.
    pub count: u32,
    /// Sockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockets: Option<u32>,
    /// Cores per socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores: Option<u32>,
    /// Threads per core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// CPU model and features.
    #[serde(default)]
    pub model: CpuModel,
    /// Host CPUs for the vCPUs, one each in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<HostCpus>,
    /// Host CPUs for all other threads of the VMM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_pin: Option<HostCpus>,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            count: 1,
            sockets: None,
            cores: None,
            threads: None,
            model: CpuModel::default(),
            pin: None,
            vmm_pin: None,
        }
    }
}

impl CpusConfig {
    /// Sockets, cores and threads.
    ///
    /// # Errors
    /// [`TopologyError`] when the numbers do not multiply up.
    pub fn topology(&self) -> Result<Topology, TopologyError> {
        Topology::new(CpuCounts {
            vcpus: self.count,
            sockets: self.sockets,
            cores: self.cores,
            threads: self.threads,
        })
    }
}

/// A CPU model and the features taken from it: `host,-tsc-deadline`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuModel {
    masked: Vec<Feature>,
}

/// A CPU model that cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCpuModel {
    /// Another model than `host`.
    #[error("CPU model {0:?} is unknown, the only one is host")]
    UnknownModel(String),
    /// An item that does not begin with a minus sign.
    #[error("{0:?} does not begin with '-': features can only be taken away, as in host,-avx512f")]
    NotMasked(String),
    /// No such feature.
    #[error("CPU feature {name:?} is unknown{hint}")]
    UnknownFeature {
        /// What was given.
        name: String,
        /// Similar names, or nothing.
        hint: String,
    },
}

text_schema!(CpuModel, "host,-tsc-deadline");

impl CpuModel {
    /// Features taken away.
    #[must_use]
    pub fn masked(&self) -> &[Feature] {
        &self.masked
    }
}

impl FromStr for CpuModel {
    type Err = InvalidCpuModel;

    fn from_str(text: &str) -> Result<Self, InvalidCpuModel> {
        let mut items = text.split(',');
        let model = items.next().unwrap_or_default();
        if model != "host" {
            return Err(InvalidCpuModel::UnknownModel(model.to_owned()));
        }
        let mut masked = Vec::new();
        for item in items {
            let name = item
                .strip_prefix('-')
                .ok_or_else(|| InvalidCpuModel::NotMasked(item.to_owned()))?;
            let feature = Feature::by_name(name).ok_or_else(|| {
                let similar = Feature::similar_names(name);
                let hint = if similar.is_empty() {
                    String::new()
                } else {
                    format!(", perhaps {}", similar.join(", "))
                };
                InvalidCpuModel::UnknownFeature {
                    name: name.to_owned(),
                    hint,
                }
            })?;
            if !masked.contains(feature) {
                masked.push(*feature);
            }
        }
        Ok(Self { masked })
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("host")?;
        for feature in &self.masked {
            write!(f, ",-{}", feature.name)?;
        }
        Ok(())
    }
}

impl TryFrom<String> for CpuModel {
    type Error = InvalidCpuModel;

    fn try_from(text: String) -> Result<Self, InvalidCpuModel> {
        text.parse()
    }
}

impl From<CpuModel> for String {
    fn from(model: CpuModel) -> Self {
        model.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_names_masked_features_canonically() {
        let model: CpuModel = "host,-tsc_deadline_timer,-avx512f,-avx512f"
            .parse()
            .unwrap();
        assert_eq!(model.to_string(), "host,-tsc-deadline,-avx512f");
    }

    #[test]
    fn unknown_models_and_features_are_refused_with_a_hint() {
        let error = |text: &str| text.parse::<CpuModel>().unwrap_err().to_string();
        assert_eq!(
            error("max"),
            "CPU model \"max\" is unknown, the only one is host"
        );
        assert!(error("host,avx").contains("does not begin with '-'"));
        assert!(
            error("host,-tsc-dead").ends_with("perhaps tsc-deadline, tsc"),
            "{}",
            error("host,-tsc-dead")
        );
        assert_eq!(error("host,-zzz"), "CPU feature \"zzz\" is unknown");
    }
}
