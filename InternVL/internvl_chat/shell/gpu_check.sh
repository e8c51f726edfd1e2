#!/usr/bin/env bash
# Acceptance run on one GPU, in at most ten minutes and without network access: kernels, launchers, resume, memory,
# decoding, compilation, and the speed of an 8B model with random weights. Without a GPU, it uses a small model.
#
#   bash gpu_check.sh [--size small|8b] [--out DIR] [--minutes 10] [--items NAME,NAME]
#
# Requires torch, transformers, peft, accelerate, timm, torchvision and Pillow; installs nothing.
# Environment: PYTHON (default: the repository's .venv if it exists, else python3).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ -z ${PYTHON:-} && -x $REPOSITORY/.venv/bin/python ]]; then
  PYTHON=$REPOSITORY/.venv/bin/python
fi
PYTHON=${PYTHON:-$(find_python)}
exec "$PYTHON" "$SOURCE_ROOT/benchmarks/gpu_check.py" "$@"
