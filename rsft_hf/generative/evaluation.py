"""Held-out evaluation: one generation per prompt with the current weights, scored by rewards and `compute_metrics`.

The prompts are not trained on and the scores select nothing. Each process generates a share of the prompts.
"""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from transformers import EvalPrediction
from transformers.utils import logging

from rsft_hf.distributed import FailTogether, gather_lists
from rsft_hf.engines.generation_config import held_out_config
from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.config import CandidateConfig
from rsft_hf.generative.generation import Generator, Sampling
from rsft_hf.generative.metrics import distinct_n, weighted_means
from rsft_hf.generative.prompts import PromptSet, column_names
from rsft_hf.generative.selection import score_candidates
from rsft_hf.generative.validation import prompt_set, readable_prompts
from rsft_hf.resampler import Predictions

logger = logging.get_logger(__name__)

_ROUND = -1  # names streams that no round draws from: every evaluation draws the same numbers

_PROMPTS_AT_ONCE = 64


def predict_prompts(
    config: CandidateConfig, generator: Generator, prompts: PromptSet, accelerator: Accelerator, trainer: Any
) -> Predictions:
    """Returns one generation per prompt (text), the reference column, and metrics without prefix. Collective.

    Args:
        config: Options.
        generator: With the model that is trained.
        prompts: What to generate for.
        accelerator: Knows the processes.
        trainer: Has `compute_metrics`, which gets texts as predictions, the reference column as labels, and the prompts
            as inputs where `include_for_metrics` names them.

    Returns:
        The metrics are `reward` (the selecting functions' weighted sum), `rewards/<name>/mean` (of all functions),
        `length` (tokens), `truncated`, `distinct_1`, `distinct_2`, what functions logged with `log_metric`, and what
        `compute_metrics` returns.

    Raises:
        ValueError: If `compute_metrics` fails on texts.
    """
    complete = held_out_config(config, generator.model, generator.encoder.tokenizer)
    sampling = Sampling(complete, num_candidates=1, round_number=_ROUND)
    own = list(range(len(prompts)))[accelerator.process_index :: accelerator.num_processes]
    candidates: list[Candidate] = []
    with FailTogether(accelerator, "evaluating"):
        for start in range(0, len(own), _PROMPTS_AT_ONCE):
            candidates += generator(prompts, own[start : start + _PROMPTS_AT_ONCE], sampling)
        logged = score_candidates(candidates, config.functions, trainer.state).metrics
        if config.eval_functions is not None:
            judged = [(candidate.reward, candidate.rewards) for candidate in candidates]
            logged |= score_candidates(candidates, config.eval_functions, trainer.state).metrics
            for candidate, (reward, rewards) in zip(candidates, judged, strict=True):
                candidate.reward, candidate.rewards = reward, rewards | candidate.rewards
    parts = gather_lists(accelerator, [(logged, len(candidates))])
    candidates = sorted(gather_lists(accelerator, candidates), key=lambda candidate: candidate.prompt_id)
    texts = [candidate.text for candidate in candidates]
    references = [candidate.row.get(config.reference_column) for candidate in candidates]
    inputs = [candidate.prompt for candidate in candidates] if "inputs" in trainer.args.include_for_metrics else None
    metrics = weighted_means(*zip(*parts, strict=True)) | _figures(candidates)
    metrics |= _computed(trainer, EvalPrediction(texts, references, inputs))
    return texts, references, metrics


def _computed(trainer: Any, prediction: EvalPrediction) -> dict[str, Any]:
    if trainer.compute_metrics is None:
        return {}
    try:
        computed = trainer.compute_metrics(prediction)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"`compute_metrics` failed on held-out prompts ({type(error).__name__}: {error}). There it gets texts, not "
            "token ids: `predictions` is a list of answers, `label_ids` the list of references (None where there "
            "is none). Leave out the decoding."
        ) from error
    # As Trainer does: a NumPy number in the log could not be written into a checkpoint.
    return {name: _plain(value) for name, value in computed.items()}


def _figures(candidates: Sequence[Candidate]) -> dict[str, float]:
    tokens = [candidate.token_ids for candidate in candidates]
    figures = {
        "reward": _mean([candidate.reward for candidate in candidates]),
        "length": _mean([float(candidate.num_tokens) for candidate in candidates]),
        "truncated": _mean([float(candidate.finish_reason == "length") for candidate in candidates]),
    }
    figures |= {f"distinct_{n}": distinct_n(tokens, n) for n in (1, 2)}
    for name in dict.fromkeys(name for candidate in candidates for name in candidate.rewards):
        figures[f"rewards/{name}/mean"] = _mean([candidate.rewards.get(name) for candidate in candidates])
    if candidates and math.isnan(figures["reward"]):
        logger.warning(
            f"No reward function answered for any of {len(candidates)} held-out prompts: their reward is NaN, which is "
            "never the best. Look at the log of the judge."
        )
    return {name: value for name, value in figures.items() if math.isfinite(value) or name.startswith("reward")}


def _plain(value: Any) -> Any:
    """A NumPy or torch number as Python's own, which a checkpoint can hold."""
    return value.item() if isinstance(value, (np.generic, torch.Tensor)) else value


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def validate_best_metric(config: CandidateConfig, trainer: Any) -> None:
    """Raises ValueError if `metric_for_best_model` is no metric of the held-out prompts, before a round is spent.

    What `compute_metrics` returns is not known beforehand: with it nothing is checked.
    """
    metric, evaluation = trainer.args.metric_for_best_model, trainer.eval_dataset
    if metric is None or evaluation is None or trainer.compute_metrics is not None:
        return
    named = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    if trainer.args.eval_strategy == "no" or not all(
        config.prompt_column in column_names(dataset) for dataset in named.values()
    ):
        return
    functions = [*config.functions.names, *(config.eval_functions.names if config.eval_functions is not None else ())]
    metrics = [
        "reward",
        "length",
        "truncated",
        "distinct_1",
        "distinct_2",
        *(f"rewards/{name}/mean" for name in functions),
    ]
    known = [f"{name}_{one}" if name else one for name in named for one in metrics]
    if metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"`metric_for_best_model`={metric!r} is not measured on held-out prompts. Use one of {', '.join(known)}, "
            "or return it from `compute_metrics`."
        )


def validate_evaluation(config: CandidateConfig, trainer: Any, prompts: PromptSet, policy: Generator) -> None:
    """Checks what held-out prompts are to be generated with, and warns if one of them is trained on.

    Raises:
        TypeError: If `eval_generation_config` is no GenerationConfig.
        ValueError: If a column is missing, the model cannot read a prompt, the engine cannot generate so, or the
            arguments ask for metrics that texts have not.
    """
    evaluation = trainer.eval_dataset
    named = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    known = {repr(prompts.row(row)[0]) for row in range(len(prompts))}
    generation_config = held_out_config(config, policy.model, policy.encoder.tokenizer)
    for name, dataset in named.items():
        is_readable = not isinstance(dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset))
        if is_readable and len(dataset) and config.prompt_column not in column_names(dataset):
            continue  # encoded rows, for the trainer's own evaluation
        _validate_metrics_settings(trainer, name)
        held_out = prompt_set(dataset, config, name, is_trained_on=False)
        if config.eval_functions is not None:
            config.eval_functions.check([column for column in column_names(dataset) if column != held_out.column])
        readable_prompts(held_out, policy.encoder, policy.model, generation_config.max_new_tokens)
        policy.engine.check(policy.model, generation_config)
        shared = [row for row in range(len(held_out)) if repr(held_out.row(row)[0]) in known]
        if shared:
            logger.warning(
                f"`{name}` holds {len(shared)} prompts that are trained on too (the first in row {shared[0]}): its "
                "figures are not held out. Take them out of one of the two."
            )


def _validate_metrics_settings(trainer: Any, name: str) -> None:
    if trainer.compute_metrics is None:
        return
    if trainer.args.batch_eval_metrics:
        raise ValueError(
            f"`batch_eval_metrics=True` computes metrics batch by batch, and the prompts of `{name}` are answered as a "
            "whole. Leave it out: texts take little memory."
        )
    if "loss" in trainer.args.include_for_metrics:
        raise ValueError(
            f'`include_for_metrics` asks for "loss", which answers to the prompts of `{name}` have not. Leave it out, '
            "or evaluate on rows with `input_ids` and `labels`."
        )
