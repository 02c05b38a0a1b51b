"""What a run needs before its first round: parts taken from the trainer, and refusals while nothing is lost.

A trainer and the resampler's options enter, the prompts, the generators and the runner leave.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, Trainer
from transformers.utils import logging

from rsft_hf.distributed import FailTogether, object_from_main
from rsft_hf.engines.auto import choose_engine
from rsft_hf.engines.base import check_engine
from rsft_hf.engines.generation_config import in_force, sampling_config
from rsft_hf.engines.model_access import refuse_unmergeable, unwrapped
from rsft_hf.generative.encoding import Encoder, Row
from rsft_hf.generative.evaluation import evaluate_prompts
from rsft_hf.generative.facts import model_fingerprint, round_facts
from rsft_hf.generative.ready import evaluation_engine, hand_over, log_probs_of_engine, ready, reference_opener
from rsft_hf.generative.refusals import (
    look_at_evaluation,
    prompt_set,
    refuse_arguments,
    refuse_long_prompts,
    refuse_model,
    refuse_other_vocabulary,
)
from rsft_hf.generative.reopening import keeps_answers
from rsft_hf.generative.rounds import RoundRunner
from rsft_hf.generative.shards import own_shards
from rsft_hf.generative.stages import Generator, PromptSet, Sampling, reference_candidate

if TYPE_CHECKING:
    from rsft_hf.generative.resampler import CandidateResampler

logger = logging.get_logger(__name__)


@dataclass
class Setup:
    """The parts of one training run.

    Attributes:
        trainer: Whose run it is.
        prompts: The prompts to train on.
        policy: Generates with the model that is trained.
        runner: Runs the rounds.
        supervised: Encoded rows of the supervised data set.
    """

    trainer: Trainer
    prompts: PromptSet
    policy: Generator
    runner: RoundRunner
    supervised: list[Row]

    def use_seed(self, run_seed: int) -> None:
        """Draws candidates from another seed from here on: that of the run which a checkpoint goes on."""
        self.runner.sampling = replace(self.runner.sampling, run_seed=run_seed)

    def run_round(self, number: int, prompts_digest: str, may_be_empty: bool) -> dict[str, float]:
        """Runs a round with the weights of this moment, and returns its figures. Collective.

        Args:
            number: Round, from 0.
            prompts_digest: Names the prompts among the round's facts.
            may_be_empty: Whether there is anything else to train on.
        """
        runner, accelerator = self.runner, self.trainer.accelerator
        with ready(runner.options, accelerator, runner.generator, self.policy.model, hands_over=False) as generator:
            digest = object_from_main(accelerator, model_fingerprint(generator.model))
            facts = round_facts(runner.options, runner, prompts_digest, digest)
            if self._has_to_generate(number, facts):
                hand_over(accelerator, generator.engine, generator.model)
            return replace(runner, generator=generator).run(number, facts, self.trainer.state, may_be_empty)

    def _has_to_generate(self, number: int, facts: Mapping[str, Any]) -> bool:
        """Whether candidates of a round are missing, or may come to be, as the main process has it. Collective."""
        runner, accelerator, is_whole = self.runner, self.trainer.accelerator, False
        with FailTogether(accelerator, f"looking for the candidates of round {number}"):
            # A second attempt is decided on by what the first one's candidates are worth.
            if accelerator.is_main_process and runner.options.max_attempts == 1:
                store, count = runner.store(number), len(self.prompts)
                stages = [store.stage(store.path(0, shard)) for shard, _ in own_shards(range(count), count, {}, 1, 0)]
                is_whole = keeps_answers(store, facts) and None not in stages
        return not object_from_main(accelerator, is_whole)

    def evaluate(self, prompts: PromptSet) -> dict[str, float]:
        """Returns the figures of held-out prompts, from the weights of this moment. Collective."""
        options, accelerator = self.runner.options, self.trainer.accelerator
        with ready(options, accelerator, self.policy, self.policy.model) as policy:
            return evaluate_prompts(options, policy, prompts, accelerator, self.trainer)


def set_up(options: "CandidateResampler", trainer: Trainer, run_seed: int) -> Setup:
    """Returns the parts of a run, after having checked that they fit.

    Raises:
        ValueError: If the model, the prompts, the rewards, the engine or the trainer's arguments do not allow it.
    """
    refuse_arguments(options, trainer)
    tokenizer, model = _tokenizer(trainer), unwrapped(trainer.model)
    refuse_model(model)
    if options.merge_adapter:
        refuse_unmergeable(model)
    encoder = Encoder(tokenizer, bool(model.config.is_encoder_decoder), dict(options.chat_template_kwargs or {}))
    prompts = prompt_set(trainer.train_dataset, options, "train_dataset")
    proposal = model if options.proposal_model is None else options.proposal_model
    refuse_model(proposal)
    if proposal is not model:
        proposal.to(trainer.args.device)
        refuse_other_vocabulary(proposal, model)
    if options.on_nothing_accepted == "reference":
        reference_candidate(prompts, 0, options.reference_column, encoder)  # a template it does not fit fails here
    config = sampling_config(options.generation_config, proposal, tokenizer)
    logger.info(f"Candidates are sampled with {in_force(config)}.")
    refuse_long_prompts(prompts, encoder, proposal, config.max_new_tokens)
    engine, surroundings = choose_engine(options.engine, model), trainer.accelerator.autocast
    check_engine(engine, proposal, config, log_probs_of_engine(options))
    for functions in (options.functions, options.eval_functions):
        if functions is not None:
            functions.to(trainer.args.device)
    policy = Generator(model, encoder, evaluation_engine(engine, model, proposal is not model), surroundings)
    if trainer.eval_dataset is not None:
        look_at_evaluation(options, trainer.eval_dataset, prompts, policy)
    reference = reference_opener(options.reference_model, model, trainer.args.device)
    generator = Generator(proposal, encoder, engine, surroundings, reference)
    sampling = Sampling(config, options.num_candidates, run_seed, with_log_probs=options.with_log_probs)
    is_conversational = not isinstance(prompts.row(0)[0], str)
    directory = Path(trainer.args.output_dir) / "candidates"
    runner = RoundRunner(options, trainer.accelerator, generator, prompts, sampling, directory, is_conversational)
    return Setup(trainer, prompts, policy, runner, _supervised_rows(options, encoder))


def _tokenizer(trainer: Trainer) -> PreTrainedTokenizerBase:
    tokenizer = trainer.processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"`processing_class` is {type(tokenizer).__name__}; generating needs the model's tokenizer. Pass "
            "processing_class=AutoTokenizer.from_pretrained(...)."
        )
    return tokenizer


def _supervised_rows(options: "CandidateResampler", encoder: Encoder) -> list[Row]:
    rows = []
    for number in range(0 if options.supervised_dataset is None else len(options.supervised_dataset)):
        row = options.supervised_dataset[number]
        if "input_ids" in row and "labels" in row:
            rows.append(
                {
                    "input_ids": list(row["input_ids"]),
                    "attention_mask": list(row.get("attention_mask", [1] * len(row["input_ids"]))),
                    "labels": list(row["labels"]),
                }
            )
        elif options.prompt_column in row and "completion" in row:
            prompt = row[options.prompt_column]
            rows.append(
                encoder.training_row(encoder.prompt_ids(prompt), encoder.completion_ids(prompt, row["completion"]))
            )
        else:
            raise ValueError(
                f"Row {number} of `supervised_dataset` has the columns {list(row)}. It needs {options.prompt_column!r} "
                "and 'completion', or 'input_ids' and 'labels'."
            )
    return rows
