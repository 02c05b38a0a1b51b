"""The number words: the verifier against num2words for every number, and what it must not take for one."""

import pytest
from num2words import num2words

from experiments.builtin.numbers import (
    HIGHEST,
    build_model,
    build_tokenizer,
    make_numbers,
    make_row,
    names_the_number,
    read_german,
)


def test_every_number_is_read_back():
    words = [num2words(number, lang="de") for number in range(HIGHEST + 1)]
    assert [read_german(word) for word in words] == list(range(10_000))
    assert len(set(words)) == 10_000


@pytest.mark.parametrize(
    ("word", "number"),
    [("hundert", 100), ("tausend", 1000), ("hunderteins", 101), ("tausendhundert", 1100), (" sieben ", 7)],
)
def test_what_germans_also_say(word, number):
    assert read_german(word) == number


@pytest.mark.parametrize(
    "word",
    [
        "", " ", "ein", "zweiein", "einshundert", "einsundzwanzig", "zwanzigein", "einundzehn", "zweihundert sieben",
        "dreihundertsiebenn", "hunderttausend", "zweihundertdreihundert", "tausendtausend", "zehntausend", "undzwanzig",
        "Sieben", "nullhundert", "zweiundzwanzigundeins", "zweihundertnull", "zwanzigtausend", "seven", "7",
    ],
)  # fmt: skip
def test_what_is_no_number(word):
    assert read_german(word) is None


def test_any_change_of_one_letter_makes_another_number_or_none():
    """The verifier cannot be pleased by a near miss: no two spellings of one letter's difference name one number."""
    for number in range(1, HIGHEST + 1, 97):
        word = num2words(number, lang="de")
        for place in range(len(word)):
            for other in (word[:place] + word[place + 1 :], word[:place] + "e" + word[place:]):
                assert other == word or read_german(other) != number, other


def test_the_reward_reads_the_row():
    rewards = names_the_number(completions=["einundzwanzig", "zwölf", "nichts"], number=[21, 21, 21], prompts=["x"] * 3)
    assert rewards == [1.0, 0.0, 0.0]


def test_splits_are_disjoint_and_the_held_out_ones_fixed():
    one, two = (make_numbers(seed, num_labelled=40, num_prompts=100, num_val=30, num_test=50) for seed in (1, 2))
    assert {split: len(rows) for split, rows in one.items()} == {"val": 30, "test": 50, "labelled": 40, "train": 100}
    numbers = [row["number"] for rows in one.values() for row in rows]
    assert len(set(numbers)) == len(numbers) == 220
    assert (one["val"], one["test"]) == (two["val"], two["test"])
    assert one["labelled"] != two["labelled"]
    with pytest.raises(ValueError, match=r"ask for 10380 numbers; there are 9999. Lower `num_prompts`"):
        make_numbers(1, num_labelled=300, num_prompts=10_000, num_val=30, num_test=50)


def test_the_builtin_translator_spells_what_it_has_read():
    rows = [make_row(number) for number in (1, 22, 333, 4444, 5555, 6666)]  # holds no k, l or q
    tokenizer = build_tokenizer(row[column] for row in rows for column in ("en", "de"))
    for text in (rows[5]["en"], rows[5]["de"], "zwölf", "q"):
        token_ids = tokenizer(text).input_ids
        assert token_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(token_ids, skip_special_tokens=True) == text
    one, same, other = (build_model(tokenizer, seed).lm_head.weight.sum().item() for seed in (1, 1, 2))
    assert one == same != other
