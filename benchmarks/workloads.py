"""Workloads of `generation.py`: models with random weights, prompts as token ids, and the length of every candidate.

The lengths are drawn once and forced upon all contenders, so that all of them compute the same number of tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import transformers as hf

PAD, END, FIRST_WORD, VOCAB_SIZE = 0, 1, 2, 8000
SEED = 2  # the first whose sample has the means that the sizes ask for, in prompts as in answers


@dataclass(frozen=True)
class Size:
    """Size of a workload; lengths are lognormal, in tokens, clamped at both ends.

    Attributes:
        num_prompts: Number of different prompts.
        num_candidates: Number of candidates per prompt.
        prompt_mean: Mean length of a prompt before clamping to `prompt_range`.
        prompt_range: Shortest and longest prompt.
        mean: Mean length of an answer before clamping to [1, `longest`].
        sigma: Standard deviation of the logarithm of an answer's length.
        longest: Longest answer.
        slots: Number of candidates generated together.
    """

    num_prompts: int = 32
    num_candidates: int = 8
    prompt_mean: float = 48.0
    prompt_range: tuple[int, int] = (16, 512)
    mean: float = 34.5
    sigma: float = 0.8
    longest: int = 256
    slots: int = 64


@dataclass(frozen=True)
class Workload:
    """Prompts and the length of every candidate.

    Attributes:
        size: Distribution they were drawn from.
        prompts: Token ids of each prompt.
        lengths: Number of tokens of each candidate of each prompt, the end token included.
    """

    size: Size
    prompts: list[list[int]]
    lengths: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))

    @property
    def num_candidates(self) -> int:
        return sum(map(len, self.lengths))

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def mean_context(self) -> tuple[float, float]:
        """Mean number of prompt tokens, and of answer tokens, before a token of an answer."""
        pairs = [(len(ids), length) for ids, row in zip(self.prompts, self.lengths, strict=True) for length in row]
        before_prompt = sum(width * length for width, length in pairs) / self.num_tokens
        return before_prompt, sum(length * (length - 1) / 2 for _, length in pairs) / self.num_tokens

    def facts(self) -> dict:
        lengths = [length for row in self.lengths for length in row]
        return {
            "prompts": len(self.prompts),
            "candidates_per_prompt": self.size.num_candidates,
            "slots": self.size.slots,
            "prompt_tokens_mean": self.num_prompt_tokens / len(self.prompts),
            "length_mean": self.num_tokens / len(lengths),
            "length_max": max(lengths),
            "tokens": self.num_tokens,
        }


def build_workload(size: Size) -> Workload:
    """Draws prompts and lengths; the same size gives the same workload."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(shape: tuple[int, ...], mean: float, sigma: float, low: int, high: int) -> list:
        # The mean of a lognormal is exp(mu + sigma^2 / 2).
        drawn = torch.exp(math.log(mean) - sigma**2 / 2 + sigma * torch.randn(shape, generator=generator))
        return drawn.round().long().clamp(low, high).tolist()

    widths = draw((size.num_prompts,), size.prompt_mean, 0.6, *size.prompt_range)
    lengths = draw((size.num_prompts, size.num_candidates), size.mean, size.sigma, 1, size.longest)
    prompts = [torch.randint(FIRST_WORD, VOCAB_SIZE, (width,), generator=generator).tolist() for width in widths]
    return Workload(size, prompts, lengths)


def warm_up_of(workload: Workload) -> Workload:
    """Returns two short prompts with short answers, to warm up a process."""
    num_candidates = workload.size.num_candidates
    lengths = [[2 + index % 2 for index in range(num_candidates)] for _ in workload.prompts[:2]]
    return replace(workload, prompts=[ids[:16] for ids in workload.prompts[:2]], lengths=lengths)


def llama() -> hf.PreTrainedModel:
    """15.7 million parameters."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 864}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=VOCAB_SIZE, **sizes, max_position_embeddings=1024))


def llama_56m() -> hf.PreTrainedModel:
    """55.8 million parameters."""
    sizes = {"hidden_size": 640, "num_hidden_layers": 8, "num_attention_heads": 10, "intermediate_size": 2112}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=VOCAB_SIZE, **sizes, max_position_embeddings=1024))


def t5() -> hf.PreTrainedModel:
    """9.4 million parameters."""
    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCAB_SIZE, **sizes, decoder_start_token_id=PAD))


def marian() -> hf.PreTrainedModel:
    """9.9 million parameters."""
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder")
             for name, value in (("layers", 4), ("ffn_dim", 1024), ("attention_heads", 4))}  # fmt: skip
    tokens = {"pad_token_id": PAD, "eos_token_id": END, "forced_eos_token_id": None, "decoder_start_token_id": PAD}
    config = hf.MarianConfig(vocab_size=VOCAB_SIZE, d_model=256, max_position_embeddings=1024, **sizes, **tokens)
    return hf.MarianMTModel(config)


def qwen_half_billion() -> hf.PreTrainedModel:
    """494 million parameters: the shape of Qwen2-0.5B."""
    sizes = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    config = hf.Qwen2Config(vocab_size=151_936, intermediate_size=4864, tie_word_embeddings=True, **sizes)
    return hf.Qwen2ForCausalLM(config)


BUILDERS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    builder.__name__: builder for builder in (llama, llama_56m, t5, marian, qwen_half_billion)
}


def build_model(name: str, device: str) -> hf.PreTrainedModel:
    """Builds a model in evaluation mode, in bfloat16 on a GPU, with no end token in its generation configuration."""
    torch.manual_seed(SEED)
    model = BUILDERS[name]()
    start = {"decoder_start_token_id": PAD} if model.config.is_encoder_decoder else {}
    model.generation_config = hf.GenerationConfig(pad_token_id=PAD, use_cache=True, **start)
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
