"""Flags of transformers and other projects that are rejected with advice instead of being ignored."""

import difflib
from collections.abc import Sequence
from typing import Any

import yaml

# Flag -> values that are accepted because they would change nothing, and the advice for all other values.
REFUSED_FLAGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "accelerator_config": ((None,), "accelerate is not used for training"),
    "activation_checkpointing": ((None, False), "use --grad_checkpoint"),
    "activation_checkpointing_kwargs": ((None,), "use --grad_checkpoint"),
    "auto_find_batch_size": ((False,), "lower --per_device_train_batch_size or --max_packed_tokens"),
    "average_tokens_across_devices": ((True,), "use --loss_reduction"),
    "batch_eval_metrics": ((False,), "validation computes its metrics over all records"),
    "bf16_full_eval": ((False,), "validation runs in the precision of the weights"),
    "data_seed": ((None,), "--seed determines the order of the records"),
    "dataloader_drop_last": ((False,), "the last step of an epoch is used even if it is smaller"),
    "dataloader_in_order": ((True,), "records are always loaded in order"),
    "dataloader_multiprocessing_context": ((None,), "dataloader workers are forked"),
    "dataloader_persistent_workers": ((False, True), "dataloader workers are always persistent"),
    "ddp_broadcast_buffers": ((None, False), "the model's buffers are constant"),
    "ddp_find_unused_parameters": ((None, False), "every trainable parameter is used in every step"),
    "ddp_static_graph": ((None, False), "packs vary across steps"),
    "debug": (("", None), "use torch's own tools, such as torch.autograd.set_detect_anomaly"),
    "do_predict": ((False,), "use m3llm eval"),
    "enable_jit_checkpoint": ((False,), "a checkpoint is always saved on a stop signal"),
    "eval_accumulation_steps": ((None,), "validation stores no logits"),
    "eval_do_concat_batches": ((True,), "validation stores no logits"),
    "eval_use_gather_object": ((False,), "validation stores no logits"),
    "fp16": ((False,), "the model trains in bfloat16 (--bf16 True) or float32"),
    "fp16_full_eval": ((False,), "validation runs in the precision of the weights"),
    "fsdp_config": ((None,), "--parallel fsdp has no options"),
    "gradient_checkpointing": ((None, False), "use --grad_checkpoint"),
    "gradient_checkpointing_kwargs": ((None,), "use --grad_checkpoint"),
    "hub_always_push": ((False,), "upload the output folder after training"),
    **dict.fromkeys(
        ("hub_model_id", "hub_private_repo", "hub_revision"),
        ((None,), "upload the output folder after training"),
    ),
    "hub_strategy": (("every_save",), "upload the output folder after training"),
    "hub_token": ((None,), "upload the output folder after training; log in with hf auth login"),
    "ignore_data_skip": ((False,), "a resumed run continues with the next record"),
    "include_for_metrics": (([], None), "validation computes the loss and metrics of generated answers"),
    "include_num_input_tokens_seen": (
        ("no", False, "False"),
        "metrics.jsonl contains the number of tokens of each step",
    ),
    "label_names": ((None,), "labels come from the conversation template"),
    "label_smoothing_factor": ((0.0,), "the loss has no label smoothing"),
    "length_column_name": (("length",), "the data check computes the lengths"),
    "liger_kernel_config": ((None,), "use --use_liger"),
    "log_level": (("passive",), "rank 0 logs information, warnings and errors"),
    "log_level_replica": (("warning",), "other ranks log warnings and errors"),
    "log_on_each_node": ((True,), "only rank 0 logs"),
    "logging_nan_inf_filter": ((True,), "steps with a non-finite loss are skipped and reported"),
    "neftune_noise_alpha": ((None,), "no noise is added to the embeddings (NEFTune)"),
    "optim_target_modules": ((None,), "the optimizers that need it are not supported"),
    "parallelism_config": ((None,), "use --parallel"),
    "per_device_eval_batch_size": ((8,), "validation packs records up to --max_packed_tokens"),
    "prediction_loss_only": ((False,), "validation stores no logits"),
    "project": (("huggingface",), "set the tracker's environment variable, such as WANDB_PROJECT"),
    "push_to_hub": ((False,), "upload the output folder after training"),
    "remove_unused_columns": ((True, False), "records have no columns"),
    "restore_callback_states_from_checkpoint": ((False,), "the early-stopping state is always restored"),
    "save_on_each_node": ((False,), "all ranks write to one shared folder"),
    "skip_memory_metrics": ((True,), "metrics.jsonl contains the peak memory"),
    "torch_compile_backend": ((None,), "--torch_compile True uses inductor"),
    "torch_compile_mode": ((None,), "--torch_compile True compiles with dynamic shapes"),
    "torch_empty_cache_steps": ((None,), "memory is planned before training"),
    **{
        f"trackio_{name}_id": ((None,), "set trackio's environment variables")
        for name in ("bucket", "space", "static_space")
    },
    "use_cache": ((False,), "training needs no key-value cache"),
    "use_liger_kernel": ((False,), "use --use_liger"),
}

CONFIG_FILES = (".json", ".yaml", ".yml")
_FILE_FIRST = "a configuration file comes first: m3llm train FILE --FLAG VALUE"
# Our flag -> names of the same setting in other projects.
_OTHER_NAMES = {
    "model_name_or_path": "model model_path model_id model_name base_model pretrained_model_name_or_path "
    "model_id_or_path adapter_name_or_path adapters",
    "base_model_path": "base_model_name_or_path",
    "meta_path": "data data_path data_file dataset dataset_dir dataset_name dataset_path train_data "
    "train_dataset train_file meta meta_data",
    "image_root": "image_folder image_dir media_dir image_path",
    "eval_meta_path": "eval_data eval_data_path eval_dataset eval_file val_data val_dataset validation_file "
    "val_size split_dataset_ratio",
    "data_root": "root data_dir",
    "output_dir": "output output_path out save_dir save_path",
    "use_llm_lora": "lora lora_r lora_rank lora_dim lora_enable use_lora use_peft peft finetuning_type "
    "train_type tuner_type sft_type r rank",
    "use_backbone_lora": "vision_lora vision_lora_rank use_vision_lora",
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size per_gpu_train_batch_size "
    "per_device_batch_size bs",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_acc accumulation_steps "
    "grad_accumulation_steps gradient_acc accumulate_grad_batches",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "load_in_4bit": "bits quant_bits quantization_bit use_qlora qlora bnb_4bit_quant_type",
    "learning_rate": "lr base_lr max_lr",
    "vision_lr": "vit_lr vision_tower_lr vision_learning_rate",
    "projector_lr": "aligner_lr mm_projector_lr merger_lr projector_learning_rate",
    "llm_lr": "language_model_lr llm_learning_rate",
    "loraplus_lr_ratio": "lorap_lr_ratio loraplus",
    "num_train_epochs": "epochs num_epochs epoch train_epochs max_epochs",
    "max_steps": "steps num_steps train_steps max_train_steps num_train_steps train_iters",
    "max_seq_length": "max_length max_len model_max_length cutoff_len seq_length seq_len max_seq_len "
    "context_length",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule lr_decay_style",
    "warmup_ratio": "warmup lr_warmup_fraction warmup_fraction",
    "warmup_steps": "num_warmup_steps lr_warmup_iters",
    "weight_decay": "wd",
    "max_grad_norm": "clip_grad gradient_clipping grad_clip gradient_clip_val",
    "adam_beta1": "beta1 betas adam_betas",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps epsilon adam_eps",
    "optim": "optimizer adafactor",
    "bf16": "dtype torch_dtype precision mixed_precision",
    "attn": "attn_impl attn_implementation flash_attn use_flash_attn flash_attention",
    "grad_checkpoint": "gradient_checkpoint use_gradient_checkpointing recompute",
    "deepspeed": "deepspeed_config ds_config deepspeed_plugin",
    "parallel": "strategy ddp",
    "freeze_backbone": "freeze_vit freeze_vision freeze_vision_tower freeze_vision_model "
    "freeze_image_encoder tune_mm_vision unfreeze_mm_vision_tower",
    "freeze_mlp": "freeze_aligner freeze_projector freeze_connector freeze_merger "
    "freeze_multi_modal_projector freeze_mm_mlp_adapter tune_mm_mlp tune_mm_mlp_adapter",
    "freeze_llm": "freeze_language_model freeze_lm freeze_model tune_mm_llm",
    "vision_select_layer": "mm_vision_select_layer vision_feature_layer",
    "mlp_path": "pretrain_mm_mlp_adapter",
    "vision_path": "vision_tower vision_model",
    "force_image_size": "image_size img_size input_size",
    "max_dynamic_patch": "max_num max_num_tiles max_tiles max_patches max_pixels image_max_pixels",
    "min_dynamic_patch": "min_num min_pixels",
    "dynamic_image_size": "dynamic_resolution image_aspect_ratio",
    "conv_style": "template conv_template chat_template conversation_template",
    "dataloader_num_workers": "num_workers workers dataloader_workers",
    "packing": "neat_packing use_packed_ds data_flatten",
    "max_packed_tokens": "max_packed_length",
    "truncate_text": "truncation_strategy truncation",
    "report_to": "wandb use_wandb tensorboard logger tracker",
    "run_name": "wandb_name wandb_run_name exp_name experiment_name",
    "resume_from_checkpoint": "resume resume_from load_checkpoint checkpoint",
    "overwrite_output_dir": "overwrite force",
    "save_steps": "save_interval checkpoint_interval save_every",
    "save_total_limit": "max_checkpoints keep_checkpoints",
    "eval_steps": "eval_interval val_interval eval_every",
    "logging_steps": "log_interval log_every log_steps",
    "use_cpu": "cpu no_cuda device",
    "seed": "random_seed",
    "sanity_check": "sanity",
}
# Advice -> flags of other projects that have no equivalent flag here.
_OTHER_WAYS = {
    "alpha is twice the rank of --use_llm_lora": "lora_alpha alpha lora_scale",
    "--use_llm_lora adapts every linear layer of the language model": "lora_target lora_target_modules "
    "target_modules lora_modules additional_target modules_to_save init_lora_weights lora_bias",
    "weights can be quantized to 4 bits only: --load_in_4bit": "load_in_8bit quant_method",
    _FILE_FIRST: "config config_file recipe yaml",
    "set GPUS for the launchers": "gpus num_gpus n_gpus gpu_ids nproc_per_node num_processes world_size",
    "the system message comes from --conv_style or the records": "system system_prompt system_message",
    "only answers are supervised": "train_on_inputs train_on_prompt mask_history completion_only_loss "
    "assistant_only_loss loss_scale",
    "set repeat_time in the meta file to use part of a dataset": "max_samples max_train_samples num_samples",
    "TensorBoard logs to runs/ in the output folder; set TENSORBOARD_LOGGING_DIR to change it": "logging_dir",
    "checkpoints are always in the safetensors format": "save_safetensors",
}
OTHER_PROJECTS = {
    other: text
    for texts in ({f"did you mean --{flag}?": names for flag, names in _OTHER_NAMES.items()}, _OTHER_WAYS)
    for text, names in texts.items()
    for other in names.split()
}


def describe_unknown(unknown: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return an error message for each unknown flag; if there is none, for each unexpected argument.

    Args:
        unknown: tokens that the parser did not recognize.
        known: names of all supported flags.
    """
    problems = []
    for token in unknown:
        if token.startswith("--"):
            flag = token.partition("=")[0]
            name = flag.removeprefix("--").replace("-", "_").lower()
            matches = difflib.get_close_matches(name, known, n=1)
            advice = OTHER_PROJECTS.get(name) or (f"did you mean --{matches[0]}?" if matches else "")
            problems.append(f"unknown flag {flag}" + (f"; {advice}" if advice else ""))
    return problems or [
        f"unexpected argument {token!r}" + (f"; {_FILE_FIRST}" if token.endswith(CONFIG_FILES) else "")
        for token in unknown
    ]


def split_refused(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Remove the flags in `REFUSED_FLAGS` from a command line.

    Returns:
        The remaining tokens, and an error message for each removed flag whose value would have an effect.
    """
    kept: list[str] = []
    refused: dict[str, list[str]] = {}
    target = kept
    for token in tokens:
        if token.startswith("--"):
            flag, has_value, value = token.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            if name in REFUSED_FLAGS:
                target = refused.setdefault(name, [])
                target[:] = [value] if has_value else []
                continue
            if name.removeprefix("no_") in REFUSED_FLAGS:
                refused[name.removeprefix("no_")] = ["False"]
                target = kept
                continue
            target = kept
        target.append(token)
    given = {name: " ".join(values) if values else "True" for name, values in refused.items()}
    problems = [
        f"--{name} {text}: not supported; {REFUSED_FLAGS[name][1]}"
        for name, text in given.items()
        if _parse(text) not in REFUSED_FLAGS[name][0]
    ]
    return kept, problems


def _parse(text: str) -> Any:
    """Parse the value of a flag as YAML; return it unchanged if it is not valid YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
