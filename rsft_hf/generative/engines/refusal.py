"""What speaks against generating in slots, or in batches at all, for a model and a request: a reason, or nothing."""

from typing import Any

from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.utils import is_peft_available

from rsft_hf.generative.engines.dropping import reason_to_stay
from rsft_hf.generative.engines.engine import GenerationRequest
from rsft_hf.generative.engines.preparation import Prepared
from rsft_hf.generative.settings import context_length

_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)


def reason_against(model: Any, request: GenerationRequest, prepared: Prepared | None = None) -> str | None:
    """Returns why the request cannot be generated in slots, None if it can.

    Args:
        model: May carry adapters.
        request: What is asked for.
        prepared: What `generate` made of it; without it only what the configuration says is looked at.
    """
    config = request.generation_config
    if (config.num_beams or 1) > 1:
        return f"num_beams={config.num_beams} searches beams"
    if config.token_healing:
        return "token_healing changes the prompts"
    if _learns_prompts(model):
        return "its adapter puts learned tokens before the prompt"
    if reason := reason_to_go_alone(model, request):
        return reason
    if prepared is None:
        return None
    for criterion in prepared.criteria:
        if type(criterion) not in _CRITERIA:
            return f"{type(criterion).__name__} looks at more than one candidate"
    return reason_to_stay(prepared.processors, prepared.model_kwargs)


def reason_to_go_alone(model: Any, request: GenerationRequest) -> str | None:
    """Returns why a candidate would come out otherwise in a batch with others, None if it would not.

    Args:
        model: May carry adapters.
        request: What is asked for.
    """
    if _is_peft(model) and any(config.alora_invocation_tokens for config in _loras(model)):
        return "its adapter (aLoRA) begins at a place in each prompt, which PEFT keeps for a whole batch"
    longest = max(len(prompt) for prompt in request.prompts) + request.generation_config.max_new_tokens
    for rope in _ropes(model.config.get_text_config().to_dict()):
        kind, limit = str(rope.get("rope_type", "")), rope.get("original_max_position_embeddings")
        limit = limit or model.config.get_text_config().to_dict().get("original_max_position_embeddings")
        limit = limit or context_length(model)
        if (kind == "longrope" or "dynamic" in kind) and limit is not None and longest > limit:
            return f"its {kind} rotary embedding changes for all rows when the longest passes {limit} tokens"
    return None


def _ropes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of rotary embeddings in a configuration, of all layer types."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return [found, *(value for value in found.values() if isinstance(value, dict))]


def _loras(model: Any) -> list[Any]:
    from peft import LoraConfig  # an extra

    return [config for config in model.peft_config.values() if isinstance(config, LoraConfig)]


def without_wrappers(model: Any) -> Any:
    """Returns the transformers model inside a PEFT model, adapters in place; any other model as it is."""
    return model.get_base_model() if _is_peft(model) else model


def _learns_prompts(model: Any) -> bool:
    return _is_peft(model) and bool(model.active_peft_config.is_prompt_learning)


def _is_peft(model: Any) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel  # an extra

    return isinstance(model, PeftModel)
