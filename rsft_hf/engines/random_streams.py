"""Random streams of candidates, keyed by run seed, round, prompt, attempt and index.

No stream depends on the batch, the process or the order of generation, so a resumed, retried or distributed round draws
the same candidates. Philox counters give the uniforms.
"""

import hashlib

import numpy as np
import torch

_VERDICT_STREAM = 2**64  # added to the key of a candidate: its acceptance draws from another stream than its tokens


def candidate_seed(run_seed: int, round_number: int, prompt_id: int, attempt: int, index: int) -> int:
    """Returns the seed of candidate `index` of a prompt, in [0, 2**63), different for every combination.

    Args:
        run_seed: Seed of the run.
        round_number: Round, from 0.
        prompt_id: Row of the prompt in its data set.
        attempt: Attempt within the round, from 0.
        index: Candidate within the attempt, from 0.

    Example:
        >>> candidate_seed(0, 0, 0, 0, 1) == candidate_seed(0, 0, 0, 1, 0)
        False
    """
    key = f"{run_seed}/{round_number}/{prompt_id}/{attempt}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def token_uniforms(seeds: list[int], num_tokens: int) -> torch.Tensor:
    """Returns the uniforms that pick the tokens of each candidate, shape (len(seeds), num_tokens), float64, in [0, 1).

    The first numbers of a stream do not depend on how many are asked for.
    """
    return torch.from_numpy(np.stack([_uniforms(seed, num_tokens) for seed in seeds]))


def verdict_uniforms(seeds: list[int]) -> torch.Tensor:
    """Returns the one uniform by which each candidate is accepted or not, shape (len(seeds),), float64, in [0, 1)."""
    keys = np.array(seeds, dtype=np.uint64), np.full(len(seeds), _VERDICT_STREAM >> 64, dtype=np.uint64)
    return torch.from_numpy(_as_uniforms(_first_philox_words(*keys)))


def _uniforms(key: int, count: int) -> np.ndarray:
    # Raw Philox words, whose stream NumPy guarantees.
    return _as_uniforms(np.random.Philox(key=key).random_raw(count))


def _as_uniforms(words: np.ndarray) -> np.ndarray:
    """53 bits of each word make a float64 in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53


_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_WEYL = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)


def _first_philox_words(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The first word of the Philox4x64-10 stream of each key (Salmon et al. 2011), as NumPy gives it, for all at once.

    A generator object for each of a million keys takes half a minute.
    """
    counters = [np.full(len(low), value, dtype=np.uint64) for value in (1, 0, 0, 0)]
    for _ in range(10):
        first_high, first_low = _multiply(counters[0], _MULTIPLIERS[0])
        second_high, second_low = _multiply(counters[2], _MULTIPLIERS[1])
        counters = [second_high ^ counters[1] ^ low, second_low, first_high ^ counters[3] ^ high, first_low]
        low, high = low + _WEYL[0], high + _WEYL[1]
    return counters[0]


def _multiply(values: np.ndarray, factor: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower half of 128-bit products."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    a, b, c, d = values >> half, values & mask, factor >> half, factor & mask
    middle = a * d + (b * d >> half)
    rest = b * c + (middle & mask)
    return a * c + (middle >> half) + (rest >> half), values * factor
