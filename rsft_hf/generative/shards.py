"""Which process generates what: shards of prompts, shared out by the tokens they are expected to take.

Prompts and the lengths of earlier candidates enter, the shards of one process leave. The shards themselves depend on
the prompts alone, so that any number of processes can go on with them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from rsft_hf.generative.candidates import CandidateStore

_MOST_PROMPTS_PER_SHARD, _FEWEST_SHARDS = 64, 4


def mean_lengths(store: CandidateStore) -> dict[int, float]:
    """Returns the mean number of tokens of each prompt's candidates in a round, by prompt; empty if there is none."""
    columns = store.columns(("prompt_id", "num_tokens"))
    lengths = defaultdict(list)
    for prompt_id, num_tokens in zip(*columns.values(), strict=True):
        lengths[prompt_id].append(num_tokens)
    return {prompt_id: sum(values) / len(values) for prompt_id, values in lengths.items()}


def own_shards(
    prompt_ids: Sequence[int],
    num_prompts: int,
    expected_lengths: Mapping[int, float],
    num_processes: int,
    process_index: int,
) -> list[tuple[int, Sequence[int]]]:
    """Returns number and prompts of each shard that is this process's work, in order of number.

    The shard with the most expected tokens goes to the process that has the fewest so far, and so on.

    Args:
        prompt_ids: Prompts to generate for, in order.
        num_prompts: Prompts of the data set, which decide how large a shard is.
        expected_lengths: Tokens of a candidate of each prompt, where they are known; equal on all processes.
        num_processes: Processes of the run.
        process_index: This process.

    Example:
        >>> lengths = {prompt: 9.0 if prompt < 2 else 1.0 for prompt in range(8)}
        >>> [[number for number, _ in own_shards(range(8), 8, lengths, 2, process)] for process in range(2)]
        [[0], [1, 2, 3]]
    """
    size = max(1, min(_MOST_PROMPTS_PER_SHARD, num_prompts // _FEWEST_SHARDS))
    shards = [prompt_ids[start : start + size] for start in range(0, len(prompt_ids), size)]
    usual = sum(expected_lengths.values()) / len(expected_lengths) if expected_lengths else 1.0
    tokens = [sum(expected_lengths.get(prompt, usual) for prompt in shard) for shard in shards]
    shares, own = [0.0] * num_processes, list[int]()
    for number in sorted(range(len(shards)), key=lambda number: (-tokens[number], number)):
        process = shares.index(min(shares))
        shares[process] += tokens[number]
        if process == process_index:
            own.append(number)
    return [(number, shards[number]) for number in sorted(own)]
