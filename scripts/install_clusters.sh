#!/usr/bin/env bash
# Installs the Slurm and the Open MPI that tests/clusters starts, on Debian and as root. Where they
# are missing, those tests are skipped.
set -euo pipefail

packages=()
type -P munged slurmctld slurmd >/dev/null || packages+=(munge slurm-wlm)
type -P mpirun >/dev/null || packages+=(openmpi-bin)
[ ${#packages[@]} -gt 0 ] || exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends "${packages[@]}"
