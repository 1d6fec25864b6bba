#!/bin/bash
# Runs every command of the test guest under QEMU, with real virtio-pci devices, and says which fail.
#
# usage: check-qemu.sh [ACCEL...]        default: kvm tcg
# needs: qemu-system-x86_64, python3; for the network part root and ip(8). What is missing is SKIPPED, unless
# DROVER_REQUIRE (a list such as kvm,net) names it. GUEST as in run-qemu.sh. About a minute per accelerator.
set -u
here=$(dirname "$(readlink -f "$0")")
run=$here/run-qemu.sh
work=$(mktemp -d)
namespace=drover-guest-$$
failed=0

cleanup() {
    ip netns del "$namespace" 2>/dev/null
    rm -rf "$work"
}
trap cleanup EXIT

skip() { # NEED REASON
    echo "SKIPPED: $2"
    case ",${DROVER_REQUIRE:-}," in *",$1,"*) echo "FAIL: $1 is required"; failed=1 ;; esac
}

verdict() { # STATUS NAME
    if [ "$1" -eq 0 ]; then echo "ok   $2"; else echo "FAIL $2"; sed 's/^/     /' "$work/log"; failed=1; fi
}

# Runs the guest; it must say that everything succeeded.
good() { # NAME ACCEL MACHINE CMDLINE [OPTION...]
    local name="$2 $3: $1"
    "$run" "${@:2}" >"$work/log" 2>&1 </dev/null
    verdict $? "$name"
}

# Runs the guest; its output must match an expression, whatever its verdict.
says() { # NAME EXPRESSION ACCEL MACHINE CMDLINE [OPTION...]
    local name="$3 $4: $1"
    "$run" "${@:3}" >"$work/log" 2>&1 </dev/null
    grep -Eq "$2" "$work/log"
    verdict $? "$name"
}

disk=(-drive "if=none,id=d,file=$work/disk,format=raw,discard=unmap"
    -device virtio-blk-pci,drive=d,disable-legacy=on,serial=DISK1)
read_only=(-drive "if=none,id=d,file=$work/disk,format=raw,readonly=on"
    -device virtio-blk-pci,drive=d,disable-legacy=on)
rng=(-device virtio-rng-pci,disable-legacy=on)

check_machine() { # ACCEL MACHINE
    local a=$1 m=$2
    truncate -s 0 "$work/disk"
    truncate -s 64M "$work/disk"
    good "memory" "$a" "$m" "run=hello,mem,mem,mem,mem,mem,tsc,cpuid,pci len=16M 2.mode=full 3.mode=incompressible 4.mode=text 5.mode=zero passes=2"
    good "memory above 4 GiB" "$a" "$m" "run=mem base=0x100000000 len=16M" -m 5G
    good "dirty" "$a" "$m" "run=dirty,heartbeat dirty_len=32M dirty.seconds=1 heartbeat.seconds=1 prefill=text order=random" "${disk[@]}"
    CPUS=2 good "two cpus" "$a" "$m" "run=cpus,dirty dirty_len=32M seconds=1 cpus=2 write=incompressible"
    good "block" "$a" "$m" "run=blk,blk 2.op=verify 2.len=1M" "${disk[@]}"
    good "block, read-only" "$a" "$m" "run=blk,blk 2.op=verify" "${read_only[@]}"
    says "block, wrong content" "bad=[1-9].*reason=mismatch" "$a" "$m" "run=blk op=verify seed=2 len=1M" "${read_only[@]}"
    good "block speed" "$a" "$m" "run=blkbench,blkbench ms=100 2.irq=1 depths=1,32" "${disk[@]}"
    good "entropy" "$a" "$m" "run=rng bytes=64K" "${rng[@]}"
    good "interrupts" "$a" "$m" "run=irq,irq 2.x2apic=1" "${rng[@]}"
    good "interrupts of a disk" "$a" "$m" "run=irq" "${disk[@]}"
    good "console" "$a" "$m" "run=console ms=300" -device virtio-serial-pci,disable-legacy=on \
        -chardev "file,id=c,path=$work/console" -device virtconsole,chardev=c
    grep -q drover-guest-console "$work/console"
    verdict $? "$a $m: console text arrived"
    says "missing device" "command=rng result=fail reason=no-device" "$a" "$m" "run=rng"
    says "malformed argument" "argument=len result=fail reason=bad-argument" "$a" "$m" "run=mem len=12q"
    says "page fault" "^drover-guest: exception vector=14 .*cr2=0x400000000000" "$a" "$m" "run=fault kind=pf"
    says "panic" "^drover-guest: panic .*reason=panic message=" "$a" "$m" "run=panic"
    for way in poweroff reset triple; do
        LIMIT=20 good "end=$way" "$a" "$m" "end=$way"
    done
    # A halted machine does not end: the time limit stops QEMU, and the guest had its say.
    LIMIT=6 good "end=halt" "$a" "$m" "end=halt"
}

check_network() { # ACCEL
    ip netns add "$namespace" || return
    ip -n "$namespace" tuntap add dev tap0 mode tap
    ip -n "$namespace" addr add 10.0.0.1/24 dev tap0
    ip -n "$namespace" link set tap0 up
    local nic=(-netdev tap,id=n,ifname=tap0,script=no,downscript=no -device virtio-net-pci,netdev=n,disable-legacy=on)
    ip netns exec "$namespace" python3 "$here/udp-peer.py" >"$work/peer" 2>&1 &
    ip netns exec "$namespace" "$run" "$1" microvm \
        "run=net,nettx,netrx net.replies=20 net.ms=10000 dst_ip=10.0.0.1 port=9 ms=500" "${nic[@]}" >"$work/log" 2>&1 </dev/null
    verdict $? "$1 microvm: network"
    wait $!
    cat "$work/peer" >>"$work/log"
    grep -q 'echo ok' "$work/peer" && grep -q 'received [1-9]' "$work/peer"
    verdict $? "$1 microvm: network, seen from the host"
    ip netns del "$namespace"
}

for accel in "${@:-kvm}" $([ $# -eq 0 ] && echo tcg); do
    if [ "$accel" = kvm ] && [ ! -w /dev/kvm ]; then
        skip kvm "no /dev/kvm"
        continue
    fi
    for machine in microvm q35; do
        check_machine "$accel" "$machine"
    done
    if [ "$accel" = kvm ]; then good "kvm-clock" kvm microvm "run=clock"; fi
    if [ "$(id -u)" -eq 0 ] && command -v ip >/dev/null; then check_network "$accel"; else skip net "network: not root, or no ip(8)"; fi
done
exit $failed
