#!/usr/bin/env bash
# End-to-end demo on synthetic data: a small random model, both launchers, merging, and an evaluation of each stage.
#
#   bash quickstart.sh
#
# Requires Python 3.11 or newer and a package registry, but no GPU and no weights. Takes about 5 minutes on two CPU
# cores. The first run also downloads and installs 6 GB of packages.
#
# The full-model stage trains on all tasks but one; the LoRA stage trains on all tasks. A table and report.html
# compare the models on held-out records.
#
# Environment: WORK_DIR (default: work_dirs/quickstart in the repository), a folder that is deleted and created again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

WORK_DIR=${WORK_DIR:-$REPOSITORY/work_dirs/quickstart}
LAUNCHERS=$SHELL_DIR/internvl3.0/2nd_finetune
WITHHELD=qa-subimage-option

step() { printf '\n== %s (after %d min %02d s)\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)); }
m3llm() { PYTHONPATH=$SOURCE_ROOT "$PYTHON" -m internvl_chat.cli "$@"; }
# Flags that adapt the recipe to a small model.
small=(--force_image_size 112 --max_dynamic_patch 1 --grad_checkpoint False --logging_steps 50)

step "1/7 setup"
ensure_environment
export PYTHON
if [[ -e $WORK_DIR && ! -f $WORK_DIR/.quickstart ]]; then
  fail "$WORK_DIR exists and was not created by quickstart.sh; set WORK_DIR to a different folder"
fi
rm -rf "$WORK_DIR"
mkdir -p "$WORK_DIR"
touch "$WORK_DIR/.quickstart"

step "2/7 sample data: compound figures, questions and answers"
m3llm sample-data "$WORK_DIR/data" --train 300 --held-out 40
# Write one meta file per stage. Repeat the text-only records, which are few, and the withheld task.
"$PYTHON" - "$WORK_DIR/data" "$WITHHELD" <<'PYTHON'
import json, pathlib, sys

folder, withheld = pathlib.Path(sys.argv[1]), sys.argv[2]
meta = json.loads((folder / "train.json").read_text())
meta["qa-puretext"]["repeat_time"] = 3
meta[withheld]["repeat_time"] = 4
(folder / "train_lora.json").write_text(json.dumps(meta, indent=2))
del meta[withheld]
(folder / "train_full.json").write_text(json.dumps(meta, indent=2))
PYTHON

step "3/7 a small InternVL3 model with random weights"
m3llm tiny-model "$WORK_DIR/tiny" --text "$WORK_DIR/data/train"

# More threads do not speed up such a small model; the other cores load images.
export GPUS=0 REPORT_TO=none OMP_NUM_THREADS=1
step "4/7 full-model launcher on all tasks except $WITHHELD"
MODEL_PATH=$WORK_DIR/tiny META_PATH=$WORK_DIR/data/train_full.json OUTPUT_DIR=$WORK_DIR/full \
  BATCH_SIZE=8 PER_DEVICE_BATCH_SIZE=8 \
  bash "$LAUNCHERS/M3LLM-fulldata-fullmodel.sh" "${small[@]}" --learning_rate 2e-3 --num_train_epochs 3

step "5/7 LoRA launcher on all tasks, from the full-model result"
MODEL_PATH=$WORK_DIR/full META_PATH=$WORK_DIR/data/train_lora.json OUTPUT_DIR=$WORK_DIR/lora \
  BATCH_SIZE=16 PER_DEVICE_BATCH_SIZE=16 \
  bash "$LAUNCHERS/M3LLM-fulldata-lora.sh" "${small[@]}" --learning_rate 3e-3 --num_train_epochs 1

step "6/7 merge"
m3llm merge "$WORK_DIR/lora" "$WORK_DIR/merged"

step "7/7 evaluation on the held-out records"
PYTHONPATH=$SOURCE_ROOT "$PYTHON" -m internvl_chat.commands.quickstart "$WORK_DIR" "$WITHHELD"
step "done"
