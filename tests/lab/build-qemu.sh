#!/bin/bash
# build-qemu.sh OUT: fetches the QEMU that runs L1, from the backports of Debian 13.
#
# Older ones (7.2, 10.0) fail far more often when two emulated CPUs work at the same
# moment (docs/testing-lab.md). It is unpacked, not installed, together with every
# library it needs, the C library and its loader included. Leaves
# OUT/qemu-system-x86_64 and OUT/share (for its option -L). Caching, locking and the
# atomic rename are the caller's.
set -euo pipefail
out=$1
mirror=${LAB_DEBIAN_MIRROR:-http://deb.debian.org/debian}

# An apt of our own, that believes nothing is installed: the machine's sources stay
# as they are, signatures are checked.
apt=$out/apt
mkdir -p "$apt"/{lists,cache/archives/partial,root}
: > "$apt/status"
for suite in trixie trixie-backports; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
done > "$apt/sources.list"
options=(-qq -y -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::State::Lists="$apt/lists" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache"
    -o APT::Sandbox::User= -o APT::Architecture=amd64 -o Debug::NoLocking=1
    -o Acquire::Retries=3 -o Acquire::Languages=none)
apt-get "${options[@]}" update
apt-get "${options[@]}" --no-install-recommends --download-only -t trixie-backports install qemu-system-x86
for package in "$apt"/cache/archives/*.deb; do dpkg -x "$package" "$apt/root"; done

# Of the packages, only what QEMU loads.
libraries=$apt/root/usr/lib/x86_64-linux-gnu
loader=$libraries/ld-linux-x86-64.so.2
qemu=$apt/root/usr/bin/qemu-system-x86_64
mkdir -p "$out/lib" "$out/share"
loaded=$("$loader" --library-path "$libraries:$libraries/pulseaudio" --list "$qemu")
if missing=$(grep 'not found' <<< "$loaded"); then
    printf 'QEMU needs libraries that its packages do not bring:\n%s\n' "$missing" >&2
    exit 1
fi
awk '$2 == "=>" { print $3 }' <<< "$loaded" | xargs cp -L -t "$out/lib"
cp -L "$loader" "$qemu" "$out/lib/"
cp -rL "$apt/root/usr/share/seabios/." "$out/share/"
for file in "$apt"/root/usr/share/qemu/*.{bin,rom}; do
    # Some are links into packages that are not here.
    [ ! -f "$file" ] || cp -L "$file" "$out/share/"
done
rm -rf "$apt"

cat > "$out/qemu-system-x86_64" << 'END'
#!/bin/sh
lib=${0%/*}/lib
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$lib/qemu-system-x86_64" "$@"
END
chmod +x "$out/qemu-system-x86_64"
"$out/qemu-system-x86_64" --version
