#!/bin/sh
# Prints what CI's tests may not skip (DROVER_REQUIRE): all that this machine can do.
set -eu

words=kvm,lab
if [ "$(id -u)" = 0 ]; then
    if unshare --mount true 2>/dev/null; then
        words=$words,root,qemu
    fi
    if [ -c /dev/net/tun ] && unshare --net true 2>/dev/null; then
        words=$words,net
    fi
fi
if [ "$(nproc)" -gt 1 ]; then
    words=$words,smp
fi
# Page faults can be served by root, by who may open the device, and by all where the host says so.
allowed=/proc/sys/vm/unprivileged_userfaultfd
if [ -e $allowed ]; then
    if [ "$(id -u)" = 0 ] || [ -w /dev/userfaultfd ] || [ "$(cat $allowed)" = 1 ]; then
        words=$words,userfaultfd
    fi
fi
if command -v systemd-socket-activate >/dev/null && command -v systemd-analyze >/dev/null; then
    words=$words,systemd
fi
echo "$words"
