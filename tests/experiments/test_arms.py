"""The arms of the generative half and their report: rules by name, the matched control, equal steps, tables."""

import json

import pytest
import torch
from transformers import TrainingArguments

from experiments.harness.arguments import ExperimentError
from experiments.harness.arms import (
    ACCEPTANCES,
    GENERATIVE_ARMS,
    GenerativeArmArguments,
    acceptance_from_name,
    make_candidate_resampler,
    supervised_schedule,
)
from experiments.harness.reporting import GenerativeReport, paired_table, write_generative_report
from experiments.harness.runs import arguments_of_run, open_folders
from rsft_hf import RSO, Threshold, TopKOverall, TopKPerPrompt
from rsft_hf.acceptance import CandidateBatch, PerPromptCap, RandomLike, RandomPerPrompt, Sequence

EXPECTED = {
    "topk:2": TopKPerPrompt(2),
    "topk_overall:10": TopKOverall(10),
    "threshold:0.5": Threshold(minimum=0.5),
    "quantile:0.9": Threshold(quantile=0.9),
    "prompt_quantile:0.75": Threshold(prompt_quantile=0.75),
    "rso:0.1:3": RSO(beta=0.1, k=3),
    "random:2": RandomPerPrompt(2),
    "cap:4": PerPromptCap(4),
}


def rewards(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(("name", "rule"), EXPECTED.items())
def test_names_stand_for_rules(name, rule):
    assert acceptance_from_name(name) == rule


def test_every_name_is_tested_and_names_chain():
    assert {name.split(":")[0] for name in EXPECTED} == set(ACCEPTANCES)
    assert acceptance_from_name("threshold:0.5+cap:1") == Sequence(Threshold(minimum=0.5), PerPromptCap(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acceptance": "best"}, "`--acceptance` 'best' is unknown"),
        ({"acceptance": "topk"}, "`--acceptance` 'topk' has 0 numbers after the name. Write it as 'topk:K'"),
        ({"acceptance": "rso:0.1"}, "Write it as 'rso:BETA:K'"),
        ({"acceptance": "topk:half"}, "`--acceptance` 'topk:half'"),
        ({"acceptance": "topk:0"}, "`--acceptance` 'topk:0': `k`"),
        ({"arms": ["plain"]}, "`--arms` plain: unknown. Use one or more of base, supervised, rejection, control"),
        ({"arms": []}, r"`--arms` \[\] must name at least one"),
        ({"seeds": [1, 1]}, r"`--seeds` \[1, 1\] must name at least one, and each once"),
        ({"temperature": 0.0}, "`--temperature` 0.0 must be above 0"),
        ({"num_draws": 0}, "`--num_draws` 0 must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ExperimentError, match=message):
        GenerativeArmArguments(**options)


def test_what_the_resampler_refuses_is_an_experiment_error():
    with pytest.raises(ExperimentError, match="`num_candidates`=0 must be an integer of at least 1"):
        make_candidate_resampler(GenerativeArmArguments(num_candidates=0), "rejection", rewards)


def test_arms_differ_in_the_rule_alone():
    arguments = GenerativeArmArguments(acceptance="topk:2", num_candidates=4, temperature=0.7, supervised_fraction=0.25)
    made = {arm: make_candidate_resampler(arguments, arm, rewards, supervised_dataset=[{}]) for arm in GENERATIVE_ARMS}
    assert made["base"] is made["supervised"] is None
    assert made["rejection"].config.acceptance == TopKPerPrompt(2)
    assert made["control"].config.acceptance == RandomLike(TopKPerPrompt(2))
    for arm in ("rejection", "control"):
        config = made[arm].config.generation_config
        # transformers would sample from 50 tokens where top_k is left open.
        assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.7, 0, 1.0)
        assert (made[arm].config.num_candidates, made[arm].config.supervised_fraction) == (4, 0.25)
    without = make_candidate_resampler(GenerativeArmArguments(), "rejection", rewards, supervised_dataset=[{}])
    assert without.config.supervised_dataset is None


def test_the_control_accepts_as_many_of_each_prompt_but_not_the_best():
    rewards_of = torch.rand(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = CandidateBatch(rewards_of)
    arguments = GenerativeArmArguments(acceptance="threshold:0.5")
    accepted = {
        arm: make_candidate_resampler(arguments, arm, rewards).config.acceptance(
            batch, torch.Generator().manual_seed(1)
        )
        for arm in ("rejection", "control")
    }
    assert torch.equal(accepted["control"].sum(1), accepted["rejection"].sum(1))
    # Uniform rewards: .75 above the threshold; at random their mean over prompts weighted by how many pass, about
    # 1/2 + Var(count) / (8 * 4 * mean count) = .5 + .5 * 2 / (8 * 4) = .53.
    assert float(rewards_of[accepted["rejection"]].mean()) == pytest.approx(0.75, abs=0.02)
    assert float(rewards_of[accepted["control"]].mean()) == pytest.approx(0.53, abs=0.03)


@pytest.mark.parametrize(("num_draws", "steps_per_round"), [(64, 8), (65, 9), (7, 1)])
def test_supervised_steps_are_those_of_the_rounds(tmp_path, num_draws, steps_per_round):
    training = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=3,
        eval_strategy="epoch", save_strategy="epoch", use_cpu=True,
    )  # fmt: skip
    schedule = supervised_schedule(training, num_draws)
    assert schedule.max_steps == 3 * steps_per_round
    assert (schedule.eval_strategy, schedule.eval_steps) == ("steps", steps_per_round)
    assert (schedule.save_strategy, schedule.save_steps) == ("steps", steps_per_round)
    assert training.max_steps == -1


def test_runs_have_their_own_folder_seed_and_configuration(tmp_path):
    training = TrainingArguments(str(tmp_path / "out"), use_cpu=True, learning_rate=1e-3)
    arms = GenerativeArmArguments(seeds=[3])
    folders = open_folders(GenerativeReport("title", (), "label"), arms, training)
    assert list(folders) == [(arm, 3) for arm in GENERATIVE_ARMS]
    written = {arm: json.loads((folders[arm, 3].path / "configuration.json").read_text()) for arm in GENERATIVE_ARMS}
    assert ["acceptance" in written[arm] for arm in GENERATIVE_ARMS] == [False, False, True, True]
    assert ["learning_rate" in written[arm] for arm in GENERATIVE_ARMS] == [False, True, True, True]
    arguments = arguments_of_run(training, folders["control", 3].path, 3)
    assert (arguments.seed, arguments.output_dir) == (3, str(tmp_path / "out" / "control" / "seed_3"))
    assert training.seed == 42


def result(arm: str, seed: int, score: float) -> dict:
    rounds = [{"round/acceptance_rate": 0.5, "accepted/reward": 1.0 + seed}] if arm == "rejection" else []
    samples = [{"prompt": "two", "reference": "zwei", "output": f"{arm} {seed}"}]
    curve = [[0, 10.0]] if arm == "base" else [[0, 10.0], [5, score]]
    return {"arm": arm, "seed": seed, "metrics": {"bleu": score}, "curve": curve, "rounds": rounds, "samples": samples}


def test_the_report_states_paired_differences_and_both_their_signs(tmp_path, capsys):
    scores = {("base", 1): 10.0, ("base", 2): 10.0, ("rejection", 1): 13.0, ("rejection", 2): 9.0}
    results = [result(arm, seed, score) for (arm, seed), score in scores.items()]
    # 13 - 10 = 3 and 9 - 10 = -1: mean 1, deviation sqrt((2^2 + 2^2) / 1) = 2.828.
    assert "+1.000 +- 2.828 (1/2)" in paired_table(results, "rejection", ["base"], ["bleu"])
    write_generative_report(results, tmp_path, GenerativeReport("Title", ("bleu",), "BLEU", ("signature x",)))
    report, printed = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    for text in (report, printed):
        assert "2 seed(s): too few to call an arm better." in text
        assert "rejection  rejection 1" in text
        assert "2.500" in text  # the accepted reward of the round, mean of 2 and 3
    assert "signature x" in report
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
