#!/bin/sh
# install.sh BINARY PREFIX [FINAL]: binary, shell completions, man pages and systemd units. FINAL is
# what PREFIX will be called when it is in place.
set -eu
binary=$1
prefix=$2
final=${3:-$2}
install -D -m 755 "$binary" "$prefix/bin/drover"
completions() {
    mkdir -p "$prefix/$2"
    "$binary" completions "$1" > "$prefix/$2/$3"
}
completions bash share/bash-completion/completions drover
completions zsh share/zsh/site-functions _drover
completions fish share/fish/vendor_completions.d drover.fish
mkdir -p "$prefix/share/man/man1"
"$binary" man "$prefix/share/man/man1"
units=$(dirname "$0")/systemd
mkdir -p "$prefix/lib/systemd/system"
install -m 644 "$units/drover-receive.socket" "$prefix/lib/systemd/system/"
# Where the binary will be found, which DESTDIR is no part of.
for unit in drover-receive@.service drover-gpu.service; do
    sed "s|@BINARY@|$final/bin/drover|" "$units/$unit" > "$prefix/lib/systemd/system/$unit"
done
