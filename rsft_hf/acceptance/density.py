"""Acceptance rules that sample a target density: RSO for q exp(r / beta), DensityRatio for p or p exp(r / beta).

Candidates are drawn from q. What is accepted follows the target, up to the estimate of the envelope M.
"""

import logging
import math
from dataclasses import dataclass

import torch

from rsft_hf.acceptance.batch import Acceptance, CandidateBatch, read_column, row_quantiles
from rsft_hf.checks import check_integer, check_interval
from rsft_hf.rejection import effective_sample_size_from_logs

logger = logging.getLogger(__name__)

_LOG_TOLERANCE = 1e-6  # by which a ratio may exceed a known envelope if the lengths are unknown

_LOG_TOLERANCE_PER_TOKEN = 1e-5  # each token's log-probabilities are rounded to single precision

_MIN_EFFECTIVE_FRACTION, _MIN_CANDIDATES = 0.05, 20  # thresholds of the warning about the effective sample size

_BETA_UNIT = "It is a temperature in units of reward."


@dataclass(frozen=True, repr=False)
class RSO(Acceptance):
    """Accepts k candidates of each prompt, distributed as q(y|x) exp(r / beta), by passes of rejection sampling.

    In each pass a remaining candidate is accepted with probability exp((r - r_max) / beta), where r_max is the largest
    remaining reward; passes continue until k are accepted or no candidate remains. A small beta is top-k, a large one a
    uniform choice. Few candidates bias the result towards q, since r_max is the maximum of a sample, and so does a k
    near n. Identical candidates count as often as they were drawn: removing duplicates first changes the law.
    Liu et al. 2023, arXiv:2309.06657, algorithm 1, with candidates shuffled and identified by index: in the original,
    the stop at k favours the first ones, and equal texts count once.

    Attributes:
        beta: Temperature in units of reward, > 0; infinity is a uniform choice.
        k: Maximum number of accepted candidates per prompt.

    Raises:
        TypeError: If `k` is not an integer.
        ValueError: If `beta` is not positive or `k` is below 1.
    """

    beta: float
    k: int = 1

    def __post_init__(self) -> None:
        check_interval("beta", self.beta, "(0, inf]", _BETA_UNIT)
        check_integer("k", self.k, minimum=1)

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool: min(k, candidates) in each row.

        Example:
            >>> batch = CandidateBatch(torch.tensor([[0.0, 5.0, 1.0]]))
            >>> RSO(beta=1e-3, k=2)(batch, torch.Generator().manual_seed(0)).tolist()  # almost top-2
            [[False, True, True]]
        """
        shape = batch.rewards.shape
        # Shuffled: the last pass stops at the k-th acceptance, and must not prefer the first columns.
        order = torch.rand(shape, dtype=torch.float64, generator=generator).argsort(dim=1)
        rewards, is_remaining = batch.rewards.gather(1, order), batch.is_candidate.gather(1, order)
        accepted = torch.zeros_like(is_remaining)
        while True:
            num_missing = self.k - accepted.sum(dim=1, keepdim=True)
            is_open = is_remaining & (num_missing > 0)
            if not bool(is_open.any()):
                return torch.zeros_like(accepted).scatter(1, order, accepted)
            largest = rewards.masked_fill(~is_remaining, -math.inf).amax(
                dim=1, keepdim=True
            )  # r_max of the remaining candidates
            uniforms = torch.rand(shape, dtype=torch.float64, generator=generator)
            passed = is_open & (uniforms.log() < (rewards - largest) / self.beta)
            passed &= passed.cumsum(dim=1) <= num_missing
            accepted |= passed
            is_remaining &= ~passed


@dataclass(frozen=True, repr=False)
class DensityRatio(Acceptance):
    """Accepts with probability w / M, w = p / q, so that accepted candidates follow p on the support of q.

    p is exp(`log_p`), times exp(r / beta) if `beta` is given, and need not be normalised. Every candidate keeps its u
    (`CandidateBatch.uniforms`), so that after a later candidate has raised M, a second decision equals that of the
    final M, in any order of candidates. Ratios of sequences grow exponentially with their length: check the effective
    sample size; a warning is logged if it is small.

    Attributes:
        beta: Temperature in units of reward, > 0, or None for a target without rewards.
        log_envelope: log M if it is known, nats. With pure top-p or top-k at temperature 1, p / q <= 1 for the raw
            model, so 0.0 is exact. None estimates it from the candidates.
        quantile: Quantile of log w used as log M, in (0, 1]; 1, or None without `log_envelope`, is the maximum. Below
            1, the acceptance probability is min(1, w / M): more candidates are accepted, and ratios above M are
            truncated (quasi-rejection sampling, Eikema et al. 2022).
        per_prompt: Whether each prompt has its own M. Both follow p within a prompt; with one M for all, prompts with
            larger ratios get more accepted candidates.

    Raises:
        ValueError: If `beta` is not positive, `log_envelope` not finite, `quantile` outside (0, 1], or if
            `log_envelope` is given together with `quantile` or `per_prompt`.
    """

    beta: float | None = None
    log_envelope: float | None = None
    quantile: float | None = None
    per_prompt: bool = False

    def __post_init__(self) -> None:
        if self.beta is not None:
            check_interval("beta", self.beta, "(0, inf]", _BETA_UNIT)
        if self.quantile is not None:
            check_interval("quantile", self.quantile, "(0, 1]", "1 is the maximum of the ratios.")
        if self.log_envelope is None:
            return
        if not math.isfinite(self.log_envelope):
            raise ValueError(f"`log_envelope`={self.log_envelope} must be finite: log M in nats, 0.0 for M = 1.")
        if self.quantile is not None or self.per_prompt:
            raise ValueError(
                f"`log_envelope`={self.log_envelope} is M for every prompt, so `quantile` and `per_prompt` have no "
                "effect with it. Give one or the other."
            )

    @property
    def requires(self) -> frozenset[str]:
        """Both log-probabilities."""
        return frozenset({"log_q", "log_p"})

    def __call__(self, batch: CandidateBatch, generator: torch.Generator) -> torch.Tensor:
        """Returns the accepted candidates, shape (P, n), bool.

        Raises:
            ValueError: If `log_q` or `log_p` is absent, or if a ratio exceeds the known `log_envelope`.

        Example:
            >>> log_p = torch.tensor([[0.5, 0.5]]).log()
            >>> batch = CandidateBatch(
            ...     torch.zeros(1, 2), log_q=torch.tensor([[0.8, 0.2]]).log(), log_p=log_p,
            ...     uniforms=torch.tensor([[0.3, 0.3]]),
            ... )
            >>> DensityRatio()(batch, torch.Generator()).tolist()  # w = .625, 2.5: accepted with .25 and 1
            [[False, True]]
        """
        log_weights = self.log_weights(batch)
        log_envelopes = self._log_envelopes(batch, log_weights)
        self._warn_if_inefficient(batch)
        uniforms = batch.uniforms
        if uniforms is None:
            uniforms = torch.rand(batch.rewards.shape, dtype=torch.float64, generator=generator)
        # accept iff log u < log p - log q - log M
        return batch.is_candidate & (uniforms.log() < log_weights - log_envelopes)

    def log_weights(self, batch: CandidateBatch) -> torch.Tensor:
        """Returns log w = log p - log q (+ r / beta), shape (P, n), nats; -inf for cells that are no candidates."""
        log_weights = read_column(batch, "log_p", repr(self)) - read_column(batch, "log_q", repr(self))
        if self.beta is not None:
            log_weights = log_weights + batch.rewards / self.beta
        return log_weights.masked_fill(~batch.is_candidate, -math.inf)

    def effective_sample_size(self, batch: CandidateBatch) -> float:
        """Returns (sum w)^2 / sum w^2 of the round, in candidates; with `per_prompt`, the sum of each prompt's own."""
        log_weights = self.log_weights(batch)
        rows = log_weights if self.per_prompt else log_weights.reshape(1, -1)
        return sum(effective_sample_size_from_logs(row) for row in rows)

    def _log_envelopes(self, batch: CandidateBatch, log_weights: torch.Tensor) -> torch.Tensor:
        if self.log_envelope is not None:
            _check_envelope(self.log_envelope, batch, log_weights)
            return torch.tensor(self.log_envelope, dtype=torch.float64)
        quantile = 1.0 if self.quantile is None else self.quantile
        if self.per_prompt:
            return row_quantiles(log_weights, batch.is_candidate, quantile)
        return row_quantiles(log_weights.reshape(1, -1), batch.is_candidate.reshape(1, -1), quantile)

    def _warn_if_inefficient(self, batch: CandidateBatch) -> None:
        num_candidates = int(batch.is_candidate.sum())
        effective = self.effective_sample_size(batch)
        if num_candidates >= _MIN_CANDIDATES and effective < _MIN_EFFECTIVE_FRACTION * num_candidates:
            logger.warning(
                "The density ratios of %d candidates are worth %.1f equally weighted ones: few will be accepted, and M "
                "is uncertain. Sample closer to the target (temperature 1, no top-k), shorten the completions, raise "
                "`beta`, or give a `quantile`.",
                num_candidates,
                effective,
            )


def _check_envelope(log_envelope: float, batch: CandidateBatch, log_weights: torch.Tensor) -> None:
    excess = log_weights - log_envelope
    tolerance = torch.full_like(excess, _LOG_TOLERANCE)
    if batch.lengths is not None:
        tolerance = torch.maximum(tolerance, _LOG_TOLERANCE_PER_TOKEN * batch.lengths)
    is_above = excess > tolerance
    if bool(is_above.any()):
        prompt, candidate = is_above.nonzero()[0].tolist()
        raise ValueError(
            f"`log_envelope`={log_envelope} is no envelope: the log ratio p / q reaches {float(log_weights.max()):.6g} "
            f"({int(is_above.sum())} of {int(batch.is_candidate.sum())} candidates lie above, the first at prompt "
            f"{prompt}, candidate {candidate}), so the accepted candidates would not follow p. Raise it, or leave it "
            "None to estimate M from the candidates; 0.0 holds only for top-p or top-k at temperature 1 and the raw "
            "model."
        )
