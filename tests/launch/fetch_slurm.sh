#!/usr/bin/env bash
# Unpacks Debian's Slurm and munge into FOLDER, with what they need and this machine has not:
# nothing is installed, no root is needed. Prints why it cannot in one line, and exits 1.
#
#   tests/launch/fetch_slurm.sh FOLDER
#
# FOLDER/root is written last: a fetch that was cut off is done again. Two may be started at once.
set -u
folder=${1:?where to}
fail() { echo "fetch_slurm.sh: $*" >&2; exit 1; }
command -v apt-get >/dev/null || fail "no slurmctld on PATH, and no apt-get to fetch it with"
mkdir -p "$folder/lists/partial" "$folder/archives/partial" || fail "cannot write $folder"
exec 9> "$folder/lock"
flock 9
[ -d "$folder/root" ] && exit 0
cd "$folder" || exit 1
apt=(-o "Dir::State::lists=$PWD/lists" -o "Dir::Cache=$PWD" -o Debug::NoLocking=true
     -o Acquire::http::Timeout=20 -o Acquire::Retries=1 -o APT::Sandbox::User=)
apt-get "${apt[@]}" update -qq > log 2>&1 || fail "apt-get update: $(tail -n 1 log)"
# What an installation would bring: just the packages that are missing here.
apt-get "${apt[@]}" install --simulate --no-install-recommends slurmctld slurmd slurm-client munge > plan 2>> log ||
  fail "no Slurm to be had: $(grep -m 1 '^E:' log)"
mapfile -t names < <(sed -n 's/^Inst \([^ ]*\) .*/\1/p' plan)
[ "${#names[@]}" -gt 0 ] || fail "slurmctld is installed and not on PATH"
apt-get "${apt[@]}" download -q "${names[@]}" >> log 2>&1 || fail "apt-get download: $(grep -m 1 '^E:' log)"
rm -rf unpacked && mkdir unpacked
for package in *.deb; do dpkg -x "$package" unpacked || fail "cannot unpack $package"; done
rm -rf ./*.deb lists archives ./pkgcache.bin ./srcpkgcache.bin
mv unpacked root
