"""What `generate` makes of a configuration: logits processors, stopping criteria, a decoder's first tokens, a cache.

A model and a request enter; the same objects leave that `model.generate` would have run with for one prompt.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import ForcedEOSTokenLogitsProcessor, GenerationMixin, StopStringCriteria

from rsft_hf.generative.engines.engine import GenerationRequest


@dataclass(frozen=True)
class Prepared:
    """What `generate` prepared for one prompt or several.

    Attributes:
        processors: From the scores of the next token to those it is drawn from.
        criteria: When a row ends.
        input_ids: Tokens that generation goes on from, shape (prompts, width): prompts, or a decoder's first tokens.
        model_kwargs: What would be handed to the model, its cache among it.
    """

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    input_ids: torch.Tensor
    model_kwargs: dict[str, Any]


def prepare(model: Any, request: GenerationRequest, prompt: Sequence[int]) -> Prepared:
    """Returns what `model.generate` would run with for this prompt alone; nothing is generated.

    Args:
        model: Has `generate`.
        request: Says how to sample.
        prompt: Token ids.
    """
    config, criteria = separated_stops(request)
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=model.device)
    return prepare_inputs(model, config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, criteria)


def prepare_inputs(
    model: Any, config: GenerationConfig, inputs: dict[str, torch.Tensor], criteria: StoppingCriteriaList
) -> Prepared:
    """Returns what `model.generate` would run with for these inputs; nothing is generated, but an encoder runs.

    Args:
        model: Has `generate`.
        config: Without stop strings; `generate` may fill it in.
        inputs: `input_ids` and `attention_mask`, shape (prompts, width).
        criteria: Further ones, such as stop strings.
    """
    forced_end, found = config.forced_eos_token_id, list[Prepared]()

    def keep(_: Any, input_ids: torch.Tensor, **kwargs: Any) -> None:
        processors = without_forced_end(kwargs.pop("logits_processor"), forced_end)
        found.append(Prepared(processors, kwargs.pop("stopping_criteria"), input_ids, kwargs))

    with without_own_stops(model):
        model.generate(**inputs, generation_config=config, stopping_criteria=criteria, custom_generate=keep)
    return found[0]


@contextlib.contextmanager
def without_own_stops(model: Any) -> Iterator[None]:
    """Keeps `generate` from putting a model's own stop strings back, for which it would want a tokenizer."""
    configs = [one.generation_config for one in model.modules() if isinstance(one, GenerationMixin)]
    stops = [config.stop_strings for config in configs]
    for config in configs:
        config.stop_strings = None
    try:
        yield
    finally:
        for config, own in zip(configs, stops, strict=True):
            config.stop_strings = own


def separated_stops(request: GenerationRequest) -> tuple[GenerationConfig, StoppingCriteriaList]:
    """Returns a copy of the configuration, which `generate` may fill in, and its stop strings as a criterion."""
    config, criteria = copy.deepcopy(request.generation_config), StoppingCriteriaList()
    if config.stop_strings is not None:
        criteria.append(StopStringCriteria(tokenizer=request.tokenizer, stop_strings=config.stop_strings))
        config.stop_strings = None  # `generate` hands no tokenizer on to a decoding function of one's own
    return config, criteria


def without_forced_end(processors: LogitsProcessorList, forced_end: Any) -> LogitsProcessorList:
    """Returns the processors without the one that ends every answer at the limit, unless it was asked for.

    `generate` takes it from the model's own configuration (BART's, Marian's) where a request leaves it out.
    """
    if forced_end is not None:
        return processors
    return LogitsProcessorList(one for one in processors if type(one) is not ForcedEOSTokenLogitsProcessor)
