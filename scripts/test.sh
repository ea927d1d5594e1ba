#!/usr/bin/env bash
# Style, types and tests; arguments go to pytest.
#
#   bash scripts/test.sh             without the slow tests
#   bash scripts/test.sh -m slow     the slow tests only
#   bash scripts/test.sh -m ''       all
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install test

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -m 'not slow' --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
