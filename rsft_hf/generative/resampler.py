"""`CandidateResampler`: trains on the model's own accepted candidates, one round per epoch.

    prompts -> engine -> candidates -> filters, rewards -> acceptance -> training rows, prompt masked
            -> the pool is replaced -> indices, shuffled, cycled to num_draws

This file holds the order of the stages. `generate`, `score`, `accept` and `encode` run a single stage over a list of
candidates, without a trainer and without a disk.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import (
    DataCollatorWithPadding,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
)

from rsft_hf.acceptance import Acceptance, TopKPerPrompt
from rsft_hf.checkpointing import load_state, save_state, validate_unchanged
from rsft_hf.distributed import FailTogether, broadcast_from_main, run_seed
from rsft_hf.engines.auto import choose_engine
from rsft_hf.engines.base import Engine
from rsft_hf.engines.generation_config import sampling_config
from rsft_hf.engines.model_access import unwrapped
from rsft_hf.generative.candidates import VERDICTS, Candidate
from rsft_hf.generative.config import CandidateConfig
from rsft_hf.generative.encoding import Encoder, RowCollator
from rsft_hf.generative.filters import Deduplicate, Filter, RejectEmpty, RejectTruncated
from rsft_hf.generative.generation import Generator, Sampling, prepared_generator, reference_opener
from rsft_hf.generative.prompts import column_names
from rsft_hf.generative.rounds import RoundRunner
from rsft_hf.generative.selection import (
    COLUMNS,
    RoundTable,
    SelectionRules,
    filter_candidates,
    judge,
    score_candidates,
    set_verdicts,
)
from rsft_hf.generative.training_rows import CandidatePool, draw_rows, encode_candidates, supervised_rows
from rsft_hf.generative.validation import prompt_set, validate_best_checkpoint, validate_collator, validate_model
from rsft_hf.resampler import Predictions, Resampler


class CandidateResampler(Resampler):
    """Trains on the model's own accepted candidates: each epoch is a round of generate, score, accept.

    Args:
        reward_funcs: One or several functions with the contract of TRL's GRPO, reward models, or names of such models.
        acceptance: Rule from rewards to accepted candidates; `TopKPerPrompt(1)`, best of n, by default.
        reward_weights: One factor per function; 1 each where None.
        reward_processing_classes: One tokenizer per reward model, None for functions.
        num_candidates: Candidates per prompt and attempt, at least 1.
        generation_config: How to sample: `GenerationConfig(do_sample=True, max_new_tokens=..., temperature=...)`. It
            overrides the model's own; what neither says is plain sampling.
        engine: "auto", "generate", or an `Engine`.
        candidates: Folder that `import_candidates` wrote, whose completions are scored and accepted in the first round
            instead of generating; several rounds where it holds folders named `round-*`.
        proposal_model: Generates instead of the trained model (a teacher); shares its tokenizer.
        reference_model: Gives log p of `DensityRatio` instead of the generating model; "base" is a PEFT model with its
            adapter off.
        merge_adapter: Whether the trained model's adapter is merged into its base while it generates: faster, and other
            candidates, since merging rounds. The base comes back bit for bit.
        filters: Candidates that one of them refuses are neither scored nor accepted.
        dedup: Which candidates of a prompt count as the same, of which the best-rewarded stays.
        max_attempts: Samplings of a prompt in a round, as long as it has fewer accepted than it should; at least 1.
        min_accepted_per_prompt: Accepted candidates below which a prompt is sampled again, or falls back.
        on_nothing_accepted: What becomes of prompts below that after the last attempt: "skip" leaves them out, "best"
            takes their best candidates, "reference" their reference answer; "raise" leaves them out too, and raises if
            nothing at all was accepted in the round.
        num_draws: Rows trained on per round; the number of prompts where None. Accepted rows are shuffled and, if they
            are fewer, repeated.
        every_n_epochs: Epochs from one round to the next; those between read the same rows in another order.
        round_start: Weights that training starts from in each round: "last" goes on, "base" goes back to those of the
            start (ReST-EM), "best" goes back to the best checkpoint before it generates.
        replay_rounds: Earlier rounds whose accepted candidates are trained on again, from 0.
        supervised_dataset: Rows with prompt and `completion`, or `input_ids` and `labels`, mixed into every round.
        supervised_fraction: Their share of the rows trained on, in [0, 1].
        prompt_column: Column of the prompts, text or messages.
        reference_column: Column of the reference answers, for `on_nothing_accepted` and `compute_metrics`.
        chat_template_kwargs: Handed to the chat template.
        max_prompt_length: Maximum number of tokens of a prompt, chat template included; where None, what the model
            reads beside `max_new_tokens`.
        on_long_prompt: Whether prompts above that are refused ("raise") or left out, counted and named ("drop").
        keep_log_probs: Whether to store log q and log p though no rule needs them.
        eval_reward_funcs: Functions that score held-out answers only, and select nothing.
        eval_generation_config: How to generate when evaluating; greedy where None.

    Raises:
        TypeError: If a rule, filter or function is of the wrong kind.
        ValueError: If a number is out of its range, or arguments contradict each other.
    """

    def __init__(
        self,
        reward_funcs: Any,
        acceptance: Acceptance | None = None,
        *,
        reward_weights: Sequence[float] | None = None,
        reward_processing_classes: Any = None,
        num_candidates: int = 8,
        generation_config: GenerationConfig | None = None,
        engine: str | Engine = "auto",
        candidates: Path | str | None = None,
        proposal_model: Any = None,
        reference_model: Any = None,
        merge_adapter: bool = False,
        filters: Sequence[Filter] = (RejectTruncated(), RejectEmpty()),
        dedup: Deduplicate | None = None,
        max_attempts: int = 1,
        min_accepted_per_prompt: int = 1,
        on_nothing_accepted: Literal["raise", "skip", "best", "reference"] = "raise",
        num_draws: int | None = None,
        every_n_epochs: int = 1,
        round_start: Literal["last", "base", "best"] = "last",
        replay_rounds: int = 0,
        supervised_dataset: Any = None,
        supervised_fraction: float = 0.0,
        prompt_column: str = "prompt",
        reference_column: str = "reference",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_prompt_length: int | None = None,
        on_long_prompt: Literal["raise", "drop"] = "raise",
        keep_log_probs: bool = False,
        eval_reward_funcs: Any = (),
        eval_generation_config: GenerationConfig | None = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        options["acceptance"] = TopKPerPrompt(1) if acceptance is None else acceptance
        self.config = CandidateConfig(**options)
        self._runner: RoundRunner | None = None
        self.round_number: int | None = None

    def bind(self, trainer: Trainer) -> CandidatePool:
        """Returns the pool that takes the place of the prompts in the training loader. Collective."""
        self.seed = run_seed(trainer)
        self._runner = RoundRunner.from_trainer(self.config, trainer, self.seed)
        self.pool = CandidatePool(supervised_rows(self.config, self._runner.policy.encoder))
        collator = self.collator(trainer.data_collator)
        validate_collator(collator, self._runner.policy.encoder, self._runner.prompts.row(0))
        self._metrics: dict[str, float] = {}
        self._drawn: list[int] = []
        self._began: float | None = None
        return self.pool

    def draws_per_epoch(self) -> int:
        """Returns `num_draws`, or the number of prompts."""
        return len(self._bound().prompts) if self.config.num_draws is None else self.config.num_draws

    def resample(self, epoch: int) -> torch.Tensor:
        """Returns the rows of the epoch, after a new round where one is due. Collective."""
        if epoch % self.config.every_n_epochs == 0:
            self._run_round(epoch // self.config.every_n_epochs)
        indices = self._draw(epoch)
        self._drawn, self._began = indices.tolist(), time.perf_counter()
        return indices

    def metrics(self) -> dict[str, float]:
        """Returns the figures of the last round."""
        return dict(self._metrics)

    def end_epoch(self) -> dict[str, float]:
        """Returns the tokens trained on in the epoch, and how many a second unless the epoch was resumed."""
        tokens = self.pool.num_tokens(self._drawn)
        metrics = {"round/trained_tokens": float(tokens)}
        if self._began is not None:
            metrics["round/trained_tokens_per_second"] = tokens / max(time.perf_counter() - self._began, 1e-9)
        return metrics

    def end_training(self) -> None:
        """Moves the rounds that a longer run has left behind the last one aside. Collective."""
        if self.round_number is not None:
            self._bound().set_later_rounds_aside(self.round_number)

    def first_candidates(self, count: int) -> list[Candidate]:
        """Returns up to `count` candidates of the round's first prompts, with rewards and verdicts."""
        store, found = self._bound().store(self.round_number or 0), list[Candidate]()
        for path in store.shards():
            if len(found) < count:
                found += store.read(path)
        return found[:count]

    def collator(self, collator: Any) -> Any:
        """Returns the trainer's collator, or one that pads labels where the trainer's default would not."""
        if type(collator) is DataCollatorWithPadding or collator is default_data_collator:
            return RowCollator(self._bound().sampling.generation_config.pad_token_id)
        return collator

    def evaluates(self, dataset: Any) -> bool:
        """Returns whether a data set holds prompts."""
        return self.config.prompt_column in column_names(dataset)

    def predict(self, dataset: Any, prefix: str) -> Predictions:
        """Returns one answer per prompt (text), the references, and the metrics. Collective."""
        prompts = prompt_set(dataset, self.config, "eval_dataset", is_trained_on=False)
        texts, references, metrics = self._bound().predict(prompts)
        return texts, references, {f"{prefix}_{name.removeprefix(f'{prefix}_')}": metrics[name] for name in metrics}

    def save(self, directory: Path, is_writer: bool) -> None:
        """Writes the pool and the figures of the round. Collective."""
        if is_writer:
            numbers = {"seed": self.seed, "metrics": self._metrics, "round_number": self.round_number}
            numbers["kept"] = self._kept()
            drawn = {"drawn": torch.tensor(self._drawn, dtype=torch.int64)}
            save_state(directory, "generative", numbers, self.pool.state() | drawn)

    def load(self, directory: Path) -> None:
        """Takes up what `save` wrote; candidates go on with the seed of the saved run.

        Raises:
            ValueError: If the run has other rows or rounds, or goes back to a best checkpoint that is gone.
        """
        numbers, tensors = load_state(directory, "generative")
        if self.config.round_start == "best":
            validate_best_checkpoint(directory.parent)
        validate_unchanged(numbers["kept"], self._kept())
        self.pool.load(tensors)
        self._drawn = tensors["drawn"].tolist()
        self.seed, self._metrics = numbers["seed"], numbers["metrics"]
        self.round_number = numbers["round_number"]
        self._bound().use_seed(self.seed)

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
        validate_model(model)
        encoder = Encoder.for_model(processing_class, model, self.config.chat_template_kwargs)
        config = sampling_config(self.config.generation_config, model, processing_class)
        sampling = Sampling(config, self.config.num_candidates, seed, round_number, attempt, self.config.with_log_probs)
        reference = reference_opener(self.config.reference_model, model, model.device)
        engine = choose_engine(self.config.engine, model)
        engine.check(model, config, self.config.engine_log_probs)
        generator = Generator(model, encoder, engine, reference=reference)
        with prepared_generator(self.config, None, generator, model) as generator:
            return generator(prompt_set(prompts, self.config, "prompts"), range(len(prompts)), sampling)

    def score(self, candidates: Sequence[Candidate], trainer_state: Any = None) -> list[Candidate]:
        """Returns the candidates, filtered and scored in place; those a filter refuses are not scored.

        Args:
            candidates: As `generate` returns them: the columns that rewards read are in their `row`.
            trainer_state: Handed to the reward functions.
        """
        filter_candidates(candidates, self.config.filters, self.config.dedup)
        score_candidates(candidates, self.config.functions, trainer_state)
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
        rule = self.config.acceptance.for_round(round_number)
        takes_best = self.config.on_nothing_accepted == "best"
        rules = SelectionRules(rule, self.config.min_accepted_per_prompt, takes_best, seed, round_number)
        generated = [one for one in candidates if one.finish_reason != "reference"]
        names = {verdict: repr(rule) for verdict in VERDICTS if verdict != "filtered"}
        set_verdicts(generated, judge(RoundTable.of(columns), rules), names)
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
        encoder = Encoder(processing_class, is_encoder_decoder, dict(self.config.chat_template_kwargs or {}))
        return datasets.Dataset.from_list(list(encode_candidates(candidates, encoder)))

    def _kept(self) -> dict[str, int]:
        return {"supervised rows": len(self.pool.supervised), "every_n_epochs": self.config.every_n_epochs}

    def _bound(self) -> RoundRunner:
        if self._runner is None:
            raise RuntimeError("The resampler is not bound to a trainer yet. Pass it as `resampler=` and call train().")
        return self._runner

    def _run_round(self, number: int) -> None:
        runner, self.round_number = self._bound(), number
        trainer = runner.trainer
        if self.config.round_start == "best" and number > 0:
            trainer.restore_best_weights()
        if self.config.round_start == "base" and number == 0:
            trainer.save_base_weights()
        self._metrics = runner.run(number, self._has_other_rows(number))
        with FailTogether(trainer.accelerator, f"encoding round {number}"):
            rounds = range(max(0, number - self.config.replay_rounds), number + 1)
            accepted = (one for earlier in rounds for one in runner.store(earlier).accepted())
            self.pool.replace(encode_candidates(accepted, runner.policy.encoder))
        if self.config.round_start == "base" and number > 0:
            trainer.restore_base_weights()

    def _draw(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.seed + epoch) % 2**62)
        indices = draw_rows(self.pool, self.draws_per_epoch(), self.config.supervised_fraction, generator)
        self._metrics |= {
            "round/accepted_rows": float(len(self.pool.accepted)),
            "round/repeats": len(indices) / len(indices.unique()),
            "round/unused_fraction": 1.0 - len(indices.unique()) / len(self.pool),
        }
        return broadcast_from_main(self._bound().trainer.accelerator, indices)

    def _has_other_rows(self, number: int) -> bool:
        """Whether a round that accepts nothing leaves anything to train on."""
        if self.config.on_nothing_accepted == "raise":
            return False
        runner = self._bound()
        replayed = range(max(0, number - self.config.replay_rounds), number)
        return len(self.pool.supervised) > 0 or any(
            next(runner.store(earlier).accepted(), None) is not None for earlier in replayed
        )
