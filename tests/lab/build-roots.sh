#!/bin/bash
# build-roots.sh OUT: packs L1's root file system and the L2 initramfs.
#
# Leaves OUT/l1.ext4 (mounted read-only by L1; a disk and not an initramfs, so
# that it needs no unpacking and that pivot_root works in L1) and OUT/l2.cpio
# (not compressed: unpacking would cost more than loading). Both hold busybox
# and the programs of binaries.txt.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1

# add ROOT FILE: copies a file to the same place under ROOT, then the libraries
# it needs. Directories that are links on a merged /usr (/bin, /lib...) are links
# in ROOT as well, so paths resolve alike.
add() {
    local root=$1 file=$2 library
    [ -e "$file" ] || { echo "binaries.txt: $file is not installed" >&2; exit 1; }
    install -D -m 755 "$file" "$root/$file"
    for library in $(ldd "$file" 2> /dev/null | grep -o '/[^ ]*' || true); do
        [ -e "$root/$library" ] || install -D -m 755 "$library" "$root/$library"
    done
}

# skeleton ROOT: directories, busybox and a link for each applet.
skeleton() {
    local root=$1 dir applet
    mkdir -p "$root"/{usr/bin,usr/sbin,usr/lib,usr/lib64,dev,proc,sys,tmp,run,root,mnt,etc,var}
    for dir in bin sbin lib lib64; do ln -s "usr/$dir" "$root/$dir"; done
    install -m 755 /bin/busybox "$root/bin/busybox"
    for applet in $(/bin/busybox --list); do
        [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"
    done
    echo 'root:x:0:0:root:/root:/bin/sh' > "$root/etc/passwd"
    echo 'root:x:0:' > "$root/etc/group"
}

for where in l1 l2; do
    skeleton "$out/$where"
    while read -r scope file; do
        case $scope in
            both | "$where")
                # A real program replaces the applet of its name.
                rm -f "$out/$where/bin/${file##*/}"
                add "$out/$where" "$file" ;;
            l1 | l2 | '#'* | '') ;;
            *) echo "binaries.txt: bad scope '$scope'" >&2; exit 1 ;;
        esac
    done < "$here/binaries.txt"
done

install -D -m 755 "$here/host/init" "$out/l1/lab/init"
mkdir -p "$out"/l1/{host,media,scratch,lib/modules}
# curl resolves nothing here, but says so in fewer words with a hosts file.
echo '127.0.0.1 localhost' > "$out/l1/etc/hosts"
ln -s /proc/self/mounts "$out/l1/etc/mtab"

install -m 755 "$here/guest/init" "$out/l2/init"
install -D -m 644 "$here/guest/tasks.sh" "$out/l2/lib/lab/tasks.sh"

fakeroot -- bash -euo pipefail -s "$out" <<'PACK'
cd "$1"
chown -R 0:0 l1 l2
size_mib=$(( $(du -sm l1 | cut -f1) * 5 / 4 + 32 ))
truncate -s "${size_mib}M" l1.ext4
mkfs.ext4 -q -O ^has_journal -m 0 -L lab-l1 -d l1 l1.ext4
(cd l2 && find . | sort | cpio -o -H newc --quiet) > l2.cpio
rm -rf l1 l2
PACK
