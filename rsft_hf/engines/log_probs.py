"""Teacher-forced log probabilities of each token of given completions: log p, and log q under the sampling settings.

For engines whose sampler returns none. Only one batch of logits is in memory at a time.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from rsft_hf.engines.sampling import TRUNCATING, Prepared, counts_tokens, pad_prompts, prepare_inputs
from rsft_hf.memory import halve_batch_size

LogProbabilities = tuple[torch.Tensor | None, torch.Tensor]


@torch.no_grad()
def token_log_probabilities(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    generation_config: GenerationConfig,
    with_log_q: bool = True,
    batch_size: int = 16,
) -> list[LogProbabilities]:
    """Returns (log q, log p) of each answer, one teacher-forced pass per batch.

    A token that rounding alone leaves outside of top-k, top-p and the like counts as the last of those kept: what was
    sampled elsewhere may lie on the edge. A token that no rounding explains, such as an end before `min_new_tokens`,
    has log q = -inf.

    Args:
        model: In evaluation mode, unwrapped.
        prompts: Token ids of the prompt of each answer.
        completions: Token ids of each answer, as sampled, at least one.
        generation_config: Complete: how the answers were sampled, for log q.
        with_log_q: Whether log q is wanted; None stands in its place otherwise.
        batch_size: Rows per forward pass, sorted by length; halved when memory runs out.

    Returns:
        Pairs of tensors of shape (len(answer),), float32, nats, on the CPU, in the order given.
    """
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]) - len(completions[row]))
    found: dict[int, LogProbabilities] = {}
    is_alike = False
    if prompts and with_log_q and not model.config.is_encoder_decoder:
        # Padding would count as tokens: prompts of one length are scored together.
        is_alike = counts_tokens(_prepare(model, [prompts[0]], generation_config, is_left=True).processors)
    while order:
        rows = [row for row in order if not is_alike or len(prompts[row]) == len(prompts[order[0]])][:batch_size]
        try:
            scored = _score(
                model, [prompts[row] for row in rows], [completions[row] for row in rows], generation_config, with_log_q
            )
        except (RuntimeError, MemoryError) as error:
            batch_size = halve_batch_size(len(rows), error)
            continue
        found.update(zip(rows, scored))
        order = [row for row in order if row not in found]
    return [found[row] for row in range(len(prompts))]


def chosen_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns log p of the tokens, nats, float32: the logits of each one less the logarithm of their sum.

    Args:
        logits: Shape (..., vocabulary), of any number format.
        tokens: Shape (...), int64; a negative one, such as -100, counts as token 0.

    Example:
        >>> logits = torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]]).log()
        >>> chosen_log_probabilities(logits, torch.tensor([2, -100])).exp().tolist()
        [0.5, 0.25]
    """
    logits = logits.float()
    return logits.gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1) - logits.logsumexp(-1)


def _score(
    model: Any, prompts: list[Any], completions: list[Any], config: GenerationConfig, with_log_q: bool
) -> list[LogProbabilities]:
    chosen = pad_prompts(completions, 0, model.device, is_left=False)["input_ids"]
    first, processors = torch.zeros(len(prompts), 0, dtype=torch.long), LogitsProcessorList()
    if model.config.is_encoder_decoder:
        prepared = _prepare(model, prompts, config, is_left=False)
        first, processors = prepared.input_ids, prepared.processors
        inputs = {name: prepared.model_kwargs[name] for name in ("attention_mask", "encoder_outputs")}
        whole = torch.cat([first, chosen[:, :-1]], 1)
        logits = model(**inputs, decoder_input_ids=whole, use_cache=False).logits[:, first.shape[1] - 1 :].float()
    else:
        if with_log_q:
            prepared = _prepare(model, prompts, config, is_left=True)
            first, processors = prepared.input_ids, prepared.processors
        logits = _causal_logits(model, prompts, completions)
    log_p = chosen_log_probabilities(logits, chosen).cpu()
    log_q = _log_q(logits, chosen, first, processors).cpu() if with_log_q and processors else log_p
    lengths = [len(ids) for ids in completions]
    return [
        (log_q[row, :length].clone() if with_log_q else None, log_p[row, :length].clone())
        for row, length in enumerate(lengths)
    ]


def _causal_logits(model: Any, prompts: list[Any], completions: list[Any]) -> torch.Tensor:
    """Returns the logits that each token of the answers was drawn from, shape (rows, longest answer, vocabulary)."""
    whole = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    # Padded on the right: positions count from the first token without being told to.
    logits = model(**pad_prompts(whole, 0, model.device, is_left=False), use_cache=False).logits
    before = torch.tensor([len(prompt) - 1 for prompt in prompts], device=logits.device)
    steps = before[:, None] + torch.arange(max(map(len, completions)), device=logits.device)
    places = steps.clamp(max=logits.shape[1] - 1)[..., None].expand(-1, -1, logits.shape[-1])
    return logits.gather(1, places).float()


def _prepare(model: Any, prompts: list[Any], config: GenerationConfig, is_left: bool) -> Prepared:
    """Returns the inputs, processors and cache that `generate` would prepare for these prompts."""
    config = copy.deepcopy(config)
    config.stop_strings = None  # they end an answer, and change no probability
    inputs = pad_prompts(prompts, config.pad_token_id, model.device, is_left)
    return prepare_inputs(model, config, inputs, StoppingCriteriaList())


def _log_q(
    logits: torch.Tensor, chosen: torch.Tensor, first: torch.Tensor, processors: LogitsProcessorList
) -> torch.Tensor:
    """Returns log q of the chosen tokens, shape (rows, steps); processors see the tokens that came before each step."""
    shaping = LogitsProcessorList(one for one in processors if not isinstance(one, TRUNCATING))
    truncating = LogitsProcessorList(one for one in processors if isinstance(one, TRUNCATING))
    history, log_q = torch.cat([first, chosen], 1), torch.zeros(chosen.shape, device=logits.device)
    for step in range(chosen.shape[1]):
        before, token = history[:, : first.shape[1] + step], chosen[:, step, None]
        shaped = shaping(before, logits[:, step].clone())
        own = shaped.gather(1, token)
        kept = truncating(before, shaped)
        log_q[:, step] = (own - kept.scatter(1, token, own).logsumexp(-1, keepdim=True)).squeeze(1)
    return log_q
