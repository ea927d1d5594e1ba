# Sourced by the launchers of Google Cloud, after `parse`: how this checkout gets onto hosts that
# have nothing yet, and how they see one WORKDIR.
#
#   pack                    writes $bundle, the commit checked out here; $unpack clones it
#   make_secret             writes $secret, a file with the variable by which processes know each other
#   runtime_of TYPE         software of TPU VMs that Google names for a type
#   wait_for STATE COMMAND… repeats a command until it prints STATE
#   on_tpu_vms KIND NAME FLAG…
#                           installs the bundle on all hosts of NAME, and starts the run there;
#                           KIND is the group of `gcloud compute tpus` that knows NAME

bundle=runs/launch/switch_jax.bundle
secret=runs/switch_jax.env # not beside the bundle, whose folder becomes part of an image
unpack='git -c advice.detachedHead=false clone --quiet switch_jax.bundle switch_jax'

[[ $workdir == /* || $workdir == gs://* ]] \
  || fail "all hosts must see --workdir: give gs://BUCKET/PATH, or a path on a disk that they all mount."
[[ "${train[*]}" != *$'\n'* ]] || fail "no argument may have a line break."

pack() {
  git cat-file -e "HEAD:${config%%:*}" 2>/dev/null \
    || fail "${config%%:*} is not committed; commit it, since commits are what is sent."
  git diff --quiet HEAD || echo "$launcher: changes that are not committed stay here" >&2
  run mkdir -p "$(dirname "$bundle")"
  run git bundle create --quiet "$bundle" HEAD
}

# In a file, since others may see command lines.
make_secret() {
  run bash -c 'umask 077; printf "SWITCH_JAX_START_SECRET=%s\n" "$(od -An -N16 -tx1 /dev/urandom | tr -d " \n")" >"$0"' "$secret"
}

runtime_of() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

wait_for() {
  local state='' wanted=$1
  shift
  quoted "$@"
  [ -z "$dry_run" ] || return 0
  until [ "$state" = "$wanted" ]; do
    [ -z "$state" ] || sleep 30
    state=$("$@")
    case $state in
      FAILED | SUSPENDED) fail "$name is $state; delete it and run this again." ;;
    esac
  done
}

on_tpu_vms() {
  local kind=$1 name=$2
  shift 2
  # A second start would replace the code under the first.
  local idle='! systemctl is-active --quiet switch_jax || { echo "already running"; exit 1; }'
  # A service outlives the connection and has a log; `systemctl stop` sends SIGTERM and waits.
  local start='sudo systemd-run --unit=switch_jax --collect --uid="$USER"'
  start+=' --property=EnvironmentFile="$HOME/switch_jax.env"'
  start+=' --property=LimitMEMLOCK=infinity --property=TimeoutStopSec=600'
  start+=' --working-directory="$HOME/switch_jax" "$HOME/switch_jax/.venv/bin/switch-jax"'
  pack
  make_secret
  run gcloud compute tpus "$kind" ssh "$name" "$@" --command="$idle"
  run gcloud compute tpus "$kind" scp "$bundle" "$secret" "$name:" "$@"
  run gcloud compute tpus "$kind" ssh "$name" "$@" \
    --command="rm -rf switch_jax && $unpack && bash switch_jax/scripts/launch/tpu_host.sh"
  run gcloud compute tpus "$kind" ssh "$name" "$@" --command="$start $(quoted_twice "${train[@]}")"
}
