"""Rejection sampling: propose from q, accept with probability p / (M q), so that what is accepted follows p.

Functions of weights and a random generator to indices, masks and probabilities; they know no loss, reward or model.
"""

import math
from collections.abc import Sequence

import torch

from rsft_hf.checks import check_integer

MAX_DRAWS = 2**31
MANY_REPEATS = 10  # reads of a row in one epoch that are warned of, where few rows fill it

# Above this envelope M, permuting the data set pass after pass costs more than sampling the same law from its counts.
_MAX_PERMUTED_ENVELOPE = 4.0


def envelope_constant(weights: torch.Tensor, proposal: torch.Tensor | None = None) -> float:
    """Returns M = max p_i / q_i, the factor by which the proposal must be scaled to cover the target.

    Both distributions are normalised first, so M >= 1 and 1/M is the acceptance rate.

    Args:
        weights: Target p up to a factor, shape (N,), >= 0, finite, not all zero.
        proposal: Proposal q up to a factor, shape (N,), > 0. None is the uniform q = 1/N, for which M = N max p.

    Returns:
        M, dimensionless, in [1, inf).

    Raises:
        ValueError: If `weights` or `proposal` is empty, not one-dimensional, negative, NaN, infinite or all zero, or
            if `proposal` has another shape or a zero.

    Example:
        >>> envelope_constant(torch.tensor([1.0, 1.0, 2.0]))  # p = (1/4, 1/4, 1/2), q = 1/3
        1.5
    """
    weights, proposal = _validated(weights, proposal)
    target = weights / weights.sum()
    if proposal is None:
        return float(len(target) * target.max())  # M = N max p
    return float((target / (proposal / proposal.sum())).max())  # M = max p/q


def acceptance_probabilities(weights: torch.Tensor, proposal: torch.Tensor | None = None) -> torch.Tensor:
    """Returns p_i / (M q_i), the probability of accepting each proposed index.

    Args:
        weights: As in `envelope_constant`.
        proposal: As in `envelope_constant`.

    Returns:
        Probabilities, shape (N,), float64, in [0, 1]; the largest is exactly 1.

    Raises:
        ValueError: As in `envelope_constant`.

    Example:
        >>> acceptance_probabilities(torch.tensor([1.0, 1.0, 2.0])).tolist()
        [0.5, 0.5, 1.0]
    """
    weights, proposal = _validated(weights, proposal)
    ratios = weights if proposal is None else weights / proposal
    return ratios / ratios.max()  # the sums and M cancel: p/(M q) = (w/q) / max (w/q)


def accept_once(
    weights: torch.Tensor, generator: torch.Generator, proposal: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the mask of the rows accepted in a single pass over N proposed rows, for `dataset.select`.

    The number of accepted rows is random, N mean(w) / max(w) on average. With `proposal`, the rows are taken as drawn
    from q already (an over-sampled data set, say), and the pass corrects for it.

    Args:
        weights: As in `envelope_constant`.
        generator: CPU generator, the only one that is advanced.
        proposal: As in `envelope_constant`.

    Returns:
        Mask, shape (N,), bool.

    Raises:
        ValueError: As in `envelope_constant`.

    Example:
        >>> accept_once(torch.ones(3), torch.Generator().manual_seed(0)).tolist()
        [True, True, True]
    """
    probabilities = acceptance_probabilities(weights, proposal)
    return torch.rand(len(probabilities), dtype=torch.float64, generator=generator) < probabilities


def rejection_sample(weights: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """Returns `num_draws` accepted indices, in the order of acceptance.

    The proposal is uniform and visits the rows in random permutations, pass after pass: T passes accept row i
    Binomial(T, w_i / max w) times. Equal weights therefore give one permutation, which is an ordinary epoch, and an
    expected count is proportional to the weight (exactly over whole passes, to O(1/N) over the last, partial one).
    Weights with a heavy tail (large M) are sampled from the counts of the same law instead of by passes. Another
    proposal would change the cost of a draw and not the law of the draws.

    Args:
        weights: As in `envelope_constant`.
        num_draws: Number of indices to return, in [1, 2**31].
        generator: CPU generator, the only one that is advanced.

    Returns:
        Indices, shape (num_draws,), int64, in [0, N).

    Raises:
        TypeError: If `num_draws` is not an integer.
        ValueError: If `num_draws` is out of range, or as in `envelope_constant`.

    Example:
        >>> rejection_sample(torch.tensor([0.0, 3.0]), 4, torch.Generator().manual_seed(0)).tolist()
        [1, 1, 1, 1]
    """
    check_integer("num_draws", num_draws, minimum=1, maximum=MAX_DRAWS)
    probabilities, _ = _validated(weights, None)  # w / max w
    if len(probabilities) <= _MAX_PERMUTED_ENVELOPE * probabilities.sum():  # M = N max p = N / sum of probabilities
        return _sample_by_permutations(probabilities, num_draws, generator)
    return _sample_from_counts(probabilities, num_draws, generator)


def sample_parts(parts: Sequence[tuple[torch.Tensor, torch.Tensor, int]], generator: torch.Generator) -> torch.Tensor:
    """Returns rows drawn from several parts in fixed numbers, shuffled.

    Args:
        parts: Rows of a part, shape (n,), int64; their weights, as in `envelope_constant`, with an envelope of their
            own; and how many draws are theirs, at least 0.
        generator: CPU generator, the only one that is advanced.

    Returns:
        Rows, shape (sum of the draws,), int64.

    Example:
        >>> parts = [(torch.tensor([7]), torch.ones(1), 2), (torch.tensor([8, 9]), torch.tensor([0.0, 3.0]), 1)]
        >>> sorted(sample_parts(parts, torch.Generator().manual_seed(0)).tolist())
        [7, 7, 9]
    """
    drawn = torch.cat([rows[rejection_sample(weights, count, generator)] for rows, weights, count in parts if count])
    return drawn[torch.randperm(len(drawn), generator=generator)]


def effective_sample_size(weights: torch.Tensor) -> float:
    """Returns (sum w)^2 / sum w^2, the number of equally weighted rows that carry the same information.

    Args:
        weights: As in `envelope_constant`.

    Returns:
        ESS in rows, in [1, N].

    Raises:
        ValueError: As in `envelope_constant`.

    Example:
        >>> round(effective_sample_size(torch.tensor([1.0, 1.0, 2.0])), 4)  # 4^2 / 6
        2.6667
    """
    weights, _ = _validated(weights, None)
    return float(weights.sum() ** 2 / (weights**2).sum())


def effective_sample_size_from_logs(log_weights: torch.Tensor) -> float:
    """Returns (sum w)^2 / sum w^2 of weights given by their logarithms, in rows, without overflow.

    Args:
        log_weights: Any shape, nats; -inf is a weight of zero.

    Returns:
        Number of equally weighted rows that carry the same information; 0 if no weight is above zero.

    Raises:
        ValueError: If one is NaN or +inf.

    Example:
        >>> log_weights = 1000 + torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64).log()
        >>> round(effective_sample_size_from_logs(log_weights), 4)  # (1 + 1 + 2)^2 / (1 + 1 + 4)
        2.6667
    """
    log_weights = log_weights.detach().to("cpu", torch.float64).reshape(-1)
    if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
        raise ValueError("`log_weights` holds NaN or +inf. Leave out the entries without a finite log-weight.")
    log_weights = log_weights[log_weights > -math.inf]
    if len(log_weights) == 0:
        return 0.0
    return float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp())


def _validated(weights: torch.Tensor, proposal: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and proposal, each relative to its largest entry, float64 on the CPU."""
    weights = _relative_to_largest("weights", weights)
    if not weights.any():
        raise ValueError("`weights` are all zero, so nothing could be accepted. Give at least one positive weight.")
    if proposal is None:
        return weights, None
    proposal = _relative_to_largest("proposal", proposal)
    if not bool((proposal > 0).all()):
        row = int((proposal <= 0).nonzero()[0])
        raise ValueError(
            f"`proposal` is 0 at index {row}, a row that could never be proposed (or its entry is too small compared "
            "with the largest). Every entry must be > 0; to leave a row out, give it weight 0."
        )
    if proposal.shape != weights.shape:
        raise ValueError(
            f"`proposal` has {len(proposal)} entries for {len(weights)} weights. Give one probability per row."
        )
    if not bool((weights / proposal).isfinite().all()):
        raise ValueError("`weights` / `proposal` overflows: a row is proposed far too rarely for its weight.")
    return weights, proposal


def _relative_to_largest(name: str, values: torch.Tensor) -> torch.Tensor:
    """Validated values over their largest, so that no sum or square of them overflows."""
    values = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"`{name}` must have shape (N,) with N >= 1, got {tuple(values.shape)}.")
    is_invalid = ~(torch.isfinite(values) & (values >= 0))
    if bool(is_invalid.any()):
        row = int(is_invalid.nonzero()[0])
        raise ValueError(
            f"`{name}` is {float(values[row])} at index {row} ({int(is_invalid.sum())} such entries); every entry must "
            "be finite and >= 0. Map the scores to weights first (Softmax takes any finite score)."
        )
    largest = values.max()
    return values / largest if largest > 0 else values


def _sample_by_permutations(probabilities: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """First `num_draws` acceptances of random permutations; arguments as in `_sample_from_counts`."""
    accepted, num_accepted = [], 0
    while num_accepted < num_draws:
        # The permutation is drawn first: with equal weights the epoch is then that of a plain random sampler.
        proposed = torch.randperm(len(probabilities), generator=generator)
        uniforms = torch.rand(len(probabilities), dtype=torch.float64, generator=generator)
        accepted.append(proposed[uniforms < probabilities[proposed]])
        num_accepted += len(accepted[-1])
    return torch.cat(accepted)[:num_draws]


def _sample_from_counts(probabilities: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """First `num_draws` acceptances of random permutations, from binomial counts instead of the permutations.

    Args:
        probabilities: Acceptance probability of each row, shape (N,), float64, in [0, 1], the largest 1.
        num_draws: Number of indices.
        generator: CPU generator.
    """
    blocks, num_missing = [], num_draws
    while num_missing > 0:
        target = num_missing + 4 * math.sqrt(num_missing) + 8  # four standard deviations: nearly always one block
        num_passes = math.ceil(target / float(probabilities.sum()))
        blocks.append(_accept_whole_passes(probabilities, num_passes, generator))
        num_missing -= len(blocks[-1])
    return torch.cat(blocks)[:num_draws]


def _accept_whole_passes(probabilities: torch.Tensor, num_passes: int, generator: torch.Generator) -> torch.Tensor:
    """All acceptances of `num_passes` whole passes, in the order of the passes and random within each."""
    num_rows = len(probabilities)
    # Frequent rows (probability above 1/2) take one Bernoulli trial per pass: at least half of the trials succeed.
    frequent = (probabilities > 0.5).nonzero().squeeze(1)
    trials = torch.rand(num_passes, len(frequent), dtype=torch.float64, generator=generator) < probabilities[frequent]
    frequent_pass, frequent_position = trials.nonzero(as_tuple=True)
    # The others: Bernoulli(a) is "a Poisson process of rate -log(1-a) has a point in this pass", so the points of all
    # passes are one Poisson number of independent (row, pass) pairs, and a repeated pair is one acceptance.
    rates = torch.where(probabilities > 0.5, 0.0, -torch.log1p(-probabilities.clamp(max=0.5)))
    mean_points = rates.sum() * num_passes
    num_points = int(torch.poisson(mean_points.reshape(1), generator=generator).item())
    rare_row = _sample_inverse_cdf(rates, num_points, generator)
    rare_pass = torch.randint(num_passes, (num_points,), generator=generator)
    frequent_pairs = frequent_pass * num_rows + frequent[frequent_position]
    pairs = torch.cat([frequent_pairs, (rare_pass * num_rows + rare_row).unique()])
    shuffle = torch.randint(2**31, (len(pairs),), generator=generator)
    order = (torch.div(pairs, num_rows, rounding_mode="floor") * 2**31 + shuffle).argsort()
    return pairs[order] % num_rows


def _sample_inverse_cdf(weights: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """Independent indices in proportion to `weights`, sorted; searching sorted values stays in the CPU cache."""
    if num_draws == 0:
        return torch.empty(0, dtype=torch.int64)  # all weights may be 0
    cumulative = weights.cumsum(0)
    # Sums of n + 1 exponential spacings over their total are n sorted uniforms, without the sort.
    points = torch.empty(num_draws + 1, dtype=torch.float64).exponential_(generator=generator).cumsum_(0)
    points.mul_(cumulative[-1] / points[-1].item())
    indices = torch.searchsorted(cumulative, points[:-1], right=True)
    # A product rounded up to the total would fall behind the last row.
    return indices.clamp_(max=int(weights.nonzero()[-1]))
