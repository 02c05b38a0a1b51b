"""The candidates of one request on their way: who enters when, and what leaves.

A reader of prompts and the rows in flight enter, sequences leave as they end. The order is a matter of speed alone.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rsft_hf.generative.engines.engine import GeneratedSequence, GenerationRequest
from rsft_hf.generative.engines.readers import ReadPrompts
from rsft_hf.generative.engines.rows import Rows

_SHARE_TO_REFILL = 4  # prompts are read when a quarter of the slots is free, several at once


@dataclass
class Waiting:
    """Candidates of a prompt that have not entered yet.

    Attributes:
        prompt: Position of the prompt in the request.
        indices: Of the candidates.
        read: The prompt as it was read for those of its candidates that are in flight already.
    """

    prompt: int
    indices: list[int]
    read: ReadPrompts | None = None


@dataclass
class Entering:
    """Some candidates of a prompt that enter now."""

    waiting: Waiting
    indices: list[int]


class Flight:
    """Runs some candidates of a request to their ends.

    Args:
        reader: Reads prompts and takes steps.
        rows: The state of the slots.
        request: What is asked for.
        left: Prompt and index of the candidates to generate.
        prefill_tokens: Most tokens of prompts read in one pass.
    """

    def __init__(
        self, reader: Any, rows: Rows, request: GenerationRequest, left: set[tuple[int, int]], prefill_tokens: int
    ) -> None:
        self.reader, self.rows, self.request, self.prefill_tokens = reader, rows, request, prefill_tokens
        self.max_rows, self.tokens_being_read = rows.max_rows, 0  # of several prompts at once
        by_prompt: dict[int, list[int]] = {}
        for prompt, index in sorted(left):
            by_prompt.setdefault(prompt, []).append(index)
        order = sorted(by_prompt, key=_last_to_end_first(request, rows.device))
        self.waiting = deque(Waiting(prompt, by_prompt[prompt]) for prompt in order)

    def run(self) -> Iterator[GeneratedSequence]:
        """Yields each sequence as it ends."""
        while self.waiting or len(self.rows):
            for sequences in self._admit() if self._is_due() else [self._step()]:
                yield from sequences
                self._cancel({sequence.prompt for sequence in sequences})

    def _is_due(self) -> bool:
        free = self.max_rows - len(self.rows)
        return bool(self.waiting) and (len(self.rows) == 0 or free * _SHARE_TO_REFILL >= self.max_rows)

    @torch.no_grad()
    def _step(self) -> list[GeneratedSequence]:
        """Takes one step with all rows."""
        rows = self.rows
        self.reader.make_room(is_last=not self.waiting)
        scores = self.reader.step(rows.last_tokens(), rows.lengths, rows.width)
        return self._leave(rows.draw(scores))

    def _leave(self, ended: list[int]) -> list[GeneratedSequence]:
        if not ended:
            return []
        sequences = self.rows.sequences(ended)
        sources, targets = self.rows.take_out(ended)
        self.reader.keep_only(len(self.rows), sources, targets)
        return sequences

    def _admit(self) -> Iterator[list[GeneratedSequence]]:
        """Fills the free slots; prompts of like length are read together."""
        free, chosen = self.max_rows - len(self.rows), list[Entering]()
        while free and self.waiting:
            first = self.waiting[0]
            chosen.append(Entering(first, first.indices[:free]))
            first.indices = first.indices[free:]
            free -= len(chosen[-1].indices)
            if not first.indices:
                self.waiting.popleft()
        already_read = [one for one in chosen if one.waiting.read is not None]
        for group in self._groups([one for one in chosen if one.waiting.read is None]):
            longest = len(self.request.prompts[group[0].waiting.prompt])
            self.tokens_being_read = len(group) * longest if len(group) > 1 else 0
            with torch.no_grad():
                read = self.reader.read([self.request.prompts[one.waiting.prompt] for one in group])
            self.tokens_being_read = 0
            for row, one in enumerate(group):
                if one.waiting.indices:  # the slots did not suffice for all of its candidates
                    one.waiting.read = read.only(row)
            yield self._enter(group, read)
        for one in already_read:
            if one.waiting.read is not None:
                yield self._enter([one], one.waiting.read)

    def _groups(self, entering: list[Entering]) -> Iterator[list[Entering]]:
        """Prompts to read in one pass: sorted by length, within the budget of tokens."""

        def length(one: Entering) -> int:
            return len(self.request.prompts[one.waiting.prompt])

        group: list[Entering] = []
        for one in sorted(entering, key=length, reverse=True):
            if group and (len(group) + 1) * length(group[0]) > self.prefill_tokens:
                yield group
                group = []
            group.append(one)
        if group:
            yield group

    @torch.no_grad()
    def _enter(self, group: list[Entering], read: ReadPrompts) -> list[GeneratedSequence]:
        """Puts candidates into slots and draws their first tokens from the one pass over their prompt."""
        first, sources = len(self.rows), list[int]()
        for row, one in enumerate(group):
            self.rows.add(one.waiting.prompt, one.indices)
            sources += [row] * len(one.indices)
        self.reader.admit(read, sources)
        return self._leave(self.rows.draw(read.scores[sources], first))

    def _cancel(self, prompts: set[int]) -> None:
        """Forgets the candidates that have not finished of prompts that need no more of them."""
        if self.request.is_satisfied is None:
            return
        satisfied = {prompt for prompt in prompts if self.request.is_satisfied(prompt)}
        if satisfied:
            self.waiting = deque(one for one in self.waiting if one.prompt not in satisfied)
            unneeded = [row for row, (prompt, _) in enumerate(self.rows.names) if prompt in satisfied]
            sources, targets = self.rows.take_out(unneeded)
            self.reader.keep_only(len(self.rows), sources, targets)


def _last_to_end_first(request: GenerationRequest, device: torch.device) -> Callable[[int], tuple[float, float, int]]:
    """Returns the key by which prompts are sorted."""
    expected = request.expected_lengths or [0.0] * len(request.prompts)

    def key(prompt: int) -> tuple[float, float, int]:
        length = float(len(request.prompts[prompt]))
        # A step of an accelerator costs much the same for few rows as for many, so the long answers begin first. That
        # of a CPU costs what its columns cost, and all rows are as wide as the widest: long prompts come last.
        return (length, -expected[prompt], prompt) if device.type == "cpu" else (-expected[prompt], length, prompt)

    return key
