"""Rollout: generation of candidates, and the preparation of model, reference model and engine for it.

`Generator` turns prompts into candidates; it needs no process group and no disk. `prepared_generator` prepares it for a
round: the whole model, the reference model for log p, weight sync of the engine. `completion_log_probabilities` is the
teacher-forced pass of a reference model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig
from transformers.utils import logging

from rsft_hf.distributed import FailTogether
from rsft_hf.engines.auto import choose_engine
from rsft_hf.engines.base import Engine, GenerationRequest
from rsft_hf.engines.log_probs import chosen_log_probabilities
from rsft_hf.engines.model_access import is_peft_model, whole_model
from rsft_hf.engines.random_streams import candidate_seed
from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.config import CandidateConfig
from rsft_hf.generative.encoding import IGNORED, Encoder, RowCollator
from rsft_hf.generative.prompts import PromptSet
from rsft_hf.generative.validation import validate_model, validate_vocabulary
from rsft_hf.isolation import in_evaluation_mode
from rsft_hf.memory import map_in_batches


@dataclass(frozen=True)
class Sampling:
    """Sampling options of a round.

    Attributes:
        generation_config: Complete: see `generation_config.sampling_config`.
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
    """Generator of candidates from prompts.

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
        token_ids = [self.encoder.prompt_ids(*row) for row in rows]
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
        self._note_surroundings(candidates, [token_ids[one.prompt] for one in sequences])
        if self.reference is not None and sampling.with_log_probs:
            self._take_reference(candidates, [token_ids[one.prompt] for one in sequences])
        if sampling.with_log_probs and any(None in (one.log_q, one.log_p) for one in candidates):
            raise ValueError(
                f"{type(self.engine).__name__} gave candidates without the log probabilities that are wanted. Name the "
                "model that log p is wanted of as `reference_model`, or use an engine that gives log q and log p."
            )
        return candidates

    def _note_surroundings(self, candidates: Sequence[Candidate], prompts: Sequence[Sequence[int]]) -> None:
        """Notes what exports need besides prompt and text."""
        for candidate, prompt_ids in zip(candidates, prompts, strict=True):
            if isinstance(candidate.prompt, str):
                candidate.separator = self.encoder.separator(prompt_ids, candidate.token_ids)
            else:
                settings = {**self.encoder.chat_template_kwargs, **(candidate.row.get("chat_template_kwargs") or {})}
                candidate.template_columns = {"chat_template_kwargs": settings}

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


@torch.no_grad()
def completion_log_probabilities(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_size: int = 16,
) -> torch.Tensor:
    """Returns log p(completion | prompt), end token included, shape (len(completions),), float64, nats.

    Args:
        model: In evaluation mode.
        encoder: Knows where prompt and answer go.
        prompts: Token ids of each prompt.
        completions: Token ids of each answer, as sampled.
        batch_size: Rows per forward pass, sorted by length; halved when memory runs out.
    """
    rows = [encoder.training_row(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
    collate = RowCollator(pad_token_id=encoder.tokenizer.pad_token_id or 0)
    sums = map_in_batches(
        [len(row["input_ids"]) for row in rows],
        batch_size,
        lambda chosen: _batch_sums(model, encoder, collate([rows[row] for row in chosen])),
    )
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def _batch_sums(model: Any, encoder: Encoder, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    batch = {name: value.to(model.device) for name, value in rows.items()}
    labels = batch["labels"] if encoder.is_encoder_decoder else batch.pop("labels")
    logits = model(**batch).logits
    if not encoder.is_encoder_decoder:  # position t predicts token t + 1
        logits, labels = logits[:, :-1], labels[:, 1:]
    log_p = chosen_log_probabilities(logits, labels).double()
    return torch.where(labels == IGNORED, 0.0, log_p).sum(-1).cpu()


logger = logging.get_logger(__name__)


@contextlib.contextmanager
def prepared_generator(
    config: CandidateConfig,
    accelerator: Accelerator | None,
    generator: Generator,
    policy: Any,
    syncs_weights: bool = True,
) -> Iterator[Generator]:
    """Gives a generator that every process may call as often as it likes. Collective.

    Args:
        config: Options: reference model, and whether to merge the adapter.
        accelerator: Knows the processes; None where there is one process, without a trainer.
        generator: With the trained model, or another one, which is taken as it is.
        policy: The trained model.
        syncs_weights: Whether an engine with weights of its own gets them here; else whoever calls hands them over.
    """
    with contextlib.ExitStack() as stack:
        model, reference = generator.model, generator.reference
        if model is policy or (reference is not None and config.reference_model == "base"):
            whole = stack.enter_context(whole_model(accelerator, policy, config.merge_adapter))
            model = whole if model is policy else model
            if reference is not None:
                reference = reference_opener(config.reference_model, whole, whole.device)
        if syncs_weights:
            sync_weights(accelerator, generator.engine, model)
        yield replace(generator, model=model, reference=reference)


def sync_weights(accelerator: Accelerator | None, engine: Engine, model: Any) -> None:
    """Brings an engine with weights of its own up to date; any other is as it was. Collective.

    Args:
        accelerator: As in `prepared_generator`.
        engine: Any.
        model: What generates, whole.
    """
    if not engine.has_own_weights:
        return
    with torch.no_grad(), in_evaluation_mode(model):
        if accelerator is None:
            engine.sync_weights(model, True)
            return
        with FailTogether(accelerator, f"handing the weights to {type(engine).__name__}"):
            engine.sync_weights(model, accelerator.is_main_process)
        accelerator.wait_for_everyone()  # a server that the main process feeds answers all of them


def evaluation_engine(engine: Engine, model: Any, has_proposal: bool) -> Engine:
    """Returns the engine for evaluating the trained model: that of the rounds where possible.

    One with weights of its own may hold a teacher's, or those of a proposal, in which the trained model's may not fit:
    then it is an engine in this process.

    Args:
        engine: Of the rounds.
        model: The trained one.
        has_proposal: Whether another model generates in the rounds.
    """
    if not engine.has_own_weights or not (engine.is_fixed or has_proposal):
        return engine
    logger.info(
        f"{type(engine).__name__} holds the weights of another model than the trained one, which is evaluated by an "
        "engine in this process."
    )
    return choose_engine("auto", model)


def reference_opener(
    reference: Any, model: Any, device: Any
) -> Callable[[], contextlib.AbstractContextManager[Any]] | None:
    """Returns a context manager that gives the reference model, None without one."""
    if reference is None:
        return None
    if isinstance(reference, str):
        if reference != "base":
            raise ValueError(f'`reference_model`={reference!r} must be a model, "base" or None.')
        if not is_peft_model(model):
            raise ValueError(
                'reference_model="base" is the model with its adapter off, and this model has none. Pass a model.'
            )

        @contextlib.contextmanager
        def without_adapter() -> Iterator[Any]:
            with model.disable_adapter():
                yield model

        return without_adapter
    validate_model(reference)
    validate_vocabulary(reference, model)
    reference.to(device)
    return lambda: contextlib.nullcontext(reference)
