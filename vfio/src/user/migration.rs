//! A server's migration interface: `VFIO_USER_DEVICE_FEATURE`, `VFIO_USER_MIG_DATA_READ` and
//! `VFIO_USER_MIG_DATA_WRITE`.

use std::sync::Arc;
use std::time::Instant;

use super::connection::Connection;
use super::offer::{ask, structure_bytes};
use super::protocol::{
    Command, FEATURE_GET, FEATURE_MIG_DATA_SIZE, FEATURE_MIG_DEVICE_STATE, FEATURE_MIGRATION,
    FEATURE_SET, Feature, FeatureValue, MIGRATION_PRE_COPY, MIGRATION_STOP_COPY, Malformed,
    MigData, Payload, invalid,
};
use crate::backend::BackendError;
use crate::migration::{MigrationFeatures, MigrationState, PreCopyInfo, VfioMigration};

/// The interface of a function that has one.
pub(super) struct UserMigration {
    connection: Arc<Connection>,
    features: MigrationFeatures,
    /// Bytes of the state in one message.
    max_data: usize,
}

impl UserMigration {
    /// `None`: the function has none.
    pub(super) fn query(
        connection: &Arc<Connection>,
        max_data: usize,
    ) -> Result<Option<Self>, BackendError> {
        let flags = match get(connection, FEATURE_MIGRATION) {
            Err(BackendError::Refused { .. }) => return Ok(None),
            flags => flags?,
        };
        let has = |flag: u64| flags & flag != 0;
        Ok(has(MIGRATION_STOP_COPY).then(|| Self {
            connection: Arc::clone(connection),
            // The protocol does not use the states for peers.
            features: MigrationFeatures {
                p2p: false,
                pre_copy: has(MIGRATION_PRE_COPY),
            },
            max_data,
        }))
    }
}

/// The value of a feature that has 8 bytes.
fn get(connection: &Connection, feature: u32) -> Result<u64, BackendError> {
    let request = Feature {
        argsz: structure_bytes::<FeatureValue>(),
        flags: FEATURE_GET | feature,
    };
    exchange(connection, request.encode(&[]), request.flags)
}

fn exchange(connection: &Connection, payload: Vec<u8>, flags: u32) -> Result<u64, BackendError> {
    let command = Command::DeviceFeature;
    let room = size_of::<FeatureValue>();
    let reply = ask(connection, command, payload, room)?;
    let value = FeatureValue::decode(&reply.payload).and_then(|(answer, _)| match answer.flags {
        same if same == flags => Ok(answer.value),
        other => Err(invalid("which feature it answers for", other)),
    });
    value.map_err(|error| connection.broken(command, &error))
}

impl VfioMigration for UserMigration {
    fn features(&self) -> MigrationFeatures {
        self.features
    }

    /// It has been shown guest memory only.
    fn reaches_peers(&self) -> bool {
        false
    }

    fn state(&self) -> Result<MigrationState, BackendError> {
        let value = get(&self.connection, FEATURE_MIG_DEVICE_STATE)?;
        // The other half is a descriptor's number, which is not used.
        let [a, b, c, d, ..] = value.to_ne_bytes();
        let number = u32::from_ne_bytes([a, b, c, d]);
        let state = MigrationState::of_number(number);
        state
            .filter(|state| state.is_of(self.features))
            .ok_or_else(|| {
                let error = invalid("the migration state", number);
                self.connection.broken(Command::DeviceFeature, &error)
            })
    }

    fn take_arc(&self, to: MigrationState) -> Result<(), BackendError> {
        let request = FeatureValue {
            argsz: structure_bytes::<FeatureValue>(),
            flags: FEATURE_SET | FEATURE_MIG_DEVICE_STATE,
            value: to.number().into(),
        };
        exchange(&self.connection, request.encode(&[]), request.flags).map(drop)
    }

    fn data_size(&self) -> Result<u64, BackendError> {
        get(&self.connection, FEATURE_MIG_DATA_SIZE)
    }

    /// The protocol has no message for it; [`data_size`](Self::data_size) tells as much.
    fn pre_copy_info(&self) -> Result<PreCopyInfo, BackendError> {
        Err(BackendError::Absent("word for what is left of its state"))
    }

    fn read_data(&self, buf: &mut [u8]) -> Result<usize, BackendError> {
        let command = Command::MigDataRead;
        let wanted = buf.len().min(self.max_data);
        let room = size_of::<MigData>() + wanted;
        let request = MigData {
            argsz: u32::try_from(room).unwrap_or(u32::MAX),
            size: u32::try_from(wanted).unwrap_or(u32::MAX),
        };
        let reply = match ask(&self.connection, command, request.encode(&[]), room) {
            // As VFIO says it in PRE_COPY; the protocol has no word for it.
            Err(BackendError::Refused { source, .. })
                if source.raw_os_error() == Some(libc::ENOMSG) =>
            {
                return Ok(0);
            }
            reply => reply?,
        };
        let read = MigData::decode(&reply.payload).and_then(|(answer, data)| {
            let expected = size_of::<MigData>() + answer.size as usize;
            match buf.get_mut(..data.len()) {
                Some(part) if reply.payload.len() == expected => {
                    part.copy_from_slice(data);
                    Ok(part.len())
                }
                _ => Err(Malformed::Length {
                    len: reply.payload.len(),
                    expected,
                }),
            }
        });
        read.map_err(|error| self.connection.broken(command, &error))
    }

    fn write_data(&self, data: &[u8]) -> Result<(), BackendError> {
        let command = Command::MigDataWrite;
        let begun = Instant::now();
        for (number, part) in data.chunks(self.max_data).enumerate() {
            if number > 0 {
                self.connection.check_time(begun, command)?;
            }
            let request = MigData {
                argsz: structure_bytes::<MigData>(),
                size: u32::try_from(part.len()).unwrap_or(u32::MAX),
            };
            ask(&self.connection, command, request.encode(part), 0)?;
        }
        Ok(())
    }
}
