#!/usr/bin/env bash
# Runs on every host of a TPU VM before the start: installs switch_jax from the clone that this file
# is in.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# By uv, because the Python of these hosts is 3.10.
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python 3.12
python3 -m uv pip install --quiet --editable '.[tpu,buckets]'
