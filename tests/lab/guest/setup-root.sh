#!/bin/sh
# Runs inside the Debian root while it is built.
set -e
echo lab-debian > /etc/hostname
# A fixed id: an empty one makes every boot a "first boot", which is slower.
echo 6c61622d64726f7665722d6465626961 > /etc/machine-id
echo 'LABEL=lab-root / ext4 errors=remount-ro 0 1' > /etc/fstab
# The serial console logs root in by name, without a password.
passwd -d root
mkdir -p /etc/systemd/journald.conf.d /etc/systemd/system/serial-getty@ttyS0.service.d
printf '[Journal]\nStorage=volatile\n' > /etc/systemd/journald.conf.d/lab.conf
# No cursor queries and colours in the logs.
printf '[Service]\nEnvironment=TERM=dumb\n' > /etc/systemd/system/serial-getty@ttyS0.service.d/lab.conf
systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer e2scrub_reap.service fstrim.timer getty@tty1.service
# Addresses come from ip= on the kernel command line; nothing waits for them.
systemctl enable --quiet systemd-networkd.service systemd-network-generator.service \
    serial-getty@ttyS0.service
systemctl disable --quiet systemd-networkd-wait-online.service
apt-get clean
rm -rf /var/lib/apt/lists/* /var/log/*.log /var/log/apt
