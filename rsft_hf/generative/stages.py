"""The stages of a round, each a function over a list of candidates: generate, filter, score, encode.

They know no process group and no disk: `rounds.py` runs them shard by shard, a notebook may run them by hand.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from rsft_hf.engines.base import Engine, GenerationRequest
from rsft_hf.engines.random_streams import candidate_seed
from rsft_hf.generative.candidates import Candidate, Prompt
from rsft_hf.generative.encoding import Encoder, Row
from rsft_hf.generative.filters import Deduplicate, Filter
from rsft_hf.generative.likelihood import completion_log_probabilities
from rsft_hf.isolation import forked_rng, in_evaluation_mode
from rsft_hf.rewards.functions import RewardFunctions, Scores


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a data set, and its other columns, by row.

    Attributes:
        dataset: Rows that are mappings, with a length and random access.
        column: Name of the column with the prompts.
    """

    dataset: Any
    column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, prompt_id: int) -> tuple[Prompt, dict[str, Any]]:
        """Returns a prompt and the other columns of its row."""
        row = dict(self.dataset[prompt_id])
        return row.pop(self.column), row


@dataclass(frozen=True)
class Sampling:
    """How the candidates of a round are drawn.

    Attributes:
        generation_config: Complete: see `settings.sampling_config`.
        num_candidates: Candidates per prompt and attempt.
        run_seed: Seed of the run.
        round_number: Round, from 0.
        attempt: Attempt within the round, from 0.
        with_log_probs: Whether log q and log p are wanted.
        expected_lengths: Tokens of a candidate of each prompt, by its row, where they are known; for the order of work,
            which changes nothing of what is drawn.
    """

    generation_config: GenerationConfig
    num_candidates: int
    run_seed: int = 0
    round_number: int = 0
    attempt: int = 0
    with_log_probs: bool = False
    expected_lengths: Mapping[int, float] = field(default_factory=dict)

    def seeds(self, prompt_id: int) -> list[int]:
        """Returns the seeds of a prompt's candidates."""
        names = (self.run_seed, self.round_number, prompt_id, self.attempt)
        return [candidate_seed(*names, index) for index in range(self.num_candidates)]


@dataclass(frozen=True)
class Generator:
    """What turns prompts into candidates.

    Attributes:
        model: Unwrapped, on its device.
        encoder: Knows the model's tokens.
        engine: Runs the model.
        surroundings: Opens the context that the model is run in, such as `accelerator.autocast`.
        reference: Opens a context that gives the model of `DensityRatio`'s target; None takes the model's own log p.
    """

    model: Any
    encoder: Encoder
    engine: Engine
    surroundings: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    reference: Callable[[], contextlib.AbstractContextManager[Any]] | None = None

    def __call__(self, prompts: PromptSet, prompt_ids: Sequence[int], sampling: Sampling) -> list[Candidate]:
        """Returns the candidates of some prompts, in order of prompt and candidate, neither filtered nor scored."""
        rows = [prompts.row(prompt_id) for prompt_id in prompt_ids]
        token_ids = [self.encoder.prompt_ids(prompt) for prompt, _ in rows]
        seeds = [sampling.seeds(prompt_id) for prompt_id in prompt_ids]
        request = GenerationRequest(
            token_ids,
            seeds,
            sampling.generation_config,
            sampling.with_log_probs,
            self.encoder.tokenizer,
            expected_lengths=[sampling.expected_lengths.get(prompt_id, 0.0) for prompt_id in prompt_ids],
        )
        with self._ready(self.model):
            sequences = sorted(self.engine(self.model, request), key=lambda one: (one.prompt, one.index))
        if [(one.prompt, one.index) for one in sequences] != [
            (prompt, index) for prompt in range(len(rows)) for index in range(sampling.num_candidates)
        ]:
            raise RuntimeError(
                f"{type(self.engine).__name__} returned {len(sequences)} sequences for {len(rows)} prompts of "
                f"{sampling.num_candidates} candidates: an engine must yield each of them once."
            )
        candidates = [
            Candidate(
                prompt_id=prompt_ids[one.prompt],
                prompt=rows[one.prompt][0],
                token_ids=one.token_ids,
                text=self.encoder.text(one.token_ids),
                finish_reason=one.finish_reason,
                attempt=sampling.attempt,
                index=one.index,
                seed=seeds[one.prompt][one.index],
                log_q=None if one.log_q is None else float(one.log_q.double().sum()),
                log_p=None if one.log_p is None else float(one.log_p.double().sum()),
                row=rows[one.prompt][1],
            )
            for one in sequences
        ]
        if self.reference is not None and sampling.with_log_probs:
            self._take_reference(candidates, [token_ids[one.prompt] for one in sequences])
        if sampling.with_log_probs and any(None in (one.log_q, one.log_p) for one in candidates):
            raise ValueError(
                f"{type(self.engine).__name__} gave candidates without the log probabilities that are wanted. Name the "
                "model that log p is wanted of as `reference_model`, or use an engine that gives log q and log p."
            )
        return candidates

    def _take_reference(self, candidates: Sequence[Candidate], prompts: Sequence[Sequence[int]]) -> None:
        reference: Callable[[], contextlib.AbstractContextManager[Any]] = self.reference or contextlib.nullcontext
        with reference() as model, self._ready(model):
            answers = [candidate.token_ids for candidate in candidates]
            values = completion_log_probabilities(model, self.encoder, prompts, answers)
        for candidate, value in zip(candidates, values.tolist(), strict=True):
            candidate.log_p = value

    @contextlib.contextmanager
    def _ready(self, model: Any) -> Iterator[None]:
        # In training mode dropout would change the candidates, and gradient checkpointing drop the cache.
        with torch.no_grad(), in_evaluation_mode(model), self.surroundings():
            yield


def filter_candidates(candidates: Sequence[Candidate], filters: Sequence[Filter], dedup: Deduplicate | None) -> None:
    """Marks the candidates that a filter refuses, and gives the others the key by which duplicates are told."""
    for candidate in candidates:
        refusing = next((rule for rule in filters if not rule(candidate)), None)
        if refusing is not None:
            candidate.verdict, candidate.rule, candidate.is_accepted = "filtered", repr(refusing), False
        elif dedup is not None:
            key = dedup.key_of(candidate)
            candidate.duplicate_key = None if key is None else hashlib.blake2b(repr(key).encode()).hexdigest()[:32]


def score_candidates(
    candidates: Sequence[Candidate], functions: RewardFunctions, trainer_state: Any = None, seed: int = 0
) -> Scores:
    """Scores the candidates that no filter refused, in place, and returns what the functions said.

    Args:
        candidates: With the other columns of their prompts in `row`.
        functions: The reward functions.
        trainer_state: Handed to them.
        seed: Of the global generators while they run; those of training stay as they were.
    """
    kept = [candidate for candidate in candidates if candidate.verdict != "filtered"]
    names = list(kept[0].row) if kept else []
    columns = {name: [candidate.row[name] for candidate in kept] for name in names}
    with forked_rng(seed):
        scores = functions(
            [candidate.prompt for candidate in kept],
            [candidate.completion for candidate in kept],
            [candidate.token_ids for candidate in kept],
            columns,
            trainer_state,
        ) if kept else Scores(torch.zeros(0, dtype=torch.float64), {})  # fmt: skip
    for row, candidate in enumerate(kept):
        candidate.reward = _number(scores.rewards[row])
        candidate.rewards = {name: _number(values[row]) for name, values in scores.by_function.items()}
        candidate.extras = {name: values[row] for name, values in scores.extras.items()}
    return scores


def encode_candidates(candidates: Iterable[Candidate], encoder: Encoder, prompts: PromptSet | None = None) -> list[Row]:
    """Returns the training rows of the accepted among the candidates, in their order.

    Args:
        candidates: Judged.
        encoder: Knows the model's tokens.
        prompts: Where the prompts come from; a stored one may lack fields of its messages. None takes the candidates'.
    """
    prompt_ids: dict[int, list[int]] = {}
    rows = []
    for candidate in candidates:
        if candidate.is_accepted:
            if candidate.prompt_id not in prompt_ids:
                prompt = candidate.prompt if prompts is None else prompts.row(candidate.prompt_id)[0]
                prompt_ids[candidate.prompt_id] = encoder.prompt_ids(prompt)
            rows.append(encoder.training_row(prompt_ids[candidate.prompt_id], candidate.token_ids))
    return rows


def reference_candidate(prompts: PromptSet, prompt_id: int, column: str, encoder: Encoder) -> Candidate:
    """Returns the reference answer of a prompt as an accepted candidate, marked as what it is."""
    prompt, row = prompts.row(prompt_id)
    reference = row[column]
    if not reference:
        raise ValueError(f"Row {prompt_id} has no reference in the column {column!r}. Give one, or drop the row.")
    if isinstance(reference, list) and isinstance(reference[0], str):
        reference = reference[0]  # several references: the first
    ids = encoder.completion_ids(prompt, reference)
    text = reference if isinstance(reference, str) else encoder.text(ids)
    return dataclasses.replace(
        Candidate(prompt_id, prompt, ids, text, "reference", attempt=-1, index=-1),
        is_accepted=True,
        verdict="fallback",
        rule='on_nothing_accepted="reference"',
    )


def _number(value: torch.Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)
