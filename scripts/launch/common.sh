# Sourced by the launchers, and written for the bash 3.2 of macOS as well.
#
#   parse REQUIRED OPTIONAL "$@"   sets a variable per option, and `train`, the arguments of switch-jax
#   run COMMAND…                   prints a command and, without --dry-run, runs it
#   succeeds COMMAND…              the same, quietly, for a question; under --dry-run the answer is no
#   quoted WORD…                   prints words for a shell; quoted_twice, if systemd or Kubernetes starts it
#   check_count OPTION MINIMUM     fails unless the value of an option is a whole number, at least MINIMUM
#   need TOOL INSTALL              exits unless TOOL is there; INSTALL says how to get it
#   fail SENTENCE                  a mistake of the user's: exit 2

launcher=scripts/launch/$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() {
  echo "$launcher: $1" >&2
  exit 2
}

usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$launcher"
}

parse() {
  local required="config workdir $1" optional=$2 option
  shift 2
  dry_run='' train=()
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry_run=yes ;;
      --help)
        usage
        exit
        ;;
      --)
        shift
        train+=("$@")
        break
        ;;
      --config.*=*) train+=("$1") ;;
      --*)
        option=${1#--}
        option=${option%%=*}
        [[ " $required $optional " == *" $option "* || $option == config.* ]] \
          || fail "there is no --$option; see --help, and put options of switch-jax train after --."
        if [[ $1 != *=* ]]; then
          [ $# -gt 1 ] || fail "--$option needs a value."
          set -- "--$option=$2" "${@:3}"
          continue
        fi
        printf -v "$option" %s "${1#*=}"
        ;;
      *) fail "'$1' is not an option; see --help." ;;
    esac
    shift
  done
  for option in $required; do
    [ -n "${!option:-}" ] || fail "give --$option, as in: $(usage | sed -n 's/^  *\(bash .*\)/\1/p')"
  done
  [ -f "${config%%:*}" ] || fail "config ${config%%:*} does not exist in this checkout."
  train=(train --config "$config" --workdir "$workdir" ${train[@]+"${train[@]}"})
}

check_count() {
  if [[ ! ${!1} =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((${!1} < $2)); then
    fail "--$1 must be a whole number, at least $2, not '${!1}'."
  fi
}

# The words as a shell reads them back.
quoted() {
  local word line='' single="'" escaped="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word=$single${word//$single/$escaped}$single ;;
    esac
    line+=" $word"
  done
  echo "${line# }"
}

# The words for a shell behind systemd or Kubernetes, which expand $NAME, ${NAME} and $(NAME) in a
# command even between single quotes, and make $$ a $.
quoted_twice() {
  local line dollar='$'
  line=$(quoted "$@")
  echo "${line//$dollar/$dollar$dollar}"
}

run() {
  quoted "$@"
  [ -n "$dry_run" ] || "$@"
}

succeeds() {
  quoted "$@"
  [ -z "$dry_run" ] && "$@" >/dev/null 2>&1
}

need() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || fail "$1 is not installed; $2"
}
