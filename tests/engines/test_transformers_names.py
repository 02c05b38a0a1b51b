"""Names of transformers that differ between versions, each against the installed models."""

import inspect

import pytest
import torch
import transformers as hf

import architectures
from rsft_hf.engines.transformers_names import CACHE_LENGTH_NAMES, CACHE_NAMES, cache_argument, cache_name


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
