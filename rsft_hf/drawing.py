"""Draws the law of `rejection.py` from its counts, where looping over passes would take long.

Checked weights and generators enter, indices leave.
"""

import math

import torch


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


def draw_independently(weights: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """Returns independent indices in proportion to `weights`, shape (N,), in random order."""
    indices = _inverse_cdf(weights, num_draws, generator)
    return indices[torch.randperm(num_draws, generator=generator)]


def _inverse_cdf(weights: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """Independent indices in proportion to `weights`, sorted; searching sorted values stays in the cache."""
    cumulative = weights.cumsum(0)
    # Sums of n + 1 exponential spacings over their total are n sorted uniforms, without the sort.
    points = torch.empty(num_draws + 1, dtype=torch.float64).exponential_(generator=generator).cumsum_(0)
    points.mul_(cumulative[-1] / points[-1].item())
    indices = torch.searchsorted(cumulative, points[:-1], right=True)
    # A product rounded up to the total would fall behind the last row.
    return indices.clamp_(max=int(weights.nonzero()[-1]))
