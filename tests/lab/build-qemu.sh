#!/bin/bash
# build-qemu.sh OUT: fetches the QEMU that runs L1, from Debian's backports.
#
# Debian 12's own QEMU 7.2 mixes up the address translations of L1 and L2 now and
# then: guests reset or hang, L1 itself oopses. 10.0 does not. It is unpacked, not
# installed, and uses the libraries of the installed 7.2. Leaves
# OUT/qemu-system-x86_64 and OUT/share (for its option -L). Caching, locking and
# the atomic rename are the caller's.
set -euo pipefail
out=$1
mirror=${LAB_DEBIAN_MIRROR:-http://deb.debian.org/debian}

# An apt of our own: the machine's sources stay as they are, signatures are checked.
apt=$out/apt
mkdir -p "$apt"/{lists,cache,debs,root}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm-backports main" > "$apt/sources.list"
options=(-qq -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::State::Lists="$apt/lists" -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=
    -o Acquire::Retries=3 -o Acquire::Languages=none)
apt-get "${options[@]}" update
cd "$apt/debs"
apt-get "${options[@]}" download qemu-system-x86 qemu-system-data seabios
for package in *.deb; do dpkg -x "$package" "$apt/root"; done

cp "$apt/root/usr/bin/qemu-system-x86_64" "$out/"
mkdir "$out/share"
cp -rL "$apt/root/usr/share/seabios/." "$out/share/"
for file in "$apt"/root/usr/share/qemu/*.{bin,rom}; do
    # Some are links into packages that are not here.
    [ ! -f "$file" ] || cp -L "$file" "$out/share/"
done
cd "$out"
rm -rf "$apt"

if missing=$(ldd "$out/qemu-system-x86_64" | grep 'not found'); then
    printf 'QEMU needs libraries that are not installed:\n%s\n' "$missing" >&2
    exit 1
fi
"$out/qemu-system-x86_64" --version
