#!/usr/bin/env bash
# Acceptance run on one GPU, in at most ten minutes and without network: kernels, launchers, resuming, memory, decoding,
# compilation, and the speed of the 8B shape with random weights. On a machine without a GPU all of it runs at small size.
#
#   bash gpu_check.sh [--size small|8b] [--out DIR] [--minutes 10] [--items NAME,NAME]
#
# Needs torch, transformers, peft, accelerate, timm, torchvision and Pillow; nothing is installed.
# Environment: PYTHON (the repository's .venv if there is one, else python3).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ -z ${PYTHON:-} && -x $REPOSITORY/.venv/bin/python ]]; then
  PYTHON=$REPOSITORY/.venv/bin/python
fi
PYTHON=${PYTHON:-$(find_python)}
exec "$PYTHON" "$SOURCE_ROOT/benchmarks/gpu_check.py" "$@"
