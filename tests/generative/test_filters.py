"""What the filters keep, what counts as a duplicate, and which equations a solution holds."""

import time

import pytest

from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.filters import (
    Deduplicate,
    LengthRange,
    MatchesPattern,
    RejectEmpty,
    RejectRepetition,
    RejectTruncated,
    Satisfies,
    solution_equations,
)


def candidate(text: str = "some text", token_ids: list[int] | None = None, finish_reason: str = "stop") -> Candidate:
    return Candidate(
        prompt_id=0,
        prompt="Say something.",
        token_ids=[1, 2, 3] if token_ids is None else token_ids,
        text=text,
        finish_reason=finish_reason,
    )


def tokens(*ids: int) -> Candidate:
    return candidate("some text" if ids else "", list(ids))


CASES = [
    (RejectTruncated(), [candidate(), candidate(finish_reason="reference")], [candidate(finish_reason="length")]),
    (RejectEmpty(), [candidate("."), candidate(" a")], [candidate(""), candidate(" \n\t\u2003")]),
    (LengthRange(2, 3), [tokens(1, 2), tokens(1, 2, 3)], [tokens(1), tokens(1, 2, 3, 4), tokens()]),
    (LengthRange(min_tokens=2), [tokens(*range(999))], [tokens(1)]),
    # Pairs of 1 2 1 2 1: 12 21 12 21, half of them repeated. Of 1 1 1 1: one of three is new, two thirds repeated.
    (RejectRepetition(2, 0.5), [tokens(1, 2, 1, 2, 1), tokens(1), tokens()], [tokens(1, 1, 1, 1)]),
    (RejectRepetition(1, 0.0), [tokens(1, 2, 3)], [tokens(1, 2, 3, 1)]),
    (RejectRepetition(max_share=None, max_run=2), [tokens(1, 1, 2, 1, 1), tokens()], [tokens(2, 1, 1, 1)]),
    (RejectRepetition(max_run=3), [tokens(5, 5, 5)], [tokens(5, 5, 5, 5), tokens(*[1, 2] * 9)]),
    (MatchesPattern(r"\d+"), [candidate("it is 42")], [candidate("it is so")]),
    (MatchesPattern(r"\d+", full=True), [candidate("42")], [candidate("it is 42")]),
    (
        MatchesPattern("(?i)as an ai", must_match=False),
        [candidate("no")],
        [candidate("As an AI, I"), candidate("as an ai")],
    ),
    (Satisfies(str.isupper, name="upper_case"), [candidate("YES")], [candidate("No")]),
]


def test_every_filter_has_a_case():
    kinds = {RejectTruncated, RejectEmpty, LengthRange, RejectRepetition, MatchesPattern, Satisfies}
    assert {type(rule) for rule, _, _ in CASES} == kinds
    assert len(CASES) == 12


@pytest.mark.parametrize(("rule", "kept", "rejected"), CASES, ids=[repr(rule) for rule, _, _ in CASES])
def test_what_is_kept_and_what_is_not(rule, kept, rejected):
    assert [rule(one) for one in kept] == [True] * len(kept)
    assert [rule(one) for one in rejected] == [False] * len(rejected)


def test_filters_are_named_readably():
    assert repr(RejectTruncated()) == "RejectTruncated()"
    assert repr(LengthRange(2, 3)) == "LengthRange(min_tokens=2, max_tokens=3)"
    assert repr(Satisfies(str.isupper, name="upper_case")) == "Satisfies(upper_case)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LengthRange(-1), "`min_tokens`=-1"),
        (lambda: LengthRange(3, 2), "`min_tokens`=3 and `max_tokens`=2"),
        (lambda: RejectRepetition(max_share=None), "both None"),
        (lambda: RejectRepetition(0), "`ngram`=0"),
        (lambda: RejectRepetition(max_share=1.5), "`max_share`=1.5"),
        (lambda: RejectRepetition(max_run=0), "`max_run`=0"),
        (lambda: MatchesPattern("("), "`pattern`='\\('.*no regular expression"),
        (lambda: Satisfies(str.isupper, name=""), "`name` is empty"),
        (lambda: Deduplicate("fuzzy"), "`key`='fuzzy'"),
    ],
)
def test_wrong_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MatchesPattern(3), "`pattern` must be a string"),
        (lambda: Satisfies("upper", name="upper"), "`predicate` must be a function"),
        (lambda: Deduplicate(3), "`key` must be"),
        (lambda: Deduplicate(str.split).key_of(candidate()), r"returned \['some', 'text'\], which cannot be hashed"),
    ],
)
def test_wrong_kinds_are_refused(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def key_of(text: str, key="normalised"):
    return Deduplicate(key).key_of(candidate(text))


def test_exact_keys_are_texts():
    assert key_of("A b", "exact") == key_of("A b", "exact") != key_of("a b", "exact")


def test_normalised_keys_forget_case_punctuation_space_and_unicode_form():
    assert key_of("  Hello,\n world! ") == key_of("hello world") == "hello world"
    assert key_of("STRASSE") == key_of("stra\u00dfe")
    assert key_of("caf\u00e9") == key_of("cafe\u0301")  # one letter, or a letter and its accent
    assert key_of("\ufb01ne\u2026 \uff11") == "fine 1"  # a ligature, an ellipsis, a wide digit
    assert key_of("hello world") != key_of("helloworld")
    assert key_of("...") == "..."
    assert key_of("...") != key_of("?!")
    assert key_of("2 + 1") != key_of("2 1"), "signs are no punctuation"
    assert key_of("2 - 1") == key_of("2 1"), "but a dash is"


def test_a_key_of_your_own_may_say_none():
    assert key_of("Total: 12", lambda text: text.split()[-1]) == "12"
    assert key_of("no equation here", solution_equations) is None
    assert key_of("So 2 + 3 = 5.", solution_equations) == ("2+3=5",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("First 3*4 = 12. Then 12 - 2.5 = 9.5.", ("3*4=12", "12-2.5=9.5")),
        ("He has <<5+3=8>>8 apples, 8 - 1 = 7", ("5+3=8",)),
        ("$1,200 / 4 = $300 each", ("1200/4=300",)),
        ("3 \u00d7 4 = 12 and 12 \u00f7 4 = 3, 5 \u2212 2 = 3", ("3*4=12", "12/4=3", "5-2=3")),
        ("3 x 4 = 12", ("3*4=12",)),
        ("2 * (3 + 4) = 2 * 7 = 14", ("2*(3+4)=2*7=14",)),
        ("(the sum, i.e. (2 + 3 = 5), is odd) and (1+2)=3", ("2+3=5", "(1+2)=3")),
        ("20% of 50: 50 * 20% = 10", ("50*20%=10",)),
        ("In 2024 there were 12. 5 + 3 = 8", ("5+3=8",)),
        ("3 apples + 2 apples = 5 apples", None),
        ("x = y", None),
        ("", None),
    ],
)
def test_equations_of_a_solution(text, expected):
    assert solution_equations(text) == expected


def test_equal_reasoning_in_other_words_has_one_key_and_another_order_another():
    first = "She sold 48/2 = 24 clips. In total 48+24 = 72."
    assert solution_equations(first) == solution_equations("Half is 48 / 2 = 24, so 48 + 24 = 72 altogether")
    assert solution_equations(first) != solution_equations("48+24 = 72 since 48/2 = 24")


@pytest.mark.parametrize("text", ["-" * 20_000, "1+" * 2_000, "(" * 20_000, "9" * 20_000, "1 " * 5_000])
def test_a_degenerate_text_is_read_in_no_time(text):
    start = time.perf_counter()
    solution_equations(text)
    assert time.perf_counter() - start < 5  # quadratic in such lengths would be a minute
