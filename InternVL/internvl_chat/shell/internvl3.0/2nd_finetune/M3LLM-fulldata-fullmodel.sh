#!/usr/bin/env bash
# Fine-tune InternVL3's language model and projector; the vision tower is frozen.
#
#   [NAME=VALUE ...] bash M3LLM-fulldata-fullmodel.sh [training flags, which override the recipe]
#
# First edit the paths in shell/data/PMC-data.json or set META_PATH. Example with 20 steps on 8 GPUs:
#
#   GPUS=8 BATCH_SIZE=8 MODEL_PATH=/models/InternVL3-8B bash M3LLM-fulldata-fullmodel.sh --max_steps 20
#
# Environment variables and defaults (if the package is installed from a wheel, "the repository" is the current
# folder):
#   GPUS=2                     GPUs on this node; 0 trains on the CPU
#   NPROC=GPUS                 ranks on this node (1 on a CPU)
#   BATCH_SIZE=2               global batch: records per optimizer step, across all ranks
#   PER_DEVICE_BATCH_SIZE=1    records per forward pass with --packing False
#   MODEL_PATH=OpenGVLab/InternVL3-8B    folder or hub id
#   META_PATH=shell/data/PMC-data.json   meta file that lists the datasets
#   DATA_ROOT=the repository   base folder for relative paths in the meta file
#   OUTPUT_DIR=work_dirs/M3LLM-fulldatav2-fullmodel-freeze-vit-lr=5e-6 (in the repository)
#   NNODES=1                   nodes with a shared file system: a number, or a range MIN:MAX (elastic)
#   NODE_RANK= MASTER_ADDR= MASTER_PORT=34229    rank of this node (0 is the first); address of the first node
#   MAX_RESTARTS=0             restarts from the newest checkpoint after a rank or a node fails
#   RDZV_BACKEND=static RDZV_ID=m3llm    torchrun's rendezvous; c10d for restarts on multiple nodes
#   PARALLEL=                  ddp, fsdp, hsdp or deepspeed; default: the first of DDP, HSDP and FSDP2 that fits
#   DEEPSPEED=                 ZeRO configuration file, e.g. shell/deepspeed/zero1.json
#   REPORT_TO=                 trackers, e.g. wandb,tensorboard; wandb if WANDB_API_KEY is set, else none
#   PYTHON=                    the repository's .venv if it exists, else python3
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"

GPUS=${GPUS:-2}
BATCH_SIZE=${BATCH_SIZE:-2}
PER_DEVICE_BATCH_SIZE=${PER_DEVICE_BATCH_SIZE:-1}
MODEL_PATH=${MODEL_PATH:-OpenGVLab/InternVL3-8B}
META_PATH=${META_PATH:-$SHELL_DIR/data/PMC-data.json}
DATA_ROOT=${DATA_ROOT:-$REPOSITORY}
OUTPUT_DIR=${OUTPUT_DIR:-$REPOSITORY/work_dirs/M3LLM-fulldatav2-fullmodel-freeze-vit-lr=5e-6}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
prepare_training "$@"

torchrun "${TORCHRUN_FLAGS[@]}" --nproc_per_node "$NPROC" "$PACKAGE/train/internvl_chat_finetune.py" \
  --model_name_or_path "$MODEL_PATH" \
  --meta_path "$META_PATH" \
  --data_root "$DATA_ROOT" \
  --output_dir "$OUTPUT_DIR" \
  --conv_style internvl2_5 \
  --use_fast_tokenizer False \
  --force_image_size 448 \
  --max_dynamic_patch 12 \
  --down_sample_ratio 0.5 \
  --drop_path_rate 0.0 \
  --freeze_llm False \
  --freeze_mlp False \
  --freeze_backbone True \
  --vision_select_layer -1 \
  --dataloader_num_workers 4 \
  --bf16 True \
  --num_train_epochs 1 \
  --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE" \
  "${BATCH_FLAGS[@]}" \
  --evaluation_strategy no \
  --save_strategy steps \
  --save_steps 200 \
  --save_total_limit 1 \
  --learning_rate 5e-6 \
  --weight_decay 0.05 \
  --warmup_ratio 0.03 \
  --lr_scheduler_type cosine \
  --logging_steps 1 \
  --max_seq_length 16384 \
  --max_packed_tokens 16384 \
  --do_train True \
  --grad_checkpoint auto \
  --group_by_length True \
  --dynamic_image_size True \
  --use_thumbnail True \
  --ps_version v2 \
  --loss_reduction sample \
  --sanity_check True \
  --report_to "$REPORT_TO" \
  ${PARALLEL:+--parallel "$PARALLEL"} \
  ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} \
  "${CPU_FLAGS[@]}" \
  "$@"
