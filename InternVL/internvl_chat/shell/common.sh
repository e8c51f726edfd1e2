# Paths and functions for the launchers and scripts: Python environment, validation of variables, torchrun.
# shellcheck shell=bash disable=SC2034

SHELL_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PACKAGE=$(cd "$SHELL_DIR/.." && pwd)
SOURCE_ROOT=$(cd "$PACKAGE/.." && pwd)
REPOSITORY=$(cd "$SOURCE_ROOT/.." && pwd)
PYTHONS=(python3.12 python3.13 python3.11 python3 python)
IS_INSTALLED=
if [[ ! -f $REPOSITORY/pyproject.toml ]]; then
  # Installed from a wheel: use the active environment's interpreter and write to the current folder.
  IS_INSTALLED=1 REPOSITORY=$PWD PYTHONS=(python python3)
fi

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# Print the path to a Python interpreter (3.11 or newer).
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" "${PYTHONS[@]}"; do
    if [[ -n $candidate ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is required; install it or set PYTHON"
}

# Create or update .venv with the package and its dependencies. Sets PYTHON.
ensure_environment() {
  local venv=$REPOSITORY/.venv stamp
  stamp=$(cat "$REPOSITORY/requirements.txt" "$REPOSITORY/pyproject.toml" | cksum)
  PYTHON=$venv/bin/python
  if [[ -x $PYTHON && -f $venv/.m3llm && $(cat "$venv/.m3llm") == "$stamp" ]]; then
    return
  fi
  local base
  base=$(PYTHON='' find_python)
  echo "Installing into $venv (about 6 GB, 2 to 3 minutes) ..."
  "$base" -m venv "$venv" || fail "cannot create $venv; on Debian or Ubuntu: apt install python3-venv"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "${REPOSITORY}[dev]" 2> "$venv/pip.log" \
    || { cat "$venv/pip.log" >&2; fail "the installation failed"; }
  echo "$stamp" > "$venv/.m3llm"
}

# Validate the launchers' environment variables. The arguments are the training flags on the command line.
# Sets NPROC, GRADIENT_ACC, REPORT_TO, PYTHON, TORCHRUN_FLAGS (nodes and restarts) and CPU_FLAGS (training flags).
prepare_training() {
  local name records threads
  for name in "$@"; do
    [[ ! ${name//-/_} =~ ^__(per_device_train_batch_size|gradient_accumulation_steps)(=|$) ]] || fail "$name:" \
      "the launcher sets this flag from BATCH_SIZE and PER_DEVICE_BATCH_SIZE; set those variables instead"
  done
  NPROC=${NPROC:-$GPUS} NNODES=${NNODES:-1} MAX_RESTARTS=${MAX_RESTARTS:-0}
  for name in GPUS NPROC BATCH_SIZE PER_DEVICE_BATCH_SIZE NNODES MAX_RESTARTS; do
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || fail "$name must be a non-negative integer, found '${!name}'"
  done
  for name in BATCH_SIZE PER_DEVICE_BATCH_SIZE NNODES; do
    ((${!name} > 0)) || fail "$name must be at least 1"
  done
  NPROC=$((NPROC > 0 ? NPROC : 1))
  ((GPUS == 0 || NPROC <= GPUS)) || fail "NPROC=$NPROC exceeds GPUS=$GPUS; each rank needs its own GPU"
  records=$((NNODES * NPROC * PER_DEVICE_BATCH_SIZE))
  ((BATCH_SIZE % records == 0)) || fail "BATCH_SIZE=$BATCH_SIZE must be divisible by $NNODES node(s) x" \
    "$NPROC rank(s) x PER_DEVICE_BATCH_SIZE=$PER_DEVICE_BATCH_SIZE; change one of them"
  GRADIENT_ACC=$((BATCH_SIZE / records))

  TORCHRUN_FLAGS=(--max_restarts "$MAX_RESTARTS")
  if ((NNODES > 1)); then
    [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES requires MASTER_ADDR, the address of the first node"
    TORCHRUN_FLAGS+=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-0}"
      --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-34229}")
  elif [[ -n ${MASTER_PORT:-} ]]; then
    TORCHRUN_FLAGS+=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT")
  else
    TORCHRUN_FLAGS+=(--standalone --local_addr localhost)
  fi

  CPU_FLAGS=()
  if ((GPUS == 0)); then
    CPU_FLAGS=(--use_cpu True --bf16 False)
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} CUDA_VISIBLE_DEVICES=
  fi
  REPORT_TO=${REPORT_TO:-${WANDB_API_KEY:+wandb}}
  REPORT_TO=${REPORT_TO:-none}
  if [[ -z ${PYTHON:-}${IS_INSTALLED} && -x $REPOSITORY/.venv/bin/python ]]; then
    PYTHON=$REPOSITORY/.venv/bin/python
  fi
  PYTHON=${PYTHON:-$(find_python)}
  command -v "$PYTHON" > /dev/null || fail "PYTHON=$PYTHON: no such interpreter"
  threads=$(($(nproc) / NPROC))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  export PYTHONSAFEPATH=1
  if [[ -z $IS_INSTALLED ]]; then
    export PYTHONPATH=$SOURCE_ROOT${PYTHONPATH:+:$PYTHONPATH}
  fi
}

# torchrun wrapper: forwards signals to the workers, writes the log and returns the workers' exit code.
torchrun() {
  exec "$PYTHON" -m internvl_chat.train.distributed.launch "$@"
}
