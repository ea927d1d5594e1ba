# Makes .venv and installs this checkout into it; sourced by the other scripts.
#
#   install [EXTRA]    installs `.` or `.[EXTRA]`, unless that was done since setup.cfg last changed

cd "$(dirname "${BASH_SOURCE[0]}")/.."

install() {
  local extra=${1:+[$1]} stamp=".venv/.installed${1:+-$1}"
  if [ ! -x .venv/bin/python ]; then
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "switch_jax needs Python 3.11 or newer; set PYTHON to one, as in PYTHON=python3.12 bash $0" >&2
      exit 2
    fi
    "$python" -m venv .venv
  fi
  if [ ! "$stamp" -nt setup.cfg ]; then
    echo "installing switch_jax$extra into .venv (once; a few minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extra"
    touch "$stamp"
  fi
}
