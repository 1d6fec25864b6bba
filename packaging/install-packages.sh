#!/bin/sh
# Installs the Debian packages listed in the given files (one per line, # begins a comment).
# Says exactly what is missing where it may not install.
set -eu

packages=$(cat "$@" | sed 's/#.*//')

missing() {
    for package in $packages; do
        status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
        case $status in
            "install ok installed") ;;
            *) printf ' %s' "$package" ;;
        esac
    done
}

wanted=$(missing | tr ' ' '\n' | sort -u | tr '\n' ' ')
[ -n "${wanted# }" ] || exit 0

if [ "$(id -u)" = 0 ]; then
    as_root=
elif sudo -n true 2>/dev/null; then
    as_root=sudo
else
    echo "These Debian packages are missing, and this user may not install them. As root:" >&2
    echo "    apt-get install --no-install-recommends $wanted" >&2
    exit 1
fi
$as_root apt-get update -qq
# Once more for those that had to make room: an installed package of another release, say.
for round in first second; do
    echo "Installing Debian packages ($round round): $wanted"
    # shellcheck disable=SC2086 # a list of words
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends $wanted >/dev/null
    wanted=$(missing)
    [ -n "$wanted" ] || exit 0
done
echo "These Debian packages cannot be installed together with the others:$wanted" >&2
exit 1
