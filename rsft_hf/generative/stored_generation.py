"""Generation without a trainer, into a folder: candidates to be scored and accepted later, elsewhere, or by others."""

import json
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from rsft_hf.distributed import FailTogether, launched_processes
from rsft_hf.engines.auto import choose_engine
from rsft_hf.engines.generation_config import active_settings, sampling_config
from rsft_hf.engines.model_access import unwrapped
from rsft_hf.generative.candidates import CandidateStore
from rsft_hf.generative.config import CandidateConfig
from rsft_hf.generative.encoding import Encoder
from rsft_hf.generative.generation import Generator, Sampling, prepared_generator
from rsft_hf.generative.imports import PROMPTS
from rsft_hf.generative.prompts import PromptSet
from rsft_hf.generative.round_cache import model_fingerprint, round_facts
from rsft_hf.generative.rounds import own_shards
from rsft_hf.generative.validation import prompt_set, readable_prompts, validate_model
from rsft_hf.training_set import dataset_fingerprint

logger = logging.get_logger(__name__)

OPTIONS = (
    "num_candidates", "generation_config", "engine", "chat_template_kwargs", "max_prompt_length", "on_long_prompt",
)  # fmt: skip
_FACTS = ("model", "engine", "prompts", "encoding", "seed", "num_candidates", "generation_config")


def generate_candidates(
    model: Any,
    processing_class: PreTrainedTokenizerBase,
    prompts: Any,
    directory: Path | str,
    *,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Returns the folder with candidates of every prompt, neither filtered nor scored. Collective.

    The processes of `accelerate launch` share the prompts. A call that was killed goes on with those that are left. The
    candidates are those of `CandidateResampler.generate` with the same seed.

    Args:
        model: On its device, whole; put into evaluation mode meanwhile.
        processing_class: The model's tokenizer.
        prompts: Rows with `prompt` (text or messages) and the columns that the rewards will need.
        directory: Folder to write, absent or empty, or of a call with the same arguments; visible to all processes.
        seed: With the number of prompt and candidate it fixes each candidate's tokens.
        **options: `num_candidates`, `generation_config`, `engine`, `chat_template_kwargs`, `max_prompt_length` and
            `on_long_prompt` of `CandidateResampler`; dropped prompts are not in the folder, and take no number.

    Raises:
        FileExistsError: If the folder holds something else, or candidates of other arguments, which are named.
        TypeError: If an option is none of these.
        ValueError: If the model or the engine cannot generate so, or a prompt is no prompt or too long.
    """
    if unknown := next((name for name in options if name not in OPTIONS), None):
        raise TypeError(f"`{unknown}` is no option of generate_candidates, which takes {', '.join(OPTIONS)}.")
    rows = prompts if isinstance(prompts, datasets.Dataset) else datasets.Dataset.from_list(list(prompts))
    config = CandidateConfig(_no_reward, **options)
    accelerator, model = launched_processes(), unwrapped(model)
    validate_model(model)
    encoder = Encoder.for_model(processing_class, model, config.chat_template_kwargs)
    sampling = Sampling(sampling_config(config.generation_config, model, processing_class), config.num_candidates, seed)
    limits = sampling.generation_config.max_new_tokens, config.max_prompt_length, config.on_long_prompt
    numbered = readable_prompts(prompt_set(rows, config, "prompts"), encoder, model, *limits)
    logger.info(f"Candidates are sampled with {active_settings(sampling.generation_config)}.")
    generator = Generator(model, encoder, choose_engine(config.engine, model), accelerator.autocast)
    generator.engine.check(model, sampling.generation_config, ())
    digests = {"model": model_fingerprint(model), "prompts": dataset_fingerprint(numbered.dataset, len(numbered))}
    known = round_facts(config, generator, numbered, sampling, digests)
    store = CandidateStore(Path(directory), (), is_conversational=not isinstance(numbered.row(0)[0], str))
    with FailTogether(accelerator, f"opening {directory}"):
        if accelerator.is_main_process:
            _open(store, {name: known[name] for name in _FACTS}, numbered.dataset)
    with FailTogether(accelerator, "generating"), prepared_generator(config, None, generator, model) as generate:
        _write_shards(accelerator, store, generate, numbered, sampling)
    return store.directory


def _write_shards(
    accelerator: Accelerator, store: CandidateStore, generate: Generator, prompts: PromptSet, sampling: Sampling
) -> None:
    """Generates the shards of this process that are not there."""
    shards = own_shards(range(len(prompts)), len(prompts), {}, accelerator.num_processes, accelerator.process_index)
    # Without a terminal there is no bar: `disable=None` is tqdm's word for it.
    is_hidden = None if accelerator.is_local_main_process else True
    for number, own in tqdm(shards, desc="Generating", unit=" shards", disable=is_hidden):
        if store.stage(store.path(0, number)) is None:
            store.write(store.path(0, number), generate(prompts, own, sampling), "generated", logged={})


def _no_reward(completions: list[Any], **columns: Any) -> list[None]:
    return [None] * len(completions)


def _open(store: CandidateStore, facts: dict[str, Any], rows: datasets.Dataset) -> None:
    """Makes the folder ready, unless it holds something else."""
    folder, facts = store.directory, json.loads(json.dumps(facts))
    earlier = store.manifest().get("facts")
    if earlier is None and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty, and holds no generated candidates. Give a new folder.")
    if earlier is not None and (changed := [name for name in facts if facts[name] != earlier.get(name)]):
        raise FileExistsError(
            f"{folder} holds candidates of other arguments ({', '.join(changed)}). Give a new folder."
        )
    (folder / PROMPTS).parent.mkdir(parents=True, exist_ok=True)
    store.write_manifest({"facts": facts, "reward_names": []})
    if not (folder / PROMPTS).is_file():
        draft = (folder / PROMPTS).with_suffix(".incomplete")
        rows.to_parquet(str(draft))
        draft.replace(folder / PROMPTS)
