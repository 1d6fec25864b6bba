"""The host's side of check-qemu.sh's network part: wants 20 echoes, then listens, then sends.

Runs beside the guest's `run=net,nettx,netrx`, in a network namespace where the guest is 10.0.0.2.
"""
import socket
import time

GUEST = ("10.0.0.2", 9)
DEADLINE = time.monotonic() + 40


def echoes(sock, wanted):
    """Sends datagrams until `wanted` have come back whole."""
    sock.settimeout(0.2)
    back = 0
    while back < wanted and time.monotonic() < DEADLINE:
        message = bytes((back * 7 + i) % 251 for i in range(1 + back * 73 % 1472))
        try:
            sock.sendto(message, GUEST)
            back += sock.recv(2048) == message
        except OSError:
            time.sleep(0.05)
    return back == wanted


def listen(sock):
    """Counts the guest's numbered datagrams; one that goes back in number is an error."""
    count, last, in_order = 0, -1, True
    sock.settimeout(10)
    try:
        while True:
            number = int.from_bytes(sock.recv(2048)[:8], "little")
            in_order = in_order and number > last
            count, last = count + 1, number
            sock.settimeout(0.5)
    except TimeoutError:
        return count, in_order


def flood(sock, seconds):
    """Sends as fast as it goes."""
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            sock.sendto(b"x" * 1400, GUEST)
            count += 1
        except OSError:
            pass
    return count


def main():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        sock.bind(("10.0.0.1", 9))
        print("echo", "ok" if echoes(sock, 20) else "failed", flush=True)
        count, in_order = listen(sock)
        print("received" if in_order else "out of order", count, flush=True)
        print("sent", flood(sock, 3), flush=True)


main()
