use super::*;

/// 2026-11-21 13:45:07 UTC, a Saturday.
fn fixed() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_795_268_707)
}

fn cmos() -> Cmos {
    Cmos::new(DeviceId::new("rtc").unwrap(), fixed)
}

fn read(cmos: &Cmos, index: u8) -> u8 {
    cmos.write(0, &[index]);
    let mut data = [0];
    cmos.read(1, &mut data);
    data[0]
}

fn write(cmos: &Cmos, index: u8, value: u8) {
    cmos.write(0, &[index]);
    cmos.write(1, &[value]);
}

#[test]
fn clock_reads_in_bcd_and_binary() {
    let cmos = cmos();
    let fields = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS];
    let bcd = fields.map(|field| read(&cmos, field));
    assert_eq!(bcd, [0x20, 0x26, 0x11, 0x21, 0x07, 0x13, 0x45, 0x07]);
    write(&cmos, STATUS_B, STATUS_B_24_HOUR | STATUS_B_BINARY);
    assert_eq!(
        fields.map(|field| read(&cmos, field)),
        [20, 26, 11, 21, 7, 13, 45, 7]
    );
    write(&cmos, STATUS_B, STATUS_B_BINARY);
    assert_eq!(read(&cmos, HOURS), HOUR_PM | 1);
}

#[test]
fn setting_the_clock_keeps_it_ticking_from_there() {
    let cmos = cmos();
    write(&cmos, YEAR, 0x30);
    write(&cmos, MONTH, 0x02);
    write(&cmos, DAY, 0x28);
    write(&cmos, HOURS, 0x23);
    let fields = [YEAR, MONTH, DAY, HOURS, MINUTES];
    assert_eq!(
        fields.map(|field| read(&cmos, field)),
        [0x30, 0x02, 0x28, 0x23, 0x45]
    );
}

/// Written often enough, a year of more than two digits would leave the range of the type.
#[test]
fn years_of_more_than_two_digits_leave_the_clock_alone() {
    let cmos = cmos();
    write(&cmos, STATUS_B, STATUS_B_24_HOUR | STATUS_B_BINARY);
    for field in [YEAR, CENTURY] {
        for number in [100, 255] {
            write(&cmos, field, number);
        }
    }
    assert_eq!([CENTURY, YEAR].map(|field| read(&cmos, field)), [20, 26]);
    let mut wire: CmosStateV1 = cmos.save().unwrap().decode(KIND, 1..=1).unwrap();
    wire.offset_seconds = i64::MAX;
    cmos.restore(&DeviceState::encode(KIND, 1, &wire).unwrap())
        .unwrap();
    for number in [99, 255] {
        write(&cmos, YEAR, number);
    }
    assert_eq!(read(&cmos, YEAR), 99);
}

#[test]
fn impossible_dates_leave_the_clock_alone() {
    let cmos = cmos();
    for (field, value) in [
        (MONTH, 0x13),
        (MONTH, 0),
        (DAY, 0xff),
        (HOURS, 0x24),
        (CENTURY, 0),
    ] {
        write(&cmos, field, value);
    }
    assert_eq!(read(&cmos, MONTH), 0x11);
    assert_eq!(read(&cmos, CENTURY), 0x20);
}

#[test]
fn calendar_agrees_with_known_dates_and_inverts() {
    let known = [
        (0, (1970, 1, 1, 5)),
        (951_782_400, (2000, 2, 29, 3)),
        (4_107_542_400, (2100, 3, 1, 2)),
        (253_402_300_799, (9999, 12, 31, 6)),
    ];
    for (seconds, (year, month, day, weekday)) in known {
        let calendar = Calendar::from_unix(seconds);
        let found = (
            calendar.year,
            calendar.month,
            calendar.day,
            calendar.weekday,
        );
        assert_eq!(found, (year, month, day, weekday), "{seconds}");
    }
    for day in 0..200_000 {
        let seconds = day * SECONDS_PER_DAY + day % SECONDS_PER_DAY;
        assert_eq!(Calendar::from_unix(seconds).to_unix(), Some(seconds));
    }
}

#[test]
fn memory_cells_hold_and_every_cell_is_safe() {
    let cmos = cmos();
    write(&cmos, 0x5b, 0x42);
    assert_eq!(read(&cmos, 0x5b), 0x42);
    for index in 0..=255 {
        for value in [0, 0x99, 0xff] {
            write(&cmos, index, value);
            read(&cmos, index);
        }
    }
}

#[test]
fn clock_offset_and_memory_survive_save_and_restore() {
    let source = cmos();
    write(&source, 0x40, 9);
    write(&source, YEAR, 0x31);
    let state = source.save().unwrap();
    let target = cmos();
    target.restore(&state).unwrap();
    assert_eq!(target.save().unwrap(), state);
    assert_eq!(read(&target, YEAR), 0x31);
}
