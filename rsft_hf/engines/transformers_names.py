"""Names of transformers that differ between the supported versions."""

import inspect
from collections.abc import Collection
from typing import Any

import transformers
from packaging.version import Version

# transformers 5.24 renamed the argument of the KV cache, in the models and in what `generate` prepares for them.
CACHE_NAMES = ("cache", "past_key_values")

# 5.24 renamed the same argument of the position embeddings of encoder-decoder models.
CACHE_LENGTH_NAMES = ("cache_length", "past_key_values_length")

_DEFAULT_CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def cache_name(names: Collection[str]) -> str:
    """Returns the name of the KV cache among `names`; the one of the installed version if there is none.

    Example:
        >>> cache_name(["input_ids", "past_key_values"]), cache_name({"cache": None, "use_cache": True})
        ('past_key_values', 'cache')
    """
    return next((name for name in CACHE_NAMES if name in names), _DEFAULT_CACHE_NAME)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Returns the keyword argument that passes a KV cache to a model."""
    return {cache_name(inspect.signature(model.forward).parameters): cache}
