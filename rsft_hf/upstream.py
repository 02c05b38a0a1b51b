"""Names of other libraries that are private, or differ between the supported versions.

`PRIVATE` is the whole list of private names that the package calls, overrides or reads; tests check each of them in the
installed versions, so that a release which drops one is found by its name.
"""

import inspect
from collections.abc import Collection
from typing import Any

import transformers
from packaging.version import Version

PRIVATE = {
    "transformers.Trainer": (
        "_inner_training_loop",
        "_init_training_state",
        "_get_train_sampler",
        "_get_num_items_in_batch",
        "_save_rng_state",
        "_load_best_model",
        "_load_from_checkpoint",
        "_prepare_inputs",
        "_train_batch_size",  # of an instance
    ),
    "transformers.GenerationMixin": ("_sample", "_prefill", "_update_model_kwargs_for_generation"),
    "transformers.PreTrainedModel": ("_keys_to_ignore_on_save",),
    "transformers.PretrainedConfig": ("_attn_implementation",),
    "accelerate.Accelerator": ("_original_forward",),  # of a model that it has prepared for autocast
    "torch._dynamo.OptimizedModule": ("_orig_mod",),  # of an instance
    "trl.SFTTrainer": ("_prepare_dataset", "_metrics"),  # the second one of an instance
    "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload": ("_register_deepspeed_module",),
    "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator": ("_invalidate_trace",),
}

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
