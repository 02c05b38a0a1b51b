"""The builtin translation task: English number words into German ones, with a verifier that reads German.

"three hundred and seven" -> "dreihundertsieben". A few labelled pairs, many numbers without a translation, and two held
out sets, all disjoint. A translation is judged by reading it back as a number, so no reference is needed. In: sizes and
a seed. Out: rows and rewards. It knows no model.
"""

import random
import re
import string
from collections.abc import Iterable
from typing import Any

from num2words import num2words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, MarianConfig, MarianMTModel, PreTrainedTokenizerFast, set_seed

HIGHEST = 9_999

_UNITS = {"ein": 1, "zwei": 2, "drei": 3, "vier": 4, "fünf": 5, "sechs": 6, "sieben": 7, "acht": 8, "neun": 9}

_TENS = {"zwanzig": 20, "dreißig": 30, "vierzig": 40, "fünfzig": 50, "sechzig": 60, "siebzig": 70, "achtzig": 80,
         "neunzig": 90}  # fmt: skip

_TEENS = {"zehn": 10, "elf": 11, "zwölf": 12, "dreizehn": 13, "vierzehn": 14, "fünfzehn": 15, "sechzehn": 16,
          "siebzehn": 17, "achtzehn": 18, "neunzehn": 19}  # fmt: skip

# "ein" stands before another part, "eins" at the end.
_LAST = {"eins" if word == "ein" else word: value for word, value in _UNITS.items()} | _TEENS


def _any_of(words: dict[str, int]) -> str:
    return f"(?:{'|'.join(words)})"


_NUMBER = re.compile(
    rf"((?P<thousands>{_any_of(_UNITS)})?tausend)?"
    rf"((?P<hundreds>{_any_of(_UNITS)})?hundert)?"
    rf"(((?P<units>{_any_of(_UNITS)})und)?(?P<tens>{_any_of(_TENS)})|(?P<last>{_any_of(_LAST)}))?"
)


def read_german(text: str) -> int | None:
    """Returns the number from 0 to 9,999 that a German word names, None if it names none.

    Both "hundert" and "einhundert" are 100. Spaces inside, capitals and anything left over make it no number.

    Example:
        >>> read_german("dreihundertsieben"), read_german("zweitausendeinundvierzig"), read_german("siebendreihundert")
        (307, 2041, None)
    """
    word = text.strip()
    if word == "null":
        return 0
    match = _NUMBER.fullmatch(word)
    if match is None or not word:
        return None
    value = _UNITS.get(match["units"] or "", 0) + _TENS.get(match["tens"] or "", 0) + _LAST.get(match["last"] or "", 0)
    for scale, part, name in ((1000, "thousands", "tausend"), (100, "hundreds", "hundert")):
        if name in word:
            value += scale * (_UNITS[match[part]] if match[part] else 1)
    return value


def names_the_number(completions: list[str], number: list[int], **kwargs: Any) -> list[float]:
    """Returns the reward of each translation: 1 if it is a German number word and names the row's number, else 0.

    Example:
        >>> names_the_number(completions=["zwölf", "zwei"], number=[12, 12])
        [1.0, 0.0]
    """
    return [float(read_german(text) == wanted) for text, wanted in zip(completions, number, strict=True)]


def make_row(number: int) -> dict[str, Any]:
    """Returns the number with its names in both languages.

    Example:
        >>> make_row(307)
        {'number': 307, 'en': 'three hundred and seven', 'de': 'dreihundertsieben'}
    """
    english = num2words(number).replace(",", "").replace("-", " ")
    return {"number": number, "en": english, "de": num2words(number, lang="de")}


def make_numbers(
    seed: int, num_labelled: int, num_prompts: int, num_val: int = 300, num_test: int = 500
) -> dict[str, list[dict[str, Any]]]:
    """Returns disjoint rows by split: "labelled", "train", "val" and "test"; the last two do not hang on the seed.

    Raises:
        ValueError: If there are not so many numbers up to 9,999.
    """
    sizes = {"val": num_val, "test": num_test, "labelled": num_labelled, "train": num_prompts}
    if sum(sizes.values()) > HIGHEST:
        raise ValueError(f"{sizes} ask for {sum(sizes.values())} numbers; there are {HIGHEST}. Lower `num_prompts`.")
    numbers = list(range(1, HIGHEST + 1))
    random.Random(0).shuffle(numbers)
    held_out, rest = numbers[: num_val + num_test], numbers[num_val + num_test :]
    random.Random(seed).shuffle(rest)
    remaining = iter(held_out + rest)
    return {split: [make_row(next(remaining)) for _ in range(size)] for split, size in sizes.items()}


LETTERS = string.ascii_lowercase + "äöüß"

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")

MAX_POSITIONS = 64


def build_tokenizer(texts: Iterable[str], vocabulary_size: int = 120) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of word parts, one vocabulary for both languages, that ends every text with `</s>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=list(LETTERS),  # so that no word is unknown, only unseen
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> MarianMTModel:
    """Returns a Marian of width 96, two layers a side, with random weights; the same seed gives the same ones."""
    width, heads = 96, 4
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_position_embeddings=MAX_POSITIONS,
        scale_embedding=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=None,
    )
    set_seed(seed)
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return model
