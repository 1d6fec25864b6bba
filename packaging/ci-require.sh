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
echo "$words"
