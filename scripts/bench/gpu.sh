#!/usr/bin/env bash
# Everything that only a GPU shows, on one GPU, in under ten minutes.
#
#   bash scripts/bench/gpu.sh [FOLDER]
#
# Writes into FOLDER (runs/gpu): tests of the model, attention and train step; step time, tokens a
# second and MFU of T5-Base against Switch-Base with 8, 32 and 128 experts in bfloat16; decoding; the
# same model in PyTorch, where that is installed; and what `switch-jax compile` predicts for this GPU.
# Needs `pip install -e '.[cuda,interop]' pytest hypothesis`; torch and transformers>=5.19 for the comparison.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-runs/gpu}
mkdir -p "$folder"
python=${PYTHON:-python3}

step() { # NAME COMMAND…: runs it, at most two minutes; goes on where it fails
  local name=$1
  shift
  echo "== $name: $*"
  timeout 120 "$@" >"$folder/$name.txt" 2>&1 || echo "   failed; see $folder/$name.txt"
  tail -n 12 "$folder/$name.txt"
}

if ! "$python" -c 'import jax; jax.devices("gpu")' 2>/dev/null; then
  echo "JAX finds no GPU; install switch_jax[cuda] on a machine with one." >&2
  exit 2
fi
step tests "$python" -m pytest -q tests/model/test_layers.py tests/model/test_router.py \
  tests/model/test_dropless.py tests/training/test_state.py
for experts in 8 32 128; do
  step "bench_$experts" "$python" -m switch_jax bench --repeats 5 --json \
    --config "configs/switch_base.py:num_experts=$experts" \
    --config.data.batch_size=64 --config.data.reader=synthetic
done
step predicted "$python" -m switch_jax compile --topology gpu \
  --config configs/switch_base.py:num_experts=8 --config.data.batch_size=64
if "$python" -c 'import torch, transformers' 2>/dev/null; then
  step transformers "$python" scripts/bench/hugging_face.py --dtype bfloat16 --repeats 5
fi
echo "results: $folder"
