#!/usr/bin/env bash
# Acceptance run on one GPU, at most ten minutes, without network: kernels, launchers, resume, memory, decoding,
# compilation, and the speed of the 8B shape with random weights. Without a GPU, all items run at small size.
#
#   bash gpu_check.sh [--size small|8b] [--out DIR] [--minutes 10] [--items NAME,NAME]
#
# Needs torch, transformers, peft, accelerate, timm, torchvision and Pillow; installs nothing.
# Environment: PYTHON (default: the repository's .venv if it exists, else python3).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ -z ${PYTHON:-} && -x $REPOSITORY/.venv/bin/python ]]; then
  PYTHON=$REPOSITORY/.venv/bin/python
fi
PYTHON=${PYTHON:-$(find_python)}
exec "$PYTHON" "$SOURCE_ROOT/benchmarks/gpu_check.py" "$@"
