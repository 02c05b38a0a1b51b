"""The law: propose from q, accept with probability p/(M q), and what is accepted follows p.

Weights and generators enter, indices and probabilities leave. This file knows nothing of losses, rewards, models or
processes: it is arithmetic that can be checked by hand.

Draws the law of `rejection.py` from its counts, where looping over passes would take long.

Checked weights and generators enter, indices leave.
"""

import math

import torch

from rsft_hf.checks import check_integer

# Above this expected number of passes per epoch's worth of draws, permuting the data set pass after pass costs more
# than drawing the same law from its counts.
_MAX_LOOPED_ENVELOPE = 4.0

MAX_DRAWS = 2**31


def envelope_constant(weights: torch.Tensor, proposal: torch.Tensor | None = None) -> float:
    """Returns M = max p_i / q_i, the factor by which the proposal must be raised to cover the target.

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
    weights, proposal = _check(weights, proposal)
    target = weights / weights.sum()
    if proposal is None:
        return float(len(target) * target.max())  # M = N max p
    return float((target / (proposal / proposal.sum())).max())  # M = max p/q


def acceptance_probabilities(weights: torch.Tensor, proposal: torch.Tensor | None = None) -> torch.Tensor:
    """Returns p_i / (M q_i), the probability with which each proposed index is accepted.

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
    weights, proposal = _check(weights, proposal)
    ratios = weights if proposal is None else weights / proposal
    return ratios / ratios.max()  # the sums and M cancel: p/(M q) = (w/q) / max (w/q)


def accept_once(
    weights: torch.Tensor, generator: torch.Generator, proposal: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns which of N proposed rows are accepted in a single pass, for `dataset.select`.

    The number accepted is random, mean / max of the weights on average. With `proposal`, the rows are taken to have
    been drawn from q already (an over-sampled data set, say), and the pass corrects for it.

    Args:
        weights: As in `envelope_constant`.
        generator: CPU generator; it alone is moved.
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
    expected count is proportional to the weight (exactly over whole passes, to O(1/N) over the cut last one). For a
    heavy tail the same law is drawn from its counts instead of by looping over the passes. Another proposal would
    change the cost of a draw and not the law of the draws.

    Args:
        weights: As in `envelope_constant`.
        num_draws: Number of indices to return, in [1, 2**31].
        generator: CPU generator; it alone is moved.

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
    probabilities, _ = _check(weights, None)  # relative to the largest: w / max w
    if len(probabilities) <= _MAX_LOOPED_ENVELOPE * probabilities.sum():  # M = N max p = N / sum of probabilities
        return _loop_over_passes(probabilities, num_draws, generator)
    return draw_passes_at_once(probabilities, num_draws, generator)


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
    weights, _ = _check(weights, None)
    return float(weights.sum() ** 2 / (weights**2).sum())


def _loop_over_passes(probabilities: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    accepted, num_accepted = [], 0
    while num_accepted < num_draws:
        # The permutation comes first: with equal weights the epoch is then that of a plain random sampler.
        proposed = torch.randperm(len(probabilities), generator=generator)
        uniforms = torch.rand(len(probabilities), dtype=torch.float64, generator=generator)
        accepted.append(proposed[uniforms < probabilities[proposed]])
        num_accepted += len(accepted[-1])
    return torch.cat(accepted)[:num_draws]


def _check(weights: torch.Tensor, proposal: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    weights = _relative("weights", weights)
    if not weights.any():
        raise ValueError("`weights` are all zero, so nothing could be accepted. Give at least one positive weight.")
    if proposal is None:
        return weights, None
    proposal = _relative("proposal", proposal)
    if not bool((proposal > 0).all()):
        row = int((proposal <= 0).nonzero()[0])
        raise ValueError(
            f"`proposal` is 0 at index {row}, a row that could never be proposed (or its entry is too small beside the "
            "largest). Every entry must be > 0; to leave a row out, give it weight 0."
        )
    if proposal.shape != weights.shape:
        raise ValueError(
            f"`proposal` has {len(proposal)} entries for {len(weights)} weights. Give one probability per row."
        )
    if not bool((weights / proposal).isfinite().all()):
        raise ValueError("`weights` / `proposal` overflows: a row is proposed far too rarely for its weight.")
    return weights, proposal


def _relative(name: str, values: torch.Tensor) -> torch.Tensor:
    """The checked values over their largest, so that no sum or square of them overflows."""
    values = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"`{name}` must have shape (N,) with N >= 1, got {tuple(values.shape)}.")
    wrong = ~(torch.isfinite(values) & (values >= 0))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"`{name}` is {float(values[row])} at index {row} ({int(wrong.sum())} such entries); every entry must be "
            "finite and >= 0. Map the scores to weights first (Softmax takes any finite score)."
        )
    largest = values.max()
    return values / largest if largest > 0 else values


def draw_passes_at_once(probabilities: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """Returns the first `num_draws` acceptances of random permutations, pass after pass, without making them.

    Args:
        probabilities: Acceptance probability of each row, shape (N,), float64, in [0, 1], the largest 1.
        num_draws: Number of indices.
        generator: CPU generator.
    """
    blocks, num_missing = [], num_draws
    while num_missing > 0:
        wanted = num_missing + 4 * math.sqrt(num_missing) + 8  # four standard deviations: one block nearly always
        num_passes = math.ceil(wanted / float(probabilities.sum()))
        blocks.append(_accept_in_block(probabilities, num_passes, generator))
        num_missing -= len(blocks[-1])
    return torch.cat(blocks)[:num_draws]


def _accept_in_block(probabilities: torch.Tensor, num_passes: int, generator: torch.Generator) -> torch.Tensor:
    """Every acceptance of `num_passes` whole passes, in the order of the passes and random within each."""
    num_rows = len(probabilities)
    # Rows accepted more often than not are tossed pass by pass: at least half of the tosses are kept.
    often = (probabilities > 0.5).nonzero().squeeze(1)
    tosses = torch.rand(num_passes, len(often), dtype=torch.float64, generator=generator) < probabilities[often]
    often_pass, often_position = tosses.nonzero(as_tuple=True)
    # The others: Bernoulli(a) is "a Poisson process of rate -log(1-a) has a point in this pass", so the points of all
    # passes are one Poisson number of independent (row, pass) pairs, and a pair met twice is one acceptance.
    rates = torch.where(probabilities > 0.5, 0.0, -torch.log1p(-probabilities.clamp(max=0.5)))
    mean_points = rates.sum() * num_passes
    num_points = int(torch.poisson(mean_points.reshape(1), generator=generator).item())
    rare_row = _inverse_cdf(rates, num_points, generator) if num_points else torch.empty(0, dtype=torch.int64)
    rare_pass = torch.randint(num_passes, (num_points,), generator=generator)
    pairs = torch.cat([often_pass * num_rows + often[often_position], (rare_pass * num_rows + rare_row).unique()])
    shuffle = torch.randint(2**31, (len(pairs),), generator=generator)
    order = (torch.div(pairs, num_rows, rounding_mode="floor") * 2**31 + shuffle).argsort()
    return pairs[order] % num_rows


def _inverse_cdf(weights: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """Independent indices in proportion to `weights`, sorted; searching sorted values stays in the cache."""
    cumulative = weights.cumsum(0)
    # Sums of n + 1 exponential spacings over their total are n sorted uniforms, without the sort.
    points = torch.empty(num_draws + 1, dtype=torch.float64).exponential_(generator=generator).cumsum_(0)
    points.mul_(cumulative[-1] / points[-1].item())
    indices = torch.searchsorted(cumulative, points[:-1], right=True)
    # A product rounded up to the total would fall behind the last row.
    return indices.clamp_(max=int(weights.nonzero()[-1]))


def effective_sample_size_from_logs(log_weights: torch.Tensor) -> float:
    """Returns (sum w)^2 / sum w^2 of weights given by their logarithms, in rows, without overflow.

    Args:
        log_weights: Any shape, nats; -inf is a weight of zero.

    Returns:
        Number of equally weighted rows that carry the same information; 0 where no weight is above zero.

    Raises:
        ValueError: If one is NaN or +inf.

    Example:
        >>> log_weights = 1000 + torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64).log()
        >>> round(effective_sample_size_from_logs(log_weights), 4)  # (1 + 1 + 2)^2 / (1 + 1 + 4)
        2.6667
    """
    log_weights = log_weights.detach().to("cpu", torch.float64).reshape(-1)
    if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
        raise ValueError("`log_weights` holds NaN or +inf, which has no sample size. Leave out what cannot be weighed.")
    log_weights = log_weights[log_weights > -math.inf]
    if len(log_weights) == 0:
        return 0.0
    return float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp())
