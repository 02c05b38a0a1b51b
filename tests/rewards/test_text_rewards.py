"""Rewards from text: against the libraries' own figures, numbers worked out by hand, and one contract for all."""

import dataclasses
import sys

import datasets
import evaluate
import pytest
import rouge_score.rouge_scorer
import sacrebleu

import generators as g
import reward_parts
from rsft_hf import rewards as scorers
from rsft_hf.rewards import BleuReward, MetricReward
from rsft_hf.rewards.contract import Scorer, check_callable
from rsft_hf.rewards.functions import RewardFunctions

TEXTS = ["the cat sat on the mat", "a dog", "the cat sat on a mat today"]
GOLD = ["the cat sat on the mat", "the cat ran off", "the cat is on the mat"]


def call(scorer, completions, **columns):
    return scorer(prompts=columns.pop("prompts", [""] * len(completions)), completions=completions, **columns)


def cases() -> dict[str, Scorer]:
    bert, tokenizer = reward_parts.bert_classifier(), reward_parts.word_tokenizer()
    made = [
        scorers.BleuReward(),
        scorers.ChrfReward("gold", word_order=2),
        scorers.CopyPenalty(column="document"),
        scorers.DistinctReward(),
        scorers.ExactMatch(),
        scorers.FormatReward(r"\d"),
        scorers.JudgeReward("tiny", base_url="http://localhost:1/v1"),
        scorers.LengthWindow(1, 3),
        scorers.MetricReward(Length()),
        scorers.ModelReward(bert, tokenizer, templates=("{document}", "{completion}")),
        scorers.RepetitionPenalty(),
        scorers.RougeReward(),
        scorers.RoundTripReward(reward_parts.llama(), tokenizer),
        scorers.SimilarityReward(bert, tokenizer),
        scorers.TokenF1(),
    ]
    return {type(scorer).__name__: scorer for scorer in made}


# A metric from a local module, as `evaluate.load` reads it without a hub.
METRIC_MODULE = """
import datasets
import evaluate


class Overlap(evaluate.Metric):
    def _info(self):
        texts = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=texts)

    def _compute(self, predictions, references, factor=1.0):
        pairs = list(zip(predictions, references))
        share = sum(bool(set(text.split()) & set(gold.split())) for text, gold in pairs) / len(pairs)
        return {"share": factor * share, "shares": [share], "rows": len(pairs)}
"""


class Length(evaluate.Metric):
    """A metric with a single number, as an object."""

    def _info(self):
        texts = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string")))
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=texts)

    def _compute(self, predictions, references):
        return {"length": float(len(predictions[0]))}


def test_every_scorer_keeps_the_contract():
    made = cases()
    others = {"ReferenceReward", "RewardFunctions", "Scores"}
    assert set(made) | others == set(scorers.__all__), "a new scorer needs a row in `cases`"
    functions = RewardFunctions(list(made.values()))
    assert len(set(functions.names)) == len(made)
    functions.check(["prompt", "reference", "gold", "document"])
    for scorer in made.values():
        check_callable(scorer, 0)
        assert isinstance(scorer, Scorer)
        assert dataclasses.is_dataclass(scorer)
        assert type(scorer).__dataclass_params__.frozen
        assert len(repr(scorer)) < 900
        assert "object at" not in repr(scorer)
        for column in scorer.requires:
            with pytest.raises(ValueError, match=f"`{scorer.name}` needs the column `{column}`"):
                RewardFunctions(scorer).check(["other"])


def test_bleu_and_chrf_are_sacrebleus_own_over_a_hundred():
    for scorer, metric in (
        (scorers.BleuReward(), sacrebleu.BLEU(effective_order=True)),
        (scorers.ChrfReward(), sacrebleu.CHRF()),
        (scorers.ChrfReward(word_order=2), sacrebleu.CHRF(word_order=2)),
    ):
        expected = [metric.sentence_score(text, [gold]).score / 100 for text, gold in zip(TEXTS, GOLD, strict=True)]
        assert call(scorer, TEXTS, reference=GOLD) == expected
        assert expected[0] == pytest.approx(1.0)
        assert 0 < expected[2] < 1


def test_bleu_by_hand():
    """A reference of "a b c": "a b" has precisions 2/2 and 1/1, brevity exp(1 - 3/2), and no longer n-gram counts."""
    assert call(scorers.BleuReward(), ["a b"], reference=["a b c"]) == [pytest.approx(0.6065307)]


def test_rouge_is_the_librarys_own_and_takes_the_best_reference():
    scorer = rouge_score.rouge_scorer.RougeScorer(["rougeL"])
    expected = [scorer.score(gold, text)["rougeL"].fmeasure for text, gold in zip(TEXTS, GOLD, strict=True)]
    assert call(scorers.RougeReward(), TEXTS, reference=GOLD) == expected
    assert call(scorers.RougeReward(), ["a b c d"], reference=[["x", "a c"]]) == [pytest.approx(2 / 3)]  # P 2/4, R 2/2


COMPARING = [scorers.BleuReward, scorers.ChrfReward, scorers.RougeReward, scorers.TokenF1, scorers.ExactMatch]


@pytest.mark.parametrize("build", COMPARING)
def test_references_may_be_one_many_or_none(build):
    rewards = call(build("gold"), ["a cat", "a cat", "a cat", "a cat"], gold=["a cat", ["dog", "a cat"], None, []])
    assert rewards[0] == pytest.approx(1.0)
    assert rewards[1] >= 0.999
    assert rewards[2:] == [None, None]
    chat = [[{"role": "assistant", "content": "a cat"}]]
    assert call(build("gold"), chat, gold=["a cat"]) == rewards[:1]
    with pytest.raises(TypeError, match=r"`gold\[0\]` is 3\. A reference is a string"):
        call(build("gold"), ["a"], gold=[3])


def test_squad_figures_by_hand():
    """ "The big cat!" is "big cat": 2 words against "a cat sat" -> "cat sat", 1 in common, F1 = 2 * 1 / 4."""
    assert call(scorers.TokenF1(), ["The big cat!"], reference=["a cat sat"]) == [0.5]
    assert call(scorers.TokenF1(), ["the", "the", "x"], reference=["a", "b", "the"]) == [1.0, 0.0, 0.0]
    assert call(scorers.TokenF1(), ["b b b"], reference=["b"]) == [0.5]  # counted once: 2 * 1 / 4
    assert call(scorers.ExactMatch(), ["The Cat.", "cats"], reference=[["dog", "cat"], "cat"]) == [1.0, 0.0]


def test_a_metric_that_is_nowhere_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"`metric`='no_such_metric' is neither a folder .* the path of such a folder"):
        scorers.MetricReward("no_such_metric")


def test_a_metric_is_computed_for_each_sentence(tmp_path):
    path = tmp_path / "overlap.py"
    path.write_text(METRIC_MODULE, encoding="utf-8")
    columns = {"completions": ["a b", "c", "d"], "gold": ["b", "d", None]}
    scorer = scorers.MetricReward(str(path), "share", "gold", {"factor": 3.0})
    assert scorer.name == "share"
    assert call(scorer, **columns) == [3.0, 0.0, None]
    assert call(scorers.MetricReward(scorer.metric, "rows", "gold"), **columns) == [1.0, 1.0, None]  # never the corpus
    assert call(scorers.MetricReward(scorer.metric, "shares", "gold"), **columns) == [1.0, 0.0, None]
    assert call(scorers.MetricReward(Length(), None, "gold"), **columns) == [3.0, 1.0, None]
    with pytest.raises(ValueError, match=r"returns \['rows', 'share', 'shares'\]\. Say which one with `key`"):
        call(scorers.MetricReward(scorer.metric, None, "gold"), **columns)
    with pytest.raises(ValueError, match='`key`="bleu" is not among'):
        call(scorers.MetricReward(scorer.metric, "bleu", "gold"), **columns)
    with pytest.raises(TypeError, match="`metric` is a int"):
        scorers.MetricReward(3)


def test_loops_cost_and_other_repetitions_do_not():
    scorer = scorers.RepetitionPenalty()
    texts = ["a b c a b c a b c", "go go go", "a b a c", "x a a y", ""]
    assert call(scorer, texts) == [-6 / 9, -2 / 3, 0.0, -1 / 4, 0.0]
    assert call(scorers.RepetitionPenalty(longest=2), texts)[0] == 0.0
    tokens = scorers.RepetitionPenalty(unit="tokens")
    assert call(tokens, ["x", "y"], completion_ids=[[7, 8, 7, 8], [7, 8, 9]]) == [-0.5, 0.0]


def test_shares_of_ngrams_by_hand():
    assert call(scorers.DistinctReward(n=2), ["a b a b", "a", "a b"]) == [2 / 3, None, 1.0]  # ab ba ab
    assert call(scorers.DistinctReward(n=1, unit="characters"), ["a a b"]) == [2 / 3]
    documents = ["The cat sat on the mat", None, "x"]
    penalty = scorers.CopyPenalty(n=3, column="document")
    texts = ["the CAT sat down there", "the cat", "two words"]  # 1 of 3 trigrams; unknown; no trigram
    assert call(penalty, texts, document=documents) == [-1 / 3, None, 0.0]
    chat = [[{"role": "user", "content": "say a b"}]]
    assert call(scorers.CopyPenalty(n=2), ["a b"], prompts=chat) == [-1.0]


def test_lengths_and_formats_by_hand():
    window = scorers.LengthWindow(3, 5, ramp=2, unit="tokens")
    lengths = (0, 1, 2, 3, 5, 6, 7)
    texts = ["x" * n for n in lengths]
    assert call(window, texts, completion_ids=[[0] * n for n in lengths]) == [0, 0, 0.5, 1, 1, 0.5, 0]
    for rule in (window, scorers.RepetitionPenalty(unit="tokens"), scorers.DistinctReward(unit="tokens")):
        with pytest.raises(ValueError, match="'some words' has a text but no tokens, which this reward counts"):
            call(rule, ["some words"], completion_ids=[[]])  # imported without a tokenizer
    assert call(scorers.LengthWindow(2), ["a", "a b", "a b c"]) == [0.0, 1.0, 1.0]
    assert call(scorers.FormatReward(r"(?s)\A<think>.*</think>"), ["<think>\n</think> 3", "3"]) == [1.0, 0.0]


WRONG = [
    (lambda: scorers.DistinctReward(n=0), "`n`=0 must be at least 1"),
    (lambda: scorers.RepetitionPenalty(longest=0), "`longest`=0 must be at least 1"),
    (lambda: scorers.DistinctReward(unit="lines"), '`unit`="lines" must be one of'),
    (lambda: scorers.CopyPenalty(unit="tokens"), '`unit`="tokens" must be one of'),
    (lambda: scorers.LengthWindow(3, 2), "`minimum`=3 and `maximum`=2"),
    (lambda: scorers.LengthWindow(ramp=-1), "`ramp`=-1 must not be negative"),
    (lambda: scorers.FormatReward("("), r"`pattern`='\(' is no regular expression"),
    (lambda: scorers.RougeReward("gold", "rougeX"), '`variant`="rougeX" must be'),
]


@pytest.mark.parametrize(("build", "message"), WRONG)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


OPTIONAL = [
    ("sacrebleu", scorers.BleuReward, "rewards"),
    ("sacrebleu", scorers.ChrfReward, "rewards"),
    ("rouge_score.rouge_scorer", scorers.RougeReward, "rewards"),
    ("openai", lambda: scorers.JudgeReward("tiny", "http://localhost:1/v1"), "judge"),
]


@pytest.mark.parametrize(("package", "build", "extra"), OPTIONAL)
def test_a_missing_package_names_its_extra(monkeypatch, package, build, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install rsft-hf\[{extra}\]"):
        build()


def test_bleu_is_of_each_sentence_and_smoothed():
    """Values: test_scorers.py."""
    # "a b c" and "a b d" share no 4-gram and no 3-gram: unsmoothed both would be 0 beside "a b c d".
    answers, references = ["a b c", "j"], ["a b d", "a b d"]
    scores = BleuReward()(prompts=answers, completions=answers, reference=references)
    assert scores[0] > 0
    assert scores[1] == 0  # and alone: another row's words change nothing
    assert BleuReward()(prompts=answers[:1], completions=answers[:1], reference=references[:1]) == scores[:1]


METRIC = """
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"share": float(predictions[0].count(references[0]))}
"""


def test_a_metric_of_ones_own_is_loaded_by_its_path(tmp_path):
    """No hub is asked: the tests run offline."""
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "share.py").write_text(METRIC)
    run = g.trainer(tmp_path, g.resampler(MetricReward(str(tmp_path / "share"))))
    run.train()
    wanted = g.prompts(4)["reference"]
    assert [one.reward for one in g.stored(run)] == [one.text.count(wanted[one.prompt_id]) for one in g.stored(run)]
