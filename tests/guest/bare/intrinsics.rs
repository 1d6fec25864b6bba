//! The memory functions that compiled code calls, as string instructions: fast natively, small, and
//! (being assembly) not turned back into calls of themselves.

use core::arch::asm;

/// C `memcpy`.
///
/// # Safety
/// As in C: both ranges valid for `len` bytes and disjoint.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's ranges; the first instruction moves len / 8 words, the second the rest.
    unsafe {
        asm!(
            "rep movsq",
            "mov ecx, {rest:e}",
            "rep movsb",
            rest = in(reg) len & 7,
            inout("rcx") len >> 3 => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
    to
}

/// C `memmove`.
///
/// # Safety
/// As in C: both ranges valid for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: a forward copy reads every byte before it is overwritten.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: the caller's ranges, copied from their last byte down; the direction flag is restored.
    unsafe {
        asm!(
            "std",
            "rep movsb",
            "cld",
            inout("rcx") len => _,
            inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _,
            options(nostack)
        );
    }
    to
}

/// C `memset`.
///
/// # Safety
/// As in C: the range valid for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    let byte = value.to_le_bytes()[0];
    // SAFETY: the caller's range; the first instruction stores len / 8 words, the second the rest.
    unsafe {
        asm!(
            "rep stosq",
            "mov ecx, {rest:e}",
            "rep stosb",
            rest = in(reg) len & 7,
            inout("rcx") len >> 3 => _,
            inout("rdi") to => _,
            in("rax") u64::from_ne_bytes([byte; 8]),
            options(nostack, preserves_flags)
        );
    }
    to
}

/// C `memcmp`.
///
/// # Safety
/// As in C: both ranges valid for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    let difference: i32;
    // SAFETY: the caller's ranges. With len 0 the flags of the xor say "equal".
    unsafe {
        asm!(
            "xor {difference:e}, {difference:e}",
            "repe cmpsb",
            "je 2f",
            "movzx {difference:e}, byte ptr [rsi - 1]",
            "movzx {other:e}, byte ptr [rdi - 1]",
            "sub {difference:e}, {other:e}",
            "2:",
            difference = out(reg) difference,
            other = out(reg) _,
            inout("rcx") len => _,
            inout("rsi") left => _,
            inout("rdi") right => _,
            options(nostack, readonly)
        );
    }
    difference
}

/// C `bcmp`.
///
/// # Safety
/// As for [`memcmp`].
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's ranges.
    unsafe { memcmp(left, right, len) }
}
