//! Page contents that can be checked later: a function of page number, seed and generation.
//!
//! The same formulas serve memory pages (number = guest-physical address / 4096) and disk blocks
//! (number = byte offset / 4096), and host programs may use them to check either from outside.

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;

/// 64-bit words of a page.
pub const WORDS: usize = 512;

/// One page, as little-endian words.
pub type Page = [u64; WORDS];

/// 2^64 / golden ratio, the increment of Weyl sequences.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Eight-byte words of the text pattern.
const WORD_LIST: [&[u8; 8]; 64] = [
    b"the     ",
    b"machine ",
    b"moves   ",
    b"between ",
    b"hosts   ",
    b"while   ",
    b"running ",
    b"its     ",
    b"memory  ",
    b"pages   ",
    b"devices ",
    b"disks   ",
    b"and     ",
    b"state   ",
    b"are     ",
    b"sent    ",
    b"as      ",
    b"deltas. ",
    b"A       ",
    b"page    ",
    b"written ",
    b"twice   ",
    b"is      ",
    b"copied  ",
    b"again,  ",
    b"until   ",
    b"the     ",
    b"rest    ",
    b"fits    ",
    b"in      ",
    b"one     ",
    b"breath; ",
    b"then    ",
    b"all     ",
    b"cpus    ",
    b"stop,   ",
    b"last    ",
    b"bytes   ",
    b"cross,  ",
    b"peer    ",
    b"answers ",
    b"yes     ",
    b"or      ",
    b"no      ",
    b"source  ",
    b"resumes ",
    b"never   ",
    b"two     ",
    b"copies  ",
    b"run     ",
    b"at      ",
    b"once\n   ",
    b"drover  ",
    b"herds   ",
    b"flocks  ",
    b"over    ",
    b"hills\n  ",
    b"with    ",
    b"patient ",
    b"dogs    ",
    b"by      ",
    b"night   ",
    b"and     ",
    b"day.\n   ",
];

/// How a page is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Only the first and the last word are written and checked.
    Sparse,
    /// Every word: a counter over a per-page base (compresses well, no two words equal).
    Full,
    /// Every word pseudo-random: no compressor gains anything.
    Incompressible,
    /// Words of English in pseudo-random order: compresses like text.
    Text,
    /// All zero, whatever the seed and generation.
    Zero,
}

impl Mode {
    /// The mode's name on the command line.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "sparse" => Self::Sparse,
            "full" => Self::Full,
            "incompressible" => Self::Incompressible,
            "text" => Self::Text,
            "zero" => Self::Zero,
            _ => return None,
        })
    }

    /// The name that [`Mode::parse`] takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sparse => "sparse",
            Self::Full => "full",
            Self::Incompressible => "incompressible",
            Self::Text => "text",
            Self::Zero => "zero",
        }
    }
}

/// The finaliser of splitmix64: a bijection that spreads every input bit.
#[must_use]
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The page's key: what its words are derived from.
#[must_use]
pub fn key(page_number: u64, seed: u64, generation: u64) -> u64 {
    mix(mix(mix(page_number.wrapping_add(GOLDEN)) ^ seed).wrapping_add(GOLDEN) ^ generation)
}

/// Writes a page. [`Mode::Sparse`] leaves the words between the first and the last as they are.
pub fn fill(page: &mut Page, mode: Mode, key: u64) {
    match mode {
        Mode::Sparse => {
            page[0] = key;
            page[WORDS - 1] = !key;
        }
        Mode::Full => each_word(page, counter(key)),
        Mode::Incompressible => each_word(page, noise(key)),
        Mode::Text => each_word(page, text(key)),
        Mode::Zero => page.fill(0),
    }
}

/// Whether a page holds what [`fill`] wrote.
#[must_use]
pub fn verify(page: &Page, mode: Mode, key: u64) -> bool {
    match mode {
        Mode::Sparse => page[0] == key && page[WORDS - 1] == !key,
        Mode::Full => same_words(&page[..], counter(key)),
        Mode::Incompressible => same_words(&page[..], noise(key)),
        Mode::Text => same_words(&page[..], text(key)),
        Mode::Zero => page.iter().all(|&word| word == 0),
    }
}

/// Whether a page filled in `mode` and then overwritten by [`Mode::Sparse`] holds both.
#[must_use]
pub fn verify_touched(page: &Page, mode: Mode, key: u64, sparse_key: u64) -> bool {
    let inner = &page[1..WORDS - 1];
    verify(page, Mode::Sparse, sparse_key)
        && match mode {
            Mode::Sparse => true,
            Mode::Full => same_words(inner, counter(key).skip(1)),
            Mode::Incompressible => same_words(inner, noise(key).skip(1)),
            Mode::Text => same_words(inner, text(key).skip(1)),
            Mode::Zero => inner.iter().all(|&word| word == 0),
        }
}

fn each_word(page: &mut Page, words: impl Iterator<Item = u64>) {
    for (slot, word) in page.iter_mut().zip(words) {
        *slot = word;
    }
}

fn same_words(page: &[u64], words: impl Iterator<Item = u64>) -> bool {
    // No early exit: the difference is folded so that the loop stays branch-free.
    page.iter()
        .zip(words)
        .fold(0, |difference, (&have, want)| difference | (have ^ want))
        == 0
}

fn counter(key: u64) -> impl Iterator<Item = u64> {
    (0..512).map(move |index| key.wrapping_add(index))
}

fn noise(key: u64) -> impl Iterator<Item = u64> {
    (0..512).map(move |index: u64| mix(key.wrapping_add(index.wrapping_mul(GOLDEN))))
}

fn text(key: u64) -> impl Iterator<Item = u64> {
    // Ten six-bit choices from each draw.
    (0..512).map(move |index: u64| {
        let draw = mix(key.wrapping_add((index / 10).wrapping_mul(GOLDEN)));
        let choice = (draw >> (6 * (index % 10))) & 63;
        u64::from_le_bytes(*WORD_LIST[choice as usize])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const MODES: [Mode; 5] = [
        Mode::Sparse,
        Mode::Full,
        Mode::Incompressible,
        Mode::Text,
        Mode::Zero,
    ];

    #[test]
    fn filled_page_verifies_and_names_round_trip() {
        for mode in MODES {
            let mut page = [7; WORDS];
            fill(&mut page, mode, key(3, 1, 2));
            assert!(verify(&page, mode, key(3, 1, 2)), "{mode:?}");
            assert_eq!(Mode::parse(mode.name()), Some(mode));
        }
        assert_eq!(Mode::parse("Zero"), None);
    }

    #[test]
    fn any_changed_word_is_noticed() {
        for mode in [Mode::Full, Mode::Incompressible, Mode::Text, Mode::Zero] {
            let mut page = [0; WORDS];
            fill(&mut page, mode, 5);
            for index in 0..WORDS {
                page[index] ^= 1 << (index % 64);
                assert!(!verify(&page, mode, 5), "{mode:?} word {index}");
                page[index] ^= 1 << (index % 64);
            }
        }
    }

    #[test]
    fn sparse_checks_its_two_words_and_keeps_the_rest() {
        let mut page = [9; WORDS];
        fill(&mut page, Mode::Sparse, 5);
        assert_eq!(page[1..WORDS - 1], [9; WORDS - 2]);
        page[0] ^= 1;
        assert!(!verify(&page, Mode::Sparse, 5));
        page[0] ^= 1;
        page[WORDS - 1] ^= 1;
        assert!(!verify(&page, Mode::Sparse, 5));
    }

    #[test]
    fn page_seed_and_generation_each_change_the_key() {
        let mut keys = HashSet::new();
        for page in 0..32 {
            for seed in 0..8 {
                for generation in 0..32 {
                    assert!(
                        keys.insert(key(page, seed, generation)),
                        "{page} {seed} {generation}"
                    );
                }
            }
        }
    }

    #[test]
    fn touched_page_is_checked_in_both_layers() {
        for mode in MODES {
            let mut page = [0; WORDS];
            fill(&mut page, mode, 11);
            fill(&mut page, Mode::Sparse, 12);
            assert!(verify_touched(&page, mode, 11, 12), "{mode:?}");
            assert!(!verify_touched(&page, mode, 11, 13), "{mode:?}");
            if mode != Mode::Sparse {
                page[200] ^= 1;
                assert!(!verify_touched(&page, mode, 11, 12), "{mode:?}");
            }
        }
    }

    #[test]
    fn text_is_text_and_noise_is_not() {
        let mut page = [0; WORDS];
        fill(&mut page, Mode::Text, 1);
        assert!(page.iter().all(|word| word.to_le_bytes().is_ascii()));
        assert!(page.iter().collect::<HashSet<_>>().len() <= 64);
        fill(&mut page, Mode::Incompressible, 1);
        let ones: u32 = page.iter().map(|word| word.count_ones()).sum();
        assert!((15000..17800).contains(&ones), "{ones} of 32768 bits set");
    }
}
