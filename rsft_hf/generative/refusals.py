"""Refusals of what cannot be generated from, while nothing has been spent: models, prompts, arguments.

Parts of a run enter; an error with the remedy leaves, or nothing.
"""

from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.settings import context_length
from rsft_hf.generative.stages import PromptSet

if TYPE_CHECKING:
    from rsft_hf.generative.by_hand import StagesByHand
    from rsft_hf.generative.resampler import CandidateResampler

logger = logging.get_logger(__name__)


def prompt_set(dataset: Any, options: "StagesByHand", name: str) -> PromptSet:
    """Returns the prompts of a data set; raises if there is no such column or a reward function lacks one."""
    columns = column_names(dataset)
    if options.prompt_column not in columns:
        raise ValueError(
            f"`{name}` has no column {options.prompt_column!r}; it has {columns}. Rename the column that holds the "
            "prompts, or name it by `prompt_column`."
        )
    others = [column for column in columns if column != options.prompt_column]
    options.functions.check(others)
    if options.on_nothing_accepted == "reference" and options.reference_column not in others:
        raise ValueError(
            f'on_nothing_accepted="reference" reads the column {options.reference_column!r}, which `{name}` lacks; it '
            f"has {columns}. Name it by `reference_column`."
        )
    prompts = PromptSet(dataset, options.prompt_column)
    kinds = {isinstance(prompts.row(row)[0], str) for row in range(len(prompts))}
    if len(kinds) > 1:
        raise ValueError(f"`{name}` mixes prompts that are text with prompts that are messages. Give one kind.")
    return prompts


def column_names(dataset: Any) -> list[str]:
    """Returns the names of a data set's columns: its own, or those of its first row where rows are mappings."""
    first = dataset[0]
    return list(first) if isinstance(first, dict) else []


def refuse_model(model: Any) -> None:
    """Raises ValueError if the model cannot generate text."""
    try:
        can_generate = model.can_generate()
    except AttributeError:  # not a transformers model at all
        can_generate = False
    if not can_generate:
        raise ValueError(
            f"{type(model).__name__} cannot generate: it has no language-modelling head. Load it with "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM."
        )


def refuse_arguments(options: "CandidateResampler", trainer: Trainer) -> None:
    """Raises ValueError if the trainer's arguments do not go with rounds of generation."""
    args = trainer.args
    if args.dataloader_persistent_workers:
        raise ValueError(
            "`dataloader_persistent_workers=True` keeps workers that hold the rows of the first round for ever. Set it "
            "to False."
        )
    if trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.MEGATRON_LM) or (
        trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    ):
        raise ValueError(
            f"{trainer.accelerator.distributed_type.value} shards the weights, and candidates are generated from whole "
            "ones. Use DDP or ZeRO stage 1 or 2."
        )
    if options.round_start == "best" and not (
        args.metric_for_best_model and args.eval_strategy == "epoch" and args.save_strategy in ("epoch", "best")
    ):
        raise ValueError(
            'round_start="best" goes back to the best checkpoint so far. Set `metric_for_best_model`, '
            f'eval_strategy="epoch" (it is {args.eval_strategy}) and save_strategy="epoch" ({args.save_strategy}).'
        )


def refuse_other_vocabulary(other: Any, model: Any) -> None:
    """Raises ValueError if two models cannot share a tokenizer."""
    sizes = other.config.get_text_config().vocab_size, model.config.get_text_config().vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{type(other).__name__} has a vocabulary of {sizes[0]} and the trained model one of {sizes[1]}: tokens of "
            "one mean nothing to the other. Use models that share a tokenizer."
        )


def refuse_long_prompts(prompts: PromptSet, encoder: Encoder, model: Any, max_new_tokens: int) -> None:
    """Raises ValueError if a prompt and its answer exceed what the model can read."""
    limit = context_length(model)
    if limit is None:
        return
    reserved = 0 if encoder.is_encoder_decoder else max_new_tokens
    if max_new_tokens > limit:
        raise ValueError(f"`max_new_tokens`={max_new_tokens} exceeds the model's {limit} positions. Lower it.")
    for row in range(len(prompts)):
        length = len(encoder.prompt_ids(prompts.row(row)[0]))
        if length + reserved > limit:
            raise ValueError(
                f"The prompt in row {row} has {length} tokens"
                + (f", which with `max_new_tokens`={reserved} is more" if reserved else ", more")
                + f" than the model's {limit} positions. Shorten or drop such prompts"
                + (", or lower `max_new_tokens`." if reserved else ".")
            )


def look_at_evaluation(options: "CandidateResampler", evaluation: Any, prompts: PromptSet) -> None:
    """Checks the columns of held-out prompts, and warns if one of them is trained on."""
    datasets = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    known = {repr(prompts.row(row)[0]) for row in range(len(prompts))}
    for name, dataset in datasets.items():
        if options.prompt_column not in column_names(dataset):
            continue
        held_out = prompt_set(dataset, options, name)
        if options.eval_functions is not None:
            options.eval_functions.check([column for column in column_names(dataset) if column != held_out.column])
        shared = [row for row in range(len(held_out)) if repr(held_out.row(row)[0]) in known]
        if shared:
            logger.warning(
                f"`{name}` holds {len(shared)} prompts that are trained on too (the first in row {shared[0]}): its "
                "figures are not held out. Take them out of one of the two."
            )
