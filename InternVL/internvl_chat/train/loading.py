"""The objects that a run is made of: model, tokenizer, preprocessing, data and their order."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.dataset import RecordSet, TrainingData, build_sets
from internvl_chat.data.encoding import RecordEncoder
from internvl_chat.data.length_cache import Lengths
from internvl_chat.data.lengths import index_lengths
from internvl_chat.data.meta import DatasetSpec
from internvl_chat.data.order import StepSampler
from internvl_chat.data.packing import StepPlanner
from internvl_chat.data.preprocessing import Preprocessing
from internvl_chat.data.template import SYSTEM_TEXTS
from internvl_chat.data.tokenizer import image_context_id, load_tokenizer
from internvl_chat.errors import DataError
from internvl_chat.logs import get_logger
from internvl_chat.model.assemble import assemble_model
from internvl_chat.model.checkpoint import load_model, resize_vocabulary
from internvl_chat.model.flops import FlopCounter
from internvl_chat.model.folders import is_adapter, model_folder
from internvl_chat.model.lora import add_lora, lora_layers
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.train.arguments import Arguments, RunArguments
from internvl_chat.train.checks import Plan, configure, training_dtype

logger = get_logger(__name__)


def load_for_training(plan: Plan) -> tuple[InternVLChatModel, PreTrainedTokenizerBase, Preprocessing]:
    """Load the model and tokenizer, apply the command line's options, and add adapters where asked.

    What is trained is decided afterwards, by `set_trainable`.
    """
    args = plan.args
    deepspeed = args.run.hf_deepspeed_config if args.run.deepspeed else None
    if deepspeed is None:
        return _load_for_training(plan)
    # Under ZeRO-3 transformers would split a model's parameters while it is built; ours are read whole and
    # split when training begins. Every process must then run every module.
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    model, tokenizer, preprocessing = _load_for_training(plan)
    set_hf_deepspeed_config(deepspeed)
    model.always_run_vision = deepspeed.is_zero3()
    return model, tokenizer, preprocessing


def base_of_adapters(plan: Plan) -> str | None:
    """Return where the base of a checkpoint's adapters is now: what the run was started from, if told."""
    model = plan.args.model
    if model.base_model_path or plan.output.resume is None:
        return model.base_model_path
    path = model.model_name_or_path
    return None if path is None or is_adapter(model_folder(path)) else path


def _load_for_training(plan: Plan) -> tuple[InternVLChatModel, PreTrainedTokenizerBase, Preprocessing]:
    args, dtype = plan.args, training_dtype(plan.args)
    tokenizer, added = load_tokenizer(plan.source)
    context = image_context_id(tokenizer)
    if args.model.model_name_or_path is None and plan.output.resume is None:
        model = assemble_model(
            vision_folder=model_folder(args.model.vision_path),
            llm_folder=model_folder(args.model.llm_path),
            mlp_file=Path(args.model.mlp_path) if args.model.mlp_path else None,
            downsample_ratio=args.data.down_sample_ratio,
            image_context_id=context,
            dtype=dtype,
            attn=plan.attn,
            drop_path_rate=args.model.drop_path_rate,
        )
    else:
        model = load_model(
            plan.source,
            base=base_of_adapters(plan),
            image_context_id=context,
            dtype=dtype,
            attn=plan.attn,
            lora_dropout=args.model.lora_dropout,
            drop_path_rate=args.model.drop_path_rate,
        )
    if added:
        logger.info("%d special tokens added to the tokenizer", added)
        resize_vocabulary(model, len(tokenizer), added)
    return model, tokenizer, prepare_model(model, args, plan.specs)


def prepare_model(model: InternVLChatModel, args: Arguments, specs: Sequence[DatasetSpec]) -> Preprocessing:
    """Apply the command line's options to a loaded model, and return how its inputs are to be made.

    Adapters are added where they are asked for and not there yet.
    """
    if model.config.image_size != args.data.force_image_size:
        model.vision_model.resize_positions(args.data.force_image_size)
    configure(model.config, args)
    if not lora_layers(model):
        add_lora(
            model,
            llm_rank=args.model.use_llm_lora,
            vision_rank=args.model.use_backbone_lora,
            dropout=args.model.lora_dropout,
        )
    limits = {spec.name: spec.max_dynamic_patch or args.data.max_dynamic_patch for spec in specs}
    model.config.max_dynamic_patch = max(limits.values())
    if len(set(limits.values())) > 1:
        logger.warning("tile limits differ (%s); the model's own becomes the largest", limits)
    model.config.min_dynamic_patch = min(model.config.min_dynamic_patch, *limits.values())
    return dataclasses.replace(
        Preprocessing.from_model_config(model.config),
        system_text=SYSTEM_TEXTS[args.data.conv_style],
        normalize_type=args.data.normalize_type,
        max_seq_length=args.data.max_seq_length,
    )


def load_data(
    args: Arguments, specs: Sequence[DatasetSpec], encoder: RecordEncoder, flops: FlopCounter
) -> tuple[TrainingData, StepSampler]:
    """Open the data sets, index the lengths of their records, and decide their order.

    Args:
        args: the command line.
        specs: the data sets.
        encoder: of the model, with the command line's tile limit.
        flops: what a record costs, by which the processes' shares are made equal.

    Raises:
        DataError: names the records that cannot be used.
    """
    run = args.run
    sets = build_sets(specs, encoder)
    data = TrainingData(sets, seed=run.seed, lengths=_index_once(sets, run))
    for records in sets:
        logger.info(
            "data set %s: %d records, %d an epoch, at most %d tiles each",
            records.spec.name,
            len(records),
            records.num_used,
            records.encoder.preprocessing.max_dynamic_patch,
        )
    lengths = data.epoch_lengths()
    planner = StepPlanner(
        run.world_size,
        tokens=lengths.tokens,
        costs=flops.records(lengths.tokens, lengths.supervised, lengths.tiles),
        max_packed_tokens=run.max_packed_tokens if run.packing else None,
        records_per_pack=run.records_per_pack,
    )
    sampler = StepSampler(
        data.sizes,
        step_records=run.step_records,
        planner=planner,
        rank=run.process_index,
        seed=run.seed,
        strategy=run.train_sampling_strategy,
        resample=args.data.use_data_resampling,
    )
    return data, sampler


def _index_once(sets: Sequence[RecordSet], run: RunArguments) -> list[Lengths]:
    """Index the records' lengths on the main process; the others are told the outcome."""
    answer: list = [None, None]
    if run.process_index == 0:
        try:
            answer[0] = index_lengths(sets)
        except DataError as error:
            answer[1] = str(error)
    if run.world_size > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    lengths, problem = answer
    if problem:
        raise DataError(problem)
    return lengths
