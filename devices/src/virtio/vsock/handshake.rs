//! A client of the host that has not said yet where it wants to go.

use std::io::{self, Read};

use super::host::HostStream;

/// `CONNECT 4294967295\n`, and some room for spaces.
const MAX_LINE: usize = 32;

/// What became of a handshake.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The line is not complete.
    Waits,
    /// The client wants to reach this port of the guest.
    Wants(u32),
    /// The client is gone or speaks something else.
    Failed,
}

/// A client whose `CONNECT <port>\n` is being read.
pub(super) struct Handshake {
    stream: Box<dyn HostStream>,
    line: Vec<u8>,
}

impl Handshake {
    pub(super) fn new(stream: Box<dyn HostStream>) -> Self {
        Self {
            stream,
            line: Vec::with_capacity(MAX_LINE),
        }
    }

    /// Reads on, byte by byte: what follows the line is the guest's.
    pub(super) fn advance(&mut self) -> Progress {
        while self.line.len() < MAX_LINE {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => return Progress::Failed,
                Ok(_) if byte == *b"\n" => {
                    return parse(&self.line).map_or(Progress::Failed, Progress::Wants);
                }
                Ok(_) => self.line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Waits,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Progress::Failed,
            }
        }
        Progress::Failed
    }

    pub(super) fn into_stream(self) -> Box<dyn HostStream> {
        self.stream
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (command, port) = (words.next()?, words.next()?);
    let complete = command.eq_ignore_ascii_case("connect") && words.next().is_none();
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    port.parse().ok().filter(|_| complete && digits)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn handshake() -> (UnixStream, Handshake) {
        let (client, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        (client, Handshake::new(Box::new(stream)))
    }

    #[test]
    fn line_may_come_in_pieces_and_what_follows_stays() {
        let (mut client, mut handshake) = handshake();
        for piece in ["CON", "NECT 5", "2"] {
            client.write_all(piece.as_bytes()).unwrap();
            assert_eq!(handshake.advance(), Progress::Waits);
        }
        client.write_all(b"\nhello").unwrap();
        assert_eq!(handshake.advance(), Progress::Wants(52));
        let mut rest = [0; 8];
        let count = handshake.into_stream().read(&mut rest).unwrap();
        assert_eq!(&rest[..count], b"hello");
    }

    #[test]
    fn other_lines_are_refused() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "LISTEN 1\n",
            "CONNECT 00000000000000000000000000000001\n",
            "\u{7f}\u{80}\n",
        ] {
            let (mut client, mut handshake) = handshake();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(handshake.advance(), Progress::Failed, "{line:?}");
        }
        for (line, port) in [("connect 0\r\n", 0), ("CONNECT  4294967295 \n", u32::MAX)] {
            let (mut client, mut handshake) = handshake();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(handshake.advance(), Progress::Wants(port), "{line:?}");
        }
        let (client, mut handshake) = handshake();
        drop(client);
        assert_eq!(handshake.advance(), Progress::Failed);
    }
}
