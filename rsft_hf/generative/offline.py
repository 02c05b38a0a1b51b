"""OfflineCandidates: completions that were imported, in the place of a generator in the first rounds of a run."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from rsft_hf.engines.random_streams import candidate_seed
from rsft_hf.generative.candidates import Candidate, CandidateStore, prompt_key, template_input
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.exports import load_candidates, round_folders
from rsft_hf.generative.generation import Sampling
from rsft_hf.generative.imports import imported_token_ids
from rsft_hf.generative.prompts import Prompt, PromptSet

logger = logging.get_logger(__name__)


class OfflineCandidates:
    """Imported completions of a run's prompts, round by round.

    Args:
        directory: Folder of one imported round, or of several named `round-*`.
        encoder: Encodes the completions that come without tokens of its tokenizer.
        max_tokens: Tokens of prompt and completion that the model can read; None without a limit.

    Attributes:
        num_rounds: Number of imported rounds.
    """

    def __init__(self, directory: Path | str, encoder: Encoder, max_tokens: int | None) -> None:
        self._folders = round_folders(directory)
        self.num_rounds = len(self._folders)
        self._encoder, self._max_tokens = encoder, max_tokens
        self._opened: tuple[int, datasets.Dataset, dict[int, list[int]]] | None = None

    def digest(self, round_number: int) -> str | None:
        """Returns a digest of a round's files; None for a round that was not imported."""
        if round_number >= self.num_rounds:
            return None
        return CandidateStore(self._folders[round_number], (), is_conversational=False).digest()

    def __call__(self, prompts: PromptSet, prompt_ids: Sequence[int], sampling: Sampling) -> list[Candidate]:
        """Returns the completions of some prompts, in order of prompt; none for a prompt without any.

        Raises:
            ValueError: If no prompt has any, prompts are not distinct, or a completion is too long for the model.
        """
        stored, rows_of = self._round(prompts, sampling.round_number)
        rows = iter(stored.select([row for prompt_id in prompt_ids for row in rows_of.get(prompt_id, ())]).to_list())
        candidates = []
        for prompt_id in prompt_ids:
            if not (num_stored := len(rows_of.get(prompt_id, ()))):
                continue
            prompt, columns = prompts.row(prompt_id)
            prompt_length = len(self._encoder.prompt_ids(prompt, columns))
            for index, row in enumerate(itertools.islice(rows, num_stored)):
                candidates.append(
                    Candidate(
                        prompt_id=prompt_id,
                        prompt=prompt,
                        token_ids=self._token_ids(prompt, columns, row, prompt_length),
                        text=row["text"],
                        finish_reason=row["finish_reason"],
                        index=index,
                        seed=candidate_seed(sampling.run_seed, sampling.round_number, prompt_id, 0, index),
                        log_q=row["log_q"],
                        row=columns,
                    )
                )
        return candidates

    def _token_ids(self, prompt: Prompt, columns: dict[str, Any], row: dict[str, Any], prompt_length: int) -> list[int]:
        ids, encoder = list(row["token_ids"] or ()), self._encoder
        # Tokens of another tokenizer mean other words to this model; a decoder's begin with more than a text, perhaps.
        is_other = not ids or max(ids) >= len(encoder.tokenizer) or encoder.text(ids) != row["text"]
        if not is_other and not encoder.is_encoder_decoder:
            ids = encoder.without_padding(ids, is_cut_off=row["finish_reason"] == "length")
        else:
            ids = imported_token_ids(encoder, prompt, columns, row["text"], row["finish_reason"])
        length = len(ids) if encoder.is_encoder_decoder else prompt_length + len(ids)
        if self._max_tokens is not None and length > self._max_tokens:
            raise ValueError(
                f"A completion of the prompt {str(prompt)[:60]!r} has {len(ids)} tokens, {length} with its prompt, "
                f"more than the model's {self._max_tokens} positions. Leave it out of the imported candidates."
            )
        return ids

    def _round(self, prompts: PromptSet, number: int) -> tuple[datasets.Dataset, dict[int, list[int]]]:
        """The stored candidates of a round, and the rows of each prompt of the run."""
        if self._opened is None or self._opened[0] != number:
            stored = load_candidates(self._folders[number])
            self._opened = number, stored, self._matched(prompts, stored)
        _, stored, rows_of = self._opened
        return stored, rows_of

    def _matched(self, prompts: PromptSet, stored: datasets.Dataset) -> dict[int, list[int]]:
        own: dict[str, int] = {}
        for number in range(len(prompts)):
            if (first := own.setdefault(prompt_key(prompts.row(number)[0]), number)) != number:
                raise ValueError(
                    f"Row {number} of `train_dataset` repeats the prompt of row {first}, so its imported candidates "
                    "cannot be told from the other's. Drop repeated prompts."
                )
        places: dict[int, int | None] = {}
        rows_of, num_unknown = defaultdict(list), 0
        for row, stored_id in enumerate(stored["prompt_id"]):
            if stored_id not in places:
                places[stored_id] = own.get(prompt_key(template_input(stored[row])[0]))
            prompt_id = places[stored_id]
            if prompt_id is None:
                num_unknown += 1
            else:
                rows_of[prompt_id].append(row)
        if not rows_of:
            raise ValueError(
                "No prompt of the imported candidates is in `train_dataset`. Train on the prompts they were imported "
                "with: stored_prompts(directory)."
            )
        if num_unknown or len(rows_of) < len(prompts):
            logger.warning(
                f"{len(rows_of)} of {len(prompts)} prompts have imported candidates; {num_unknown} of {len(stored)} "
                "candidates belong to prompts that are not in `train_dataset`."
            )
        return rows_of
