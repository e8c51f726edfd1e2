#!/usr/bin/env bash
# Run the linters, the type checker and the tests. No GPU or weights required.
#
#   bash test.sh             the fast tests
#   bash test.sh -m slow     the slow tests (other arguments are passed to pytest)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure_environment
cd "$REPOSITORY"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m mypy
find InternVL '(' -name '*.sh' -o -name '*.sbatch' ')' -exec "$(dirname "$PYTHON")/shellcheck" {} +
"$PYTHON" -m pytest -n 2 --dist loadfile "$@"
