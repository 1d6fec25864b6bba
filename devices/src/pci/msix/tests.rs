use super::*;
use crate::interrupt::MsiRouter;
use crate::testing::FakeRouter;

fn msix(vectors: usize) -> (Msix, FakeRouter) {
    let router = FakeRouter::default();
    let routes = (0..vectors).map(|_| router.allocate().unwrap()).collect();
    (Msix::new(routes), router)
}

fn program(msix: &mut Msix, vector: u64, address: u64, data: u32) {
    msix.write_table(vector * 16, &address.to_le_bytes());
    let control = u64::from(data).to_le_bytes();
    msix.write_table(vector * 16 + 8, &control);
}

#[test]
fn interrupt_raised_while_masked_is_pending_and_delivered_on_unmask() {
    let (mut msix, router) = msix(2);
    program(&mut msix, 1, 0xfee0_1000, 0x41);
    router.routes()[1].trigger();
    let mut pba = [0; 8];
    msix.read_pba(0, &mut pba);
    assert_eq!(pba[0], 0b10);
    msix.set_control(ENABLE);
    let expected = MsiMessage {
        address: 0xfee0_1000,
        data: 0x41,
    };
    assert_eq!(router.routes()[1].delivered(), [expected]);
    msix.read_pba(0, &mut pba);
    assert_eq!(pba[0], 0);
}

#[test]
fn function_mask_and_vector_mask_hold_interrupts_back() {
    let (mut msix, router) = msix(1);
    program(&mut msix, 0, 0xfee0_0000, 0x30);
    msix.set_control(ENABLE);
    assert!(router.routes()[0].message().is_some());
    msix.set_control(ENABLE | FUNCTION_MASK);
    assert!(router.routes()[0].message().is_none());
    msix.set_control(ENABLE);
    msix.write_table(12, &1_u32.to_le_bytes());
    assert!(router.routes()[0].message().is_none());
}

#[test]
fn table_reads_back_what_was_written() {
    let (mut msix, _router) = msix(1);
    program(&mut msix, 0, 0x1234_5678_fee0_0003, 0xdead);
    let mut data = [0; 8];
    msix.read_table(0, &mut data);
    assert_eq!(
        u64::from_le_bytes(data),
        0x1234_5678_fee0_0000,
        "low bits are reserved"
    );
    msix.read_table(8, &mut data);
    assert_eq!(u64::from_le_bytes(data), 0xdead, "unmasked");
}

#[test]
fn write_across_two_entries_changes_neither() {
    let (mut msix, router) = msix(2);
    program(&mut msix, 0, 0xfee0_0000, 0x30);
    program(&mut msix, 1, 0xfee0_0000, 0x31);
    msix.set_control(ENABLE);
    let before = msix.save();
    msix.write_table(12, &[1, 0, 0, 0, 0, 0x10, 0xe0, 0xfe]);
    assert_eq!(msix.save(), before);
    assert!(router.routes()[0].message().is_some());
    let mut data = [0; 8];
    msix.read_table(12, &mut data);
    assert_eq!(data, [0xff; 8]);
}

#[test]
fn accesses_outside_the_table_or_of_odd_width_do_nothing() {
    let (mut msix, router) = msix(1);
    msix.set_control(ENABLE);
    for offset in [16, 1, 3, u64::MAX - 7] {
        msix.write_table(offset, &[0; 8]);
        let mut data = [0; 8];
        msix.read_table(offset, &mut data);
    }
    msix.write_table(12, &[0]);
    msix.write_table(12, &[0; 2]);
    assert!(router.routes()[0].message().is_none());
    let mut pba = [0xaa; 8];
    msix.read_pba(u64::MAX - 3, &mut pba[..3]);
    msix.read_pba(8, &mut pba);
    assert_eq!(pba, [0; 8]);
}

#[test]
fn restore_reroutes_and_keeps_pending_interrupts() {
    let (mut source, router) = msix(3);
    program(&mut source, 0, 0xfee0_0000, 0x30);
    program(&mut source, 2, 0xfee0_0000, 0x32);
    source.write_table(2 * 16 + 12, &1_u32.to_le_bytes());
    source.set_control(ENABLE);
    router.routes()[2].trigger();
    let state = source.save();
    assert_eq!(state.pending, [2]);

    let (mut target, target_router) = msix(3);
    target.restore(&state).unwrap();
    assert_eq!(target.save(), state);
    target.write_table(2 * 16 + 12, &0_u32.to_le_bytes());
    assert_eq!(target_router.routes()[2].delivered().len(), 1);
}

#[test]
fn restore_refuses_another_shape() {
    let (mut target, _router) = msix(2);
    let (three, _other) = msix(3);
    assert!(target.restore(&three.save()).is_err());
    let mut bad = target.save();
    bad.pending = vec![2];
    assert!(target.restore(&bad).is_err());
}

#[test]
fn capability_encodes_size_and_places() {
    let layout = MsixLayout {
        bar: 0,
        table_offset: 0x8000,
        pba_offset: 0xc000,
    };
    let body = layout.capability(3);
    assert_eq!(body, [2, 0, 0x00, 0x80, 0, 0, 0x00, 0xc0, 0, 0]);
}
