#!/usr/bin/env bash
# Check the style and run the tests, without a GPU, network or weights.
#
#   bash test.sh             the fast tests
#   bash test.sh -m slow     the slow ones (more arguments go to pytest)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_environment
cd "$REPOSITORY"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m pytest -n 2 --dist loadfile "$@"
