"""The candidates in flight, row by row: their tokens so far, their streams, what they were drawn with, when they end.

Scores of the next token enter, finished sequences leave. Nothing here knows a model or its cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import EosTokenCriteria, StopStringCriteria

from rsft_hf.generative.engines.chains import Chains
from rsft_hf.generative.engines.engine import GeneratedSequence, GenerationRequest
from rsft_hf.generative.engines.records import choose, log_probability
from rsft_hf.generative.streams import token_uniforms


class Rows:
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
        chains: Chains,
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
        """Returns what these rows, which have ended, have come to."""
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
