"""Tokenizers and models for the tests of rewards: built from code and configs, in one seed, a word is a token."""

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", *"a b c d e f g h i j k l m n o p".split()]
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
SMALL = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.4, "pad_token_id": 0}
NOISE = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}  # shows where dropout is not turned off


def word_tokenizer(pad_token: str | None = "<pad>") -> hf.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad_token, eos_token="<eos>")
    tokenizer.chat_template = CHAT
    return tokenizer


def built(model_class: type, config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return model_class(config)


def bert_classifier(num_labels: int = 1, **keywords) -> hf.PreTrainedModel:
    config = hf.BertConfig(**SMALL, **NOISE, num_labels=num_labels, **keywords)
    return built(hf.BertForSequenceClassification, config)


def llama_classifier() -> hf.PreTrainedModel:
    """A decoder that knows no padding token: it must be told where a text ends."""
    config = hf.LlamaConfig(**{**SMALL, "pad_token_id": None}, num_key_value_heads=1, num_labels=1)
    return built(hf.LlamaForSequenceClassification, config)


def llama() -> hf.PreTrainedModel:
    return built(hf.LlamaForCausalLM, hf.LlamaConfig(**SMALL, num_key_value_heads=1))


def t5() -> hf.PreTrainedModel:
    sizes = {"vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.5}
    return built(hf.T5ForConditionalGeneration, hf.T5Config(**sizes, **special, initializer_factor=1.5))


def bert_encoder() -> hf.PreTrainedModel:
    return built(hf.BertModel, hf.BertConfig(**SMALL, **NOISE))


def training_model(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """The model in train mode but for one module, whose own mode must come back too."""
    model.train()
    next(model.children()).eval()
    return model


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]
