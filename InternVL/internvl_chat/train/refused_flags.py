"""Flags of transformers that have no effect here; they are refused by name, never ignored."""

from collections.abc import Sequence
from typing import Any

import yaml

# Values that change nothing and are accepted, and what to use instead of the flag.
REFUSED_FLAGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "accelerator_config": ((None,), "accelerate is not used for training"),
    "activation_checkpointing": ((None, False), "use --grad_checkpoint"),
    "activation_checkpointing_kwargs": ((None,), "use --grad_checkpoint"),
    "auto_find_batch_size": ((False,), "lower --per_device_train_batch_size or --max_packed_tokens"),
    "average_tokens_across_devices": ((True,), "use --loss_reduction"),
    "batch_eval_metrics": ((False,), "validation computes its metrics over all records"),
    "bf16_full_eval": ((False,), "validation runs in the precision of the weights"),
    "data_seed": ((None,), "--seed determines the order of the records"),
    "dataloader_drop_last": ((False,), "the last, smaller step of an epoch is used"),
    "dataloader_in_order": ((True,), "the order of the records is fixed"),
    "dataloader_multiprocessing_context": ((None,), "dataloader workers are forked"),
    "dataloader_persistent_workers": ((False, True), "dataloader workers are always persistent"),
    "ddp_broadcast_buffers": ((None, False), "the model's buffers are constant"),
    "ddp_find_unused_parameters": ((None, False), "every trained parameter is used in every step"),
    "ddp_static_graph": ((None, False), "packs differ from step to step"),
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
    "hub_always_push": ((False,), "upload the finished folder"),
    **dict.fromkeys(
        ("hub_model_id", "hub_private_repo", "hub_revision"), ((None,), "upload the finished folder")
    ),
    "hub_strategy": (("every_save",), "upload the finished folder"),
    "hub_token": ((None,), "upload the finished folder; log in with hf auth login"),
    "ignore_data_skip": ((False,), "a resumed run continues with the next record"),
    "include_for_metrics": (([], None), "validation measures losses and generated answers"),
    "include_num_input_tokens_seen": (("no", False, "False"), "metrics.jsonl has the tokens of each step"),
    "label_names": ((None,), "labels come from the conversation template"),
    "label_smoothing_factor": ((0.0,), "the loss has no label smoothing"),
    "length_column_name": (("length",), "the data check measures the lengths"),
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
    "push_to_hub": ((False,), "upload the finished folder"),
    "remove_unused_columns": ((True, False), "records have no columns"),
    "restore_callback_states_from_checkpoint": ((False,), "the early-stopping state is always restored"),
    "save_on_each_node": ((False,), "all ranks write to one shared folder"),
    "skip_memory_metrics": ((True,), "metrics.jsonl has the peak memory of each step"),
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


def split_refused(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Remove the flags in `REFUSED_FLAGS` from a command line.

    Returns:
        the other tokens, and a problem for each of these flags that has a value with an effect
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
    """Return the value of a flag: a number, a truth value, or text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
