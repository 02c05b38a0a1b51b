"""A toy world of dialogue: colours that are asked for and named, a tiny Llama that chats, a tiny BERT to judge it."""

import random
from pathlib import Path

import datasets
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from experiments import reward_model

COLOURS = ("red", "blue", "green", "grey")
WORDS = ("what", "colour", "is", "the", "sky", "it", "now", "user", "assistant", ":", "?", ".", *COLOURS)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def build_tokenizer(**special_tokens: str) -> hf.PreTrainedTokenizerFast:
    """A tokenizer of whole words, with the special tokens given."""
    words = {word: number for number, word in enumerate([*special_tokens.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=next(iter(special_tokens.values()))))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special_tokens)


def save_chat_model(folder: Path) -> str:
    """The path of a saved Llama with random weights and a chat template."""
    tokenizer = build_tokenizer(pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_encoder(folder: Path) -> str:
    """The path of a saved BERT with random weights, and no chat template."""
    tokenizer = build_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    config = hf.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    hf.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_dialogues(folder: Path) -> str:
    """The path of a folder with three splits: a good response names the last colour of the context, a bad one another.

    The context has one turn in some rows and three in others, and no context is in two splits.
    """
    generator = random.Random(0)
    contexts = [[f"{' '.join(generator.choices(COLOURS, k=3))} ?"] for _ in range(300)]
    contexts += [[f"{first} {second} ?", "it is .", f"now {third} {first} ?"]
                 for first in COLOURS for second in COLOURS for third in COLOURS]  # fmt: skip
    unique = list({tuple(turns): turns for turns in contexts}.values())
    generator.shuffle(unique)
    rows = []
    for turns in unique:
        named = turns[-1].split()[-2]
        others = [colour for colour in COLOURS if colour != named]
        rows.append(
            {
                "context": turns,
                "positive_responses": [f"it is {named} .", f"{named} ."],
                "adversarial_negative_responses": [f"it is {others[0]} .", f"{others[1]} ."],
                "random_negative_responses": ["what colour is the sky ?", f"{others[2]} now ."],
            }
        )
    half, quarter = len(rows) // 2, len(rows) // 4
    splits = {"train": rows[:half], "dev": rows[half : half + quarter], "test": rows[half + quarter :]}
    for split, chosen in splits.items():
        datasets.Dataset.from_list(chosen).to_parquet(str(folder / f"{split}.parquet"))
    return str(folder)


def save_reward_model(folder: Path, encoder: str, seed: int) -> str:
    """The path of a saved reward model with random weights, large enough to tell responses apart."""
    tokenizer = reward_model.load_tokenizer(encoder, max_turns=4)
    config = hf.AutoConfig.from_pretrained(encoder, num_labels=1)
    torch.manual_seed(seed)
    model = hf.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
