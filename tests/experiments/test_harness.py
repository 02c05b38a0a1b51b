"""Harness: the grammar's law, the builtin model, options, weightings by name, arms."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

import rsft_hf
from experiments.builtin import reviews as grammar
from experiments.builtin.reviews import build_model, build_tokenizer
from experiments.harness.arguments import (
    WEIGHTINGS,
    ExperimentError,
    Preset,
    option,
    parse_arguments,
    weighting_from_name,
)
from experiments.harness.arms import RandomAssignment, WeightedArmArguments, make_loss_resampler

# The grammar


@pytest.mark.parametrize(
    ("clause", "text", "is_positive"),
    [
        (grammar.state("plot", "dull"), "the plot is dull", False),
        (grammar.negate("plot", "dull"), "the plot is not dull", True),
        (grammar.negate("plot", "superb"), "the plot is not superb", False),
        (grammar.hedge("plot", "hardly", "superb"), "the plot is hardly superb", False),
        (grammar.hedge("plot", "anything but", "dull"), "the plot is anything but dull", True),
        (grammar.hedge("plot", "rather", "dull"), "the plot is rather dull", False),
        (
            grammar.deny("nobody could claim that", grammar.negate("plot", "superb")),
            "nobody could claim that the plot is not superb",
            True,
        ),
        (
            grammar.contrast(
                grammar.state("plot", "superb"), grammar.state("acting", "dull"), "although {conceded}, {asserted}"
            ),
            "although the plot is superb, the acting is dull",
            False,
        ),
        (
            grammar.contrast(
                grammar.negate("plot", "good"), grammar.negate("acting", "dull"), "{asserted}, even if {conceded}"
            ),
            "the acting is not dull, even if the plot is not good",
            True,
        ),
        (grammar.compare("plot", False, "superb"), "the plot is worse than the superb one before it", False),
        (grammar.wish("they promised me {an_a} {s}", "plot", "elegant"), "they promised me an elegant plot", False),
        (grammar.wish("i wish the {s} were {a}", "plot", "dull"), "i wish the plot were dull", True),
        (
            grammar.exclaim("plot", "superb", "somebody in the room snored", False),
            "what a superb plot, somebody in the room snored",
            False,
        ),
    ],
)
def test_the_writers_own_last_word_is_the_label(clause, text, is_positive):
    assert clause == grammar.Clause(text, is_positive)


def test_the_reviews_are_the_same_for_a_seed_balanced_and_never_repeated():
    splits = grammar.make_reviews(num_train=400, num_test=101, seed=3)
    assert splits == grammar.make_reviews(num_train=400, num_test=101, seed=3)
    assert splits["train"] != grammar.make_reviews(num_train=400, num_test=101, seed=4)["train"]
    assert Counter(row["label"] for row in splits["train"]) == {0: 200, 1: 200}
    assert Counter(row["label"] for row in splits["test"]) == {0: 51, 1: 50}
    assert {row["phenomenon"] for row in splits["train"]} == set(grammar.FREQUENCIES)
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts) == 501


def test_more_reviews_than_the_grammar_has_are_refused(monkeypatch):
    row = {"text": "The plot is dull.", "label": 0, "phenomenon": "plain"}
    monkeypatch.setattr(grammar, "write_review", lambda rng: dict(row))
    with pytest.raises(ValueError, match="Only 1 distinct reviews found after 100 draws; `num_train`=2"):
        grammar.make_reviews(num_train=2, num_test=1)


def test_the_two_sides_of_a_contrast_always_disagree(monkeypatch):
    """So counting good and bad words does not tell the label; the conjunction does."""
    sides = []
    monkeypatch.setattr(grammar, "contrast", lambda conceded, asserted, form: sides.append((conceded, asserted)))
    for seed in range(100):
        grammar._construct(random.Random(seed), "contrast", ["plot", "acting"])
    assert len(sides) == 100
    assert all(conceded.is_positive != asserted.is_positive for conceded, asserted in sides)


def test_the_builtin_model_depends_on_its_seed_alone():
    tokenizer = build_tokenizer(["The plot is dull.", "The acting is superb."])
    assert tokenizer.tokenize("The PLOT is unheard-of") == ["the", "plot", "is", "[UNK]", "[UNK]", "[UNK]"]
    first, again, other = (build_model(tokenizer, 3, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    assert first["classifier.weight"].shape[0] == 3


# Options


@dataclass
class Options:
    rate: float = option(0.1, "A number.")
    source: str = option("far", "A name.")
    is_loud: bool = option(False, "A switch.")


@dataclass
class Lists:
    seeds: list[int] | None = None


def test_the_command_line_wins_over_the_file_over_presets_over_defaults(tmp_path):
    presets = [Preset("source", "near", {"rate": 0.2, "seeds": [7]})]
    parse = lambda *argv: parse_arguments((Options, Lists), argv, presets)  # noqa: E731
    assert parse() == (Options(0.1, "far", False), Lists(None))
    assert parse("--source", "near") == (Options(0.2, "near", False), Lists([7]))
    config = tmp_path / "run.yaml"
    config.write_text("source: near\nrate: 3e-1\nis_loud: true\nseeds: [1, 2]\n")
    assert parse("--config", str(config)) == (Options(0.3, "near", True), Lists([1, 2]))
    assert parse("--config", str(config), "--rate", "0.4", "--seeds", "5") == (
        Options(0.4, "near", True),
        Lists([5]),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rte: 1", r"unknown key 'rte' \(did you mean 'rate'\?\). Valid keys: is_loud, rate, seeds, source"),
        ("rate: fast", "argument --rate: invalid float value: 'fast'"),
        ("- rate", "holds a list; it must hold one `option: value` a line"),
        ("rate: [", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ExperimentError, match=message):
        parse_arguments((Options, Lists), ["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "absent.yaml"], "`--config` absent.yaml is no file"),
        (["--raet", "1"], r"Unknown option '--raet' \(did you mean 'rate'\?\)"),
        (["--rate", "fast"], "invalid float value: 'fast'. See --help"),
    ],
)
def test_a_wrong_command_line_is_refused(argv, message):
    with pytest.raises(ExperimentError, match=message):
        parse_arguments((Options, Lists), argv)


# Weightings by name


def test_every_weighting_has_a_name():
    names = {
        "proportional": rsft_hf.Proportional(),
        "tempered:0.25": rsft_hf.Tempered(0.25),
        "softmax:2": rsft_hf.weighted.Softmax(2.0),
        "clipped:0.9": rsft_hf.Clipped(0.9),
        "drop_top:0.1": rsft_hf.DropTop(0.1),
        "floored:0.3": rsft_hf.Floored(0.3),
        "class_balanced": rsft_hf.ClassBalanced(),
        "entropy": rsft_hf.weighted.Entropy(),
        "margin": rsft_hf.weighted.Margin(),
        "least_confidence": rsft_hf.weighted.LeastConfidence(),
    }
    assert {name.partition(":")[0] for name in names} == set(WEIGHTINGS)
    for name, rule in names.items():
        assert weighting_from_name(name) == rule
    chain = rsft_hf.Chain(rsft_hf.DropTop(0.05), rsft_hf.Floored(0.2))
    assert weighting_from_name("drop_top:0.05 + floored:0.2") == chain


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("proportinal", "unknown.*did you mean 'proportional'.*Use one of proportional, tempered"),
        ("tempered", "tempered needs its alpha, such as 'tempered:0.5'"),
        ("tempered:-1", "needs its alpha.*`alpha`=-1.0 must lie in"),
        ("margin:2", "margin takes no parameter. Write 'margin'"),
        ("floored:0.2+", "'' is unknown"),
    ],
)
def test_a_wrong_weighting_is_refused(name, message):
    with pytest.raises(ExperimentError, match=message):
        weighting_from_name(name)


def test_the_control_keeps_the_weights_and_forgets_the_rows():
    losses = torch.arange(1.0, 1001.0)
    weights = RandomAssignment(rsft_hf.Proportional(), seed=1)(losses)
    assert torch.equal(weights.sort().values, losses.double())
    # Independent permutations of 1000 numbers correlate with a standard error of 1 / sqrt(999) = .032.
    assert abs(torch.corrcoef(torch.stack([weights, losses.double()]))[0, 1]) < 0.13
    assert torch.equal(weights, RandomAssignment(rsft_hf.Proportional(), seed=1)(losses))
    assert not torch.equal(weights, RandomAssignment(rsft_hf.Proportional(), seed=2)(losses))
    assert RandomAssignment(rsft_hf.weighted.Margin(), seed=1).requires == {"margins"}


def test_an_arm_gets_its_resampler():
    arguments = WeightedArmArguments(weighting="tempered:0.5", num_draws=7, losses="training")
    assert make_loss_resampler(arguments, "plain", 1) is None
    rejection, control = (make_loss_resampler(arguments, arm, 1) for arm in ("rejection", "control"))
    assert rejection.weighting == rsft_hf.Tempered(0.5)
    assert control.weighting == RandomAssignment(rsft_hf.Tempered(0.5), 1)
    assert (rejection.num_draws, rejection.losses) == (control.num_draws, control.losses) == (7, "training")
    assert arguments.configuration("plain") == {}
    assert arguments.configuration("control")["num_draws"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["plain", "mine"]}, "`--arms` mine: unknown. Use one or more of plain, rejection, control"),
        ({"seeds": [1, 1]}, r"`--seeds` \[1, 1\] must name at least one, and each once"),
        ({"num_draws": 0}, "num_draws"),
        ({"weighting": "entropy", "losses": "training"}, "only a scoring pass measures"),
    ],
)
def test_wrong_arms_are_refused_before_any_training(options, message):
    with pytest.raises(ExperimentError, match=message):
        WeightedArmArguments(**options)
