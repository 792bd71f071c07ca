#!/usr/bin/env bash
# Install the packages of envs/slurm-packages.txt on Debian or Ubuntu; no daemon is started or
# enabled, nothing else is changed, and a second call does nothing.
set -euo pipefail
list="$(dirname "$0")/../../envs/slurm-packages.txt"
policy=/usr/sbin/policy-rc.d
saved=$policy.abf-saved

fail() { echo "tests/slurm/install.sh: $*" >&2; exit 1; }

command -v dpkg-query >/dev/null || fail "no dpkg: only Debian and Ubuntu are supported"
missing=()
for package in $(sed 's/#.*//' "$list"); do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] || fail "missing: ${missing[*]}; run as root: sudo $0"

restore() {
    rm -f "$policy"
    if [ -e "$saved" ]; then mv "$saved" "$policy"; fi
}
[ ! -e "$saved" ] || restore # left by a call that was killed
[ ! -e "$policy" ] || mv "$policy" "$saved"
trap restore EXIT
# 101: "action forbidden", asked by every package before it starts its daemon
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"

apt=(apt-get -q -y -o Acquire::Retries=2 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=120)
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if ! { "${apt[@]}" update && "${apt[@]}" install --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    grep -E '^(E|W|Err):?' "$log" | tail -n 5 >&2 || tail -n 5 "$log" >&2
    fail "apt-get could not install ${missing[*]}; is there a network and a mirror? whole log: $log"
fi
rm -f "$log"
if command -v systemctl >/dev/null; then
    for package in "${missing[@]}"; do
        systemctl disable --quiet "$package" 2>/dev/null || true # most packages have no service
    done
fi
echo "installed: ${missing[*]}"
