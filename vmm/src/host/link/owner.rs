//! Whose a TCP connection of this host is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The kernel's tables of TCP sockets, as this thread's network namespace has them
/// (Documentation/networking/proc_net_tcp.rst).
const TABLES: [&str; 2] = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];

/// `TCP_ESTABLISHED`. In later states a socket may belong to no process, and then shows user 0.
const ESTABLISHED: &str = "01";

/// The user whose process holds the end `own` of an established connection to `other`; `None` when
/// no process of this network namespace does, or the kernel does not say.
pub(super) fn owner(own: SocketAddr, other: SocketAddr) -> Option<u32> {
    let tables = TABLES.iter();
    let mut texts = tables.filter_map(|table| std::fs::read_to_string(table).ok());
    texts.find_map(|text| find(&text, own, other))
}

fn find(table: &str, own: SocketAddr, other: SocketAddr) -> Option<u32> {
    let wanted = [canonical(own), canonical(other)];
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let ends = [fields.next()?, fields.next()?];
        if fields.next()? != ESTABLISHED || ends.map(address) != wanted.map(Some) {
            return None;
        }
        // After the queues, the timer and the retransmissions.
        fields.nth(3)?.parse().ok()
    })
}

/// IPv4 over an IPv6 socket is IPv4 to the other end.
fn canonical(address: SocketAddr) -> (IpAddr, u16) {
    (address.ip().to_canonical(), address.port())
}

/// Words of 32 bits as this host has them in memory, then the port as a number.
fn address(text: &str) -> Option<(IpAddr, u16)> {
    let (words, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let digits = words.get(at * 8..at * 8 + 8)?;
        let word = u32::from_str_radix(digits, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip: IpAddr = match words.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let bytes = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()
        }
        _ => return None,
    };
    Some((ip.to_canonical(), port))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const V4: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:115C 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1 0 100 0 0 10 0
   1: 0100007F:BFFB 0100007F:115C 01 00000000:00000000 00:00000000 00000000  1000        0 13 1 0 20 0 0 10 -1
   2: 0100007F:115C 0100007F:BFFB 01 00000000:00000000 00:00000000 00000000     7        0 14 1 0 20 0 0 10 -1
   3: 0100007F:BFFC 0100007F:115C 04 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 0 0 10 -1
";
    const V6: &str = "  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000001000000:BFFB 00000000000000000000000001000000:115C 01 00000000:00000000 00:00000000 00000000  1001        0 9 1 0 20 0 0 10 -1
   1: 0000000000000000FFFF00000100007F:BFFD 0000000000000000FFFF00000100007F:115C 01 00000000:00000000 00:00000000 00000000  1002        0 9 1 0 20 0 0 10 -1
";

    #[test]
    fn the_peers_end_is_found_and_no_other() {
        let find = |table, own: &str, other: &str| {
            find(table, own.parse().unwrap(), other.parse().unwrap())
        };
        let here = "127.0.0.1:4444";
        assert_eq!(find(V4, "127.0.0.1:49147", here), Some(1000));
        assert_eq!(find(V4, here, "127.0.0.1:49147"), Some(7));
        // Half closed: it belongs to nobody, and shows 0.
        assert_eq!(find(V4, "127.0.0.1:49148", here), None);
        assert_eq!(find(V4, "127.0.0.2:49147", here), None);
        assert_eq!(find(V6, "[::1]:49147", "[::1]:4444"), Some(1001));
        assert_eq!(find(V6, "127.0.0.1:49149", here), Some(1002));
        assert_eq!(
            find(V6, "127.0.0.1:49149", "[::ffff:127.0.0.1]:4444"),
            Some(1002)
        );
        assert_eq!(find("", "127.0.0.1:49147", here), None);
    }

    #[test]
    fn a_connection_of_this_process_is_this_users() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = listener.local_addr().unwrap();
        let stream = TcpStream::connect(here).unwrap();
        let own = stream.local_addr().unwrap();
        let uid = std::fs::metadata("/proc/self").unwrap().uid();
        assert_eq!(owner(own, here), Some(uid));
        drop(stream);
        assert_eq!(owner(own, here), None);
    }
}
