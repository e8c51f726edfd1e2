# Shared by the launchers, quickstart.sh and test.sh: where things are, the environment, how training starts.
# Source it; it changes no folder and sets no HOME.

SHELL_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SOURCE_ROOT=$(cd "$SHELL_DIR/../.." && pwd)
REPOSITORY=$(cd "$SOURCE_ROOT/.." && pwd)

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# Print a Python 3.11 or newer.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
    if [[ -n $candidate ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "needs Python 3.11 or newer; install it or set PYTHON"
}

# Make .venv with the package and its dependencies, unless it is up to date; sets PYTHON.
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
  "$base" -m venv "$venv" || fail "cannot make $venv; on Debian or Ubuntu: apt install python3-venv"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$REPOSITORY[dev]" 2> "$venv/pip.log" \
    || { cat "$venv/pip.log" >&2; fail "the installation failed"; }
  echo "$stamp" > "$venv/.m3llm"
}

# Append standard input to a file, without what a progress bar has overwritten. A full disk costs lines, not the run.
write_log() {
  until sed -u 's/.*\r//' >> "$1"; do
    read -r _ || break
  done 2> /dev/null
}

# Start the training script with the given flags, on one or several processes; what follows wins.
# Reads the environment that the launchers document.
launch_training() {
  local argument previous=
  for argument in "$@"; do  # an output folder among the flags wins, also for the log
    [[ $previous != --output_dir ]] || OUTPUT_DIR=$argument
    [[ $argument != --output_dir=* ]] || OUTPUT_DIR=${argument#--output_dir=}
    previous=$argument
  done
  local nodes=${NNODES:-1} restarts=${MAX_RESTARTS:-0} processes accumulate per_device=${PER_DEVICE_BATCH_SIZE:-1} name value
  processes=${NPROC:-$GPUS}
  for name in GPUS BATCH_SIZE per_device processes nodes restarts; do
    value=${!name}
    [[ $value =~ ^(0|[1-9][0-9]*)$ ]] || fail "$name must be a whole number, found '$value'"
    [[ $name == GPUS || $name == processes || $name == restarts || $value -gt 0 ]] || fail "$name must be at least 1"
  done
  processes=$((processes > 0 ? processes : 1))
  if ((nodes > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
    fail "NNODES=$nodes needs MASTER_ADDR, the address of the first machine"
  fi
  if ((GPUS > 0 && processes > GPUS)); then
    fail "NPROC=$processes processes need as many GPUs, but GPUS=$GPUS"
  fi
  if ((BATCH_SIZE % (nodes * processes * per_device) != 0)); then
    fail "BATCH_SIZE=$BATCH_SIZE cannot be divided by $nodes node(s) x $processes process(es) x" \
      "PER_DEVICE_BATCH_SIZE=$per_device; change one of them"
  fi
  accumulate=$((BATCH_SIZE / (nodes * processes * per_device)))

  local report_to=${REPORT_TO:-none}
  if [[ -z ${REPORT_TO:-} && -n ${WANDB_API_KEY:-} ]]; then
    report_to=wandb
  fi
  local flags=(
    --model_name_or_path "${MODEL_PATH:-OpenGVLab/InternVL3-8B}"
    --meta_path "${META_PATH:-$SHELL_DIR/data/PMC-data.json}"
    --data_root "${DATA_ROOT:-$REPOSITORY}"
    --output_dir "$OUTPUT_DIR"
    --per_device_train_batch_size "$per_device"
    --gradient_accumulation_steps "$accumulate"
    --report_to "$report_to"
    --self_test True
  )
  [[ -z ${DEEPSPEED:-} ]] || flags+=(--deepspeed "$DEEPSPEED")
  if ((GPUS == 0)); then
    flags+=(--use_cpu True)
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} CUDA_VISIBLE_DEVICES=
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / processes > 0 ? $(nproc) / processes : 1))}
  fi

  PYTHON=${PYTHON:-$([[ -x $REPOSITORY/.venv/bin/python ]] && echo "$REPOSITORY/.venv/bin/python" || find_python)}
  command -v "$PYTHON" > /dev/null || fail "PYTHON=$PYTHON: no such interpreter"
  export M3LLM_LAUNCHER=$$ WANDB_DIR=${WANDB_DIR:-$OUTPUT_DIR} PYTHONPATH=$SOURCE_ROOT${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
  local start=("$PYTHON")
  if ((processes * nodes > 1 || restarts > 0)); then
    start+=(-m internvl_chat.train.distributed.launch --nproc_per_node "$processes" --nnodes "$nodes"
      --max_restarts "$restarts")
    if ((nodes > 1)); then
      start+=(--node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}"
        --master_port "${MASTER_PORT:-34229}")
    elif [[ -n ${MASTER_PORT:-} ]]; then
      start+=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT")
    else
      start+=(--standalone)
    fi
  fi
  start+=(-m internvl_chat.train.internvl_chat_finetune)

  local created=no
  [[ -e $OUTPUT_DIR ]] || created=yes
  mkdir -p "$OUTPUT_DIR" || fail "cannot make the output folder $OUTPUT_DIR"
  local log=$OUTPUT_DIR/training_log.txt status=0
  # The terminal gets the progress bar; the log gets each line as it ended. Both outlive the signals.
  local output child writer
  exec {output}> >(trap '' INT TERM USR1 HUP; tee -p >(write_log "$log"))
  writer=$!
  set -m  # in a group of its own, so that a signal of the terminal comes once, passed on from here
  "${start[@]}" "${flags[@]}" "$@" 1>&"$output" 2>&1 {output}>&- &
  child=$!
  set +m
  for name in INT TERM USR1; do
    trap "kill -$name $child 2> /dev/null || true" "$name"
  done
  trap "kill -TERM $child 2> /dev/null || true" HUP
  while kill -0 "$child" 2> /dev/null; do
    status=0
    wait "$child" || status=$?
  done
  trap - INT TERM USR1 HUP
  exec {output}>&-
  wait "$writer" || true
  if ((status != 0)); then
    # A run that did not even begin leaves nothing behind; whoever holds the lock has begun.
    if [[ $created == yes && -z $(find "$OUTPUT_DIR" -mindepth 1 ! -name training_log.txt -print -quit) ]]; then
      sleep 0.2
      rm -f "$log"
      rmdir "$OUTPUT_DIR"
      echo "$(basename "$0"): the training did not start (exit code $status)" >&2
    elif ((status == 130 || status == 138 || status == 143)); then
      echo "$(basename "$0"): stopped by a signal (exit code $status); the same command again goes on from the" \
        "newest checkpoint in $OUTPUT_DIR" >&2
    else
      echo "$(basename "$0"): the training ended with exit code $status; its output is in $log" >&2
    fi
    exit "$status"
  fi
}
