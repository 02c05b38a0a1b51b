"""The stages of a round for those who call them themselves: a notebook, an offline job.

What `CandidateResampler` runs in `train()` runs here over a list of candidates, without a trainer and without a disk.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rsft_hf.acceptance import Acceptance
from rsft_hf.engines.auto import choose_engine
from rsft_hf.engines.base import Engine, check_engine
from rsft_hf.engines.generation_config import sampling_config
from rsft_hf.engines.model_access import unwrapped
from rsft_hf.generative import stages
from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.filters import Deduplicate, Filter
from rsft_hf.generative.ready import log_probs_of_engine, ready, reference_opener
from rsft_hf.generative.refusals import prompt_set, refuse_model
from rsft_hf.generative.selection import ACCEPTED, COLUMNS, RoundTable, SelectionRules, judge
from rsft_hf.rewards.functions import RewardFunctions


class StagesByHand:
    """`generate`, `score`, `accept` and `encode`, with the options of the resampler that inherits them."""

    if TYPE_CHECKING:
        functions: RewardFunctions
        acceptance: Acceptance
        filters: tuple[Filter, ...]
        dedup: Deduplicate | None
        num_candidates: int
        generation_config: GenerationConfig | None
        engine: str | Engine
        with_log_probs: bool
        min_accepted_per_prompt: int
        on_nothing_accepted: str
        prompt_column: str
        reference_column: str
        reference_model: Any
        chat_template_kwargs: Mapping[str, Any] | None
        merge_adapter: bool

    def generate(
        self,
        model: Any,
        processing_class: PreTrainedTokenizerBase,
        prompts: Any,
        *,
        seed: int = 0,
        round_number: int = 0,
        attempt: int = 0,
    ) -> list[Candidate]:
        """Returns the candidates of every prompt, in order of prompt and candidate, neither filtered nor scored.

        Args:
            model: On its device, wrapped or not; put into evaluation mode meanwhile. One that is sharded: the block of
                `whole_model(accelerator, model)` gives what to pass.
            processing_class: The model's tokenizer.
            prompts: Rows with the prompt column and the columns that the rewards need.
            seed: Of the run; with round, prompt, attempt and number of the candidate it fixes each candidate's tokens.
            round_number: Round, from 0.
            attempt: Attempt, from 0; another one draws other candidates.

        Raises:
            ValueError: If the model or the engine cannot generate so, `max_new_tokens` is unset or a column is missing.
        """
        model = unwrapped(model)
        refuse_model(model)
        encoder = self._encoder(processing_class, bool(model.config.is_encoder_decoder))
        config = sampling_config(self.generation_config, model, processing_class)
        sampling = stages.Sampling(config, self.num_candidates, seed, round_number, attempt, self.with_log_probs)
        reference = reference_opener(self.reference_model, model, model.device)
        engine = choose_engine(self.engine, model)
        check_engine(engine, model, config, log_probs_of_engine(self))
        generator = stages.Generator(model, encoder, engine, reference=reference)
        with ready(self, None, generator, model) as generator:
            return generator(prompt_set(prompts, self, "prompts"), range(len(prompts)), sampling)

    def score(self, candidates: Sequence[Candidate], trainer_state: Any = None) -> list[Candidate]:
        """Returns the candidates, filtered and scored in place; those a filter refuses are not scored.

        Args:
            candidates: As `generate` returns them: the columns that rewards read are in their `row`.
            trainer_state: Handed to the reward functions.
        """
        stages.filter_candidates(candidates, self.filters, self.dedup)
        stages.score_candidates(candidates, self.functions, trainer_state)
        return list(candidates)

    def accept(self, candidates: Sequence[Candidate], *, seed: int = 0, round_number: int = 0) -> list[Candidate]:
        """Returns the candidates with their verdicts, given in place; all of them are judged as one round.

        Args:
            candidates: Scored.
            seed: Of the rules that draw or break ties.
            round_number: For rules that follow a schedule.
        """
        columns: dict[str, list[Any]] = {
            name: [getattr(one, "index" if name == "candidate" else name) for one in candidates] for name in COLUMNS
        }
        rule = self.acceptance.for_round(round_number)
        takes_best = self.on_nothing_accepted == "best"
        rules = SelectionRules(rule, self.min_accepted_per_prompt, takes_best, seed, round_number)
        generated = [one for one in candidates if one.finish_reason != "reference"]
        for candidate, verdict in zip(generated, judge(RoundTable.of(columns), rules), strict=True):
            candidate.verdict, candidate.is_accepted = verdict, verdict in ACCEPTED
            candidate.rule = candidate.rule if verdict == "filtered" else repr(rule)
        return list(candidates)

    def encode(
        self,
        candidates: Sequence[Candidate],
        processing_class: PreTrainedTokenizerBase,
        *,
        is_encoder_decoder: bool = False,
    ) -> datasets.Dataset:
        """Returns the accepted candidates as training rows: `input_ids`, `attention_mask`, `labels`, unpadded.

        Args:
            candidates: Judged.
            processing_class: The tokenizer of the model to train.
            is_encoder_decoder: Whether that model reads the answer apart from the prompt.
        """
        encoder = self._encoder(processing_class, is_encoder_decoder)
        return datasets.Dataset.from_list(stages.encode_candidates(candidates, encoder))

    def _encoder(self, tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool) -> Encoder:
        return Encoder(tokenizer, is_encoder_decoder, dict(self.chat_template_kwargs or {}))
