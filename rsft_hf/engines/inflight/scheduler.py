"""Scheduler of continuous batching, and the running sequences.

`Scheduler` admits prompts and runs decode steps; the order affects speed only. `RunningBatch` holds the running
sequences: tokens so far, random streams, log probabilities and end conditions.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import EosTokenCriteria, StopStringCriteria

from rsft_hf.engines.base import GeneratedSequence, GenerationRequest
from rsft_hf.engines.inflight.model_runner import PrefillOutput
from rsft_hf.engines.random_streams import token_uniforms
from rsft_hf.engines.sampling import ProcessorChains, choose, log_probability


class RunningBatch:
    """The state of every slot but for its keys and values. Rows in use are the first ones.

    Args:
        request: Prompts, seeds and how to sample.
        chains: Processes scores.
        criteria: Of `generate`: end tokens and stop strings among them.
        starts: Tokens that each prompt's rows begin with: the prompt itself, or the first tokens of a decoder.
        max_rows: Slots.
        device: Where scores are.
    """

    def __init__(
        self,
        request: GenerationRequest,
        chains: ProcessorChains,
        criteria: Any,
        starts: Sequence[Sequence[int]],
        max_rows: int,
        device: torch.device,
    ) -> None:
        self.request, self.chains, self.starts = request, chains, starts
        self.max_rows, self.device = max_rows, device
        self.names: list[tuple[int, int]] = []  # prompt and index of each row in use
        self.ages: list[tuple[int, int]] = []  # tokens of each row's start, and of the row as a whole
        most = request.generation_config.max_new_tokens
        config, width = request.generation_config, max(len(start) for start in starts) + most
        self._ends = [one.eos_token_id for one in criteria if type(one) is EosTokenCriteria]
        self._stop_strings = [one for one in criteria if isinstance(one, StopStringCriteria)]
        state = {"sequences": torch.full((max_rows, width), config.pad_token_id, dtype=torch.int64)}
        state["lengths"] = torch.zeros(max_rows, dtype=torch.int64)
        state["steps"], state["limits"] = torch.zeros_like(state["lengths"]), torch.zeros_like(state["lengths"])
        if config.do_sample:
            state["uniforms"] = torch.zeros((max_rows, most), dtype=torch.float64)
        if request.with_log_probs:  # four bytes a token each; the scores they come from are gone after a step
            state["log_q"], state["log_p"] = torch.zeros((max_rows, most)), torch.zeros((max_rows, most))
        self._state = {name: values.to(device) for name, values in state.items()}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each row, shape (rows,), int64."""
        return self._state["lengths"][: len(self)]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(length for _, length in self.ages)

    def last_tokens(self) -> torch.Tensor:
        """Returns the last token of each row, shape (rows,), int64."""
        return self._state["sequences"][: len(self)].gather(1, self.lengths[:, None] - 1).squeeze(1)

    def add(self, prompt: int, indices: Sequence[int]) -> None:
        """Lets candidates of a prompt take the next rows."""
        state, start, first = self._state, list(self.starts[prompt]), len(self)
        new = slice(first, first + len(indices))
        state["sequences"][new, : len(start)] = torch.tensor(start, device=self.device)
        state["lengths"][new], state["steps"][new] = len(start), 0
        limits = [self.request.limit(prompt, index) for index in indices]
        state["limits"][new] = torch.tensor(limits, device=self.device)
        if "uniforms" in state:
            seeds = [self.request.seeds[prompt][index] for index in indices]
            state["uniforms"][new] = token_uniforms(seeds, state["uniforms"].shape[1]).to(self.device)
        self.names += [(prompt, index) for index in indices]
        self.ages += [(len(start), len(start)) for _ in indices]

    def draw(self, scores: torch.Tensor, first: int = 0) -> list[int]:
        """Draws the next token of the rows from `first` on, and returns which of all rows have ended with it.

        Args:
            scores: Of those rows, raw, shape (rows, vocabulary).
            first: First of them.
        """
        rows = torch.arange(first, len(self), device=self.device)
        state = {name: values[first : len(self)] for name, values in self._state.items()}
        raw = scores.float()
        keeps_raw = self.request.with_log_probs and not self.chains.is_empty
        processed = self.chains(state["sequences"], self.ages[first:], raw.clone() if keeps_raw else raw)
        uniforms = None
        if "uniforms" in state:
            uniforms = state["uniforms"].gather(1, state["steps"][:, None]).squeeze(1)
        chosen, probabilities = choose(processed, uniforms)
        if self.request.with_log_probs:
            if probabilities is None:
                log_q = log_probability(processed, chosen)
            else:
                log_q = probabilities.gather(1, chosen[:, None]).squeeze(1).log()
            self._state["log_q"][rows, state["steps"]] = log_q
            self._state["log_p"][rows, state["steps"]] = log_probability(raw, chosen) if keeps_raw else log_q
        self._state["sequences"][rows, state["lengths"]] = chosen
        state["lengths"] += 1
        state["steps"] += 1
        self.ages[first:] = [(start, length + 1) for start, length in self.ages[first:]]
        has_ended = self._is_stopped(rows, chosen) | (state["steps"] >= state["limits"])
        return [first + row for row in has_ended.nonzero().flatten().tolist()]

    def take_out(self, gone: list[int]) -> tuple[list[int], list[int]]:
        """Removes rows, and returns which of the last rows took their places, and which places."""
        rest, leaving = len(self) - len(gone), set(gone)
        sources = [row for row in range(rest, len(self)) if row not in leaving]
        targets = [row for row in gone if row < rest]
        if sources:
            for values in self._state.values():
                values[targets] = values[sources]
        for source, target in zip(sources, targets, strict=True):
            self.names[target], self.ages[target] = self.names[source], self.ages[source]
        del self.names[rest:], self.ages[rest:]
        return sources, targets

    def _is_stopped(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Which rows end with the token chosen by an end token or a stop string, not by the limit."""
        is_stopped = torch.zeros_like(chosen, dtype=torch.bool)
        for ends in self._ends:
            is_stopped |= torch.isin(chosen, ends.to(chosen.device))
        for criterion in self._stop_strings:
            lengths = self._state["lengths"][rows]
            places = lengths[:, None] + torch.arange(-criterion.maximum_token_len, 0, device=self.device)
            tails = self._state["sequences"][rows[:, None], places.clamp(min=0)]
            pad = self.request.generation_config.pad_token_id
            is_stopped |= criterion(tails.masked_fill(places < 0, pad), None)
        return is_stopped

    def sequences(self, ended: list[int]) -> list[GeneratedSequence]:
        """Returns the sequences of rows that have ended."""
        rows = torch.tensor(ended, device=self.device)
        is_stopped = self._is_stopped(rows, self._state["sequences"][rows, self._state["lengths"][rows] - 1]).tolist()
        tokens = self._state["sequences"][rows].tolist()
        probabilities = [self._state[name][rows].cpu() for name in ("log_q", "log_p") if name in self._state]
        found = []
        for number, row in enumerate(ended):
            (prompt, index), (start, length) = self.names[row], self.ages[row]
            logs = [values[number, : length - start].clone() for values in probabilities]
            reason = "stop" if is_stopped[number] else "length"
            found.append(GeneratedSequence(prompt, index, tokens[number][start:length], reason, *logs))
        return found


_SHARE_TO_REFILL = 4  # prompts are read when a quarter of the slots is free, several at once


@dataclass
class WaitingPrompt:
    """Candidates of a prompt that have not entered yet.

    Attributes:
        prompt: Position of the prompt in the request.
        indices: Of the candidates.
        read: The prompt as it was read for those of its candidates that are running already.
    """

    prompt: int
    indices: list[int]
    read: PrefillOutput | None = None


@dataclass
class AdmittedPrompt:
    """Some candidates of a prompt that enter now."""

    waiting: WaitingPrompt
    indices: list[int]


class Scheduler:
    """Runs some candidates of a request to their ends.

    Args:
        runner: Reads prompts and takes steps.
        rows: The state of the slots.
        request: What is asked for.
        left: Prompt and index of the candidates to generate.
        prefill_tokens: Most tokens of prompts read in one pass.
    """

    def __init__(
        self,
        runner: Any,
        rows: RunningBatch,
        request: GenerationRequest,
        left: set[tuple[int, int]],
        prefill_tokens: int,
    ) -> None:
        self.runner, self.rows, self.request, self.prefill_tokens = runner, rows, request, prefill_tokens
        self.max_rows, self.num_prefill_tokens = rows.max_rows, 0  # of several prompts at once
        by_prompt: dict[int, list[int]] = {}
        for prompt, index in sorted(left):
            by_prompt.setdefault(prompt, []).append(index)
        order = sorted(by_prompt, key=_last_to_end_first(request, rows.device))
        self.waiting = deque(WaitingPrompt(prompt, by_prompt[prompt]) for prompt in order)

    def run(self) -> Iterator[GeneratedSequence]:
        """Yields each sequence as it ends."""
        while self.waiting or len(self.rows):
            for sequences in self._admit() if self._is_due() else [self._step()]:
                yield from sequences

    def _is_due(self) -> bool:
        free = self.max_rows - len(self.rows)
        return bool(self.waiting) and (len(self.rows) == 0 or free * _SHARE_TO_REFILL >= self.max_rows)

    @torch.no_grad()
    def _step(self) -> list[GeneratedSequence]:
        """Takes one step with all rows."""
        rows = self.rows
        self.runner.make_room(is_last=not self.waiting)
        scores = self.runner.step(rows.last_tokens(), rows.lengths, rows.width)
        return self._leave(rows.draw(scores))

    def _leave(self, ended: list[int]) -> list[GeneratedSequence]:
        if not ended:
            return []
        sequences = self.rows.sequences(ended)
        sources, targets = self.rows.take_out(ended)
        self.runner.keep_only(len(self.rows), sources, targets)
        return sequences

    def _admit(self) -> Iterator[list[GeneratedSequence]]:
        """Fills the free slots; prompts of like length are read together."""
        free, chosen = self.max_rows - len(self.rows), list[AdmittedPrompt]()
        while free and self.waiting:
            first = self.waiting[0]
            chosen.append(AdmittedPrompt(first, first.indices[:free]))
            first.indices = first.indices[free:]
            free -= len(chosen[-1].indices)
            if not first.indices:
                self.waiting.popleft()
        already_read = [one for one in chosen if one.waiting.read is not None]
        for group in self._groups([one for one in chosen if one.waiting.read is None]):
            longest = len(self.request.prompts[group[0].waiting.prompt])
            self.num_prefill_tokens = len(group) * longest if len(group) > 1 else 0
            with torch.no_grad():
                read = self.runner.read([self.request.prompts[one.waiting.prompt] for one in group])
            self.num_prefill_tokens = 0
            for row, one in enumerate(group):
                if one.waiting.indices:  # the slots did not suffice for all of its candidates
                    one.waiting.read = read.only(row)
            yield self._enter(group, read)
        for one in already_read:
            if one.waiting.read is not None:
                yield self._enter([one], one.waiting.read)

    def _groups(self, entering: list[AdmittedPrompt]) -> Iterator[list[AdmittedPrompt]]:
        """Prompts to read in one pass: sorted by length, within the budget of tokens."""

        def length(one: AdmittedPrompt) -> int:
            return len(self.request.prompts[one.waiting.prompt])

        group: list[AdmittedPrompt] = []
        for one in sorted(entering, key=length, reverse=True):
            if group and (len(group) + 1) * length(group[0]) > self.prefill_tokens:
                yield group
                group = []
            group.append(one)
        if group:
            yield group

    @torch.no_grad()
    def _enter(self, group: list[AdmittedPrompt], read: PrefillOutput) -> list[GeneratedSequence]:
        """Puts candidates into slots and draws their first tokens from the one pass over their prompt."""
        first, sources = len(self.rows), list[int]()
        for row, one in enumerate(group):
            self.rows.add(one.waiting.prompt, one.indices)
            sources += [row] * len(one.indices)
        self.runner.admit(read, sources)
        return self._leave(self.rows.draw(read.scores[sources], first))


def _last_to_end_first(request: GenerationRequest, device: torch.device) -> Callable[[int], tuple[float, float, int]]:
    """Returns the key by which prompts are sorted."""
    expected = request.expected_lengths or [0.0] * len(request.prompts)

    def key(prompt: int) -> tuple[float, float, int]:
        length = float(len(request.prompts[prompt]))
        # A step of an accelerator costs much the same for few rows as for many, so the long answers begin first. That
        # of a CPU costs what its columns cost, and all rows are as wide as the widest: long prompts come last.
        return (length, -expected[prompt], prompt) if device.type == "cpu" else (-expected[prompt], length, prompt)

    return key
