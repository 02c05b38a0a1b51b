"""Toy sequence model with known probabilities, for the tests of acceptance rules.

Strings over {a, b} end by a token E, after three letters at the latest. q is the model at temperature 0.7 with top-p
0.9, which cannot make every string; p is the model itself.
"""

import itertools
import math

import numpy as np
import torch
from scipy import stats

from rsft_hf.acceptance import CandidateBatch

# Probabilities of (a, b, E) after the start, after a and after b.
RAW = {"": (0.55, 0.40, 0.05), "a": (0.15, 0.60, 0.25), "b": (0.50, 0.08, 0.42)}
BETA = 0.5  # temperature of the rewards


def processed(probabilities: tuple[float, ...], temperature: float, top_p: float) -> tuple[float, ...]:
    """Distribution of one step after temperature and top-p."""
    tempered = np.array(probabilities) ** (1 / temperature)
    tempered /= tempered.sum()
    order = np.argsort(-tempered)
    is_kept = np.cumsum(tempered[order]) - tempered[order] < top_p
    kept = np.zeros(3)
    kept[order[is_kept]] = tempered[order[is_kept]]
    return tuple(kept / kept.sum())


def log_probabilities(temperature: float = 1.0, top_p: float = 1.0) -> torch.Tensor:
    """Log-probability of each of STRINGS, nats, -inf if it cannot be sampled."""
    steps = {state: processed(row, temperature, top_p) for state, row in RAW.items()}
    found = []
    for string in STRINGS:
        states = ["", *string]
        probability = math.prod(steps[state]["ab".index(letter)] for state, letter in zip(states, string))
        found.append(
            probability * (steps[states[-1]][2] if len(string) < 3 else 1.0)
        )  # after three letters E has probability 1
    return torch.tensor(found, dtype=torch.float64).log()


STRINGS = ["".join(letters) for length in range(4) for letters in itertools.product("ab", repeat=length)]
LOG_P = log_probabilities()
LOG_Q = log_probabilities(temperature=0.7, top_p=0.9)
REWARDS = torch.tensor([string.count("b") - 0.3 * len(string) for string in STRINGS], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normalised(log_weights: torch.Tensor) -> torch.Tensor:
    return torch.softmax(log_weights, dim=0)


def on_support(log_target: torch.Tensor, log_q: torch.Tensor = LOG_Q) -> torch.Tensor:
    """The target restricted to the support of q, normalised."""
    return normalised(log_target.masked_fill(log_q == -math.inf, -math.inf))


def sample(num_prompts: int, num_candidates: int, log_q: torch.Tensor = LOG_Q, seed: int = 1) -> torch.Tensor:
    """Strings drawn from q, as indices into STRINGS, shape (P, n)."""
    drawn = torch.multinomial(log_q.exp(), num_prompts * num_candidates, replacement=True, generator=seeded(seed))
    return drawn.reshape(num_prompts, num_candidates)


def batch_of(strings: torch.Tensor, log_q: torch.Tensor = LOG_Q, log_p: torch.Tensor = LOG_P) -> CandidateBatch:
    return CandidateBatch(REWARDS[strings], log_q=log_q[strings], log_p=log_p[strings])


def p_value(strings: torch.Tensor, target: torch.Tensor) -> float:
    """p-value of the counts under the target by chi-square; 0 if a string outside its support occurs."""
    counts = torch.bincount(strings, minlength=len(target)).double()
    if bool(counts[target == 0].any()):
        return 0.0
    is_cell = target > 0
    return float(stats.chisquare(counts[is_cell].numpy(), (target * len(strings))[is_cell].numpy()).pvalue)
