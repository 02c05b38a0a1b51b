"""Cards for the hub: what a model card says of a run, what it must not say, and the data-set repository."""

import sys
from pathlib import Path

import datasets
import pandas
import pytest
import transformers as hf
from huggingface_hub import DatasetCard, ModelCard
from trl import SFTConfig, SFTTrainer

import generators
import rsft_hf
import runs
from generative_runs import resampler, stored, trained
from rsft_hf import (
    Chain,
    Floored,
    LossResampler,
    RejectionSamplingMixin,
    RejectionSamplingTrainer,
    Tempered,
    TopKPerPrompt,
)
from rsft_hf.cards import SECTION, by_epoch, command_line, export_repository, extend_model_card, publishable, shown
from sharded_runs import with_adapter


class RejectionSamplingSFTTrainer(RejectionSamplingMixin, SFTTrainer):
    """TRL's trainer, which writes its own card."""


def card_of(ours: hf.Trainer, **keywords) -> ModelCard:
    ours.create_model_card(**keywords)
    return ModelCard.load(Path(ours.args.output_dir) / "README.md")


def cells(text: str) -> list[list[str]]:
    """Rows of the tables of a text in Markdown."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\", "") for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_weighted_run_is_described_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", "hf_abcdefghijklm", "--lr=1e-3"])
    made = LossResampler(Chain(Tempered(0.5), Floored(0.8)), losses="forward", warmup_epochs=1)
    evaluated = {"eval_strategy": "epoch", "label_names": ["labels"]}
    ours = runs.trained(RejectionSamplingTrainer, tmp_path, resampler=made, args=evaluated, eval_dataset=runs.rows(7))
    card = card_of(ours, language="de", tags="own", model_name="mine")
    assert {"own", "rsft_hf", "rejection-sampling"} <= set(card.data.tags)
    assert card.data.language == ["de"]
    section = card.text.split(SECTION)[1]
    assert "accepted with probability w / max w" in section
    assert f"{runs.NUM_ROWS} rows" in section
    found = cells(section)
    assert ["weighting", "Chain(Tempered(alpha=0.5), Floored(fraction=0.8))"] in found
    assert ["warmup_epochs", "1"] in found
    assert not [row for row in found if row[0] in ("temperature", "keep_fraction", "scoring_batch_size")], "defaults"
    names = next(row for row in found if row[0] == "epoch")
    table = pandas.DataFrame([row for row in found if row[0] in "123"], columns=names)
    assert len(table) == 3
    history = ours.state.log_history
    rates = [line["resampling/acceptance_rate"] for line in history if "resampling/acceptance_rate" in line]
    assert table["resampling/acceptance_rate"].tolist() == [f"{rate:.4g}" for rate in rates]
    losses = [line["eval_loss"] for line in history if "eval_loss" in line]
    assert table["eval_loss"].tolist() == [f"{loss:.4g}" for loss in losses]
    assert "python train.py --hub_token '***' --lr=1e-3" in section.replace("***", "'***'")
    assert "hf_abc" not in card.content
    for package in ("rsft-hf", "accelerate"):
        assert f"{package} " in section
    assert "von Neumann 1951" in section


def test_a_card_written_twice_has_the_section_once(tmp_path: Path) -> None:
    ours = runs.trained(RejectionSamplingTrainer, tmp_path, resampler=LossResampler(Tempered(0.5)))
    first = card_of(ours).content
    extend_model_card(tmp_path / "README.md", ours)
    assert (tmp_path / "README.md").read_text() == first
    assert card_of(ours).content.count(SECTION) == 1


def test_a_generative_run_names_its_rewards_and_sources(tmp_path: Path) -> None:
    made = resampler(acceptance=TopKPerPrompt(2), reward_weights=[2.0])
    ours = trained(tmp_path, made, args={"num_train_epochs": 2})
    section = card_of(ours).text.split(SECTION)[1]
    found = cells(section)
    assert ["reward_funcs", "share_of_wanted"] in found
    assert ["acceptance", "TopKPerPrompt(k=2)"] in found
    assert ["num_candidates", "4"] in found
    assert "max_new_tokens=8" in dict(row for row in found if len(row) == 2)["generation_config"]
    assert "Dong et al. 2023, [arXiv:2304.06767]" in section
    rows = [row for row in found if row[0] in ("1", "2")]
    names = next(row for row in found if row[0] == "epoch")
    rewards = [sum(one["reward"] for one in stored(tmp_path, number)) / 36 for number in (0, 1)]
    assert [row[names.index("candidates/reward")] for row in rows] == [f"{reward:.4g}" for reward in rewards]


def test_trl_keeps_its_card_at_every_checkpoint(tmp_path: Path) -> None:
    args = SFTConfig(str(tmp_path), num_train_epochs=2, per_device_train_batch_size=2, save_strategy="epoch",
                     report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-3)  # fmt: skip
    ours = RejectionSamplingSFTTrainer(
        model=with_adapter(generators.tiny_model()), args=args, train_dataset=generators.prompts(4),
        processing_class=generators.tokenizer(), resampler=resampler(),
    )  # fmt: skip
    ours.train()
    card = ModelCard.load(tmp_path / "README.md")
    assert {"trl", "sft", "rsft_hf"} <= set(card.data.tags)
    assert card.text.count(SECTION) == 1
    assert "Training procedure" in card.text.split(SECTION)[0]
    assert "Trained with `RejectionSamplingSFTTrainer`" in card.text


def test_the_name_of_a_reward_is_no_markup(tmp_path: Path) -> None:
    def reward(completions: list, **columns) -> list[float]:
        return [float(len(text)) for text in completions]

    reward.__name__ = "a|b <script>alert(1)</script>"
    section = card_of(trained(tmp_path, resampler(reward))).text.split(SECTION)[1]
    assert "<script>" not in section
    assert "a\\|b &lt;script&gt;" in section


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("http://me:secret@host/v1", "http://***@host/v1"),
        ([str(Path.home() / "rm"), generators.share_of_wanted], "~/rm, share_of_wanted"),
        (Path("a/b"), "b"),
        ((), "none"),
        ({"a": 1, "b": None}, "a=1, b=None"),
        ([0.5, 1.0], "0.5, 1.0"),
        (datasets.Dataset.from_dict({"secret": ["x", "y"]}), "Dataset of 2 rows"),
        (hf.GenerationConfig(max_new_tokens=3, do_sample=True, eos_token_id=7), "max_new_tokens=3, do_sample=True"),
    ],
)
def test_values_are_shown_without_what_belongs_to_one_person(value, expected: str) -> None:
    assert shown(value) == expected


def test_a_model_is_shown_by_its_name() -> None:
    assert shown(generators.tiny_model()) == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["run.py", "--api_key", "abc", "--lr", "1"], "python run.py --api_key *** --lr 1"),
        (["run.py", "--api_key=abc"], "python run.py --api_key=***"),
        (["run.py", "--flag_key", "--lr", "1"], "python run.py --flag_key --lr 1"),
        (["run.py", "two words; rm"], "python run.py 'two words; rm'"),
        (["run.py", "hf_abcdefghijklmnop"], "python run.py ***"),
        (["/x/bin/rsft-hf", "report", "out"], "rsft-hf report out"),
        (["/x/ipykernel_launcher", "-f", "kernel.json"], ""),
        (["/x/run.py"], "python run.py"),
        (["recipes/run.py"], "python recipes/run.py"),
        (["-c"], ""),
        ([], ""),
    ],
)
def test_the_command_is_told_without_its_secrets(argv: list[str], expected: str) -> None:
    assert command_line(argv) == expected


def test_text_without_secrets_is_left_as_it_is() -> None:
    for text in ("http://host:8000/v1", "task-forces and masks", "hf_x", "a@b.c", "Tempered(alpha=0.5)"):
        assert publishable(text) == text


def test_long_runs_give_short_tables() -> None:
    history = [{"epoch": epoch / 2, "loss": float(epoch)} for epoch in range(1, 201)]
    table = by_epoch(history)
    assert table["epoch"].tolist() == list(range(5, 101, 5))
    assert table["loss"].tolist() == [f"{2 * epoch}" for epoch in table["epoch"]]
    assert by_epoch([]).empty
    assert by_epoch([{"epoch": 1.0, "train_runtime": 3.0}]).empty


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    trained(folder / "run", resampler(acceptance=TopKPerPrompt(2)), args={"num_train_epochs": 2})
    return export_repository(folder / "run", folder / "shared")


def test_a_repository_loads_by_configuration(repository: Path) -> None:
    source = repository.parent / "run"
    expected = {"sft": rsft_hf.export_sft, "dpo": rsft_hf.export_dpo, "kto": rsft_hf.export_kto}
    assert datasets.get_dataset_config_names(str(repository)) == [*expected, "candidates"]
    assert datasets.get_dataset_default_config_name(str(repository)) == "sft"
    for name, export in expected.items():
        assert datasets.load_dataset(str(repository), name, split="train")[:] == export(source)[:]
    assert datasets.load_dataset(str(repository), "candidates", split="train").num_rows == 2 * 36


def test_a_repository_that_was_written_anew_is_not_loaded_from_a_cache(tmp_path: Path) -> None:
    for text in ("one", "two"):
        rows = [{"prompt": "p", "completion": text}]
        rsft_hf.import_candidates(rows, tmp_path / text / "imported")
        folder = export_repository(tmp_path / text / "imported", tmp_path / text / "shared")
        assert datasets.load_dataset(str(folder), "candidates", split="train")["text"][:] == [text]


def test_a_repository_tells_how_it_was_made(repository: Path) -> None:
    card = DatasetCard.load(repository / "README.md")
    assert [one["config_name"] for one in card.data.configs] == ["sft", "dpo", "kto", "candidates"]
    found = cells(card.text)
    for number in (0, 1):
        rows = stored(repository.parent / "run", number)
        accepted = [row["reward"] for row in rows if row["is_accepted"]]
        mean = sum(row["reward"] for row in rows) / len(rows)
        figures = [str(len(rows)), str(len(accepted)), f"{mean:.4g}", f"{sum(accepted) / len(accepted):.4g}"]
        assert [f"round-{number:03d}", *figures] in found
    assert ["acceptance", "TopKPerPrompt(k=2)"] in [
        [row[0], row[1].replace("rsft_hf.acceptance.rules.", "")] for row in found
    ]
    assert ["reward_functions", "share_of_wanted"] in found
    assert "max_new_tokens=8" in card.text.replace("\\", "")


def test_imported_candidates_that_nobody_judged_are_shared_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completions": ["a", "b"]}]
    rsft_hf.import_candidates(rows, tmp_path / "imported")
    folder = export_repository(tmp_path / "imported", tmp_path / "shared")
    assert datasets.get_dataset_config_names(str(folder)) == ["candidates"]
    assert ["imported", "2", "0", "-", "-"] in cells((folder / "README.md").read_text())


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    rsft_hf.import_candidates([{"prompt": "p", "completions": ["a"]}], tmp_path / "imported")
    with pytest.raises(FileExistsError, match="mine is not empty"):
        export_repository(tmp_path / "imported", tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="holds no candidates"):
        export_repository(tmp_path / "mine", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_data_given_as_a_list_is_counted_and_not_shown() -> None:
    assert shown([{"prompt": "my secret"}, {"prompt": "another"}]) == "list of 2 rows"
    assert shown([1.0, 0.5]) == "1.0, 0.5"
