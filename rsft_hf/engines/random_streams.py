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
    return torch.tensor([float(_uniforms(_VERDICT_STREAM + seed, 1)[0]) for seed in seeds], dtype=torch.float64)


def _uniforms(key: int, count: int) -> np.ndarray:
    # Raw Philox words, whose stream NumPy guarantees; 53 bits each make a float64 in [0, 1).
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53
