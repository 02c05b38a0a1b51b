"""What is noted while a batch is generated: the tokens drawn, their log probabilities, and where each row ended.

Scores and streams enter, tokens leave. The records speak of rows by their number in the batch, so that rows may leave.
"""

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria, MaxTimeCriteria

_BLOCK = 64  # tokens


class StreamSampler(LogitsProcessor):
    """Draws each row's token from the row's own stream, and keeps it with its log probabilities.

    As the last of `generate`'s logits processors it leaves the token drawn as the only choice.

    Args:
        processors: Those that `generate` built from its configuration.
        uniforms: Shape (rows, steps), float64; None picks the most probable token.
        with_log_probs: Whether to keep log q and log p of the chosen tokens.
        size: Rows, and most tokens of a row.
        device: Where the tokens are drawn.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        uniforms: torch.Tensor | None,
        with_log_probs: bool,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.processors, self.with_log_probs = processors, with_log_probs
        self.uniforms = None if uniforms is None else uniforms.to(device)
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        # Four bytes a token each, where the scores of the whole vocabulary would be kept otherwise.
        self.log_q = torch.zeros(size if with_log_probs else (0, 0), device=device)
        self.log_p = torch.zeros_like(self.log_q)
        self._step = 0

    def draw(self, input_ids: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Returns the next token of these rows, shape (len(rows),), int64."""
        raw = scores.float()
        processed = self.processors(input_ids, raw.clone())
        chosen, _ = choose(processed, None if self.uniforms is None else self.uniforms[rows, self._step])
        self.tokens[rows, self._step] = chosen
        if self.with_log_probs:
            self.log_p[rows, self._step] = log_probability(raw, chosen)
            self.log_q[rows, self._step] = log_probability(processed, chosen)
        self._step += 1
        return chosen

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns scores that leave one choice, for a loop that picks the best of all rows."""
        chosen = self.draw(input_ids, scores, torch.arange(len(input_ids), device=input_ids.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class EndRecorder(StoppingCriteriaList):
    """The criteria of `generate`, which also note where each row ended, and whether by its own end or by the limit.

    Args:
        criteria: Those that `generate` built.
        limits: Most tokens of each row, shape (rows,), int64.
        prompt_width: Columns before the first token that is generated.
    """

    def __init__(self, criteria: StoppingCriteriaList, limits: torch.Tensor, prompt_width: int) -> None:
        super().__init__(criteria)
        self.limits, self.prompt_width = limits, prompt_width
        self.lengths = torch.zeros_like(limits)  # 0 while a row goes on
        self.is_stopped = torch.zeros_like(limits, dtype=torch.bool)

    def ended(self, input_ids: torch.Tensor, rows: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        """Returns which of these rows have ended, now or before, shape (len(rows),), bool."""
        going_on = self.lengths[rows] == 0
        is_done, is_stopped = torch.zeros_like(going_on), torch.zeros_like(going_on)
        for criterion in self:
            is_met = criterion(input_ids, scores, **kwargs)
            is_done |= is_met
            if not isinstance(criterion, (MaxLengthCriteria, MaxTimeCriteria)):
                is_stopped |= is_met
        is_done |= input_ids.shape[1] - self.prompt_width >= self.limits[rows]
        newly = going_on & is_done
        self.is_stopped[rows] |= is_stopped & newly
        self.lengths[rows[newly]] = input_ids.shape[1] - self.prompt_width
        return ~going_on | is_done

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Returns which rows of the whole batch have ended."""
        return self.ended(input_ids, torch.arange(len(input_ids), device=input_ids.device), scores, **kwargs)


def inverse_cdf(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Returns the token of each row at which the cumulative distribution passes the row's uniform, shape (rows,).

    Args:
        probabilities: Shape (rows, vocabulary), >= 0; 0 for tokens that cannot be drawn.
        uniforms: Shape (rows,), float64, in [0, 1).

    Example:
        >>> probabilities = torch.tensor([[0.2, 0.0, 0.8]])
        >>> [int(inverse_cdf(probabilities, torch.tensor([u], dtype=torch.float64))) for u in (0.1, 0.2, 0.9)]
        [0, 2, 2]
    """
    num_blocks = -(-probabilities.shape[1] // _BLOCK)
    padded = torch.nn.functional.pad(probabilities, (0, num_blocks * _BLOCK - probabilities.shape[1]))
    blocks = padded.view(len(probabilities), num_blocks, _BLOCK)
    # In float64: a float32 sum over a vocabulary of 150,000 is off by more than a rare token's probability. First the
    # block, then the token in it, which costs a pass over the probabilities and no sums of the same size.
    sums = blocks.sum(-1, dtype=torch.float64)
    block, rest = _passed(sums, uniforms * sums.sum(-1))
    chosen_blocks = blocks[torch.arange(len(blocks), device=blocks.device), block].double()
    token, _ = _passed(chosen_blocks, rest)
    return (block * _BLOCK + token).clamp(max=probabilities.shape[1] - 1)  # past the end where they are NaN


def _passed(parts: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part in which the sum over the parts of each row passes its target, and how far into it, shapes (rows,)."""
    cumulative = parts.cumsum(-1)
    totals = cumulative[:, -1]
    targets = torch.minimum(targets, torch.nextafter(totals, torch.zeros_like(totals)))
    part = torch.searchsorted(cumulative, targets[:, None], right=True).clamp(max=parts.shape[1] - 1)
    before = torch.where(part > 0, cumulative.gather(1, (part - 1).clamp(min=0)), 0.0)
    return part.squeeze(1), (targets[:, None] - before).squeeze(1)


def choose(processed: torch.Tensor, uniforms: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the token of each row, shape (rows,), int64, and the probabilities it was drawn from, if it was drawn.

    Args:
        processed: Scores, shape (rows, vocabulary), float32.
        uniforms: Shape (rows,), float64; None picks the most probable token.

    Raises:
        ValueError: If the scores of a row are NaN, or leave no token to choose.
    """
    if uniforms is None:
        chosen, probabilities = processed.argmax(-1), None
    else:
        probabilities = processed.softmax(-1)
        chosen = inverse_cdf(probabilities, uniforms)
    _refuse_broken(processed if probabilities is None else probabilities, chosen)
    return chosen, probabilities


def _refuse_broken(values: torch.Tensor, chosen: torch.Tensor) -> None:
    """Raises ValueError if a token was chosen that has no probability: its row is NaN, or leaves nothing to choose.

    Args:
        values: Probabilities, or the scores that the greatest was taken of, shape (rows, vocabulary).
        chosen: Token of each row, shape (rows,), int64.
    """
    is_broken = ~torch.isfinite(values.gather(1, chosen[:, None]))
    if bool(is_broken.any()):
        raise ValueError(
            f"The scores of {int(is_broken.sum())} of {len(chosen)} candidates are NaN, or leave no token to choose. "
            "Training may have diverged, a number may have overflowed in half precision, or `generation_config` may "
            "forbid every token."
        )


def log_probability(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Returns the log probability of each row's token, shape (rows,), nats."""
    return logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(-1)
