"""Validation of models, prompts and TrainingArguments before anything is generated."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import DistributedType
from transformers import DataCollatorForLanguageModeling, Trainer
from transformers.utils import logging

from rsft_hf.checks import check_integer
from rsft_hf.engines.generation_config import context_length
from rsft_hf.engines.model_access import is_sharded
from rsft_hf.generative.config import CandidateConfig
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.prompts import Prompt, PromptSet, column_names, message_text, template_arguments
from rsft_hf.isolation import forked_rng

logger = logging.get_logger(__name__)


def prompt_set(dataset: Any, config: CandidateConfig, name: str, is_trained_on: bool = True) -> PromptSet:
    """Returns the prompts of a data set; raises if there is no such column or a reward function lacks one.

    Args:
        dataset: Rows that are mappings, with a length and random access.
        config: Names the columns and holds the reward functions.
        name: What the user calls it, for the message.
        is_trained_on: Whether references may be trained on, which held-out prompts' never are.
    """
    if isinstance(dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset)) or not len(dataset):
        raise ValueError(
            f"`{name}` ({type(dataset).__name__}) has no rows, or none that can be chosen by number. Pass a data set "
            "of prompts with a length and at least one row."
        )
    columns = column_names(dataset)
    if config.prompt_column not in columns:
        raise ValueError(
            f"`{name}` has no column {config.prompt_column!r}; it has {columns}. Rename the column that holds the "
            "prompts, or name it by `prompt_column`."
        )
    others = [column for column in columns if column != config.prompt_column]
    config.functions.check(others)
    if is_trained_on and config.on_nothing_accepted == "reference" and config.reference_column not in others:
        raise ValueError(
            f'on_nothing_accepted="reference" reads the column {config.reference_column!r}, which `{name}` lacks; it '
            f"has {columns}. Name it by `reference_column`."
        )
    prompts = PromptSet(dataset, config.prompt_column)
    kinds = {_validated_kind(prompts, row, config, name) for row in range(len(prompts))}
    if len(kinds) > 1:
        raise ValueError(f"`{name}` mixes prompts that are text with prompts that are messages. Give one kind.")
    return prompts


def _validated_kind(prompts: PromptSet, row: int, config: CandidateConfig, name: str) -> type:
    """The type of a prompt that can be rendered; raises ValueError if it cannot."""
    prompt, columns = prompts.row(row)
    where = f"The prompt in row {row} of `{name}`"
    if isinstance(prompt, str):
        _validate_storable(prompt, where)
        return str
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{where} is {prompt!r}. Give text or a list of messages, and drop rows without one.")
    if not all(isinstance(message, dict) and _is_text(message) for message in prompt):
        raise ValueError(
            f"{where} has a message whose content is not text: {prompt!r}. Only text is read; give messages with a "
            "`role` and a `content` that is a string or a list of text parts (null for an assistant's tool calls)."
        )
    arguments = _validated_template_arguments(columns, where)
    _validate_storable([prompt, arguments], where)
    continues = (dict(config.chat_template_kwargs or {}) | arguments).get("continue_final_message")
    if prompt[-1].get("role") == "assistant" and not continues:
        raise ValueError(
            f"{where} ends with the assistant's turn: a second one would be generated after it. Move that turn to the "
            f"column {config.reference_column!r}, or have it continued by "
            'chat_template_kwargs={"continue_final_message": True}.'
        )
    if continues and (prompt[-1].get("role") != "assistant" or not message_text(prompt[-1].get("content"))):
        raise ValueError(
            f"{where} ends with {prompt[-1]!r}, and `continue_final_message` continues an assistant's text. End the "
            "prompt with one, or leave `continue_final_message` out of `chat_template_kwargs`."
        )
    return list


def _validate_storable(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(
            f"{where} cannot be stored: {error}. Give text that UTF-8 can encode, and messages and tools that JSON can."
        ) from error


def _validated_template_arguments(columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    kwargs, tools = columns.get("chat_template_kwargs"), columns.get("tools")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValueError(f"{where} has `chat_template_kwargs`={kwargs!r}. Give a dict per row, or rename the column.")
    try:
        arguments = template_arguments(columns)
        tools = arguments.get("tools")
    except json.JSONDecodeError:
        arguments = {}
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise ValueError(
            f"{where} has `tools`={tools!r}. The chat template takes a list of JSON schemas, or that list as JSON "
            "text; rename the column if it holds something else."
        )
    return arguments


def _is_text(message: dict[str, Any]) -> bool:
    content = message.get("content")
    if content is None:  # as chat templates take a turn that only calls tools
        return message.get("role") == "assistant" and len(message.keys() - {"role", "content"}) > 0
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    return isinstance(content, str)


def validate_model(model: Any) -> None:
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


def validate_training_arguments(config: CandidateConfig, trainer: Trainer) -> None:
    """Raises ValueError if the trainer's arguments do not go with rounds of generation."""
    args = trainer.args
    if args.dataloader_persistent_workers:
        raise ValueError(
            "`dataloader_persistent_workers=True` keeps workers that hold the rows of the first round for ever. Set it "
            "to False."
        )
    _validate_sharding(config, trainer)
    if isinstance(trainer.data_collator, DataCollatorForLanguageModeling):
        raise ValueError(
            "`data_collator` is DataCollatorForLanguageModeling, which makes labels of its own: it would teach the "
            "prompts and hide the ends. Leave it out, or take DataCollatorForSeq2Seq, which keeps the rows' labels."
        )
    if args.push_to_hub:
        logger.warning(
            f"`push_to_hub=True` uploads the candidates too, prompts and answers in plain text: they are in "
            f"{args.output_dir}/candidates."
        )
    if config.round_start == "best" and not (
        args.metric_for_best_model and args.eval_strategy == "epoch" and args.save_strategy in ("epoch", "best")
    ):
        raise ValueError(
            'round_start="best" goes back to the best checkpoint so far. Set `metric_for_best_model`, '
            f'eval_strategy="epoch" (it is "{args.eval_strategy.value}") and save_strategy="epoch" '
            f'("{args.save_strategy.value}").'
        )


def validate_collator(collator: Any, encoder: Encoder, row: tuple[Prompt, Mapping[str, Any]]) -> None:
    """Raises ValueError if a data collator cannot read training rows, here two made of the prompt of a row."""
    ids = encoder.prompt_ids(*row)
    rows = [encoder.training_row(ids, ids[:length]) for length in (1, 2)]
    try:
        with forked_rng(0):
            batch = collator(rows)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"`data_collator` ({type(collator).__name__}) cannot read rows of input_ids, attention_mask and labels: "
            f"{type(error).__name__}: {error}. Leave it out, or take DataCollatorForSeq2Seq; preferences are trained "
            "on from export_dpo or export_kto, not in rounds."
        ) from error
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise ValueError(
            f"`data_collator` ({type(collator).__name__}) drops the labels of the rows. Leave it out, or take "
            "DataCollatorForSeq2Seq."
        )


def _validate_sharding(config: CandidateConfig, trainer: Trainer) -> None:
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type
    if kind == DistributedType.MEGATRON_LM or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ValueError(
            f"{kind.value}{' version 1' if kind == DistributedType.FSDP else ''} shards the weights in a way that they "
            'cannot be generated from. Use FSDP2 (`fsdp_config={"version": 2}`), DDP or ZeRO.'
        )
    if config.round_start == "base" and kind == DistributedType.DEEPSPEED:
        raise ValueError('round_start="base" cannot reach the weights that DeepSpeed\'s optimizer keeps. Use "last".')
    if config.round_start != "last" and (kind == DistributedType.FSDP or is_sharded(trainer.model)):
        raise ValueError(
            f'round_start="{config.round_start}" puts whole weights back, and FSDP2 has spread them over the '
            'processes. Use "last".'
        )
    if kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        logger.warning(
            "Generating under ZeRO-3 follows DeepSpeed's documentation and has not been run. Look at the first round's "
            "candidates, or use FSDP2 or ZeRO-2."
        )


def validate_vocabulary(other: Any, model: Any) -> None:
    """Raises ValueError if two models cannot share a tokenizer."""
    sizes = other.config.get_text_config().vocab_size, model.config.get_text_config().vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{type(other).__name__} has a vocabulary of {sizes[0]} and the trained model one of {sizes[1]}: tokens of "
            "one mean nothing to the other. Use models that share a tokenizer."
        )


def readable_prompts(
    prompts: PromptSet,
    encoder: Encoder,
    model: Any,
    max_new_tokens: int,
    max_prompt_length: int | None = None,
    on_long_prompt: str = "raise",
) -> PromptSet:
    """Returns the prompts that the model can read with their answers.

    Args:
        prompts: Prompts of any length.
        encoder: Encodes them.
        model: Model with a limit of positions, or without.
        max_new_tokens: Tokens that an answer may have.
        max_prompt_length: As in `CandidateResampler`.
        on_long_prompt: As in `CandidateResampler`.

    Raises:
        ValueError: If a prompt has no tokens, or is too long and not dropped, or none is left.
    """
    positions = context_length(model)
    reserved = 0 if encoder.is_encoder_decoder else max_new_tokens
    if positions is not None and max_new_tokens > positions:
        raise ValueError(f"`max_new_tokens`={max_new_tokens} exceeds the model's {positions} positions. Lower it.")
    limits = [limit for limit in (positions and positions - reserved, max_prompt_length) if limit is not None]
    lengths = _prompt_lengths(prompts, encoder)
    limit = min(limits, default=max(lengths))
    if on_long_prompt == "drop":
        return PromptSet(_without_long(prompts.dataset, lengths, limit), prompts.column)
    if (row := next((row for row, length in enumerate(lengths) if length > limit), None)) is not None:
        bound = f"`max_prompt_length`={limit}"
        if limit != max_prompt_length:
            bound = f"the model's {positions} positions" + (f" less `max_new_tokens`={reserved}" if reserved else "")
        raise ValueError(
            f"The prompt in row {row} has {lengths[row]} tokens, more than {bound}. Shorten such prompts, or leave "
            'them out by on_long_prompt="drop" (held-out ones by drop_long_prompts).'
        )
    return prompts


def drop_long_prompts(
    prompts: datasets.Dataset,
    processing_class: Any,
    max_prompt_length: int,
    prompt_column: str = "prompt",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    is_encoder_decoder: bool = False,
) -> datasets.Dataset:
    """Returns the prompts that have at most so many tokens; the log tells how many were dropped, and which.

    Args:
        prompts: Rows with prompts, text or messages.
        processing_class: The model's tokenizer.
        max_prompt_length: Maximum number of tokens, those of the chat template included, at least 1.
        prompt_column: Column of the prompts.
        chat_template_kwargs: Handed to the chat template.
        is_encoder_decoder: Whether the model is one, which reads the end token of a prompt.

    Raises:
        ValueError: If no prompt is left.
    """
    check_integer("max_prompt_length", max_prompt_length, 1)
    encoder = Encoder(processing_class, is_encoder_decoder, dict(chat_template_kwargs or {}))
    kept: datasets.Dataset = _without_long(
        prompts, _prompt_lengths(PromptSet(prompts, prompt_column), encoder), max_prompt_length
    )
    return kept


def _prompt_lengths(prompts: PromptSet, encoder: Encoder) -> list[int]:
    lengths = []
    for row in range(len(prompts)):
        try:
            lengths.append(len(encoder.prompt_ids(*prompts.row(row))))
        except ValueError as error:
            raise ValueError(f"The prompt in row {row} cannot be encoded. {error}") from error
    return lengths


def _without_long(dataset: Any, lengths: list[int], limit: int) -> Any:
    """The rows of at most so many tokens; says which are left out."""
    kept = [row for row, length in enumerate(lengths) if length <= limit]
    if not kept:
        raise ValueError(
            f"Each of the {len(lengths)} prompts has more than {limit} tokens: none is left. Raise "
            "`max_prompt_length`, lower `max_new_tokens`, or take a model that reads more."
        )
    if len(kept) == len(lengths):
        return dataset
    dropped = [str(row) for row, length in enumerate(lengths) if length > limit]
    logger.warning(
        f"{len(dropped)} of {len(lengths)} prompts have more than {limit} tokens and are dropped: rows "
        f"{', '.join(dropped[:5])}{', ...' if len(dropped) > 5 else ''}."
    )
    return dataset.select(kept) if isinstance(dataset, datasets.Dataset) else torch.utils.data.Subset(dataset, kept)


def validate_best_checkpoint(checkpoint: Path) -> None:
    """Raises ValueError if the best checkpoint of the run that saved a checkpoint is gone."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    best = state.get("best_model_checkpoint")
    if best is not None and not Path(best).is_dir():
        raise ValueError(
            f'round_start="best" goes back to {best}, which is gone. Put the folder of checkpoints back where it was.'
        )
