#!/bin/sh
# Boots the test guest under QEMU and prints what it says.
#
# usage: run-qemu.sh ACCEL MACHINE CMDLINE [QEMU OPTION...]
#   ACCEL    kvm or tcg
#   MACHINE  microvm or q35
#   CMDLINE  the guest's command line (README.md)
# environment:
#   GUEST    the ELF (default: the workspace's target/release/drover-guest)
#   MEMORY   guest memory (default: 256M)
#   CPUS     guest CPUs (default: 1)
#   LIMIT    seconds until QEMU is stopped (default: 60)
# Standard input is the guest's serial input. Exit status: 0 if the guest said that all commands
# succeeded, 1 if it did not, 2 for a wrong call.
set -eu
if [ $# -lt 3 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
accel=$1 machine=$2 cmdline=$3
shift 3
here=$(dirname "$(readlink -f "$0")")
guest=${GUEST:-${CARGO_TARGET_DIR:-$here/../../target}/release/drover-guest}
case $accel in
    # ARCH_CAPABILITIES cannot be written on every host, and the guest does not need it.
    kvm) cpu=host,-arch-capabilities ;;
    tcg) cpu=max ;;
    *) echo "run-qemu.sh: unknown accelerator $accel" >&2; exit 2 ;;
esac
case $machine in
    microvm) machine=microvm,pcie=on ;;
    q35) ;;
    *) echo "run-qemu.sh: unknown machine $machine" >&2; exit 2 ;;
esac
log=$(mktemp)
trap 'rm -f "$log"' EXIT
timeout "${LIMIT:-60}" qemu-system-x86_64 -M "$machine" -accel "$accel" -cpu "$cpu" \
    -m "${MEMORY:-256M}" -smp "${CPUS:-1}" -kernel "$guest" -append "$cmdline" \
    -nodefaults -display none -no-reboot -serial stdio "$@" | tee "$log" || true
# The last word of the guest's last line is its verdict.
grep -q '^drover-guest: done .*result=ok' "$log"
