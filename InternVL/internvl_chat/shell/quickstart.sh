#!/usr/bin/env bash
# End-to-end demo on synthetic data: small random model, both launchers, merge, evaluation, one question.
#
#   bash quickstart.sh       needs Python 3.11+ and a package registry; no GPU, no weights; about 10 minutes on two
#                            CPU cores, installation included
#
# Environment: WORK_DIR (default: work_dirs/quickstart in the repository) is deleted and created again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

WORK_DIR=${WORK_DIR:-$REPOSITORY/work_dirs/quickstart}
LAUNCHERS=$SHELL_DIR/internvl3.0/2nd_finetune

step() { printf '\n== %s\n' "$*"; }
m3llm() { PYTHONPATH=$SOURCE_ROOT "$PYTHON" -m internvl_chat.cli "$@"; }
# Overrides of the recipe for a small model.
small=(--force_image_size 112 --max_dynamic_patch 1 --grad_checkpoint False --logging_steps 25)

step "1/8 set-up"
ensure_environment
export PYTHON
if [[ -e $WORK_DIR && ! -f $WORK_DIR/.quickstart ]]; then
  fail "$WORK_DIR exists and is not an earlier quickstart; set WORK_DIR to another folder"
fi
rm -rf "$WORK_DIR"
mkdir -p "$WORK_DIR"
touch "$WORK_DIR/.quickstart"

step "2/8 sample data: compound figures, questions and answers"
m3llm sample-data "$WORK_DIR/data" --train 200 --held-out 40

step "3/8 a small InternVL3 with random weights"
m3llm tiny-model "$WORK_DIR/tiny" --text "$WORK_DIR/data/train"

export GPUS=0 META_PATH=$WORK_DIR/data/train.json REPORT_TO=none
step "4/8 the full-model launcher"
MODEL_PATH=$WORK_DIR/tiny OUTPUT_DIR=$WORK_DIR/full BATCH_SIZE=8 PER_DEVICE_BATCH_SIZE=8 \
  bash "$LAUNCHERS/M3LLM-fulldata-fullmodel.sh" "${small[@]}" --learning_rate 1e-3 --num_train_epochs 3

step "5/8 the LoRA launcher, on the result"
MODEL_PATH=$WORK_DIR/full OUTPUT_DIR=$WORK_DIR/lora BATCH_SIZE=16 PER_DEVICE_BATCH_SIZE=8 \
  bash "$LAUNCHERS/M3LLM-fulldata-lora.sh" "${small[@]}" --learning_rate 5e-4 --max_steps 40

step "6/8 merge"
m3llm merge "$WORK_DIR/lora" "$WORK_DIR/merged"

step "7/8 evaluation on the held-out records"
held_out=$WORK_DIR/data/held_out.json
m3llm loss "$held_out" --model "$WORK_DIR/tiny" --json > "$WORK_DIR/loss_before.jsonl"
m3llm loss "$held_out" --model "$WORK_DIR/merged" --json > "$WORK_DIR/loss_after.jsonl"
m3llm eval "$held_out" --model "$WORK_DIR/merged" --max_new_tokens 48 --json > "$WORK_DIR/answers.jsonl"

step "8/8 one question"
figure=$(find "$WORK_DIR/data/images" -name '*_fig1.*_0.*' | sort | tail -n 1)
question="Fig-0: <image>
Which imaging modality is Fig-0? Answer with one of: CT, MRI, X-ray, ultrasound, histology, chart."
echo "image:    $figure"
echo "question: $question"
echo "answer:   $(m3llm generate --model "$WORK_DIR/merged" --image "$figure" "$question")"

step "result"
PYTHONPATH=$SOURCE_ROOT "$PYTHON" -m internvl_chat.commands.quickstart "$WORK_DIR"
