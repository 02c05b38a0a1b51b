"""More tiny generators, for what differs between architectures: positions, masks, windows, experts, caches.

In: nothing is read from disk or hub. Out: models with random weights whose distributions are far from uniform.
"""

from typing import Any

import torch
import transformers as hf

import generators as g
from rsft_hf.engines.base import GenerationRequest
from rsft_hf.engines.random_streams import candidate_seed

_LLAMA = {**g._LLAMA, "num_hidden_layers": 3}
_SLIDING = {"sliding_window": 4}  # shorter than every prompt with its answer
_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
_SMALL = {"hidden_size": 16, "initializer_range": 0.5}
_PARTS = {"num_hidden_layers": 2, "num_attention_heads": 2}
_NEOX = {**_SMALL, **_PARTS, "intermediate_size": 32, "max_position_embeddings": 64}
_OPT = {**_PARTS, "hidden_size": 16, "ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
_DEEPSEEK = {
    **_NEOX, "moe_intermediate_size": 16, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
_PROPHET = {
    "hidden_size": 16, "encoder_ffn_dim": 32, "num_encoder_layers": 2, "num_encoder_attention_heads": 2,
    "decoder_ffn_dim": 32, "num_decoder_layers": 2, "num_decoder_attention_heads": 2, "max_position_embeddings": 64,
    "decoder_start_token_id": g.BOS,
}  # fmt: skip
_PHI = {**_LLAMA, "num_key_value_heads": 2}

_BUILDERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, {**_LLAMA, **_SLIDING, **_LAYERS}),
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, {**_LLAMA, **_EXPERTS}),
    "phi": (hf.PhiConfig, hf.PhiForCausalLM, {key: value for key, value in _PHI.items() if key != "head_dim"}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {**_LLAMA, **_SLIDING}),
    "opt": (hf.OPTConfig, hf.OPTForCausalLM, {**_OPT, "init_std": 0.5}),
    "bloom": (hf.BloomConfig, hf.BloomForCausalLM, {**_SMALL, "n_layer": 2, "n_head": 2}),
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, _NEOX),
    "deepseek": (hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM, _DEEPSEEK),
    "m2m100": (hf.M2M100Config, hf.M2M100ForConditionalGeneration, g._BART),
    "pegasus": (hf.PegasusConfig, hf.PegasusForConditionalGeneration, g._BART),
    "prophetnet": (hf.ProphetNetConfig, hf.ProphetNetForConditionalGeneration, _PROPHET),
    "mamba": (hf.MambaConfig, hf.MambaForCausalLM, {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "openai_gpt": (hf.OpenAIGPTConfig, hf.OpenAIGPTLMHeadModel, {"n_embd": 16, "n_layer": 2, "n_head": 2,
                                                                 "n_positions": 64, "initializer_range": 0.5}),
}  # fmt: skip

SLOTTED = (*g.NAMES, "gemma3", "mixtral", "phi", "mistral", "opt", "bloom", "gpt_neox", "deepseek", "m2m100", "pegasus")
UNSLOTTED = {  # and why
    "prophetnet": "rows admitted while others run get other log probabilities than alone",  # it masks nothing then
    "mamba": "cache",  # none of keys and values, or since transformers 5.24 one of another kind
    "openai_gpt": "a trial run ended with IndexError",  # it has no cache at all
}


def model_of(name: str, seed: int = 3, **config: Any) -> Any:
    """A model of `SLOTTED` or `UNSLOTTED` in evaluation mode and fp32, equal at every call."""
    if name in g.NAMES:
        return g.tiny_model(name, **config).eval()
    config_class, model_class, settings = _BUILDERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**{**g._TOKENS, **settings, **config})).eval()


def prompts_for(model: Any, num_prompts: int = 7) -> list[list[int]]:
    """Prompts of 2 to 18 tokens."""
    ids = g.prompt_ids(num_prompts, closes_text=bool(model.config.is_encoder_decoder))
    return [prompt * (1 + number % 3) for number, prompt in enumerate(ids)]


def request_for(model, ids, num_candidates: int = 2, **fields) -> GenerationRequest:
    seeds = [[candidate_seed(0, 0, number, 0, index) for index in range(num_candidates)] for number in range(len(ids))]
    config = fields.pop("config", None) or g.complete(model)
    return GenerationRequest(ids, seeds, config, tokenizer=g.tokenizer(), **fields)


def run(engine, model, asked: GenerationRequest) -> list:
    with torch.no_grad():
        return sorted(engine(model, asked), key=lambda one: (one.prompt, one.index))


def texts(found: list) -> list:
    return [(one.prompt, one.index, one.token_ids, one.finish_reason) for one in found]
