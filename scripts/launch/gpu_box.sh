#!/usr/bin/env bash
# Trains on all GPUs of this machine: one process drives them. Run it again to continue.
#
#   bash scripts/launch/gpu_box.sh --config FILE --workdir DIR [--config.KEY=VALUE …]
#
#   --config FILE   as for switch-jax train
#   --workdir DIR   a folder, gs://BUCKET/PATH or s3://BUCKET/PATH
#   --dry-run       print the commands only
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "" "" "$@"
need nvidia-smi "this launcher is for NVIDIA GPUs; switch-jax train runs anywhere."

run bash -ec 'source scripts/venv.sh; install cuda,buckets' "$launcher"
run exec .venv/bin/switch-jax "${train[@]}"
