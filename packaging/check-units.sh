#!/bin/sh
# Verifies the units as a boot takes them, all of them enabled: alone each may be right, and together not.
set -eu
cd "$(dirname "$0")/systemd"
if ! command -v systemd-analyze > /dev/null; then
    echo "check-units.sh: systemd-analyze is not installed, the units are not verified" >&2
    case ",${DROVER_REQUIRE:-}," in
    *,systemd,*) exit 1 ;;
    esac
    exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for unit in drover-*; do
    sed 's|@BINARY@|/bin/true|' "$unit" > "$scratch/$unit"
    for target in $(sed -n 's/^WantedBy=//p' "$unit"); do
        mkdir -p "$scratch/$target.wants"
        ln -s "../$unit" "$scratch/$target.wants/$unit"
    done
done
# Units of the system itself may have faults of their own, of which its exit status tells, too.
said=$(SYSTEMD_UNIT_PATH="$scratch:" systemd-analyze verify --man=no multi-user.target 2>&1) || ended=$?
case "$said" in
*drover*)
    echo "$said" | grep drover >&2
    exit 1
    ;;
esac
if [ "${ended:-0}" -gt 1 ]; then
    echo "check-units.sh: systemd-analyze ended with $ended: $said" >&2
    exit 1
fi
