//! The keys with which a person leaves a raw terminal.

/// Ctrl-A, as in QEMU and screen.
const PREFIX: u8 = 0x01;

/// What a key sequence asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EscapeAction {
    /// Ctrl-A x: end the VM, or the connection to it.
    Quit,
    /// Ctrl-A h: show the keys.
    Help,
}

/// Finds escape sequences in what is typed.
#[derive(Debug, Default)]
pub struct Escape {
    after_prefix: bool,
}

impl Escape {
    /// What `Ctrl-A h` shows.
    pub const HELP: &'static str =
        "\r\nCtrl-A x  quit\r\nCtrl-A h  this help\r\nCtrl-A Ctrl-A  send Ctrl-A\r\n";

    /// Appends the bytes meant for the guest to `output`; calls `act` for each action.
    pub fn filter(
        &mut self,
        input: &[u8],
        output: &mut Vec<u8>,
        mut act: impl FnMut(EscapeAction),
    ) {
        for byte in input {
            if !self.after_prefix {
                if *byte == PREFIX {
                    self.after_prefix = true;
                } else {
                    output.push(*byte);
                }
                continue;
            }
            self.after_prefix = false;
            match *byte {
                PREFIX => output.push(PREFIX),
                b'x' | b'X' => act(EscapeAction::Quit),
                b'h' | b'H' | b'?' => act(EscapeAction::Help),
                other => output.extend([PREFIX, other]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_found_across_reads_and_the_rest_passes() {
        let mut escape = Escape::default();
        let (mut output, mut actions) = (Vec::new(), Vec::new());
        for input in [&b"a\x01"[..], b"x", b"\x01\x01b\x01h\x01q"] {
            escape.filter(input, &mut output, |action| actions.push(action));
        }
        assert_eq!(output, b"a\x01b\x01q");
        assert_eq!(actions, [EscapeAction::Quit, EscapeAction::Help]);
    }
}
