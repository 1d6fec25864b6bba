#!/bin/bash
# build-kernel.sh OUT: builds the lab kernel from Debian's linux-source-6.12.
#
# Leaves OUT/vmlinux (stripped ELF with the PVH note), OUT/bzImage and
# OUT/config. OUT is an empty directory; the source tree is unpacked below it
# and removed again. Caching, locking and the atomic rename are the caller's.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
source_tar=/usr/src/linux-source-6.12.tar.xz

# A caller that dies sends TERM (its parent-death signal): take the compilers
# along. They run as a background job because bash delays a trap until its
# foreground job ends.
trap 'trap - TERM; kill -TERM 0' TERM INT

tar -C "$out" -xf "$source_tar"
cd "$out/linux-source-6.12"

make -s tinyconfig
cat "$here/kernel.config" >> .config
make -s olddefconfig 2> >(grep -v "override: reassigning" >&2)
lost=$(grep -E '^(CONFIG_|# CONFIG_)' "$here/kernel.config" | grep -vxFf .config || true)
if [ -n "$lost" ]; then
    printf 'kernel.config: these lines did not survive olddefconfig:\n%s\n' "$lost" >&2
    exit 1
fi

# Fixed names keep two builds of one configuration alike.
export KBUILD_BUILD_USER=lab KBUILD_BUILD_HOST=lab KBUILD_BUILD_TIMESTAMP=1970-01-01
make -s -j"${LAB_BUILD_JOBS:-$(nproc)}" vmlinux bzImage &
wait $!

strip -o "$out/vmlinux" vmlinux
cp arch/x86/boot/bzImage "$out/bzImage"
cp .config "$out/config"
cd "$out"
rm -rf linux-source-6.12
