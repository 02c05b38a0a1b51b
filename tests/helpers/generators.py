"""Tiny generators for the tests: six architectures from configs, a tokenizer of whole words from code, and prompts.

In: nothing is read from disk or hub. Out: models with random weights whose distributions are far from uniform, so that
a wrong mask, position or processor shows in the first tokens; a word is a token.
"""

from pathlib import Path
from typing import Any

import datasets
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from rsft_hf import RejectionSamplingSeq2SeqTrainer, RejectionSamplingTrainer
from rsft_hf.engines.base import GeneratedSequence, GenerationRequest
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.generation_config import sampling_config
from rsft_hf.engines.random_streams import candidate_seed
from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.resampler import CandidateResampler

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>")
PAD, EOS, BOS, UNK, START, END = range(6)
LETTERS = tuple("abcdefghij")
WORDS = (*SPECIAL, "user", "assistant", "system", "think", *LETTERS, "abcdef")  # by the last, transformers aligns stops
A = WORDS.index("a")  # the letters' ids are A, A + 1, ...
DECODER_ONLY = ("llama", "gpt2", "qwen3")
ENCODER_DECODER = ("t5", "bart", "marian")
NAMES = (*DECODER_ONLY, *ENCODER_DECODER)

# ChatML, with a switch such as `apply_chat_template(..., enable_thinking=True)` turns.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}"
    "{% if enable_thinking %}{{ 'think ' }}{% endif %}{% endif %}"
)

_POSITIONS = 64
_TOKENS = {"vocab_size": len(WORDS), "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_LLAMA = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": _POSITIONS, "initializer_range": 0.5,
    "attention_dropout": 0.1,
}  # fmt: skip
_BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": _POSITIONS,
    "init_std": 0.5, "decoder_start_token_id": BOS, "forced_eos_token_id": None, "scale_embedding": True,
    "tie_word_embeddings": False,
}  # fmt: skip
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": _POSITIONS, "initializer_range": 0.3}
_T5 = {
    "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": PAD, "initializer_factor": 0.5, "tie_word_embeddings": False,
}  # fmt: skip
_BUILDERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, _LLAMA),
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, _GPT2),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, _LLAMA),
    "t5": (hf.T5Config, hf.T5ForConditionalGeneration, _T5),
    "bart": (hf.BartConfig, hf.BartForConditionalGeneration, _BART),
    "marian": (hf.MarianConfig, hf.MarianMTModel, _BART),
}


def tiny_model(name: str = "llama", seed: int = 16, **config: Any) -> Any:
    """A model of `NAMES` in fp32 and training mode (dropout 0.1), equal at every call; `config` overrides its config.

    Its own `generation_config` names the special tokens and no length: pass `sampling(...)` or `max_new_tokens`.
    """
    config_class, model_class, settings = _BUILDERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**{**_TOKENS, **settings, **config}))
    for path, weights in model.named_parameters():
        if ("encoder_attn." in path or "EncDecAttention." in path) and weights.dim() == 2:
            weights.data.mul_(5)  # otherwise all prompts get the same answer
    if name in ("bart", "marian"):
        model.final_logits_bias[0, EOS] = 2.5  # otherwise no answer ends
    return model.train()


def checkpoint_activations(model: Any) -> None:
    """Turns on activation checkpointing, which transformers called gradient checkpointing before 5.24."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def tokenizer(closes_text: bool = False, pad_token: str | None = "<pad>") -> hf.PreTrainedTokenizerFast:
    """A tokenizer of the words in `WORDS`, separated by blanks, with pad, eos, bos, unk and a ChatML-like template.

    Args:
        closes_text: Whether it ends every text by <eos>, as those of T5 and Marian do.
        pad_token: "<eos>" for the habit of padding with the end token.
    """
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if closes_text:
        words.post_processor = processors.TemplateProcessing(
            single="$A <eos>", pair="$A $B <eos>", special_tokens=[("<eos>", EOS)]
        )
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad_token,
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=[AddedToken(word, special=True) for word in SPECIAL[4:]],
        model_max_length=_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TEMPLATE
    return made


def tokenizer_for(name: str) -> hf.PreTrainedTokenizerFast:
    """The tokenizer as an architecture's own would be: closing texts for encoder-decoder models only."""
    return tokenizer(closes_text=name in ENCODER_DECODER)


def prompts(num_prompts: int = 4, conversational: bool = False, first: int = 0) -> datasets.Dataset:
    """Prompts of 2 to 5 letters, no two equal up to 100, with columns `prompt`, `reference` and `wanted`.

    `wanted` is the letter that `share_of_wanted` rewards. Every third conversation has three turns.

    Args:
        num_prompts: Rows.
        conversational: Whether prompts are lists of messages instead of text.
        first: Number of the first prompt: another range is a held-out set.
    """
    rows = []
    for number in range(first, first + num_prompts):
        text = " ".join([LETTERS[number % 10], LETTERS[number // 10 % 10], *LETTERS[: number % 4]])
        messages = [{"role": "user", "content": text}]
        if number % 3 == 2:
            messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, *messages]
        wanted = LETTERS[number % 3]
        rows.append({"prompt": messages if conversational else text, "reference": wanted, "wanted": wanted})
    return datasets.Dataset.from_list(rows)


def prompt_ids(num_prompts: int = 4, closes_text: bool = False) -> list[list[int]]:
    """The token ids of `prompts(num_prompts)`, of mixed lengths."""
    encode = tokenizer(closes_text)
    return [encode(text)["input_ids"] for text in prompts(num_prompts)["prompt"]]


def share_of_wanted(completions: list, wanted: list[str], **_: Any) -> list[float]:
    """A reward with the contract of TRL's GRPO: the share of words that are the row's wanted letter."""
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
    return [text.split().count(letter) / (1 + len(text.split())) for text, letter in zip(texts, wanted)]


def sampling(max_new_tokens: int = 8, **settings: Any) -> hf.GenerationConfig:
    """A user's configuration; with 8 tokens some candidates of every prompt end and some are cut off."""
    return hf.GenerationConfig(max_new_tokens=max_new_tokens, **settings)


def complete(model: Any, is_greedy: bool = False, max_new_tokens: int = 8, **settings: Any) -> hf.GenerationConfig:
    """The configuration in force for a model, as a round makes it from `sampling(max_new_tokens, **settings)`."""
    return sampling_config(sampling(max_new_tokens, **settings), model, tokenizer(), is_greedy)


def generated(
    model: Any,
    config: hf.GenerationConfig,
    ids: list[list[int]],
    num_candidates: int = 1,
    engine: GenerateEngine | None = None,
    numbers: list[int] | None = None,
) -> list[GeneratedSequence]:
    """What the engine makes of prompts in evaluation mode, with log probabilities, in order of prompt and candidate.

    Args:
        model: Put into evaluation mode.
        config: From `complete`.
        ids: Token ids of each prompt.
        num_candidates: Of each prompt.
        engine: `GenerateEngine()` where None.
        numbers: Names the prompts, and so their streams; 0, 1, ... where None.
    """
    numbers = list(range(len(ids))) if numbers is None else numbers
    seeds = [[candidate_seed(0, 0, number, 0, index) for index in range(num_candidates)] for number in numbers]
    request = GenerationRequest(ids, seeds, config, with_log_probs=True, tokenizer=tokenizer())
    with torch.no_grad():
        sequences = list((engine or GenerateEngine())(model.eval(), request))
    return sorted(sequences, key=lambda one: (one.prompt, one.index))


def arguments(output_dir: Path | str, seq2seq: bool = False, **overrides: Any) -> hf.TrainingArguments:
    """One epoch of batches of two on the CPU, logged at every step, nothing saved."""
    defaults = {
        "num_train_epochs": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    made = hf.Seq2SeqTrainingArguments if seq2seq else hf.TrainingArguments
    return made(str(output_dir), **{**defaults, **overrides})


def resampler(reward_funcs: Any = share_of_wanted, acceptance: Any = None, **options: Any) -> CandidateResampler:
    """Two candidates per prompt, the better one accepted, nothing filtered: no round is empty."""
    defaults = {"num_candidates": 2, "generation_config": sampling(12), "on_nothing_accepted": "best", "filters": ()}
    return CandidateResampler(reward_funcs, acceptance, **{**defaults, **options})


def trainer(
    folder: Path, source: CandidateResampler, name: str = "llama", num_prompts: int = 4, **keywords: Any
) -> Any:
    """A trainer over prompts; `args` holds overrides of `arguments`, other keywords go to the trainer."""
    is_seq2seq = name in ENCODER_DECODER
    made = RejectionSamplingSeq2SeqTrainer if is_seq2seq else RejectionSamplingTrainer
    args = arguments(folder, is_seq2seq, **keywords.pop("args", {}))
    defaults = {"model": tiny_model(name), "train_dataset": prompts(num_prompts)}
    return made(args=args, processing_class=tokenizer_for(name), resampler=source, **{**defaults, **keywords})


def stored(run: Any, number: int = 0) -> list[Candidate]:
    """The candidates that a trainer's round left on disk, in order of prompt and candidate."""
    store = run.resampler._bound().store(number)
    return [one for path in store.shards() for one in store.read(path)]
