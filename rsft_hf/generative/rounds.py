"""A round, shard by shard and process by process: the order of the stages, and what a kill leaves to go on from.

    prompts in shards, shared among the processes -> generate -> write -> filter, score -> write
    -> the main process judges the whole round -> prompts in need of another attempt? once more -> verdicts written

Every shard is the work of one process, and holds the same candidates whichever process that is.

The weights that a round's training starts from: a snapshot of those the run began with.

A model enters; its trainable parameters are written once, and put back whenever a round starts from the base.

What a run needs before its first round: parts taken from the trainer, and refusals while nothing is lost.

A trainer and the resampler's options enter, the prompts, the generators and the runner leave.

Which process generates what: shards of prompts, shared out by the tokens they are expected to take.

Prompts and the lengths of earlier candidates enter, the shards of one process leave. The shards themselves depend on
the prompts alone, so that any number of processes can go on with them.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.utils import logging

from rsft_hf.distributed import FailTogether, object_from_main
from rsft_hf.engines.auto import choose_engine
from rsft_hf.engines.base import check_engine
from rsft_hf.engines.generation_config import in_force, sampling_config
from rsft_hf.engines.model_access import refuse_unmergeable, unwrapped
from rsft_hf.generative.candidates import CandidateStore, PromptSet
from rsft_hf.generative.config import CandidateConfig
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.evaluation import evaluate_prompts, look_at_evaluation
from rsft_hf.generative.generation import (
    Generator,
    Sampling,
    evaluation_engine,
    hand_over,
    ready,
    reference_opener,
)
from rsft_hf.generative.metrics import Effort, explain_empty_round, round_metrics
from rsft_hf.generative.round_cache import keeps_answers, model_fingerprint, open_round, round_facts
from rsft_hf.generative.selection import (
    ACCEPTED,
    COLUMNS,
    RoundTable,
    SelectionRules,
    filter_candidates,
    judge,
    prompts_in_need,
    score_candidates,
    stable_repr,
)
from rsft_hf.generative.training_rows import reference_candidate
from rsft_hf.generative.validation import (
    prompt_set,
    refuse_arguments,
    refuse_long_prompts,
    refuse_model,
    refuse_other_vocabulary,
)
from rsft_hf.training_set import dataset_fingerprint

logger = logging.get_logger(__name__)


@dataclass
class RoundRunner:
    """The rounds of one training run: what they need, and the order of their stages.

    Attributes:
        config: Options.
        trainer: Trainer whose run it is.
        prompts: Prompts to train on.
        policy: Generator with the model that is trained, for evaluation.
        generator: Generator of the candidates, with the proposal model where there is one.
        sampling: How candidates are drawn, but for round and attempt.
        digests: Digest of the prompts, by which a stored round is recognised.
    """

    config: CandidateConfig
    trainer: Trainer
    prompts: PromptSet
    policy: Generator
    generator: Generator
    sampling: Sampling
    digests: Mapping[str, str]

    @classmethod
    def from_trainer(cls, config: CandidateConfig, trainer: Trainer, run_seed: int) -> "RoundRunner":
        """Prepares and validates the parts of a run.

        Raises:
            ValueError: If the model, the prompts, the rewards, the engine or the trainer's arguments do not allow it.
        """
        refuse_arguments(config, trainer)
        tokenizer, model = _tokenizer(trainer), unwrapped(trainer.model)
        refuse_model(model)
        if config.merge_adapter:
            refuse_unmergeable(model)
        encoder = Encoder(tokenizer, bool(model.config.is_encoder_decoder), dict(config.chat_template_kwargs or {}))
        prompts = prompt_set(trainer.train_dataset, config, "train_dataset")
        proposal = model if config.proposal_model is None else config.proposal_model
        refuse_model(proposal)
        if proposal is not model:
            proposal.to(trainer.args.device)
            refuse_other_vocabulary(proposal, model)
        if config.on_nothing_accepted == "reference":
            reference_candidate(prompts, 0, config.reference_column, encoder)  # a template it does not fit fails here
        generation_config = sampling_config(config.generation_config, proposal, tokenizer)
        logger.info(f"Candidates are sampled with {in_force(generation_config)}.")
        refuse_long_prompts(prompts, encoder, proposal, generation_config.max_new_tokens)
        engine, surroundings = choose_engine(config.engine, model), trainer.accelerator.autocast
        check_engine(engine, proposal, generation_config, config.engine_log_probs)
        for functions in (config.functions, config.eval_functions):
            if functions is not None:
                functions.to(trainer.args.device)
        policy = Generator(model, encoder, evaluation_engine(engine, model, proposal is not model), surroundings)
        if trainer.eval_dataset is not None:
            look_at_evaluation(config, trainer.eval_dataset, prompts, policy)
        reference = reference_opener(config.reference_model, model, trainer.args.device)
        generator = Generator(proposal, encoder, engine, surroundings, reference)
        sampling = Sampling(generation_config, config.num_candidates, run_seed, with_log_probs=config.with_log_probs)
        digests = {"prompts": dataset_fingerprint(trainer.train_dataset, len(trainer.train_dataset))}
        return cls(config, trainer, prompts, policy, generator, sampling, digests)

    @property
    def accelerator(self) -> Accelerator:
        """Accelerator of the trainer, which knows the processes."""
        return self.trainer.accelerator

    @property
    def directory(self) -> Path:
        """Folder of all rounds."""
        return Path(self.trainer.args.output_dir) / "candidates"

    def use_seed(self, run_seed: int) -> None:
        """Draws candidates from the seed of the run that a checkpoint belongs to."""
        self.sampling = replace(self.sampling, run_seed=run_seed)

    def store(self, round_number: int) -> CandidateStore:
        """Returns the store of a round."""
        folder = self.directory / f"round-{round_number:03d}"
        return CandidateStore(folder, self.config.functions.names, not isinstance(self.prompts.row(0)[0], str))

    def run(self, round_number: int, may_be_empty: bool = False) -> dict[str, float]:
        """Runs a round with the current weights, or what is left of it, and returns its metrics. Collective.

        Args:
            round_number: Round, from 0.
            may_be_empty: Whether there are other rows to train on.

        Raises:
            RuntimeError: If nothing was accepted, unless that may be; the candidates stay on disk.
        """
        with ready(self.config, self.accelerator, self.generator, self.policy.model, hands_over=False) as generator:
            digest = object_from_main(self.accelerator, model_fingerprint(generator.model))
            digests = {**self.digests, "model": digest}
            facts = round_facts(self.config, generator, self.prompts, self.sampling, digests)
            if self._has_to_generate(round_number, facts):
                hand_over(self.accelerator, generator.engine, generator.model)
            return replace(self, generator=generator)._run_stages(round_number, facts, may_be_empty)

    def evaluate(self, prompts: PromptSet) -> dict[str, float]:
        """Returns the metrics of held-out prompts with the current weights. Collective."""
        with ready(self.config, self.accelerator, self.policy, self.policy.model) as policy:
            return evaluate_prompts(self.config, policy, prompts, self.accelerator, self.trainer)

    def _run_stages(self, round_number: int, facts: Mapping[str, Any], may_be_empty: bool) -> dict[str, float]:
        began, store, effort = time.perf_counter(), self.store(round_number), Effort()
        rules = self._rules(round_number)
        with FailTogether(self.accelerator, f"preparing round {round_number}"):
            if self.accelerator.is_main_process:
                open_round(store, facts)
        with FailTogether(self.accelerator, f"looking for {store.directory}"):
            if not store.directory.is_dir():
                raise RuntimeError(
                    f"{store.directory} is not visible here: the processes must share `output_dir`. Put it on a file "
                    "system that all machines mount."
                )
        needy: Sequence[int] = range(len(self.prompts))
        verdicts: list[str] = []
        for attempt in range(self.config.max_attempts):
            lengths = self._lengths(round_number, attempt)
            sampling = replace(self.sampling, round_number=round_number, attempt=attempt, expected_lengths=lengths)
            with FailTogether(self.accelerator, f"generating and scoring round {round_number}"):
                for path, prompt_ids in self._own_shards(store, needy, sampling):
                    self._make_shard(store, path, prompt_ids, sampling, effort)
            is_last = attempt == self.config.max_attempts - 1
            takes_best = is_last and self.config.on_nothing_accepted == "best"
            verdicts, needy = self._judged(store, replace(rules, takes_best=takes_best), attempt)
            if not needy:
                break
        metrics = self._finish(store, rules, verdicts, needy)
        with FailTogether(self.accelerator, f"looking at round {round_number}"):
            if self.accelerator.is_main_process and not may_be_empty and next(store.accepted(), None) is None:
                table = RoundTable.of(store.columns(COLUMNS))
                raise RuntimeError(explain_empty_round(store, table, verdicts, rules.acceptance))
        self.accelerator.wait_for_everyone()
        return metrics | effort.metrics(self.accelerator) | {"round/seconds": time.perf_counter() - began}

    def _has_to_generate(self, number: int, facts: Mapping[str, Any]) -> bool:
        """Whether candidates of a round are missing, or may come to be, as the main process has it. Collective."""
        is_whole = False
        with FailTogether(self.accelerator, f"looking for the candidates of round {number}"):
            # A second attempt is decided on by what the first one's candidates are worth.
            if self.accelerator.is_main_process and self.config.max_attempts == 1:
                store, count = self.store(number), len(self.prompts)
                stages = [store.stage(store.path(0, shard)) for shard, _ in own_shards(range(count), count, {}, 1, 0)]
                is_whole = keeps_answers(store, facts) and None not in stages
        return not object_from_main(self.accelerator, is_whole)

    def _rules(self, round_number: int) -> SelectionRules:
        rule = self.config.acceptance.for_round(round_number)
        minimum, seed = self.config.min_accepted_per_prompt, self.sampling.run_seed
        return SelectionRules(rule, minimum, False, seed, round_number)

    def _lengths(self, round_number: int, attempt: int) -> dict[int, float]:
        """Tokens that candidates took the last time, by prompt, as the main process has them."""
        lengths: dict[int, float] = {}
        with FailTogether(self.accelerator, f"looking at the lengths before round {round_number}"):
            if self.accelerator.is_main_process and (attempt or round_number):
                lengths = mean_lengths(self.store(round_number if attempt else round_number - 1))
        return object_from_main(self.accelerator, lengths)

    def _own_shards(
        self, store: CandidateStore, prompt_ids: Sequence[int], sampling: Sampling
    ) -> Iterator[tuple[Path, Sequence[int]]]:
        """The shards of an attempt that are this process's work."""
        place = self.accelerator.num_processes, self.accelerator.process_index
        for number, own in own_shards(prompt_ids, len(self.prompts), sampling.expected_lengths, *place):
            yield store.path(sampling.attempt, number), own

    def _make_shard(
        self,
        store: CandidateStore,
        path: Path,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        effort: Effort,
    ) -> None:
        stage = store.stage(path)
        if stage is None:
            began = time.perf_counter()
            candidates = self.generator(self.prompts, prompt_ids, sampling)
            effort.generate_seconds += time.perf_counter() - began
            effort.generate_tokens += sum(candidate.num_tokens for candidate in candidates)
            store.write(path, candidates, "generated")
        elif stage == "generated" or store.is_unjudged(path):
            candidates = store.read(path)
            for candidate in candidates:
                candidate.forget_scores()
                candidate.row = self.prompts.row(candidate.prompt_id)[1]
        else:
            return
        began = time.perf_counter()
        filter_candidates(candidates, self.config.filters, self.config.dedup)
        scores = score_candidates(candidates, self.config.functions, self.trainer.state, candidates[0].seed % 2**32)
        effort.logged.append(scores.metrics)
        effort.score_seconds += time.perf_counter() - began
        effort.score_tokens += sum(candidate.num_tokens for candidate in candidates if candidate.verdict != "filtered")
        store.write(path, candidates, "scored")

    def _judged(self, store: CandidateStore, rules: SelectionRules, attempt: int) -> tuple[list[str], list[int]]:
        """The verdict on every candidate so far, and the prompts in need, as the main process has them."""
        decided: tuple[list[str], list[int]] = ([], [])
        with FailTogether(self.accelerator, f"judging round {rules.round_number}"):
            if self.accelerator.is_main_process:
                # A killed run may have left shards of later attempts: who needs those was decided without them.
                table = RoundTable.of(store.columns(COLUMNS), attempt)
                verdicts = judge(table, rules, self._accepted_earlier(rules.round_number))
                minimum = rules.min_accepted
                decided = verdicts, prompts_in_need(range(len(self.prompts)), table, verdicts, minimum)
        return object_from_main(self.accelerator, decided)

    def _accepted_earlier(self, round_number: int) -> set[tuple[int, str]]:
        if self.config.dedup is None or not self.config.dedup.across_rounds:
            return set()
        keys = set()
        for number in range(round_number):
            columns = self.store(number).columns(("prompt_id", "duplicate_key", "is_accepted"))
            keys |= {
                (prompt, key)
                for prompt, key, is_accepted in zip(*columns.values(), strict=True)
                if is_accepted and key is not None
            }
        return keys

    def _finish(
        self, store: CandidateStore, rules: SelectionRules, verdicts: Sequence[str], needy: Sequence[int]
    ) -> dict[str, float]:
        with FailTogether(self.accelerator, f"writing the verdicts of round {rules.round_number}"):
            self._write_verdicts(store, rules, verdicts)
            if self.accelerator.is_main_process and needy and self.config.on_nothing_accepted == "reference":
                column, encoder = self.config.reference_column, self.generator.encoder
                references = [reference_candidate(self.prompts, prompt, column, encoder) for prompt in needy]
                store.write(store.directory / "references.parquet", references, "judged")
        metrics: dict[str, float] = {}
        with FailTogether(self.accelerator, f"describing round {rules.round_number}"):
            if self.accelerator.is_main_process:
                table = RoundTable.of(store.columns(COLUMNS))
                metrics = round_metrics(store, table, verdicts, rules.acceptance)
                store.write_manifest(store.manifest() | {"metrics": metrics})
        return object_from_main(self.accelerator, metrics)

    def _write_verdicts(self, store: CandidateStore, rules: SelectionRules, verdicts: Sequence[str]) -> None:
        reasons = {
            "accepted": stable_repr(rules.acceptance),
            "rejected": stable_repr(rules.acceptance),
            "duplicate": stable_repr(self.config.dedup),
            "unjudged": "no reward function answered",
            "fallback": f'on_nothing_accepted="{self.config.on_nothing_accepted}"',
        }
        start = 0
        for number, path in enumerate(store.shards()):
            if path.name == "references.parquet":
                continue
            size = pq.read_metadata(path).num_rows
            if number % self.accelerator.num_processes == self.accelerator.process_index:
                candidates = store.read(path)
                for candidate, verdict in zip(candidates, verdicts[start : start + size], strict=True):
                    candidate.verdict, candidate.is_accepted = verdict, verdict in ACCEPTED
                    candidate.rule = reasons.get(verdict, candidate.rule)
                store.write(path, candidates, "judged")
            start += size


def save_base(model: torch.nn.Module, path: Path) -> None:
    """Writes the trainable parameters: of a PEFT model its adapter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".incomplete")
    save_file({name: values.detach().cpu().contiguous().clone() for name, values in _trainable(model).items()}, draft)
    draft.replace(path)


def restore_base(model: torch.nn.Module, path: Path) -> None:
    """Puts the trainable parameters back to what `save_base` wrote.

    Raises:
        RuntimeError: If the file is absent, or belongs to other parameters.
    """
    if not path.is_file():
        raise RuntimeError(f'round_start="base" finds no {path}, which the first round writes. Begin the run anew.')
    saved, parameters = load_file(path), _trainable(model)
    if saved.keys() != parameters.keys():
        raise RuntimeError(f"{path} holds other parameters than the model. Begin the run anew, in another folder.")
    with torch.no_grad():
        for name, values in parameters.items():
            values.copy_(saved[name])


def _trainable(model: torch.nn.Module) -> dict[str, Any]:
    return {name: values for name, values in model.named_parameters() if values.requires_grad}


def _tokenizer(trainer: Trainer) -> PreTrainedTokenizerBase:
    tokenizer = trainer.processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"`processing_class` is {type(tokenizer).__name__}; generating needs the model's tokenizer. Pass "
            "processing_class=AutoTokenizer.from_pretrained(...)."
        )
    return tokenizer


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
