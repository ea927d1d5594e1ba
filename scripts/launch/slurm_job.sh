#!/usr/bin/env bash
# The batch script of slurm_gpu.sh: runs its arguments on all tasks, and when Slurm says (USR1) that
# the time limit is near, lets them save and queues the job again. What Slurm preempts, it queues
# again itself, and the tasks have been sent SIGTERM.
set -u

# By it the tasks know each other; srun hands it to them.
SWITCH_JAX_START_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export SWITCH_JAX_START_SECRET

queue_again() {
  # Not by a signal to srun, which at SIGTERM kills its tasks.
  scancel --signal=TERM "$SLURM_JOB_ID"
  if timeout 480 tail --pid="$step" -f /dev/null; then
    wait "$step"
    case $? in 0 | 2 | 3) exit $? ;; esac # it ended just then, by itself: see docs/launch.md
  fi
  scontrol requeue "$SLURM_JOB_ID"
}

trap queue_again USR1
srun --kill-on-bad-exit=1 --cpu-bind=none "$@" &
step=$!
wait "$step"
