"""Names of other libraries that are private or differ between versions, each against what is installed."""

import importlib
import inspect
from pathlib import Path

import datasets
import pytest
import torch
import transformers as hf

import architectures
import generators
from rsft_hf.upstream import CACHE_LENGTH_NAMES, CACHE_NAMES, PRIVATE, cache_argument, cache_name

# Parameters that overrides and calls pass by name or by place.
PARAMETERS = {
    "_inner_training_loop": ["batch_size", "args", "resume_from_checkpoint"],
    "_init_training_state": ["max_steps", "num_update_steps_per_epoch"],
    "_get_train_sampler": ["train_dataset"],
    "_save_rng_state": ["output_dir"],
    "_load_best_model": [],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_prepare_inputs": ["inputs"],
    "_sample": ["input_ids", "logits_processor", "stopping_criteria", "generation_config"],
    "_prefill": ["input_ids", "generation_config", "model_kwargs"],
    "_update_model_kwargs_for_generation": ["outputs", "model_kwargs", "is_encoder_decoder"],
    "_prepare_dataset": ["dataset"],
    "_register_deepspeed_module": ["module"],
    "_invalidate_trace": [],
}


def instance_of(owner: str, folder: Path) -> object:
    """An object of a class whose private name is no method."""
    model = generators.tiny_model()
    if owner == "torch._dynamo.OptimizedModule":
        return torch.compile(model)
    if owner == "transformers.PreTrainedModel":
        return model
    if owner == "accelerate.Accelerator":
        args = hf.TrainingArguments(str(folder), report_to="none", use_cpu=True, bf16=True)
        return hf.Trainer(model, args).accelerator.prepare(model)
    if owner == "transformers.PretrainedConfig":
        return model.config
    trl = pytest.importorskip("trl") if owner.startswith("trl.") else None
    trainer_class, config = (hf.Trainer, hf.TrainingArguments) if trl is None else (trl.SFTTrainer, trl.SFTConfig)
    args = config(str(folder), report_to="none", use_cpu=True, bf16=False)
    rows = [{"input_ids": [6, 7], "labels": [6, 7]}] * 2
    return trainer_class(
        model, args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=generators.tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in PRIVATE.items() for name in names])
def test_a_private_name_is_there_with_the_parameters_that_are_passed(owner: str, name: str, tmp_path: Path) -> None:
    module, _, class_name = owner.rpartition(".")
    if module.startswith(("deepspeed", "trl")):
        pytest.importorskip(module.split(".")[0])
    found = getattr(getattr(importlib.import_module(module), class_name), name, None)
    if name in PARAMETERS:
        parameters = list(inspect.signature(found).parameters)
        assert set(PARAMETERS[name]) <= set(parameters)
    else:
        assert name in dir(instance_of(owner, tmp_path))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_models_take_and_return_their_cache_by_this_name(name):
    model = architectures.model_of(name).eval()
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    outputs = model(**inputs, use_cache=True)
    assert any(name in outputs for name in CACHE_NAMES)
    cache = outputs[cache_name(outputs)]
    length = cache.get_seq_length()
    model(**inputs, use_cache=True, **cache_argument(model, cache))
    assert (length, cache.get_seq_length()) == (3, 6)


def test_generate_prepares_the_cache_by_this_name():
    model, found = architectures.model_of("llama").eval(), {}
    model.generate(
        torch.tensor([[5, 6]]),
        max_new_tokens=1,
        custom_generate=lambda *args, **kwargs: found.update(kwargs) or args[1],
    )
    assert found[cache_name(found)].get_seq_length() == 0


def test_position_embeddings_take_the_length_of_the_cache_by_one_of_these_names():
    embedding = architectures.model_of("m2m100").get_decoder().embed_positions
    assert len(set(CACHE_LENGTH_NAMES) & set(inspect.signature(embedding.forward).parameters)) == 1


def test_a_model_that_takes_anything_gets_the_name_of_the_installed_version():
    class Wrapper(torch.nn.Module):
        def forward(self, *args, **kwargs): ...

    expected = "cache" if tuple(map(int, hf.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
    assert cache_argument(Wrapper(), "kv") == {expected: "kv"}
