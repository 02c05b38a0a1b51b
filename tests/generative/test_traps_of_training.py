"""The traps of training on candidates and of judging them, 10 to 18; 1 to 9 stand in test_generative_traps.py."""

import pytest
import transformers as hf

import generators as g
from rsft_hf.acceptance import Threshold, TopKPerPrompt
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.generative.encoding import Encoder, RowCollator
from rsft_hf.generative.generation import completion_log_probabilities
from rsft_hf.rewards import BleuReward, MetricReward


def losses(run: hf.Trainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("rule", [TopKPerPrompt(1), Threshold(quantile=0.9)], ids=["half", "a_tenth"])
def test_trap_10_the_loss_is_that_of_accepted_tokens_whatever_the_acceptance(tmp_path, rule):
    settings = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
    fixed = {"attention_dropout": 0.0}
    source = g.resampler(acceptance=rule, on_nothing_accepted="skip", num_candidates=4)
    keywords = {"model": g.tiny_model(**fixed), "args": settings}
    run = g.trainer(tmp_path / "ours", source, num_prompts=8, **keywords)
    run.train()
    rows = [source.pool[index] for index in run._progress.indices.tolist()]
    assert len(rows) == 8  # the epoch, and so the number of steps, is as long as there are prompts
    plain = hf.Trainer(
        g.tiny_model(**fixed), g.arguments(tmp_path / "plain", **settings), RowCollator(g.PAD), train_dataset=rows
    )
    plain.train()
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    assert len(losses(run)) == 2
    for path, value in plain.model.state_dict().items():
        assert (run.model.state_dict()[path] - value).abs().max() < 1e-6
    # By hand: nats of the answers of the first four rows over their tokens, however they fall into micro-batches.
    answers = [[label for label in row["labels"] if label != -100] for row in rows[:4]]
    asked = [row["input_ids"][: -len(answer)] for row, answer in zip(rows, answers)]
    encoder = Encoder(g.tokenizer(), is_encoder_decoder=False)
    log_p = completion_log_probabilities(g.tiny_model(**fixed).eval(), encoder, asked, answers)
    # The log rounds to four digits.
    assert losses(run)[0] == pytest.approx(-float(log_p.sum()) / sum(map(len, answers)), abs=1e-3)


def test_trap_11_bleu_is_of_each_sentence_and_smoothed():
    """Values: test_scorers.py."""
    # "a b c" and "a b d" share no 4-gram and no 3-gram: unsmoothed both would be 0 beside "a b c d".
    answers, references = ["a b c", "j"], ["a b d", "a b d"]
    scores = BleuReward()(prompts=answers, completions=answers, reference=references)
    assert scores[0] > 0
    assert scores[1] == 0  # and alone: another row's words change nothing
    assert BleuReward()(prompts=answers[:1], completions=answers[:1], reference=references[:1]) == scores[:1]


def test_trap_12_a_judge_that_fails_is_none_and_accepts_nothing(tmp_path):
    """A judge behind a server: test_judge.py."""

    def judge(completions, **_):
        return [None if number % 2 else -5.0 for number in range(len(completions))]

    source = g.resampler(judge, Threshold(minimum=-9.0), on_nothing_accepted="skip")
    run = g.trainer(tmp_path, source)
    run.train()
    assert [one.verdict for one in g.stored(run)] == ["accepted", "unjudged"] * 4
    assert [one.reward for one in g.stored(run)] == [-5.0, None] * 4
    assert source.metrics()["candidates/reward"] == -5.0  # neither -1 nor 0 is in the mean
    assert source.metrics()["candidates/unjudged"] == 0.5


@pytest.mark.parametrize("policy", ["skip", "reference"])
def test_trap_13_the_reference_is_no_candidate_unless_asked_for(tmp_path, policy):
    # Prompts "a a", "b a a", "c a a b", "d a a b c".
    reward = lambda prompts, **_: [float(text[0] in "bd") for text in prompts]  # noqa: E731
    source = g.resampler(reward, Threshold(minimum=0.5), on_nothing_accepted=policy)
    run = g.trainer(tmp_path, source)
    run.train()
    references = [one for one in g.stored(run) if one.finish_reason == "reference"]
    assert len(references) == (2 if policy == "reference" else 0)
    assert {one.verdict for one in references} <= {"fallback"}
    assert all(one.reward is None and one.index == -1 for one in references)
    assert source.metrics()["round/acceptance_rate"] == 0.5  # of the 8 generated: references count in no rate


def test_trap_14_and_15_length_bias_and_collapse_are_logged(tmp_path):
    """The figures by hand: test_metrics.py."""

    def length(completion_ids, **_):
        return [3.0 * len(ids) for ids in completion_ids]

    held_out = []

    def watched(completions, **_):
        held_out.extend(completions)
        return [0.25] * len(completions)

    source = g.resampler(length, eval_reward_funcs=watched)
    run = g.trainer(tmp_path, source, eval_dataset=g.prompts(3, first=50))
    run.train()
    logged = {name: value for line in run.state.log_history for name, value in line.items()}
    assert logged["candidates/length_reward_correlation"] == pytest.approx(1)
    assert {f"{kind}/distinct_{n}" for kind in ("candidates", "accepted") for n in (1, 2)} <= set(logged)
    assert not held_out  # it selected nothing
    figures = run.evaluate()
    assert figures["eval_rewards/watched/mean"] == 0.25
    assert len(held_out) == 3


def test_trap_16_candidates_are_the_same_in_any_batch_and_again_and_new_in_a_retry(tmp_path):
    """Resumed runs: test_generative_resume.py. Processes: test_generative_distributed.py."""

    def made(folder: str, most: int, attempts: int) -> dict:
        source = g.resampler(
            acceptance=Threshold(minimum=9.0), engine=GenerateEngine(most), max_attempts=attempts, num_candidates=3
        )
        run = g.trainer(tmp_path / folder, source)
        run.train()
        return {(one.prompt_id, one.attempt, one.index): (one.seed, one.token_ids) for one in g.stored(run)}

    first = made("first", 64, attempts=1)
    assert len(first) == 4 * 3
    assert made("again", 64, attempts=1) == first
    assert made("small", 2, attempts=1) == first
    retried = made("retried", 5, attempts=2)
    assert {key: value for key, value in retried.items() if key[1] == 0} == first
    seeds = [seed for seed, _ in retried.values()]
    assert len(seeds) == len(set(seeds)) == 2 * len(first)


def test_trap_17_no_last_batch_shard_or_prompt_is_dropped(tmp_path):
    # 9 prompts: shards of 2 and one of 1, training batches of 2 and one of 1, generation of 5 rows at a time.
    source = g.resampler(engine=GenerateEngine(5), num_candidates=3)
    answered = []

    def count(prediction):
        answered.append(len(prediction.predictions))
        return {}

    held_out = g.prompts(66, first=30)  # evaluation generates for 64 at once
    source.eval_generation_config = g.sampling(2)
    run = g.trainer(tmp_path, source, num_prompts=9, eval_dataset=held_out, compute_metrics=count)
    run.train()
    assert len(list((tmp_path / "candidates" / "round-000").glob("*.parquet"))) == 5
    assert [(one.prompt_id, one.index) for one in g.stored(run)] == [(p, j) for p in range(9) for j in range(3)]
    assert sorted(run._progress.indices.tolist()) == list(range(9))
    assert run.state.global_step == 5
    run.evaluate()
    assert answered == [66]


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


def test_trap_18_a_metric_of_ones_own_is_loaded_by_its_path(tmp_path):
    """No hub is asked: the tests run offline."""
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "share.py").write_text(METRIC)
    run = g.trainer(tmp_path, g.resampler(MetricReward(str(tmp_path / "share"))))
    run.train()
    wanted = g.prompts(4)["reference"]
    assert [one.reward for one in g.stored(run)] == [one.text.count(wanted[one.prompt_id]) for one in g.stored(run)]
