#!/bin/sh
# install.sh BINARY PREFIX: binary, shell completions and man pages.
set -eu
binary=$1
prefix=$2
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
