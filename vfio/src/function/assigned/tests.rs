mod moving;

use std::sync::{Weak, mpsc};
use std::time::{Duration, Instant};

use devices::interrupt::{LineSource, MsiMessage, MsiRoute};
use devices::testing::FakeRouter;

use parking_lot::Condvar;

use super::*;
use crate::backend::IrqKind;
use crate::function::HostNotice;
use crate::testing::ModelBackend;

/// BAR 0 of 32 bits, BAR 2 of 64, MSI with 4 vectors, MSI-X with 2 in BAR 2, PCI Express.
fn config() -> Vec<u8> {
    let mut config = vec![0; 256];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0x34, 0x12, 0x70, 0x64, 0, 0, 0x10, 0]);
    put(0x18, &[0x0c]);
    put(0x34, &[0x40]);
    put(
        0x40,
        &[0x11, 0x50, 0x01, 0x80, 0x02, 0x10, 0, 0, 0x02, 0x20, 0, 0],
    );
    put(0x50, &[0x10, 0x90, 0x02, 0x00, 0, 0, 0, 0x10]);
    put(0x90, &[0x05, 0x00, 0x04, 0x00]);
    config
}

struct Fixture {
    model: Arc<ModelBackend>,
    router: Arc<FakeRouter>,
    function: AssignedFunction,
}

fn fixture(config: &[u8]) -> Result<Fixture, FunctionError> {
    fixture_over(ModelBackend::new(config))
}

fn fixture_over(model: ModelBackend) -> Result<Fixture, FunctionError> {
    let model = Arc::new(model);
    let router = Arc::new(FakeRouter::default());
    let id = DeviceId::new("gpu").unwrap();
    let function = AssignedFunction::new(id, model.clone(), router.clone())?;
    Ok(Fixture {
        model,
        router,
        function,
    })
}

impl Fixture {
    fn program_vector(&self, vector: u64, data: u32) {
        let entry = 0x1000 + vector * 16;
        let parts = [(0, 0xfee0_0000), (4, 0), (8, data), (12, 0)];
        for (at, value) in parts {
            self.function
                .write_bar(2, entry + at, &u32::to_le_bytes(value));
        }
    }

    fn signalled(&self, route: usize) -> bool {
        let route = &self.router.routes()[route];
        route.eventfd().read().is_ok_and(|count| count == 1)
    }
}

#[test]
fn device_is_reset_before_and_after() {
    let f = fixture(&config()).unwrap();
    assert_eq!(f.model.resets(), 1);
    let mut command = [0; 2];
    f.model.read(RegionIndex::Config, 4, &mut command).unwrap();
    assert_eq!(command, [3, 0], "it decodes, whatever its guest says");
    let model = Arc::clone(&f.model);
    drop(f);
    assert_eq!(model.resets(), 2);
}

#[test]
fn bars_have_the_regions_sizes_and_the_registers_kinds() {
    let f = fixture(&config()).unwrap();
    let [first, second] = f.function.bars()[..] else {
        panic!("two BARs");
    };
    assert_eq!(
        (first.index, first.size_bytes, first.prefetchable),
        (0, 0x1000, false)
    );
    assert_eq!(
        (second.index, second.size_bytes, second.prefetchable),
        (2, 0x4000, true)
    );
}

#[test]
fn registers_are_the_devices_and_the_vector_table_is_not() {
    let f = fixture(&config()).unwrap();
    f.function.write_bar(0, 0x20, &[1, 2, 3, 4]);
    let mut data = [0; 4];
    f.model.read(RegionIndex::Bar(0), 0x20, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
    f.program_vector(1, 0x42);
    f.model
        .read(RegionIndex::Bar(2), 0x1018, &mut data)
        .unwrap();
    assert_eq!(data, [0; 4], "the guest's address is nothing to the device");
    f.function.read_bar(2, 0x1018, &mut data);
    assert_eq!(data, [0x42, 0, 0, 0]);
    f.function.read_bar(2, 0xfff_0000, &mut data);
    assert_eq!(data, [0xff; 4], "outside of the BAR");
}

#[test]
fn msix_vectors_signal_their_routes_while_it_is_on() {
    let f = fixture(&config()).unwrap();
    assert!(!f.model.interrupt(IrqKind::MsiX, 1));
    f.program_vector(1, 0x42);
    f.function.write_config(0x42, &[0x01, 0x80]);
    assert_eq!(f.model.vectors(IrqKind::MsiX), 2);
    let routes = f.router.routes();
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x42,
    };
    assert_eq!(routes[1].message(), Some(message));
    assert_eq!(routes[0].message(), None, "masked in the table");
    assert!(f.model.interrupt(IrqKind::MsiX, 1) && f.signalled(1));
    f.function.write_config(0x42, &[0x01, 0x00]);
    assert_eq!(f.model.vectors(IrqKind::MsiX), 0);
}

#[test]
fn msi_vectors_differ_in_the_low_bits() {
    let f = fixture(&config()).unwrap();
    f.function
        .write_config(0x94, &0xfee0_1000_u32.to_le_bytes());
    f.function.write_config(0x98, &[0x41, 0x00]);
    f.function.write_config(0x92, &[0x25, 0x00]);
    assert_eq!(f.model.vectors(IrqKind::Msi), 4);
    let routes = f.router.routes();
    let data: Vec<_> = routes[2..]
        .iter()
        .map(|route| route.message().unwrap().data)
        .collect();
    assert_eq!(data, [0x40, 0x41, 0x42, 0x43]);
    assert!(f.model.interrupt(IrqKind::Msi, 3) && f.signalled(5));
    f.function.write_config(0x92, &[0x24, 0x00]);
    assert_eq!(f.model.vectors(IrqKind::Msi), 0);
}

#[derive(Default)]
struct Line {
    raised: Mutex<u32>,
    sources: Mutex<Vec<Weak<dyn LineSource>>>,
    changed: Condvar,
}

impl SharedLine for Line {
    fn raise(&self) {
        *self.raised.lock() += 1;
        self.changed.notify_all();
    }

    fn listen(&self, source: Weak<dyn LineSource>) {
        self.sources.lock().push(source);
    }
}

impl Line {
    fn wait_raised(&self, times: u32) {
        let mut raised = self.raised.lock();
        let is_late = |raised: &mut u32| *raised < times;
        let timeout = Duration::from_secs(10);
        self.changed.wait_while_for(&mut raised, is_late, timeout);
        assert_eq!(*raised, times);
    }
}

#[test]
fn legacy_line_is_raised_and_let_go_on_while_messages_are_off() {
    let f = fixture(&config()).unwrap();
    let line = Arc::new(Line::default());
    assert!(!f.model.interrupt(IrqKind::Intx, 0), "not connected");
    f.function.connect_line(line.clone()).unwrap();
    let mut pin = [0; 4];
    f.function.read_config(0x3c, &mut pin);
    assert_eq!(pin, [0, 1, 0, 0]);
    assert!(f.model.interrupt(IrqKind::Intx, 0));
    line.wait_raised(1);
    let source = line.sources.lock()[0].upgrade().unwrap();
    source.handled();
    assert_eq!(f.model.unmasked(), 1);
    source.handled();
    assert_eq!(f.model.unmasked(), 1, "that was somebody else's");
    f.function.write_config(0x42, &[0x01, 0x80]);
    assert_eq!(f.model.vectors(IrqKind::Intx), 0);
    f.function.write_config(0x42, &[0x01, 0x00]);
    assert_eq!(f.model.vectors(IrqKind::Intx), 1);
    f.function.write_config(0x92, &[0x05, 0x00]);
    assert_eq!(f.model.vectors(IrqKind::Intx), 0);
    Device::reset(&f.function).unwrap();
    assert!(
        f.model.interrupt(IrqKind::Intx, 0),
        "on again after a reset"
    );
    line.wait_raised(2);
}

#[test]
fn guests_function_level_reset_puts_everything_back() {
    let f = fixture(&config()).unwrap();
    f.function.place_bar(0, 0xc000_0000);
    f.program_vector(0, 0x42);
    f.function.write_config(0x42, &[0x01, 0x80]);
    assert_eq!(f.function.write_config(4, &[6, 0]).len(), 2);
    f.function.write_bar(0, 0, &[9]);
    let changes = f.function.write_config(0x58, &[0, 0x80]);
    assert_eq!(changes.len(), 2, "{changes:?}");
    assert_eq!(f.model.resets(), 2);
    let mut data = [9; 4];
    f.function.read_config(4, &mut data);
    assert_eq!(data[..2], [0, 0]);
    f.function.read_config(0x40, &mut data);
    assert_eq!(data[2..], [1, 0]);
    assert_eq!(f.model.vectors(IrqKind::MsiX), 0);
    f.function.read_bar(2, 0x1008, &mut data);
    assert_eq!(data, [0; 4]);
}

/// Whatever the old guest has begun, the next one is not disturbed by it.
#[test]
fn device_is_silent_after_a_reset_of_the_machine_though_it_has_none() {
    let models = [
        ModelBackend::new(&config()),
        ModelBackend::new(&config()).without_reset(),
    ];
    for model in models {
        let f = fixture_over(model).unwrap();
        f.function.write_config(4, &[6, 0]);
        f.program_vector(0, 0x42);
        f.function.write_config(0x42, &[0x01, 0x80]);
        f.function.write_config(0x92, &[0x25, 0x00]);
        let on = [IrqKind::MsiX, IrqKind::Msi].map(|kind| f.model.vectors(kind));
        assert_eq!(on, [2, 4]);
        f.function.reset().unwrap();
        let off = [IrqKind::MsiX, IrqKind::Msi].map(|kind| f.model.vectors(kind));
        assert_eq!(off, [0, 0]);
        let mut command = [0; 2];
        f.model.read(RegionIndex::Config, 4, &mut command).unwrap();
        assert_eq!(command, [3, 0], "no bus mastering");
    }
}

#[test]
fn machine_is_reset_without_a_device_whose_server_is_lost() {
    let f = fixture(&config()).unwrap();
    f.function.write_bar(0, 0x20, &[1, 2, 3, 4]);
    f.program_vector(0, 0x41);
    f.function.write_config(0x42, &[0x01, 0x80]);
    assert_eq!(f.model.vectors(IrqKind::MsiX), 2);
    f.model.lose();
    f.function.reset().unwrap();
    let mut data = [0; 4];
    f.function.read_bar(2, 0x1008, &mut data);
    assert_eq!(data, [0; 4], "the vector is what it is at power-on");
    f.function.read_bar(0, 0x20, &mut data);
    assert_eq!(data, [0xff; 4], "nothing answers");
    assert_eq!(f.model.resets(), 1, "the one before its guest");
}

#[test]
fn impossible_devices_are_refused() {
    let mut outside = config();
    outside[0x45] = 0x40;
    assert!(matches!(
        fixture(&outside),
        Err(FunctionError::Msix { bar: 2 })
    ));
    let mut no_bar = config();
    no_bar[0x44] = 0x05;
    assert!(matches!(
        fixture(&no_bar),
        Err(FunctionError::Msix { bar: 5 })
    ));
    let mut io = config();
    io[0x10] = 0x01;
    let io = fixture(&io);
    assert!(matches!(
        io,
        Err(FunctionError::Bar {
            bar: 0,
            size_bytes: 0x1000
        })
    ));
}

#[test]
fn devices_without_a_migration_interface_do_not_move() {
    let f = fixture(&config()).unwrap();
    assert!(matches!(
        f.function.migratability(),
        Migratability::Blocked(_)
    ));
    assert!(matches!(f.function.begin_copy(), Err(MoveError::Absent)));
    assert!(!f.function.must_be_alone(), "nobody moves it");
    f.function.start().unwrap();
    f.function.pause().unwrap();
}

#[test]
fn notices_of_the_host_are_heard_through_resets_and_not_too_often() {
    let Fixture {
        function, model, ..
    } = fixture(&config()).unwrap();
    let (hear, heard) = mpsc::channel();
    let hook = move |notice| hear.send(notice).unwrap();
    let function = function.with_notices(Arc::new(hook)).unwrap();
    Device::reset(&function).unwrap();
    let soon = Duration::from_secs(10);
    let begin = Instant::now();
    assert!(model.interrupt(IrqKind::Request, 0));
    assert_eq!(heard.recv_timeout(soon), Ok(HostNotice::Request));
    // Without end, but for what is heard of it: one a second.
    let mut count = 1;
    while begin.elapsed() < Duration::from_millis(500) {
        assert!(model.interrupt(IrqKind::Error, 0));
        count += heard.try_iter().count() as u64;
    }
    assert!(count <= 1 + begin.elapsed().as_secs(), "{count}");
    assert_eq!(heard.recv_timeout(soon), Ok(HostNotice::Error));
    drop(function);
    assert!(heard.recv().is_err(), "nobody is left to call it");
}
