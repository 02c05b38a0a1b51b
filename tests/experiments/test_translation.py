"""The translation experiment from end to end: four arms, resume, rewards, and its errors, on a few rows."""

import csv
import json

import datasets
import pytest
import torch
from transformers import Seq2SeqTrainer

from experiments import translation
from experiments.builtin.numbers import build_model, build_tokenizer, make_numbers, make_row
from experiments.harness.arguments import ExperimentError
from experiments.translation_data import corpus_scores, corpus_signatures, make_rewards, token_metric, translate

NUM_PROMPTS, BATCH_SIZE = 24, 8


@pytest.fixture
def run(tmp_path):
    """Calls the experiment on two rounds of a few numbers; more options may follow."""
    options = {
        "dataset": "builtin",
        "max_train_samples": NUM_PROMPTS,
        "max_val_samples": 10,
        "max_test_samples": 12,
        "num_labelled": 20,
        "start_epochs": 4,
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH_SIZE,
        "num_candidates": 3,
        "max_new_tokens": 12,
        "acceptance": "topk:1",
        "output_dir": tmp_path / "out",
        "use_cpu": True,
    }
    fixed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return lambda *more: translation.main([*fixed, *map(str, more)])


@pytest.fixture(scope="module")
def translator(tmp_path_factory) -> str:
    """A folder with a model that has learnt nothing, as a pretrained one would be given."""
    folder = tmp_path_factory.mktemp("translator")
    tokenizer = build_tokenizer(row[column] for row in map(make_row, range(1, 999, 7)) for column in ("en", "de"))
    build_model(tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    rows = make_numbers(0, num_labelled=1, num_prompts=NUM_PROMPTS + 6, num_val=8, num_test=9)
    for split in ("train", "val", "test"):
        datasets.Dataset.from_list(rows[split]).to_csv(str(folder / f"{split}.csv"))
    return str(folder)


def test_four_arms_one_report(run, tmp_path, capsys):
    results = run("--seeds", 1, 2)
    arms = ("base", "supervised", "rejection", "control")
    assert [(result["arm"], result["seed"]) for result in results] == [(arm, seed) for seed in (1, 2) for arm in arms]
    for result in results:
        is_base, is_sampled = result["arm"] == "base", result["arm"] in ("rejection", "control")
        assert result["metrics"]["steps"] == (0 if is_base else 2 * NUM_PROMPTS / BATCH_SIZE)
        assert [steps for steps, _ in result["curve"]] == ([0] if is_base else [0, 3, 6])
        # What all arms of a seed start from, and what each of them ends with, whoever measures it.
        assert result["curve"][0] == next(one["curve"][0] for one in results if one["seed"] == result["seed"])
        assert result["curve"][-1][1] == result["metrics"]["val_exact_match"]
        assert len(result["rounds"]) == (2 if is_sampled else 0)
        assert [set(sample) for sample in result["samples"]] == [{"prompt", "reference", "number", "output"}] * 4
        for figures in result["rounds"]:
            assert figures["round/acceptance_rate"] <= 1 / 3

    output = tmp_path / "out"
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    with (output / "results.csv").open() as file:
        assert [float(line["numbers_exact_match"]) for line in csv.DictReader(file)] == [
            result["metrics"]["numbers_exact_match"] for result in results
        ]
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")
    report, printed = (output / "report.md").read_text(), capsys.readouterr().out
    for text in (report, printed):
        assert "2 seed(s): too few to call an arm better." in text
        assert "less supervised" in text


def test_prompts_are_the_same_for_the_arms_of_a_seed_and_hold_no_translation(run, tmp_path):
    run("--arms", "rejection", "control")
    prompts = {}
    for arm in ("rejection", "control"):
        files = str(tmp_path / "out" / arm / "seed_1" / "candidates" / "round-000" / "*.parquet")
        table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / arm))
        assert "reference" not in table.column_names
        prompts[arm] = table["prompt"][:]
        assert sum(table["is_accepted"]) == len(
            {row for row, yes in zip(table["prompt_id"], table["is_accepted"]) if yes}
        )
    assert prompts["rejection"] == prompts["control"]
    assert len(set(prompts["control"])) == NUM_PROMPTS


def test_a_finished_run_is_read_again_and_another_one_refused(run, capsys):
    first = run("--arms", "base", "supervised")
    again = run("--arms", "base", "supervised", "--acceptance", "topk:2", "--logging_steps", 3)  # neither concerns them
    assert again == json.loads(json.dumps(first))
    assert "supervised, seed 1: finished earlier" in capsys.readouterr().out
    with pytest.raises(ExperimentError, match=r"other options: learning_rate was 0.002, is 0.001"):
        run("--arms", "supervised", "--learning_rate", "1e-3")
    (anew,) = run("--arms", "supervised", "--learning_rate", "1e-3", "--overwrite_output_dir")
    assert anew["metrics"]["steps"] == 6


@pytest.mark.parametrize("arm", ["supervised", "rejection"])
def test_a_killed_run_goes_on_from_its_checkpoint(run, tmp_path, capsys, arm):
    options = ("--arms", arm, "--save_strategy", "epoch", "--save_total_limit", 2)
    (whole,) = run(*options)
    folder = tmp_path / "out" / arm / "seed_1"
    (folder / "result.json").unlink()
    (folder / "checkpoint-6").rename(tmp_path / "last")
    (resumed,) = run(*options)
    assert f"{arm}, seed 1: going on from {folder / 'checkpoint-3'}" in capsys.readouterr().out
    assert resumed["metrics"].pop("seconds") is None
    assert whole["metrics"].pop("seconds") > 0
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["curve"] == whole["curve"]
    assert resumed["samples"] == whole["samples"]


def test_a_data_set_of_ones_own(run, translator, pairs, tmp_path):
    own = ("--dataset", pairs, "--model_name_or_path", translator, "--val_split", "val", "--seeds", 5)
    results = run(*own, "--reward", "chrf", "--supervised_fraction", 0.5, "--arms", "base", "rejection")
    names = ["val_bleu", "val_chrf", "test_bleu", "test_chrf", "steps", "seconds"]
    assert [list(result["metrics"]) for result in results] == [names, names]
    assert corpus_signatures()["bleu"] in (tmp_path / "out" / "report.md").read_text()
    free = ("--reward", "free", "--reverse_model", translator, "--output_dir", tmp_path / "free")
    (result,) = run(*own, *free, "--arms", "rejection", "--num_train_epochs", 1)
    assert result["rounds"][0]["accepted/reward"] >= result["rounds"][0]["candidates/reward"]


def test_both_ways_of_measuring_give_the_same_translations(translator, tmp_path):
    """Batches, their order and padding change nothing, and token ids are read as the texts they stand for."""
    options = translation.TranslationArguments(model_name_or_path=translator)
    model, tokenizer = translation.load_translator(options, None, None)
    sentences = [make_row(number)["en"] for number in (7, 1234, 30, 999, 2)]
    texts = translate(model, tokenizer, sentences, max_new_tokens=9, batch_size=2)
    assert texts == [translate(model, tokenizer, [one], max_new_tokens=9)[0] for one in sentences]
    references = [make_row(number)["de"] for number in (7, 1234, 30, 999, 2)]
    dataset = datasets.Dataset.from_dict({"prompt": sentences, "reference": references})
    seen = []
    trainer = Seq2SeqTrainer(
        model,
        translation.TranslationTrainingArguments(
            str(tmp_path), use_cpu=True, generation_max_length=10, report_to="none"
        ),
        translation.DataCollatorForSeq2Seq(tokenizer, model),
        eval_dataset=translation.encode_pairs(dataset, tokenizer),
        processing_class=tokenizer,
        compute_metrics=token_metric(lambda found, wanted: seen.append((found, wanted)) or {}, tokenizer, references),
    )
    trainer.evaluate()
    assert seen == [(texts, references)]


def test_corpus_figures_are_no_means_over_sentences():
    """Corpus BLEU pools n-grams: 4 + 0 unigrams of 5 + 5 and so on; a mean would give the first sentence half."""
    references = ["ein Hund rennt im Park", "zwei Katzen schlafen auf dem Sofa"]
    translations = ["ein Hund rennt im Park", "nichts"]
    together = corpus_scores(translations, references)
    apart = [corpus_scores([one], [two])["bleu"] for one, two in zip(translations, references, strict=True)]
    assert together["bleu"] < 60 < 100 == apart[0] == pytest.approx(100)
    assert together["bleu"] != pytest.approx(sum(apart) / 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--reward", "best"), "`--reward` 'best' is unknown. Use one of chrf, free, verifier"),
        (("--reward", "chrf"), "`--reward chrf` needs references, which the builtin prompts lack"),
        (("--reward", "free"), "`--reward free` needs `--reverse_model`, `--similarity_model`, or both"),
        (("--reward", "free", "--reverse_model", "nobody/nothing"), "`--reverse_model` 'nobody/nothing' could not be"),
        (("--dataset", "a.csv"), "`--model_name_or_path builtin` knows number words only"),
        (("--max_train_samples", "20000"), "there are 9999. Lower `num_prompts`"),
        (("--num_labelled", "0"), "`--num_labelled` 0 must be at least 1"),
        (("--num_candidates", "0"), "`num_candidates`=0 must be an integer of at least 1"),
        (("--round_start", "first"), "round_start"),
    ],
)
def test_wrong_options_are_refused_before_a_folder_is_made(run, tmp_path, more, message):
    with pytest.raises(ExperimentError, match=message):
        run("--model_name_or_path", "builtin", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--val_split", "validation"),
            "`--val_split` 'validation' is not in the data set. Use one of test, train, val",
        ),
        (("--test_splits", "test", "dev"), "`--test_splits` 'dev' is not in the data set"),
        (("--target_column", "fr"), "`--target_column` 'fr' is not a column of train. Use one of"),
        (("--reward", "verifier"), "`--reward verifier` reads the number words"),
    ],
)
def test_wrong_data_sets_are_refused(run, pairs, translator, more, message):
    own = ("--dataset", pairs, "--model_name_or_path", translator, "--val_split", "val", "--reward", "chrf")
    with pytest.raises(ExperimentError, match=message):
        run(*own, *more)


def test_the_free_reward_reads_no_reference(translator):
    options = translation.TranslationArguments(reward="free", reverse_model=translator)
    columns = set().union(*(function.requires for function in make_rewards(options)))
    assert columns == set()
    assert not torch.is_grad_enabled() or make_rewards(translation.TranslationArguments())[0].requires == {"reference"}
