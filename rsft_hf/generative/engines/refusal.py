"""What speaks against generating in slots, for a model and a request: a reason in words, or nothing."""

from typing import Any

from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.utils import is_peft_available

from rsft_hf.generative.engines.dropping import reason_to_stay
from rsft_hf.generative.engines.engine import GenerationRequest
from rsft_hf.generative.engines.preparation import Prepared

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
    if prepared is None:
        return None
    for criterion in prepared.criteria:
        if type(criterion) not in _CRITERIA:
            return f"{type(criterion).__name__} looks at more than one candidate"
    return reason_to_stay(prepared.processors, prepared.model_kwargs)


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
