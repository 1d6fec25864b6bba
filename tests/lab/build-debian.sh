#!/bin/bash
# build-debian.sh OUT: makes the Debian guest of the lab.
#
# Leaves OUT/debian.qcow2 (one ext4 file system, no partitions), OUT/vmlinuz and
# OUT/initrd.img, the last two being Debian's own stock kernel. Scenarios that
# want a raw disk convert the image, which reads fewer bytes than copying one.
# Runs as root, or as a user with subordinate ids (mmdebstrap picks its mode);
# needs no loop device. Caching, locking and the atomic rename are the caller's.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
mirror=${LAB_DEBIAN_MIRROR:-http://deb.debian.org/debian}
security=${LAB_DEBIAN_SECURITY_MIRROR:-http://deb.debian.org/debian-security}
packages=$(grep -v '^#' "$here/debian-packages.txt" | paste -sd,)

# See build-kernel.sh.
trap 'trap - TERM; kill -TERM 0' TERM INT

# Left out of the image: documentation, locales, and drivers of hardware that no
# guest of the lab has. They are two thirds of the files, and most of the initrd.
excludes=()
for path in doc man locale info lintian bash-completion; do
    excludes+=("--dpkgopt=path-exclude=/usr/share/$path/*")
done
for path in drivers/{gpu,media,infiniband,iio,staging,hwmon,usb,isdn,mtd,comedi,bluetooth,mmc,hid,video} \
    drivers/{platform,target,ata,thunderbolt,crypto,scsi,nfc,firewire} drivers/net/{ethernet,wireless,usb,can,phy} \
    fs/{ocfs2,btrfs,xfs,ceph,cifs,nfs,nfsd,f2fs,jfs,reiserfs,gfs2,ntfs3,smb} sound net/{wireless,mac80211,bluetooth}; do
    excludes+=("--dpkgopt=path-exclude=/lib/modules/*/kernel/$path/*")
done

mmdebstrap --quiet --mode=auto --variant=minbase --include="$packages" \
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Retries "3"' "${excludes[@]}" \
    --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
    --essential-hook="upload $here/guest/initramfs.conf /etc/initramfs-tools/conf.d/lab.conf" \
    --customize-hook="upload $here/guest/setup-root.sh /setup-root.sh" \
    --customize-hook='chroot "$1" sh /setup-root.sh && rm "$1/setup-root.sh"' \
    bookworm "$out/root.tar" \
    "deb $mirror bookworm main" "deb $mirror bookworm-updates main" \
    "deb $security bookworm-security main" &
wait $!

# fakeroot: files keep root's ownership whoever builds.
fakeroot -- bash -euo pipefail -s "$out" <<'PACK'
cd "$1"
mkdir root
tar -C root --exclude='./dev/*' -xf root.tar
cp root/boot/vmlinuz-* vmlinuz
cp root/boot/initrd.img-* initrd.img
truncate -s 1G debian.raw
mkfs.ext4 -q -L lab-root -J size=16 -m 0 -d root debian.raw
rm -rf root root.tar
PACK
qemu-img convert -f raw -O qcow2 "$out/debian.raw" "$out/debian.qcow2"
rm "$out/debian.raw"
