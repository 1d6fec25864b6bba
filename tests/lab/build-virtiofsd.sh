#!/bin/bash
# build-virtiofsd.sh [OUT]: builds virtiofsd, the vhost-user-fs server that tests run.
#
# Debian 12's own (the C program in qemu-system-common) is deprecated since QEMU 5.2 and gone
# since 8.0. Keeps the program in ${DROVER_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/drover}/
# virtiofsd-VERSION/virtiofsd, builds it only when it is not there, and prints that path; with
# OUT, an existing directory, copies it to OUT/virtiofsd. Two builders take turns, and a program
# that is there is whole.
# Needs the Debian packages libseccomp-dev and libcap-ng-dev.
set -euo pipefail
version=1.14.0

cache=${DROVER_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/drover}
entry=$cache/virtiofsd-$version
mkdir -p "$cache"

if [ ! -x "$entry/virtiofsd" ]; then
    exec 9> "$cache/virtiofsd.lock"
    if ! flock -n 9; then
        echo "virtiofsd: waiting for another build" >&2
        flock 9
    fi
fi
if [ ! -x "$entry/virtiofsd" ]; then
    for package in libseccomp-dev libcap-ng-dev; do
        if ! dpkg-query -W -f '${Status}' "$package" 2> /dev/null | grep -q 'ok installed'; then
            echo "virtiofsd: the Debian package $package is not installed" >&2
            exit 1
        fi
    done
    echo "virtiofsd: building $entry: about 2 CPU minutes, once" >&2
    building=$entry.building
    rm -rf "$building"
    # Its own lock file; link-time optimisation would cost minutes and gain a test nothing.
    # The caller may be cargo, which tells its children things that are not for this build.
    env -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS -u CARGO_BUILD_TARGET \
        CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_STRIP=symbols \
        CARGO_TARGET_DIR="$building/target" \
        "${CARGO:-cargo}" install --quiet --locked --no-track --root "$building" \
        --version "$version" virtiofsd 9>&- >&2
    mkdir -p "$building/done"
    mv "$building/bin/virtiofsd" "$building/done/virtiofsd"
    rm -rf "$entry"
    mv "$building/done" "$entry"
    rm -rf "$building"
fi

if [ $# -gt 0 ]; then
    cp "$entry/virtiofsd" "$1/virtiofsd"
fi
echo "$entry/virtiofsd"
