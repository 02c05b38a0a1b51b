"""Held-out figures of what the model generates, in the places where Trainer looks for them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import generators
from generative_runs import CountingEngine, logged, resampler, stored, trained, trainer
from rsft_hf import RejectionSamplingSeq2SeqTrainer

HELD_OUT = generators.prompts(5, first=82)
KEYS = {"reward", "rewards/share_of_wanted/mean", "length", "truncated", "distinct_1", "distinct_2", "runtime"}
ENCODED = [{"input_ids": [6, 7, 8], "attention_mask": [1, 1, 1], "labels": [-100, 7, 8]}] * 2


def greedy_tokens(rows, model, max_new_tokens: int = 8) -> list[list[int]]:
    """A slow oracle: one prompt, the most probable token again and again."""
    answers, words = [], generators.tokenizer()
    for prompt in rows["prompt"]:
        ids, answer = words(prompt)["input_ids"], []
        while len(answer) < max_new_tokens and generators.EOS not in answer:
            with torch.no_grad():
                answer.append(int(model.eval()(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
        answers.append(answer)
    return answers


def greedy(rows, model) -> list[str]:
    return [generators.tokenizer().decode(answer, skip_special_tokens=True) for answer in greedy_tokens(rows, model)]


def answer_length(completions: list, **_) -> list[float]:
    return [float(len(text)) for text in completions]


def test_the_figures_are_those_of_greedy_answers(tmp_path: Path) -> None:
    figures = trainer(tmp_path, eval_dataset=HELD_OUT).evaluate()
    assert {name.removeprefix("eval_") for name in figures} == KEYS
    texts = greedy(HELD_OUT, generators.tiny_model())
    rewards = generators.share_of_wanted(texts, HELD_OUT["wanted"])
    assert figures["eval_reward"] == pytest.approx(sum(rewards) / 5) != 0
    answers = greedy_tokens(HELD_OUT, generators.tiny_model())
    assert figures["eval_length"] == sum(map(len, answers)) / 5
    assert figures["eval_truncated"] == sum(generators.EOS not in answer for answer in answers) / 5 != 1
    assert figures["eval_rewards/share_of_wanted/mean"] == figures["eval_reward"]
    assert not (tmp_path / "candidates").exists()


def test_a_resampler_answers_with_the_model_of_the_trainer_that_asks(tmp_path: Path) -> None:
    made = resampler()
    models = [generators.tiny_model(), generators.tiny_model(initializer_range=0.9)]
    for parameter in models[1].parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    trainers = [
        trainer(tmp_path / str(number), made, model=model, eval_dataset=HELD_OUT) for number, model in enumerate(models)
    ]
    expected = [greedy(HELD_OUT, model) for model in models]
    assert expected[0] != expected[1]
    for number in (0, 1, 0, 1):
        assert list(trainers[number].predict(HELD_OUT).predictions) == expected[number]
    trainers[0].model = models[1]  # after training, Trainer's own evaluation would take it
    assert list(trainers[0].predict(HELD_OUT).predictions) == expected[1]


def test_evaluating_moves_neither_weights_nor_training(tmp_path: Path) -> None:
    import runs

    plain = trained(tmp_path / "plain", args={"num_train_epochs": 2})
    args = {"num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    ours = trained(tmp_path / "ours", args=args, eval_dataset=HELD_OUT)
    assert len(logged(ours, "eval_reward")) == 11
    assert runs.losses(ours) == runs.losses(plain)
    assert runs.largest_difference(ours, plain) == 0.0
    assert stored(tmp_path / "ours", 1) == stored(tmp_path / "plain", 1)


def test_a_curve_begins_with_the_base_model(tmp_path: Path) -> None:
    args = {"num_train_epochs": 2, "eval_strategy": "epoch", "eval_on_start": True}
    ours = trained(tmp_path, args=args, eval_dataset=HELD_OUT)
    assert [line["step"] for line in ours.state.log_history if "eval_reward" in line] == [0, 5, 10]
    assert logged(ours, "eval_reward")[0] == trainer(tmp_path, eval_dataset=HELD_OUT).evaluate()["eval_reward"]


def test_eval_reward_funcs_are_reported_and_select_nothing(tmp_path: Path) -> None:
    made = resampler(eval_reward_funcs=answer_length)
    ours = trained(tmp_path / "ours", made, args={"eval_strategy": "epoch"}, eval_dataset=HELD_OUT)
    trained(tmp_path / "plain")
    assert stored(tmp_path / "ours") == stored(tmp_path / "plain")
    figures = ours.evaluate()
    texts = greedy(HELD_OUT, ours.model)
    assert figures["eval_rewards/answer_length/mean"] == sum(map(len, texts)) / 5
    assert figures["eval_reward"] == figures["eval_rewards/share_of_wanted/mean"]


def test_what_reward_functions_log_is_among_the_figures(tmp_path: Path) -> None:
    def first(completions: list, log_metric, **_) -> list[float]:
        log_metric("seen", len(completions))
        log_metric("length", -1)  # the name of a figure that is measured
        return [0.0] * len(completions)

    def second(completions: list, log_metric, **_) -> list[float]:
        log_metric("longest", max(map(len, completions)))
        return [0.0] * len(completions)

    figures = trainer(tmp_path, resampler(first, eval_reward_funcs=second), eval_dataset=HELD_OUT).evaluate()
    assert figures["eval_seen"] == 5
    assert figures["eval_longest"] == max(map(len, greedy(HELD_OUT, generators.tiny_model())))
    assert figures["eval_length"] > 0


def test_compute_metrics_gets_texts_and_references(tmp_path: Path) -> None:
    seen = []

    def compute_metrics(prediction: hf.EvalPrediction) -> dict:
        seen.append(prediction)
        return {"score": 0.25, "eval_named": 1.0}

    figures = trainer(tmp_path, eval_dataset=HELD_OUT, compute_metrics=compute_metrics).evaluate(
        metric_key_prefix="eval"
    )
    assert list(seen[0].predictions) == greedy(HELD_OUT, generators.tiny_model())
    assert list(seen[0].label_ids) == HELD_OUT["reference"]
    assert (figures["eval_score"], figures["eval_named"]) == (0.25, 1.0)
    ours = trainer(tmp_path, eval_dataset=HELD_OUT.remove_columns("reference"), compute_metrics=compute_metrics)
    ours.evaluate()
    assert list(seen[1].label_ids) == [None] * 5


def test_compute_metrics_gets_the_prompts_where_they_are_named(tmp_path: Path) -> None:
    seen: list[hf.EvalPrediction] = []
    ours = trainer(
        tmp_path, eval_dataset=HELD_OUT, compute_metrics=lambda one: seen.append(one) or {},
        args={"include_for_metrics": ["inputs"]},
    )  # fmt: skip
    ours.evaluate()
    assert seen[0].inputs == HELD_OUT["prompt"][:]


def test_predict_answers_prompts(tmp_path: Path) -> None:
    class Predicted(hf.TrainerCallback):
        def on_predict(self, args, state, control, metrics, **_):
            seen.append(metrics)

    seen: list[dict] = []
    ours = trainer(tmp_path, eval_dataset=HELD_OUT, callbacks=[Predicted()], compute_metrics=lambda _: {"score": 1.0})
    output = ours.predict(HELD_OUT)
    assert output.predictions == greedy(HELD_OUT, generators.tiny_model())
    assert output.label_ids == HELD_OUT["reference"][:]
    assert seen == [output.metrics]
    figures = ours.evaluate()
    for name, value in figures.items():
        if name not in ("eval_runtime", "epoch"):
            assert output.metrics[name.replace("eval_", "test_")] == value
    with pytest.raises(ValueError, match=r"predict\(\) got max_length, which held-out prompts do not use"):
        ours.predict(HELD_OUT, max_length=4)
    plain = hf.Trainer(generators.tiny_model(), generators.arguments(tmp_path), hf.default_data_collator)
    assert np.array_equal(ours.predict(ENCODED).predictions, plain.predict(ENCODED).predictions)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"batch_eval_metrics": True}, "`batch_eval_metrics=True` computes metrics batch by batch"),
        ({"include_for_metrics": ["loss"]}, '`include_for_metrics` asks for "loss"'),
    ],
)
def test_metrics_settings_that_texts_do_not_have_are_refused_before_the_run(tmp_path: Path, args, match) -> None:
    def compute_metrics(prediction: hf.EvalPrediction, compute_result: bool = True) -> dict:
        return {}

    engine = CountingEngine()
    made = resampler(engine=engine)
    ours = trainer(tmp_path, made, eval_dataset=HELD_OUT, compute_metrics=compute_metrics, args=args)
    with pytest.raises(ValueError, match=match):
        ours.train()
    assert engine.calls == []


def test_compute_metrics_that_decodes_is_told_that_it_gets_texts(tmp_path: Path) -> None:
    def compute_metrics(prediction: hf.EvalPrediction) -> dict:
        generators.tokenizer().batch_decode(np.where(np.array(prediction.predictions) < 0, 0, prediction.predictions))
        return {}

    ours = trainer(tmp_path, eval_dataset=HELD_OUT, compute_metrics=compute_metrics)
    with pytest.raises(ValueError, match=r"`compute_metrics` failed on held-out prompts.*it gets texts, not token ids"):
        ours.evaluate()


def test_numpy_numbers_of_compute_metrics_can_be_saved(tmp_path: Path) -> None:
    args = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    scores = {"score": np.float32(0.5), "count": np.int64(3), "mean": torch.tensor(0.25)}
    trained(tmp_path, args=args, eval_dataset=HELD_OUT, compute_metrics=lambda _: dict(scores))
    history = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    line = next(line for line in history if "eval_score" in line)
    assert (line["eval_score"], line["eval_count"], line["eval_mean"]) == (0.5, 3, 0.25)


def test_several_sets_have_figures_of_their_own(tmp_path: Path) -> None:
    sets = {"easy": HELD_OUT, "hard": generators.prompts(3, first=60), "encoded": ENCODED}
    args = {"eval_strategy": "epoch"}
    ours = trained(tmp_path, args=args, eval_dataset=sets)
    assert len(logged(ours, "eval_easy_reward")) == len(logged(ours, "eval_hard_reward")) == 1
    assert len(logged(ours, "eval_encoded_loss")) == 1
    assert ours.evaluate(HELD_OUT)["eval_reward"] == ours.evaluate()["eval_easy_reward"]


def test_an_encoded_set_is_evaluated_by_trainer_itself(tmp_path: Path) -> None:
    figures = trainer(tmp_path, eval_dataset=ENCODED).evaluate()
    args, collator = generators.arguments(tmp_path), hf.default_data_collator
    plain = hf.Trainer(generators.tiny_model(), args, collator, eval_dataset=ENCODED)
    assert figures["eval_loss"] == plain.evaluate()["eval_loss"]
    assert "eval_reward" not in figures


def test_the_best_round_is_loaded_at_the_end(tmp_path: Path) -> None:
    scores, starts = iter([0.1, 0.9, 0.5]), []

    class Weights(hf.TrainerCallback):
        def on_epoch_end(self, args, state, control, model, **kwargs):
            starts.append([values.detach().clone() for values in model.parameters()])

    args = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "num_train_epochs": 3}
    ours = trained(
        tmp_path,
        args={**args, "metric_for_best_model": "score", "greater_is_better": True},
        eval_dataset=HELD_OUT,
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[Weights()],
    )
    assert ours.state.best_metric == 0.9
    assert ours.state.best_model_checkpoint.endswith("checkpoint-10")
    assert all(torch.equal(now, best) for now, best in zip(ours.model.parameters(), starts[1], strict=True))


def test_early_stopping_stops_the_rounds(tmp_path: Path) -> None:
    scores, engine = iter([0.9, 0.1, 0.2, 0.3]), CountingEngine()
    args = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "num_train_epochs": 9}
    ours = trained(
        tmp_path,
        resampler(engine=engine),
        args={**args, "metric_for_best_model": "score", "greater_is_better": True},
        eval_dataset=HELD_OUT,
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[hf.EarlyStoppingCallback(early_stopping_patience=2)],
    )
    assert ours.state.global_step == 15  # the best, and two that were worse
    assert len(engine.calls) == 3 * 5 + 3


def test_eval_reward_can_choose_the_best(tmp_path: Path) -> None:
    args = {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "reward", "num_train_epochs": 2}
    ours = trained(tmp_path, args={**args, "greater_is_better": True}, eval_dataset=HELD_OUT)
    assert ours.state.best_metric == max(logged(ours, "eval_reward"))


@pytest.mark.parametrize("metric", [None, "rewrad", "eval_loss"])
def test_a_best_metric_that_is_not_measured_is_refused_before_the_first_round(tmp_path: Path, metric) -> None:
    """Without a name Trainer takes the loss, which held-out prompts do not have."""
    engine = CountingEngine(0)
    args = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    with pytest.raises(ValueError, match=r"is not measured on held-out prompts. Use one of reward, length, .*rewards/"):
        trained(
            tmp_path,
            resampler(engine=engine),
            args={**args, "metric_for_best_model": metric},
            eval_dataset=HELD_OUT,
        )
    assert engine.calls == []


def test_a_judge_that_answers_for_no_held_out_prompt_is_nan_and_never_the_best(tmp_path: Path, caplog) -> None:
    rounds = iter(range(99))

    def judge(prompts: list, completions: list, **_) -> list[float | None]:
        is_out = prompts[0] in HELD_OUT["prompt"] and next(rounds) == 0  # in the first evaluation
        return [None if is_out else float(len(text)) for text in completions]

    args = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 2, "greater_is_better": True}
    ours = trained(tmp_path, resampler(judge), args={**args, "metric_for_best_model": "reward"}, eval_dataset=HELD_OUT)
    first, second = logged(ours, "eval_reward")
    assert math.isnan(first)
    assert ours.state.best_metric == second
    assert "No reward function answered for any of 5 held-out prompts" in caplog.text


def test_sampled_evaluation_draws_the_same_every_time(tmp_path: Path) -> None:
    config = generators.sampling(4, do_sample=True, temperature=2.0)
    ours = trainer(tmp_path, resampler(eval_generation_config=config), eval_dataset=HELD_OUT)
    first, second = ours.evaluate(), ours.evaluate()
    assert first.pop("eval_runtime") > 0
    assert second.pop("eval_runtime") > 0
    assert first == second
    assert first["eval_length"] <= 4
    assert first["eval_length"] != trainer(tmp_path, eval_dataset=HELD_OUT).evaluate()["eval_length"]


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_encoder_decoder_models_answer_too(tmp_path: Path, name: str) -> None:
    beams = generators.sampling(8, num_beams=2)
    for made in (resampler(), resampler(eval_generation_config=beams)):
        ours = trainer(
            tmp_path,
            made,
            model=generators.tiny_model(name),
            processing_class=generators.tokenizer_for(name),
            eval_dataset=HELD_OUT,
        )
        figures = ours.evaluate()
        assert {name.removeprefix("eval_") for name in figures} == KEYS
        assert 0 < figures["eval_length"] <= 8


def test_how_to_evaluate_is_checked_before_training(tmp_path: Path) -> None:
    engine = CountingEngine()
    made = resampler(eval_generation_config={"max_new_tokens": 3}, engine=engine)
    with pytest.raises(TypeError, match="`eval_generation_config` must be a transformers GenerationConfig, got dict"):
        trained(tmp_path, made, args={"eval_strategy": "epoch"}, eval_dataset=HELD_OUT)
    assert engine.calls == []


def test_answers_are_as_long_as_candidates_where_evaluation_does_not_say(tmp_path: Path) -> None:
    """The candidates' limit is 8 tokens; transformers' own default would be 20."""
    made = resampler(eval_generation_config=hf.GenerationConfig(do_sample=True))
    run = trained(tmp_path, made, args={"eval_strategy": "epoch"}, eval_dataset=HELD_OUT)
    assert run.evaluate()["eval_length"] <= 8


def test_held_out_prompts_longer_than_the_context(tmp_path: Path) -> None:
    engine, rows = CountingEngine(), [{**HELD_OUT[0], "prompt": "a " * 60}]
    model = generators.tiny_model("gpt2")
    with pytest.raises(ValueError, match="prompt in row 0 has 60 tokens"):
        trained(tmp_path, resampler(engine=engine), model=model, args={"eval_strategy": "epoch"}, eval_dataset=rows)
    assert engine.calls == []


def test_held_out_prompts_need_no_reference_to_fall_back_on(tmp_path: Path) -> None:
    made = resampler(on_nothing_accepted="reference")
    trained(tmp_path, made, args={"eval_strategy": "epoch"}, eval_dataset=HELD_OUT.remove_columns("reference"))


@pytest.mark.parametrize("rows", [HELD_OUT.to_iterable_dataset(), HELD_OUT.select([])], ids=["iterable", "empty"])
def test_held_out_prompts_without_rows_to_look_at(tmp_path: Path, rows: Any) -> None:
    engine = CountingEngine()
    with pytest.raises(ValueError, match="`eval_dataset`"):
        trained(tmp_path, resampler(engine=engine), args={"eval_strategy": "epoch"}, eval_dataset=rows)
    assert engine.calls == []


def test_arguments_of_evaluate_that_prompts_do_not_heed_are_refused(tmp_path: Path) -> None:
    engine, args = CountingEngine(), generators.arguments(tmp_path, seq2seq=True)
    ours = RejectionSamplingSeq2SeqTrainer(
        model=generators.tiny_model("t5"), args=args, resampler=resampler(engine=engine),
        train_dataset=generators.prompts(4), eval_dataset=generators.prompts(2, first=80),
        processing_class=generators.tokenizer_for("t5"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"evaluate\(\) got max_length, .*eval_generation_config"):
        ours.evaluate(max_length=2)
    assert engine.calls == []
    assert "eval_reward" in ours.evaluate()
