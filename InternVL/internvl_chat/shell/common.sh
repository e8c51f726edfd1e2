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

# Add a problem with the environment variables; `report_problems` prints all of them.
PROBLEMS=()
problem() {
  PROBLEMS+=("$*")
}

report_problems() {
  local text
  ((${#PROBLEMS[@]} > 0)) || return 0
  for text in "${PROBLEMS[@]}"; do
    echo "$(basename "$0"): $text" >&2
  done
  exit 2
}

# Check that a variable is an integer between two bounds; return 1 otherwise.
check_integer() {
  local name=$1 low=$2 high=${3:-999999}
  if [[ ! ${!name} =~ ^(0|[1-9][0-9]{0,17})$ ]]; then
    problem "$name must be a non-negative integer, found '${!name}'"
  elif ((${!name} < low)); then
    problem "$name must be at least $low, found ${!name}"
  elif ((${!name} > high)); then
    problem "$name must be at most $high, found ${!name}"
  else
    return 0
  fi
  return 1
}

# Validate NNODES and the rendezvous variables. Sets MIN_NODES, MAX_NODES and TORCHRUN_FLAGS.
prepare_nodes() {
  NNODES=${NNODES:-1} MAX_RESTARTS=${MAX_RESTARTS:-0} MASTER_PORT=${MASTER_PORT:-} NODE_RANK=${NODE_RANK:-}
  MASTER_ADDR=${MASTER_ADDR:-} RDZV_ID=${RDZV_ID:-m3llm}
  MIN_NODES=${NNODES%%:*} MAX_NODES=${NNODES##*:}
  if [[ ! $NNODES =~ ^[1-9][0-9]{0,5}(:[1-9][0-9]{0,5})?$ ]] || ((MIN_NODES > MAX_NODES)); then
    problem "NNODES must be a number of nodes or a range MIN:MAX, found '$NNODES'"
    MIN_NODES=1 MAX_NODES=1
  fi
  check_integer MAX_RESTARTS 0 || MAX_RESTARTS=0
  [[ -z $MASTER_PORT ]] || check_integer MASTER_PORT 1 65535 || MASTER_PORT=
  [[ -z $NODE_RANK ]] || check_integer NODE_RANK 0 $((MAX_NODES - 1)) || NODE_RANK=0
  [[ -z $MASTER_ADDR || $MASTER_ADDR =~ ^[][A-Za-z0-9._:-]+$ ]] \
    || problem "MASTER_ADDR must be a host name or an IP address, found '$MASTER_ADDR'"
  [[ $RDZV_ID =~ ^[A-Za-z0-9._-]+$ ]] \
    || problem "RDZV_ID may contain letters, digits, '.', '_' and '-', found '$RDZV_ID'"
  ((MAX_NODES == 1)) || [[ -n $MASTER_ADDR ]] \
    || problem "NNODES=$NNODES requires MASTER_ADDR, the address of the first node"

  # The static rendezvous assigns ranks by NODE_RANK, but cannot restart the ranks of several nodes together.
  local restarts=
  ((MIN_NODES == MAX_NODES)) || restarts="NNODES=$NNODES, a range of nodes,"
  ((MAX_NODES == 1 || MAX_RESTARTS == 0)) || restarts="MAX_RESTARTS=$MAX_RESTARTS on multiple nodes"
  RDZV_BACKEND=${RDZV_BACKEND:-${restarts:+c10d}}
  RDZV_BACKEND=${RDZV_BACKEND:-static}
  TORCHRUN_FLAGS=(--max_restarts "$MAX_RESTARTS")
  if [[ $RDZV_BACKEND == c10d && -n $MASTER_ADDR$MASTER_PORT ]]; then
    TORCHRUN_FLAGS+=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_id "$RDZV_ID"
      --rdzv_endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-34229}")
    # The first node hosts the store. Without NODE_RANK, torchrun compares MASTER_ADDR with the host's name.
    [[ -z $NODE_RANK ]] \
      || TORCHRUN_FLAGS+=(--rdzv_conf "is_host=$((NODE_RANK == 0))${PET_RDZV_CONF:+,$PET_RDZV_CONF}")
  elif [[ $RDZV_BACKEND != static && $RDZV_BACKEND != c10d ]]; then
    problem "RDZV_BACKEND must be static or c10d, found '$RDZV_BACKEND'"
  elif [[ $RDZV_BACKEND == static && -n $restarts ]]; then
    problem "$restarts needs RDZV_BACKEND=c10d"
  elif ((MAX_NODES > 1)); then
    [[ -n $NODE_RANK ]] || problem "NNODES=$NNODES requires NODE_RANK, the rank of this node: 0 on the first node"
    TORCHRUN_FLAGS+=(--nnodes "$NNODES" --node_rank "$NODE_RANK"
      --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-34229}")
  elif [[ -n $MASTER_PORT ]]; then
    TORCHRUN_FLAGS+=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT")
  else
    TORCHRUN_FLAGS+=(--standalone --local_addr localhost)
  fi
}

# Check that each rank gets the same number of records per step or, with a range of nodes, at least one. Sets
# BATCH_FLAGS.
prepare_batch() {
  local ranks=$((MAX_NODES * NPROC)) records=$((MAX_NODES * NPROC * PER_DEVICE_BATCH_SIZE))
  if ((MIN_NODES < MAX_NODES)); then
    BATCH_FLAGS=(--global_batch_size "$BATCH_SIZE")
    ((BATCH_SIZE >= ranks)) || problem "BATCH_SIZE=$BATCH_SIZE must be at least $ranks ($MAX_NODES node(s) x" \
      "$NPROC rank(s)): each rank needs a record per step"
    [[ -z ${DEEPSPEED:-} ]] || problem "NNODES=$NNODES: DeepSpeed cannot resume with a different number of ranks;" \
      "use PARALLEL=ddp or PARALLEL=fsdp, or a fixed number of nodes"
  elif ((BATCH_SIZE % records)); then
    problem "BATCH_SIZE=$BATCH_SIZE must be divisible by $MAX_NODES node(s) x $NPROC rank(s) x" \
      "PER_DEVICE_BATCH_SIZE=$PER_DEVICE_BATCH_SIZE; change one of them"
  else
    BATCH_FLAGS=(--gradient_accumulation_steps $((BATCH_SIZE / records)))
  fi
}

# Validate the launchers' environment variables. The arguments are the training flags on the command line.
# Sets NPROC, REPORT_TO, PYTHON, TORCHRUN_FLAGS (nodes and restarts), BATCH_FLAGS and CPU_FLAGS (training flags).
prepare_training() {
  local name threads valid=1 flags="per_device_train_batch_size|gradient_accumulation_steps|global_batch_size"
  for name in "$@"; do
    [[ ! ${name//-/_} =~ ^__($flags)(=|$) ]] || problem "$name:" \
      "the launcher sets this flag from BATCH_SIZE and PER_DEVICE_BATCH_SIZE; set those variables instead"
  done
  check_integer GPUS 0 || GPUS=0 valid=
  NPROC=${NPROC:-$GPUS}
  check_integer NPROC 0 || valid=
  check_integer BATCH_SIZE 1 || valid=
  check_integer PER_DEVICE_BATCH_SIZE 1 || valid=
  prepare_nodes
  if [[ -n $valid ]]; then
    NPROC=$((NPROC > 0 ? NPROC : 1))
    ((GPUS == 0 || NPROC <= GPUS)) || problem "NPROC=$NPROC exceeds GPUS=$GPUS; each rank needs its own GPU"
    prepare_batch
  fi
  if [[ -z ${PYTHON:-}${IS_INSTALLED} && -x $REPOSITORY/.venv/bin/python ]]; then
    PYTHON=$REPOSITORY/.venv/bin/python
  fi
  PYTHON=${PYTHON:-$(find_python)}
  command -v "$PYTHON" > /dev/null || problem "PYTHON=$PYTHON: no such interpreter"
  report_problems

  CPU_FLAGS=()
  if ((GPUS == 0)); then
    CPU_FLAGS=(--use_cpu True --bf16 False)
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} CUDA_VISIBLE_DEVICES=
  fi
  REPORT_TO=${REPORT_TO:-${WANDB_API_KEY:+wandb}}
  REPORT_TO=${REPORT_TO:-none}
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
