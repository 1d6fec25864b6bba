//! Devices added and removed by operators. Opening one may take long, and is done on a thread of its
//! own; letting one go is up to the guest.

use std::io;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::DeviceId;

use super::client::Answer;
use super::{CommandError, Controller, DeviceInfo, MachineLink};
use crate::config::{DeviceConfig, VmConfig};
use crate::control::errors::chain;
use crate::machine::assigned::{AssignError, Opened};
use crate::machine::events::EventKind;
use crate::machine::runtime::DeviceEntry;

/// Until it is looked again whether a device that has gone is still accessed, and at most: longer than a
/// server has for an answer.
const IN_USE_PAUSE: Duration = Duration::from_millis(1);
const IN_USE_MAX: Duration = Duration::from_secs(60);

impl Controller {
    /// Begins to add a device; `answer` gets what has come of it.
    pub(super) fn add_device(&mut self, config: DeviceConfig, answer: Answer<DeviceInfo>) {
        let begun = self.begin_adding(config).and_then(|(id, device)| {
            let opener = self.machine.opener.clone();
            let jobs = self.jobs_sender.clone();
            let work = move |answer: Answer<DeviceInfo>| {
                let opened = opener.open(&id, &device);
                // Who asked may have gone, and would not know of it: it is closed again.
                let opened = (!answer.is_closed()).then_some(opened);
                // Without a controller the VM has ended, and the device is closed again.
                let _ = jobs.send(Box::new(move |controller: &mut Controller| {
                    controller.adding = false;
                    match opened {
                        Some(opened) => controller.answer_adding(device, opened, answer),
                        None => log::info!(device = id.as_str(); "nobody waits for a device that was to be added"),
                    }
                }));
            };
            thread_for("plug", work).map_err(CommandError::Thread)
        });
        self.adding |= begun.is_ok();
        // The one who asked may no longer wait for the answer; the thread waits for its order.
        let _ = match begun {
            Ok((_, begin)) => begin.send(answer).map_err(|_| ()),
            Err(error) => answer.send(Err(error)).map_err(|_| ()),
        };
    }

    /// The device with its id, if it fits the others.
    fn begin_adding(
        &self,
        mut device: DeviceConfig,
    ) -> Result<(DeviceId, DeviceConfig), CommandError> {
        self.check_idle()?;
        self.check_doubt()?;
        self.check_adding()?;
        if self.is_loading() {
            return Err(CommandError::Loading);
        }
        let mut config = self.config_with_ids();
        if device.id.is_none() {
            let ids = config.device_ids();
            let free = (0..).map(|number| format!("device{number}"));
            device.id = free.into_iter().find(|id| !ids.contains(id));
        }
        config.device.push(device.clone());
        let checked = config.validate();
        checked.map_err(|error| CommandError::InvalidDevice(chain(&error)))?;
        let id = device.id.clone().unwrap_or_default();
        let id = DeviceId::new(id).expect("checked with the configuration");
        Ok((id, device))
    }

    /// Names stay as they are, whatever comes and goes.
    fn config_with_ids(&self) -> VmConfig {
        let mut config = (*self.config).clone();
        let ids = config.device_ids();
        for (device, id) in config.device.iter_mut().zip(ids) {
            device.id = Some(id);
        }
        config
    }

    fn answer_adding(
        &mut self,
        device: DeviceConfig,
        opened: Result<Opened, AssignError>,
        answer: Answer<DeviceInfo>,
    ) {
        let added = self.finish_adding(device, opened);
        // Gone in the last moment.
        if let Err(Ok(info)) = answer.send(added)
            && let Err(error) = self.remove_device(&info.id)
        {
            log::warn!(device = info.id.as_str(), error:%; "a device is added that nobody knows of");
        }
    }

    fn finish_adding(
        &mut self,
        device: DeviceConfig,
        opened: Result<Opened, AssignError>,
    ) -> Result<DeviceInfo, CommandError> {
        let opened = opened.map_err(CommandError::Assign)?;
        let bdf = self.machine.plug(opened, None).map_err(CommandError::Bus)?;
        self.machine.acpi.add_device(bdf.device());
        // Others may have gone while it was opened.
        let mut config = self.config_with_ids();
        config.device.push(device);
        self.set_config(config);
        let info = self.machine.device_infos().pop();
        let info = info.expect("the device that was added last");
        let device = info.id.clone();
        self.events.publish(EventKind::DeviceAdded { device });
        Ok(info)
    }

    /// Asks the guest to let a device go.
    pub(super) fn remove_device(&self, id: &str) -> Result<(), CommandError> {
        self.check_idle()?;
        self.ask_back(id)
    }

    /// Assigned devices as they are configured, with their names.
    pub(crate) fn assigned_configs(&self) -> Vec<DeviceConfig> {
        self.config_with_ids().device
    }

    /// Whether an assigned device is there, or still being closed.
    pub(crate) fn has_assigned(&self, id: &str) -> bool {
        self.config.device_ids().iter().any(|known| known == id)
    }

    /// The same as [`remove_device`](Self::remove_device), for the migration that runs.
    pub(crate) fn ask_back(&self, id: &str) -> Result<(), CommandError> {
        if !self.machine.device_infos().iter().any(|info| info.id == id) {
            return Err(CommandError::UnknownDevice(id.to_owned()));
        }
        let bdf = self.machine.removable(id);
        let bdf = bdf.ok_or_else(|| CommandError::NotRemovable(id.to_owned()))?;
        self.machine.acpi.remove_device(bdf.device());
        Ok(())
    }

    /// The guest has let devices go: bit n stands for device n.
    pub(super) fn eject(&mut self, devices: u32) {
        for number in (0..32).filter(|number| devices & 1 << number != 0) {
            if let Some(entry) = self.machine.unplug(number) {
                self.close(entry);
            }
        }
    }

    /// Has a device closed by a thread of its own: its reset may take long.
    fn close(&mut self, entry: DeviceEntry) {
        let device = entry.device.id().to_string();
        let (jobs, id) = (self.jobs_sender.clone(), device.clone());
        let work = move |entry: DeviceEntry| {
            let device = Arc::downgrade(&entry.device);
            drop(entry);
            // A vCPU may still be in an access that has begun, and closes it then.
            let begin = Instant::now();
            while device.strong_count() > 0 && begin.elapsed() < IN_USE_MAX {
                std::thread::sleep(IN_USE_PAUSE);
            }
            // Without a controller nobody asks any more.
            let _ = jobs.send(Box::new(|controller: &mut Controller| {
                controller.finish_removing(id);
            }));
        };
        match thread_for("unplug", work) {
            Ok((thread, hand)) => {
                self.closing.insert(device, thread);
                // The thread waits for it.
                let _ = hand.send(entry);
            }
            Err(error) => {
                log::warn!(device:%, error:% = error; "no thread to close a device on, the VM waits for it");
                drop(entry);
                self.finish_removing(device);
            }
        }
    }

    fn finish_removing(&mut self, device: String) {
        self.closing.remove(&device);
        let mut config = self.config_with_ids();
        let is_another = |config: &DeviceConfig| config.id.as_ref() != Some(&device);
        config.device.retain(is_another);
        self.set_config(config);
        self.events.publish(EventKind::DeviceRemoved { device });
    }

    /// Waits until devices that have been let go are closed: whoever has the VM's end announced
    /// may have them.
    pub(super) fn finish_closing(&mut self) {
        for (device, thread) in std::mem::take(&mut self.closing) {
            if thread.join().is_err() {
                log::error!(device:%; "the thread that closes a device has panicked");
            }
        }
    }

    fn set_config(&mut self, config: VmConfig) {
        self.config = Arc::new(config);
        self.config_cell.set(Arc::clone(&self.config));
    }

    /// Whether no device is on its way in or out.
    ///
    /// # Errors
    /// [`CommandError::Adding`], [`CommandError::Closing`].
    pub(super) fn check_adding(&self) -> Result<(), CommandError> {
        match (self.adding, self.closing.keys().next()) {
            (true, _) => Err(CommandError::Adding),
            (false, Some(device)) => Err(CommandError::Closing(device.clone())),
            (false, None) => Ok(()),
        }
    }
}

impl MachineLink {
    /// Opens a device and gives it to the guest, on behalf of the migration that runs.
    ///
    /// # Errors
    /// As for [`ControllerClient::add_device`](super::ControllerClient::add_device).
    pub(crate) fn plug_in(&self, device: DeviceConfig) -> Result<(), CommandError> {
        let ended = |_| CommandError::Ended;
        let opener = self.call(|controller| controller.machine.opener.clone());
        let opener = opener.map_err(ended)?;
        let id = DeviceId::new(device.id.clone().unwrap_or_default());
        let id = id.map_err(|error| CommandError::InvalidDevice(chain(&error)))?;
        let opened = opener.open(&id, &device);
        let added = self.call(move |controller| controller.finish_adding(device, opened));
        added.map_err(ended)?.map(drop)
    }
}

/// A thread that waits for what it is to work on: whoever has that keeps it when there is no thread to be had.
fn thread_for<T: Send + 'static>(
    name: &str,
    work: impl FnOnce(T) + Send + 'static,
) -> io::Result<(JoinHandle<()>, mpsc::Sender<T>)> {
    let (hand, handed) = mpsc::channel();
    let wait = move || {
        if let Ok(value) = handed.recv() {
            work(value);
        }
    };
    let thread = std::thread::Builder::new().name(name.to_owned());
    Ok((thread.spawn(wait)?, hand))
}
