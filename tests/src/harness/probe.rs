//! Tiny kernels in machine code. They run in ring 0, need no stack, and say on the serial port what
//! they were given.

/// Prints, without a stack: `mov dx, 0x3f8`.
const SERIAL_TO_DX: [u8; 4] = [0x66, 0xba, 0xf8, 0x03];
/// Prints what ESI/RSI points to, up to a zero: `l: lodsb; test al, al; jz +3; out dx, al; jmp l`.
const PRINT_STRING: [u8; 8] = [0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8];
/// Prints ECX bytes at ESI/RSI: `l: lodsb; out dx, al; loop l`.
const PRINT_BYTES: [u8; 4] = [0xac, 0xee, 0xe2, 0xfc];
/// `l: hlt; jmp l`.
const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// How a probe ends: a byte to a port, then halted.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// The ACPI sleep control register, S5.
    PowerOff,
    /// The keyboard controller's reset line.
    Reset,
    /// Only halted.
    Halt,
}

/// `mov dx, port; mov al, value; out dx, al`.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `mov al, byte; out dx, al`.
fn put(byte: u8) -> [u8; 3] {
    [0xb0, byte, 0xee]
}

fn end(end: End) -> Vec<u8> {
    let mut code = match end {
        End::PowerOff => out(0x600, 5 << 2 | 1 << 5),
        End::Reset => out(0x64, 0xfe),
        End::Halt => Vec::new(),
    };
    code.extend(HALT);
    code
}

/// 32-bit code for the PVH protocol: prints `P`, the command line, a newline, the first module if
/// there is one, and a newline.
#[must_use]
pub fn pvh(ending: End) -> Vec<u8> {
    let mut code = SERIAL_TO_DX.to_vec();
    code.extend(put(b'P'));
    // mov esi, [ebx + 24]: the start info's command line.
    code.extend([0x8b, 0x73, 0x18]);
    code.extend(PRINT_STRING);
    code.extend(put(b'\n'));
    // mov ecx, [ebx + 12]; jecxz +13: the number of modules.
    code.extend([0x8b, 0x4b, 0x0c, 0xe3, 0x0d]);
    // mov ebp, [ebx + 16]; mov esi, [ebp]; mov ecx, [ebp + 8]: the first one.
    code.extend([0x8b, 0x6b, 0x10, 0x8b, 0x75, 0x00, 0x8b, 0x4d, 0x08]);
    code.extend(PRINT_BYTES);
    code.extend(put(b'\n'));
    code.extend(end(ending));
    code
}

/// 64-bit code for the Linux boot protocol: prints `L`, the command line, a newline, the initrd if
/// there is one, and a newline.
#[must_use]
pub fn linux64(ending: End) -> Vec<u8> {
    // mov rbx, rsi: the zero page.
    let mut code = vec![0x48, 0x89, 0xf3];
    code.extend(SERIAL_TO_DX);
    code.extend(put(b'L'));
    // mov esi, [rbx + 0x228]: cmd_line_ptr.
    code.extend([0x8b, 0xb3, 0x28, 0x02, 0x00, 0x00]);
    code.extend(PRINT_STRING);
    code.extend(put(b'\n'));
    // mov esi, [rbx + 0x218]; mov ecx, [rbx + 0x21c]; jecxz +4: ramdisk_image and ramdisk_size.
    code.extend([0x8b, 0xb3, 0x18, 0x02, 0x00, 0x00]);
    code.extend([0x8b, 0x8b, 0x1c, 0x02, 0x00, 0x00]);
    code.extend([0x67, 0xe3, 0x04]);
    code.extend(PRINT_BYTES);
    code.extend(put(b'\n'));
    code.extend(end(ending));
    code
}

/// 32-bit code that KVM cannot go on at, on whatever host: `popcnt eax, [0xd0000000]`. No device is
/// there, so that KVM must emulate the access, and its emulator does not know the instruction.
pub const NOT_EMULATABLE: [u8; 8] = [0xf3, 0x0f, 0xb8, 0x05, 0x00, 0x00, 0x00, 0xd0];

/// Where [`cpuid`] leaves its answers.
pub const CPUID_ANSWERS: u64 = 0x20_0000;

/// 32-bit code that executes CPUID for each leaf and subleaf, in ring 0, and stores EAX, EBX, ECX
/// and EDX one after the other at [`CPUID_ANSWERS`]. Prints `C` when it is done, and halts.
#[must_use]
pub fn cpuid(leaves: &[(u32, u32)]) -> Vec<u8> {
    let mut code = Vec::new();
    let mut address = 0x20_0000_u32;
    for (leaf, subleaf) in leaves {
        // mov eax, leaf; mov ecx, subleaf; cpuid
        code.push(0xb8);
        code.extend(leaf.to_le_bytes());
        code.push(0xb9);
        code.extend(subleaf.to_le_bytes());
        code.extend([0x0f, 0xa2]);
        // mov [address], register
        for register in [&[0xa3][..], &[0x89, 0x1d], &[0x89, 0x0d], &[0x89, 0x15]] {
            code.extend(register);
            code.extend(address.to_le_bytes());
            address += 4;
        }
    }
    code.extend(SERIAL_TO_DX);
    code.extend(put(b'C'));
    code.extend(HALT);
    code
}

/// Waits for a byte on the serial port: `mov dx, 0x3fd; l: in al, dx; test al, 1; jz l`.
pub const WAIT_FOR_KEY: [u8; 9] = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb];

/// 32-bit code for two vCPUs: the first starts the second, which makes a mark and reads a port from
/// then on. Prints `+` if it has come, `-` if not, and resets the machine while the other is reading.
#[must_use]
pub fn reset_beside_port_reads() -> Vec<u8> {
    // Real mode at 0x8000: mov byte [0x9000], 1; l: in al, 0x80; jmp l.
    const OTHER: [u8; 9] = [0xc6, 0x06, 0x00, 0x90, 0x01, 0xe4, 0x80, 0xeb, 0xfc];
    // mov dword [address], value
    let store = |address: u32, value: u32| {
        let mut code = vec![0xc7, 0x05];
        code.extend(address.to_le_bytes());
        code.extend(value.to_le_bytes());
        code
    };
    let mut code = store(0x9000, 0);
    for (part, at) in OTHER.chunks(4).zip([0x8000, 0x8004, 0x8008]) {
        let mut word = [0; 4];
        word.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
        code.extend(store(at, u32::from_le_bytes(word)));
    }
    // Local APIC: enabled, then INIT and SIPI with vector 8 to APIC id 1.
    for (register, value) in [
        (0xfee0_00f0, 0x1ff),
        (0xfee0_0310, 1 << 24),
        (0xfee0_0300, 0x4500),
        (0xfee0_0300, 0x4608),
    ] {
        code.extend(store(register, value));
    }
    // mov ecx, 500000
    code.extend([0xb9, 0x20, 0xa1, 0x07, 0x00]);
    // l: cmp byte [0x9000], 0; jne +8; in al, 0x80; loop l
    code.extend([0x80, 0x3d, 0x00, 0x90, 0x00, 0x00, 0x00, 0x75, 0x08]);
    code.extend([0xe4, 0x80, 0xe2, 0xf3]);
    // mov al, '-'; jmp +2; mov al, '+'
    code.extend([0xb0, b'-', 0xeb, 0x02, 0xb0, b'+']);
    code.extend(SERIAL_TO_DX);
    code.push(0xee);
    // mov ecx, 200; l: in al, 0x80; loop l: until the other one reads for sure.
    code.extend([0xb9, 0xc8, 0x00, 0x00, 0x00, 0xe4, 0x80, 0xe2, 0xfc]);
    code.extend(end(End::Reset));
    code
}

/// 32-bit code that asks for a reset at once, for ever.
#[must_use]
pub fn reset_at_once() -> Vec<u8> {
    end(End::Reset)
}
