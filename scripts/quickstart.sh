#!/usr/bin/env bash
# Pretrains a small Switch Transformer on the text of the standard library, in minutes on two cores.
# Run again, it resumes the run or, if it is finished, only evaluates and plots it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install plots

workdir=runs/quickstart
.venv/bin/switch-jax train --config configs/switch_mini.py --workdir "$workdir"
.venv/bin/switch-jax eval --workdir "$workdir"
.venv/bin/switch-jax plot --workdir "$workdir"
.venv/bin/switch-jax generate --workdir "$workdir" --max_length 24 \
  --text "Return the ___ of the list, or raise ___ if the value is not present."

cat <<END

Everything is in $workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/, figures/.
Look at $workdir/figures/loss.png and router.png, then try

  source .venv/bin/activate
  switch-jax generate --workdir $workdir --text "for i in ___(10):"
  switch-jax experts --workdir $workdir
  switch-jax data peek --config configs/switch_mini.py
  switch-jax inspect --config configs/switch_c.py
  switch-jax bench --config configs/switch_mini.py
  switch-jax train --config configs/switch_mini.py:num_experts=0 --workdir runs/dense
END
