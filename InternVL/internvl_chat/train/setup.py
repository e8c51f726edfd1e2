"""The objects that a run is made of: model, tokenizer, preprocessing, data and their order."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from internvl_chat.data.audit import find_warnings
from internvl_chat.data.bad_records import LeftOut, leave_out, list_problems, raise_problems
from internvl_chat.data.dataset import TrainingData, build_sets
from internvl_chat.data.encoding import RecordEncoder
from internvl_chat.data.length_cache import Lengths
from internvl_chat.data.lengths import index_records
from internvl_chat.data.meta import DatasetSpec
from internvl_chat.data.order import StepSampler
from internvl_chat.data.packing import StepPlanner
from internvl_chat.data.preprocessing import Preprocessing
from internvl_chat.data.record_set import RecordSet
from internvl_chat.data.template import SYSTEM_TEXTS
from internvl_chat.data.tokenizer import image_context_id, load_tokenizer
from internvl_chat.model.assemble import assemble_model, assembled_config
from internvl_chat.model.checkpoint import load_model, resize_vocabulary
from internvl_chat.model.configuration import InternVLChatConfig
from internvl_chat.model.flops import FlopCounter
from internvl_chat.model.folders import is_adapter, model_folder, read_config
from internvl_chat.model.lora import add_lora, lora_layers
from internvl_chat.model.modeling import InternVLChatModel
from internvl_chat.train.arguments import Arguments
from internvl_chat.train.checks import Plan, configure, training_dtype
from internvl_chat.train.validation import Validation
from internvl_chat.utils.errors import DataError
from internvl_chat.utils.logging import get_logger

logger = get_logger(__name__)

_LONGEST_CHECK = timedelta(days=2)
# Records that the log names; the ledger names all.
_NAMED = 20
# Held-out records that a process is given at a time.
_RECORDS_AT_ONCE = 32


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
    preprocessing = plan_preprocessing(model.config, args, specs)
    model.config.max_dynamic_patch = preprocessing.max_dynamic_patch
    model.config.min_dynamic_patch = preprocessing.min_dynamic_patch
    return preprocessing


def choose_kernels(model: InternVLChatModel, args: Arguments) -> None:
    """Let a model compute by Liger's kernels, and by compiled blocks, where the flags say so."""
    if args.model.use_liger:
        model.use_liger()
    if args.run.compile_blocks:
        model.compile_blocks()


def plan_preprocessing(
    config: InternVLChatConfig, args: Arguments, specs: Sequence[DatasetSpec]
) -> Preprocessing:
    """Return how the inputs of a model are to be made, which takes none of its weights.

    Args:
        config: of the model; it stays as it is.
        args: the command line.
        specs: the data sets; the largest of their tile limits becomes the model's own.
    """
    config = copy.deepcopy(config)
    configure(config, args)
    limits = [spec.max_dynamic_patch or args.data.max_dynamic_patch for spec in specs]
    config.max_dynamic_patch = max(limits)
    config.min_dynamic_patch = min(config.min_dynamic_patch, *limits)
    return dataclasses.replace(
        Preprocessing.from_model_config(config),
        system_text=SYSTEM_TEXTS[args.data.conv_style],
        normalize_type=args.data.normalize_type,
        max_seq_length=args.data.max_seq_length,
    )


def load_encoder(plan: Plan) -> RecordEncoder:
    """Return what encodes the records of a run, with the command line's tile limit; no weights are read."""
    args = plan.args
    if args.model.model_name_or_path is None and plan.output.resume is None:
        folders = model_folder(args.model.vision_path), model_folder(args.model.llm_path)
        config = assembled_config(*folders, args.data.down_sample_ratio)
    else:
        config = read_config(plan.source)
    tokenizer, _ = load_tokenizer(plan.source)
    preprocessing = plan_preprocessing(config, args, plan.specs)
    encoder = RecordEncoder(tokenizer, preprocessing, truncate_text=args.data.truncate_text)
    return encoder.with_max_tiles(args.data.max_dynamic_patch)


def load_data(
    args: Arguments, specs: Sequence[DatasetSpec], encoder: RecordEncoder, flops: FlopCounter
) -> tuple[TrainingData, StepSampler]:
    """Open and check the data sets, and decide the order of their records; see `load_records`."""
    data = load_records(args, specs, encoder)
    return data, order_records(args, data, flops)


def load_records(
    args: Arguments,
    specs: Sequence[DatasetSpec],
    encoder: RecordEncoder,
    *,
    began_without: Sequence[tuple[str, int]] | None = None,
) -> TrainingData:
    """Open the data sets, and look at every record before it is used.

    Args:
        args: the command line.
        specs: the data sets.
        encoder: of `load_encoder`.
        began_without: the records (data set and index) that a run which goes on has left out from its start.
            It leaves out the same, whatever was repaired or damaged since: so their order stays.

    Raises:
        DataError: names the records that cannot be used, if they are not to be left out.
    """
    sets = build_sets(specs, encoder)
    limits = {s.spec.name: s.encoder.preprocessing.max_dynamic_patch for s in sets}
    if len(set(limits.values())) > 1:
        logger.warning("tile limits differ (%s); the model's own becomes the largest", limits)
    lengths, left_out, digests = _check_once(sets, args)
    if began_without is not None:
        left_out = [LeftOut(name, index, "as from the start of this run") for name, index in began_without]
    skip = args.data.on_bad_record == "skip"
    data = TrainingData(
        sets,
        seed=args.run.seed,
        lengths=lengths,
        left_out=left_out,
        max_bad_fraction=args.data.max_bad_fraction if skip else None,
        digests=digests,
    )
    for records, size in zip(sets, data.sizes, strict=True):
        logger.info(
            "data set %s: %d records, %d an epoch, at most %d tiles each",
            records.spec.name,
            len(records),
            size,
            records.encoder.preprocessing.max_dynamic_patch,
        )
    if left_out:
        logger.warning(
            "%d records are left out, all of which ledger.jsonl names:\n%s",
            len(left_out), "\n".join(f"  {one.message}" for one in left_out[:_NAMED]),
        )  # fmt: skip
    return data


def order_records(args: Arguments, data: TrainingData, flops: FlopCounter) -> StepSampler:
    """Return which records each step uses, and where.

    Args:
        args: the command line.
        data: of `load_records`.
        flops: what a record costs, by which the processes' shares are made equal.
    """
    run = args.run
    return StepSampler(
        data.sizes,
        step_records=run.step_records,
        planner=_planner(args, data, flops),
        rank=run.process_index,
        seed=run.seed,
        strategy=run.train_sampling_strategy,
        resample=args.data.use_data_resampling,
    )


def _planner(args: Arguments, data: TrainingData, flops: FlopCounter) -> StepPlanner:
    run, lengths = args.run, data.epoch_lengths()
    return StepPlanner(
        run.world_size,
        tokens=lengths.tokens,
        costs=flops.records(lengths.tokens, lengths.supervised, lengths.tiles),
        max_packed_tokens=run.max_packed_tokens if run.packing else None,
        records_per_pack=run.records_per_pack,
    )


def plan_validation(args: Arguments, data: TrainingData, flops: FlopCounter) -> Validation:
    """Deal the held-out records to the processes; see `order_records`."""
    run = args.run
    sampler = StepSampler(
        data.sizes,
        step_records=_RECORDS_AT_ONCE * run.world_size,
        planner=_planner(args, data, flops),
        rank=run.process_index,
        strategy="sequential",
    )
    normalization = data.sets[0].encoder.preprocessing.normalize_type
    return Validation(data, sampler, run.loss_reduction, run.eval_generate, normalization)


def _check_once(sets: Sequence[RecordSet], args: Arguments) -> tuple[list[Lengths], list[LeftOut], list[str]]:
    """Check the records on the main process; the others are told the outcome."""
    answer: list = [None, "the main process could not check the records; see its own message"]
    group = None
    if args.run.world_size > 1:
        # To decode every image may take longer than the other processes would wait.
        group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_CHECK)
    try:
        if args.run.process_index == 0:
            answer = [(*_check(sets, args), [records.digest() for records in sets]), None]
    except DataError as error:
        answer = [None, str(error)]
    finally:
        if group is not None:
            torch.distributed.broadcast_object_list(answer, src=0, group=group)
    found, problem = answer
    if problem:
        raise DataError(problem)
    return found


def _check(sets: Sequence[RecordSet], args: Arguments) -> tuple[list[Lengths], list[LeftOut]]:
    """Return the lengths of the records, and those that are left out.

    Raises:
        DataError: there are too many of them, or any if none is to be left out.
    """
    data = args.data
    indexes = index_records(sets, decode=data.check == "full")
    problems = [problem for index in indexes for problem in index.problems]
    left_out: list[LeftOut] = []
    if data.on_bad_record == "skip":
        left_out = leave_out(problems, sum(map(len, indexes)), data.max_bad_fraction)
    else:
        try:
            raise_problems(problems)
        except DataError as error:
            raise DataError(f"{error}\nRepair or remove what is named, or train without it, by name: "
                            "--on_bad_record skip") from None  # fmt: skip
    if data.check != "off":
        warnings = [problem for problem in problems if not problem.is_error]
        # A wrong 'length' is told when its set is opened.
        warnings += [warning for warning in find_warnings(sets, indexes) if warning.kind != "length"]
        counts = Counter(warning.kind for warning in warnings)
        logger.info(
            "data check (%s): %d records, %d cannot be used%s",
            data.check, sum(map(len, indexes)), len(left_out),
            "".join(f", {kind}: {count}" for kind, count in counts.items()),
        )  # fmt: skip
        if warnings:
            logger.warning("the data check found\n%s", "\n".join(list_problems(warnings, 10)))
    return [index.lengths for index in indexes], left_out
