"""Built-in data sets and small models of the recipes, for runs without a download.

    python -m recipes.data.make          # from the root of the repository; two minutes on one CPU core

    reviews/     train.csv, test.csv (`text`, `label`), model/ (a BERT configuration and its tokenizer, no weights)
    numbers/     train.csv, test.csv (`en`, `de`: numbers in words), model/ (a Marian after training on 60 other pairs)
    dialogues/   train.jsonl, test.jsonl (`prompt`, `chosen`, `rejected`: conversations), chat_model/ (a Llama that
                 answers on the right subject about half of the time), reward_model/ (a BERT configuration)
    commands/    train.jsonl, test.jsonl (`text`, `tokens`, `tags`, `intent`), model/ (a BERT configuration), and
                 parser/ (a Llama configuration)
    facts/       train.jsonl, test.jsonl (questions in the format of SQuAD), model/ (a BERT configuration)
    sums/        train.jsonl, test.jsonl (`question`, `answer`, in the format of GSM8K), model/ (a Llama that adds well
                 at times)
    meetings/    train.jsonl, test.jsonl (`dialogue`, `summary`), model/ (a Marian that summarises some of them)

The data sets are equal at every call. The models are trained with a fixed seed and saved in half precision; another
version of torch may give slightly different weights.
"""

import csv
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from experiments.builtin import commands, numbers, office, reviews

FOLDER = Path(__file__).resolve().parent
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
NUM_REVIEWS, NUM_NUMBERS, NUM_LABELLED, NUM_DIALOGUES = (3000, 600), (1200, 300), 60, (480, 120)
NUM_COMMANDS, NUM_FACTS, NUM_SUMS, NUM_MEETINGS = (500, 150), (400, 100), (400, 100), (400, 100)

ACTIVITIES = {  # an activity: what one is good at, and a remark about it
    "cooking": ("soup", "fresh herbs make the difference"),
    "gardening": ("roses", "the soil matters most"),
    "running": ("marathons", "good shoes save your knees"),
    "painting": ("portraits", "the light is everything"),
    "chess": ("openings", "endgames win matches"),
    "sailing": ("regattas", "the wind decides"),
    "reading": ("novels", "libraries are wonderful places"),
    "photography": ("landscapes", "mornings have the best light"),
    "swimming": ("crawl", "breathing is the hard part"),
    "baking": ("bread", "patience gives a good crust"),
    "hiking": ("mountains", "pack less than you think"),
    "guitar": ("chords", "scales pay off in the end"),
}
OPENINGS = (
    "i have taken up {a} .", "my new hobby is {a} .", "lately i spend my evenings on {a} .", "{a} makes me happy .",
    "i am thinking about {a} .", "my sister wants to try {a} .", "we talked about {a} at work .", "is {a} hard ?",
    "what do you think of {a} ?", "tell me about {a} .",
)  # fmt: skip
PREFACES = ("", "hello !", "good morning .", "guess what .", "by the way ,", "you know ,", "well ,", "listen :")
ANSWERS = (
    "{a} is a fine hobby , {r} .", "i like {a} too , {r} .", "with {a} , {r} . do you know {g} ?",
    "try {g} first , {r} .", "ah , {a} ! how are your {g} ?", "{r} , so enjoy your {a} .",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
PAIR_TEMPLATE = "[CLS] {% for message in messages %}{{ message['content'] + ' [SEP] ' }}{% endfor %}"


def main() -> None:
    """Writes every data set and model."""
    make_reviews(FOLDER / "reviews")
    make_numbers(FOLDER / "numbers")
    make_dialogues(FOLDER / "dialogues")
    make_commands(FOLDER / "commands")
    make_facts(FOLDER / "facts")
    make_sums(FOLDER / "sums")
    make_meetings(FOLDER / "meetings")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB under {FOLDER.name}")


def make_reviews(folder: Path) -> None:
    """Writes reviews from a grammar, and the configuration of a small BERT."""
    splits = reviews.make_reviews(*NUM_REVIEWS)
    names = ("negative", "positive")
    for split, rows in splits.items():
        write_csv(folder / f"{split}.csv", [{"text": row["text"], "label": names[row["label"]]} for row in rows])
    tokenizer = reviews.build_tokenizer(row["text"] for row in splits["train"])
    config = reviews.build_model(tokenizer, num_labels=2, seed=0).config
    config.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def make_numbers(folder: Path) -> None:
    """Writes pairs of English and German number words, and a translator that gets two thirds of them right."""
    num_train, num_test = NUM_NUMBERS
    splits = numbers.make_numbers(0, NUM_LABELLED, num_train, num_val=0, num_test=num_test)
    for split in ("train", "test"):
        write_csv(folder / f"{split}.csv", [{"en": row["en"], "de": row["de"]} for row in splits[split]])
    labelled = splits["labelled"]
    tokenizer = numbers.build_tokenizer(text for row in labelled for text in (row["en"], row["de"]))
    model = small_marian(tokenizer)
    examples = [tokenizer(row["en"], text_target=row["de"]) for row in labelled]
    fit(model, examples, num_steps=350, learning_rate=2e-3, pad=tokenizer.pad_token_id)
    save(model, tokenizer, folder / "model")


def make_dialogues(folder: Path) -> None:
    """Writes dialogues with a right and a wrong answer, a small chat model, and the configuration of a reward model."""
    rng = random.Random(0)
    contexts = [(activity, preface, opening) for activity in ACTIVITIES for preface in PREFACES for opening in OPENINGS]
    rng.shuffle(contexts)
    rows = [dialogue(rng, *context) for context in contexts]
    num_train, num_test = NUM_DIALOGUES
    splits = {"train": rows[:num_train], "test": rows[num_train : num_train + num_test]}
    for split, chosen in splits.items():
        write_lines(folder / f"{split}.jsonl", [json.dumps(row) for row in chosen])
    words = sorted({word for row in rows for turn in row["prompt"] + row["chosen"] for word in turn["content"].split()})
    chat = word_tokenizer(["<pad>", "<unk>", "<end>", "<user>", "<assistant>", *words], "<unk>", "<pad>", "<end>")
    chat.chat_template = CHAT_TEMPLATE
    set_seed(0)
    options = {"pad_token_id": chat.pad_token_id, "eos_token_id": chat.eos_token_id, "bos_token_id": None}
    options |= SMALL
    config = LlamaConfig(vocab_size=len(chat), max_position_embeddings=128, tie_word_embeddings=True, **options)
    model = LlamaForCausalLM(config)
    seen = rows[:num_train]
    conversations = [row["prompt"] + (row["chosen"] if rng.random() < 0.6 else row["rejected"]) for row in seen]
    examples = [answer_only(chat, conversation) for conversation in conversations]
    fit(model, examples, num_steps=800, learning_rate=2e-3, pad=chat.pad_token_id)
    save(model, chat, folder / "chat_model")
    judge = word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words], "[UNK]", "[PAD]", "[SEP]")
    judge.chat_template = PAIR_TEMPLATE
    options = {"vocab_size": len(judge), "pad_token_id": judge.pad_token_id, "num_labels": 1, "initializer_range": 0.05}
    options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128}
    options |= SMALL
    BertConfig(**options).save_pretrained(folder / "reward_model")
    judge.save_pretrained(folder / "reward_model")


def make_commands(folder: Path) -> None:
    """Writes commands to a voice assistant, and configurations of an encoder and of a model that writes parses."""
    splits = commands.make_commands(*NUM_COMMANDS)
    write_rows(folder, splits)
    words = sorted({word for rows in splits.values() for row in rows for word in row["tokens"]})
    save_encoder(words, folder / "model")
    rows = [row for split in splits.values() for row in split]
    marks = " ".join(['{"intent": ", "slots": {"', '": "', '", "', '"}}', "}"])
    save_decoder(
        [row["text"] for row in rows] + [one for row in rows for one in parts_of(row)] + [marks], folder / "parser"
    )


def parts_of(row: dict[str, Any]) -> list[str]:
    """Returns what a parse of a command is made of: with and without a space before it."""
    names = [row["intent"], *{tag[2:] for tag in row["tags"] if tag != "O"}, *row["tokens"]]
    return [f'"{name}' for name in names]


def make_facts(folder: Path) -> None:
    """Writes questions on facts, and the configuration of a small BERT."""
    splits = office.make_facts(*NUM_FACTS)
    write_rows(folder, splits)
    save_encoder(all_words(splits, ("context", "question")), folder / "model")


def make_sums(folder: Path) -> None:
    """Writes sums with their steps, and a model that has seen a part of them."""
    splits = office.make_sums(*NUM_SUMS)
    write_rows(folder, splits)
    texts = [row[name] for rows in splits.values() for row in rows for name in row]
    model, tokenizer = save_decoder([*texts, "0123456789 0 1 2 3 4 5 6 7 8 9"], folder / "model")
    examples = [answer_only(tokenizer, chat(row["question"], row["answer"])) for row in splits["train"][:150]]
    fit(model, examples, num_steps=500, learning_rate=2e-3, pad=tokenizer.pad_token_id)
    save(model, tokenizer, folder / "model")


def make_meetings(folder: Path) -> None:
    """Writes dialogues with summaries, and an encoder-decoder that has seen a part of them."""
    splits = office.make_meetings(*NUM_MEETINGS)
    write_rows(folder, splits)
    words = all_words(splits, ("dialogue", "summary"))
    tokenizer = word_tokenizer(["<pad>", "<unk>", "</s>", *words], "<unk>", "<pad>", "</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    model = small_marian(tokenizer)
    examples = [tokenizer(row["dialogue"], text_target=row["summary"]) for row in splits["train"][:100]]
    fit(model, examples, num_steps=400, learning_rate=2e-3, pad=0)
    save(model, tokenizer, folder / "model")


def small_marian(tokenizer: PreTrainedTokenizerFast) -> MarianMTModel:
    """Returns an encoder-decoder of two and two layers with random weights."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["decoder_start_token_id"] = tokenizer.pad_token_id
    size = {"d_model": 48, "max_position_embeddings": 64, "scale_embedding": True, "forced_eos_token_id": None}
    for side in ("encoder", "decoder"):
        size |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 96}
    set_seed(0)
    model = MarianMTModel(MarianConfig(vocab_size=len(tokenizer), **size, **ids))
    model.generation_config = GenerationConfig(**ids)
    return model


def chat(question: str, answer: str) -> list[dict[str, str]]:
    """Returns a conversation of two turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def all_words(splits: dict[str, list[dict[str, Any]]], columns: tuple[str, ...]) -> list[str]:
    """Returns the words of some columns, sorted."""
    return sorted({word for rows in splits.values() for row in rows for name in columns for word in row[name].split()})


def write_rows(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    """Writes the splits as JSONL."""
    for split, rows in splits.items():
        write_lines(folder / f"{split}.jsonl", [json.dumps(row) for row in rows])


def save_encoder(words: list[str], folder: Path) -> None:
    """Writes the configuration and the tokenizer of a small BERT over whole words."""
    tokenizer = word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words], "[UNK]", "[PAD]", "[SEP]")
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    options = {"vocab_size": len(tokenizer), "pad_token_id": 0, "max_position_embeddings": 128}
    options |= SMALL
    BertConfig(**options, initializer_range=0.05).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_decoder(texts: list[str], folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Writes the configuration of a small Llama over words and signs; returns a model of it and its tokenizer."""
    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>"]
    # A piece keeps the space before it, so that pieces in a row are the text.
    piece = r"\n| ?[a-z_]+| ?[^\sa-z_]"
    pieces = sorted({found for text in texts for found in re.findall(piece, f" {text}")})
    vocabulary = {one: number for number, one in enumerate([*special, *pieces])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split(Regex(piece), "removed", invert=True), decoders.Fuse()
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", "additional_special_tokens": special[3:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=128, **named)
    tokenizer.chat_template = CHAT_TEMPLATE
    options = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, "tie_word_embeddings": True}
    options |= SMALL
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **options)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    set_seed(0)
    return LlamaForCausalLM(config), tokenizer


def dialogue(rng: random.Random, activity: str, preface: str, opening: str) -> dict[str, Any]:
    """Returns a prompt with an answer on its subject and one on another."""
    other = rng.choice([name for name in ACTIVITIES if name != activity])
    prompt = f"{preface} {opening.format(a=activity)}".strip()
    right, wrong = (rng.choice(ANSWERS).format(a=a, g=ACTIVITIES[a][0], r=ACTIVITIES[a][1]) for a in (activity, other))
    turn = lambda role, content: [{"role": role, "content": content}]  # noqa: E731
    return {"prompt": turn("user", prompt), "chosen": turn("assistant", right), "rejected": turn("assistant", wrong)}


def answer_only(tokenizer: PreTrainedTokenizerFast, conversation: list[dict[str, str]]) -> dict[str, list[int]]:
    """Returns the token ids of a conversation, with labels on its last turn."""
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    prompt = tokenizer.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True)
    ids, num_prompt = tokenizer(text)["input_ids"], len(tokenizer(prompt)["input_ids"])
    return {"input_ids": ids, "labels": [-100] * num_prompt + ids[num_prompt:]}


def word_tokenizer(words: list[str], unknown: str, pad: str, end: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if "[CLS]" in words else {"eos_token": end}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, unk_token=unknown, pad_token=pad, **special
    )


def fit(model: PreTrainedModel, examples: list[dict[str, Any]], num_steps: int, learning_rate: float, pad: int) -> None:
    """Trains on random batches of 32 examples, with a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, num_steps)
    rng = random.Random(0)
    model.train()
    for _ in range(num_steps):
        batch = rng.sample(examples, min(32, len(examples)))
        ids = padded([row["input_ids"] for row in batch], pad)
        inputs = {"input_ids": ids, "attention_mask": ids.ne(pad).long()}
        loss = model(**inputs, labels=padded([row["labels"] for row in batch], -100)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """Returns the rows as one tensor, filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves model and tokenizer, the weights in half precision."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes the rows with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes the lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
