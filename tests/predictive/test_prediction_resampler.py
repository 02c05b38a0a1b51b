"""`PredictionResampler` in training: which rows an epoch reads, with which labels; resume; tasks; refusals."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf

import runs
from predictive_runs import POOL, logged, resampler, token_rows, token_trainer, trained
from rsft_hf import RejectionSamplingTrainer
from rsft_hf.predictive import (
    Agreement,
    Calibrated,
    ClassPrior,
    PredictionResampler,
    Sharpened,
    Teacher,
    load_pseudo_labels,
)


class Epochs(hf.TrainerCallback):
    """Keeps the rows of every epoch, as the loader gives them."""

    def __init__(self) -> None:
        self.epochs: list[list[dict[str, Any]]] = []

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if state.global_step % state.max_steps * 3 % state.max_steps == 0:
            dataset, sampler = train_dataloader.dataset, train_dataloader.batch_sampler
            self.epochs.append([dataset[row] | {"number": row} for batch in sampler for row in batch])


def test_an_epoch_reads_each_labelled_row_once_and_accepted_labels_in_their_share(tmp_path: Path) -> None:
    epochs = Epochs()
    trainer = trained(tmp_path, callbacks=[epochs])
    assert len(epochs.epochs) == 3
    assert sorted(row["number"] for row in epochs.epochs[0]) == sorted(2 * list(range(26)))  # the warm-up
    stored = load_pseudo_labels(tmp_path)
    for number, rows in enumerate(epochs.epochs[1:]):
        labelled = [row for row in rows if row["number"] < 26]
        assert sorted(row["number"] for row in labelled) == list(range(26))
        assert all(row["labels"] == runs.rows()[row["number"]]["labels"] for row in labelled)
        drawn = [row for row in rows if row["number"] >= 26]
        assert len(drawn) == 26
        accepted = dict(
            zip(
                *(stored.filter(lambda line, n=number: line["round"] == n)[name][:] for name in ("row", "label")),
                strict=True,
            )
        )
        assert {row["number"] - 26 for row in drawn} <= set(accepted)
        assert all(row["labels"] == accepted[row["number"] - 26] for row in drawn)
        assert all(row["input_ids"] == POOL[row["number"] - 26]["input_ids"] for row in drawn)
    assert logged(trainer, "drawn") == [0, 26, 26]
    assert logged(trainer, "proposed_rows") == [34, 34]


def test_the_store_tells_what_was_proposed_and_what_is_right(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    everything, accepted = load_pseudo_labels(tmp_path, only_accepted=False), load_pseudo_labels(tmp_path)
    assert everything.column_names == ["round", "row", "label", "confidence", "probability", "is_accepted", "reference"]
    assert everything["row"][:34] == list(range(34))
    assert everything["reference"][:34] == [row["truth"] for row in POOL]
    assert len(accepted) == sum(logged(trainer, "accepted_rows")) < len(everything)
    last = accepted.filter(lambda line: line["round"] == 1)
    wrong = sum(label != truth for label, truth in zip(last["label"], last["reference"], strict=True))
    assert logged(trainer, "wrong")[-1] == wrong
    assert logged(trainer, "accuracy")[-1] == pytest.approx(1 - wrong / len(last))
    # Sharpened(0.5) over two classes: the likelier one is always accepted, the other one with p(y) q(z) / (q(y) p(z)).
    for line in everything:
        other = (1 - line["confidence"]) / line["confidence"]
        assert min(abs(line["probability"] - 1), abs(line["probability"] - other)) < 1e-5
    with pytest.raises(FileNotFoundError, match="holds no round"):
        load_pseudo_labels(tmp_path / "none")


@pytest.mark.parametrize("is_dataset", [False, True])
def test_rows_without_a_true_label_are_unknown(tmp_path: Path, is_dataset: bool) -> None:
    rows = [{**row, "truth": None} if number % 2 else dict(row) for number, row in enumerate(POOL)]
    if not is_dataset:
        rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    pool = datasets.Dataset.from_list(rows) if is_dataset else rows
    trained(tmp_path, resampler(unlabelled_dataset=pool, reference_column="truth"))
    references = load_pseudo_labels(tmp_path, only_accepted=False)["reference"][:34]
    assert references == [-100 if number % 2 else row["truth"] for number, row in enumerate(POOL)]


def test_a_doubtful_row_needs_no_label(tmp_path: Path) -> None:
    rows = runs.rows()
    del rows[3]["labels"]
    made = PredictionResampler(doubtful_rows=[3, 5])
    trained(tmp_path, made, train_dataset=rows, args={"num_train_epochs": 2})
    assert load_pseudo_labels(tmp_path, only_accepted=False)["row"][:] == [0, 1]


def test_the_label_of_an_unlabelled_row_is_never_read(tmp_path: Path) -> None:
    """Rows with other labels in the label column, under any of its names, give the same run."""
    blind = [{name: row[name] for name in ("input_ids", "attention_mask", "truth")} for row in POOL]
    renamed = [{**row, "label": 1} for row in blind]
    runs_of = [
        trained(tmp_path / str(number), resampler(unlabelled_dataset=rows))
        for number, rows in enumerate((POOL, blind, renamed))
    ]
    assert runs.largest_difference(runs_of[0], runs_of[1]) == runs.largest_difference(runs_of[0], runs_of[2]) == 0


def test_labelled_rows_alone_are_plain_trainer(tmp_path: Path) -> None:
    """A warm-up as long as the run, with as many draws as labelled rows: bit for bit the same training."""
    plain = runs.trained(hf.Trainer, tmp_path / "plain")
    warm = trained(tmp_path / "warm", resampler(warmup_epochs=3, num_draws=26))
    assert runs.losses(plain) == runs.losses(warm)
    assert runs.largest_difference(plain, warm) == 0


@pytest.mark.parametrize("ema_decay", [None, 0.5])
@pytest.mark.parametrize("at", [5, 13, 26], ids=["warm-up", "boundary", "inside"])
def test_resume_is_exact(tmp_path: Path, at: int, ema_decay: float | None) -> None:
    args = {"save_strategy": "steps", "save_steps": at}
    whole = trained(tmp_path, resampler(ema_decay=ema_decay), args=args)
    rows = load_pseudo_labels(tmp_path, only_accepted=False).to_list()
    torch.manual_seed(12345)
    cut = trained(tmp_path, resampler(ema_decay=ema_decay), args=args, resume=str(tmp_path / f"checkpoint-{at}"))
    assert runs.largest_difference(whole, cut) == 0
    assert load_pseudo_labels(tmp_path, only_accepted=False).to_list() == rows
    assert [
        {
            k: v
            for k, v in line.items()
            if "runtime" not in k and "second" not in k and k != "total_flos" and k != "train_loss"
        }
        for line in cut.state.log_history
    ] == [
        {
            k: v
            for k, v in line.items()
            if "runtime" not in k and "second" not in k and k != "total_flos" and k != "train_loss"
        }
        for line in whole.state.log_history
    ]


def test_a_run_is_not_resumed_with_other_unlabelled_rows(tmp_path: Path) -> None:
    args = {"save_strategy": "epoch"}
    trained(tmp_path, args=args)
    for options, message in (
        ({"unlabelled_dataset": POOL[1:]}, "unlabelled rows was 34"),
        ({"ema_decay": 0.5}, "ema_decay was None"),
    ):
        with pytest.raises(ValueError, match=f"Cannot resume: {message}"):
            trained(tmp_path, resampler(**options), args=args, resume=str(tmp_path / "checkpoint-13"))


def test_the_average_of_the_weights_proposes_and_training_goes_on_with_its_own(tmp_path: Path) -> None:
    proposers = []

    class Spy(Sharpened):
        def __call__(self, proposals):
            proposers.append(trainer.model.classifier.weight.detach().clone())
            return super().__call__(proposals)

    made = resampler(target=Spy(0.5), ema_decay=0.9)
    trainer = RejectionSamplingTrainer(
        runs.bert(), runs.arguments(tmp_path), train_dataset=runs.rows(), data_collator=runs.collate, resampler=made
    )
    initial = trainer.model.classifier.weight.detach().clone()
    history = [initial]
    trainer.add_callback(
        type(
            "Steps",
            (hf.TrainerCallback,),
            {
                "on_step_end": lambda self, args, state, control, **kwargs: history.append(
                    trainer.model.classifier.weight.detach().clone()
                )
            },
        )()
    )
    trainer.train()
    average = initial.clone()
    for number, weights in enumerate(history[1:14]):  # the first epoch has 13 steps
        decay = min(0.9, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * weights
    assert torch.allclose(proposers[0], average, atol=1e-6)
    assert made.teacher.num_updates == 38  # the last step of 39 would come with the next proposal
    assert torch.equal(trainer.model.classifier.weight.detach(), history[-1])


def test_workers_read_the_labels_of_the_round(tmp_path: Path) -> None:
    alone, with_workers = (
        trained(tmp_path / str(number), args={"dataloader_num_workers": number}) for number in (0, 2)
    )
    assert runs.largest_difference(alone, with_workers) == 0
    assert runs.losses(alone) == runs.losses(with_workers)


def test_a_new_run_in_the_same_folder_leaves_no_round_of_the_old_one(tmp_path: Path) -> None:
    trained(tmp_path, args={"num_train_epochs": 4})
    assert set(load_pseudo_labels(tmp_path)["round"]) == {0, 1, 2}
    trained(tmp_path, args={"num_train_epochs": 2})
    assert set(load_pseudo_labels(tmp_path)["round"]) == {0}


def test_accumulation_length_groups_and_the_card(tmp_path: Path) -> None:
    args = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "group_by_length"}
    trainer = trained(tmp_path, args=args)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "drew a label for each unlabelled row" in card
    assert "Sharpened\\(temperature=0\\.5" in card
    assert "| list of 34 rows |" in card
    assert "11, 45, 14" not in card  # tokens of a row: data is counted, never shown
    assert "arXiv:1905.02249" in card
    assert "pseudo_labels/accuracy" in card


def test_a_report_of_such_a_run(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    from rsft_hf.report import read_run, write_report

    trained(tmp_path, args={"save_strategy": "epoch"})
    path = write_report(read_run(tmp_path), tmp_path / "report.html")
    assert "Logged for each round of proposed labels." in path.read_text()


def test_every_n_epochs_and_num_proposals(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, resampler(num_proposals=10, every_n_epochs=2, warmup_epochs=0), args={"num_train_epochs": 4}
    )
    assert logged(trainer, "proposed_rows") == [10, 10]
    assert logged(trainer, "drawn") == [26] * 4
    everything = load_pseudo_labels(tmp_path, only_accepted=False)
    assert len(set(everything["row"][:10])) == 10
    assert everything["row"][:10] != everything["row"][10:]


@pytest.mark.parametrize(("num_draws", "drawn"), [(1, 0), (2, 1), (40, 36)])
def test_few_draws_keep_a_labelled_row(tmp_path: Path, num_draws: int, drawn: int) -> None:
    trainer = trained(tmp_path, resampler(num_draws=num_draws, pseudo_fraction=0.9, warmup_epochs=0))
    assert logged(trainer, "drawn") == [drawn] * 3


def test_doubtful_rows_lose_their_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    epochs = Epochs()
    made = PredictionResampler(doubtful_rows=[3, 5, 3])
    trained(tmp_path, made, callbacks=[epochs], args={"num_train_epochs": 3})
    assert made.draws_per_epoch() == 48  # 24 labelled rows and as many drawn labels
    rows = runs.rows()
    first = epochs.epochs[0]
    assert {tuple(row["input_ids"]) for row in first} == {
        tuple(row["input_ids"]) for number, row in enumerate(rows) if number not in (3, 5)
    }
    drawn = [row for row in epochs.epochs[1] if row["number"] >= 24]
    assert {tuple(row["input_ids"]) for row in drawn} <= {tuple(rows[number]["input_ids"]) for number in (3, 5)}
    expected = "The 2 rows with accepted labels are each read 12 times to fill 24 draws. Accept more of them"
    assert expected in caplog.text


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("accepts_tokens", [True, False])
def test_tokens(tmp_path: Path, accepts_tokens: bool, side: str) -> None:
    """Labels stand at the marked tokens, whatever the padding; accepted one by one, or all of a row together."""
    pool = [
        {**row, "truth": row["labels"], "labels": [min(one, 0) for one in row["labels"]]} for row in token_rows(70)[40:]
    ]
    made = PredictionResampler(pool, accepts_tokens=accepts_tokens, reference_column="truth", warmup_epochs=10)
    trainer = token_trainer(tmp_path, made, side=side)
    trainer.train()
    assert logged(trainer, "accuracy")[-1] > 0.9
    rows = [trainer.get_train_dataloader().dataset[40 + number] for number in range(30)]
    stored = {line["row"]: line for line in load_pseudo_labels(tmp_path, only_accepted=False) if line["round"] == 1}
    partly = 0
    for number, row in enumerate(rows):
        assert len(row["labels"]) == len(row["input_ids"])
        assert row["labels"][0] == -100
        assert row["labels"][1:] == stored[number]["label"]
        rejected = [one == -100 for one in row["labels"][1:]]
        partly += any(rejected) and not all(rejected)
    assert accepts_tokens or partly == 0
    right = [
        one == truth
        for number, row in enumerate(rows)
        for one, truth in zip(row["labels"], pool[number]["truth"], strict=True)
        if one != -100
    ]
    assert sum(right) / len(right) == pytest.approx(logged(trainer, "accuracy")[-1])


def test_tokens_without_marks_are_all_labelled(tmp_path: Path) -> None:
    made = PredictionResampler(token_rows(50, with_labels=False)[40:], warmup_epochs=1, accepts_tokens=True)
    trainer = token_trainer(tmp_path, made, num_train_epochs=2)
    trainer.train()
    stored = load_pseudo_labels(tmp_path, only_accepted=False)
    assert [len(label) for label in stored["label"]] == [len(row["input_ids"]) for row in token_rows(50)[40:]]


def test_multi_label(tmp_path: Path) -> None:
    def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "labels": [float(row["input_ids"][0] % 2), float(row["input_ids"][1] % 2)]} for row in rows]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return runs.collate([{**row, "labels": 0} for row in rows]) | {
            "labels": torch.tensor([row["labels"] for row in rows])
        }

    model = runs.bert()
    model.config.problem_type = "multi_label_classification"
    pool = [{**row, "truth": row["labels"]} for row in labelled(runs.rows(60)[26:])]
    trainer = trained(
        tmp_path,
        resampler(unlabelled_dataset=pool),
        model=model,
        train_dataset=labelled(runs.rows()),
        data_collator=collate,
    )
    stored = load_pseudo_labels(tmp_path)
    assert all(len(label) == 2 and set(label) <= {0, 1} for label in stored["label"])
    rows = [trainer.get_train_dataloader().dataset[26 + number] for number in range(34)]
    assert all(isinstance(one, float) for row in rows for one in row["labels"])
    assert logged(trainer, "accuracy")


def test_images_and_other_inputs(tmp_path: Path) -> None:
    config = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    rows = [{"pixel_values": torch.full((1, 8, 8), number % 3 / 2), "labels": number % 3} for number in range(30)]
    made = PredictionResampler([{"pixel_values": row["pixel_values"]} for row in rows], warmup_epochs=2)
    trainer = RejectionSamplingTrainer(
        hf.ViTForImageClassification(config), runs.arguments(tmp_path), train_dataset=rows, resampler=made
    )
    trainer.train()
    assert logged(trainer, "proposed_rows") == [30]


@pytest.mark.parametrize(
    "target",
    [Agreement(2), ClassPrior(), Teacher(runs.bert(), runs.bert(initializer_range=0.5)), Calibrated(runs.rows()),
     lambda proposals: proposals.log_probs * 3],
    ids=["agreement", "prior", "teacher", "calibrated", "function"],
)  # fmt: skip
def test_every_target_trains(tmp_path: Path, target: Any) -> None:
    model = runs.bert()
    trainer = trained(tmp_path, resampler(target=target), model=model)
    assert logged(trainer, "acceptance_rate")
    assert trainer.model.training  # as the last step left it


def test_proposing_moves_no_random_state(tmp_path: Path) -> None:
    """Dropout of the training steps is the same whether an epoch begins with proposals or not."""
    states = []

    class State(hf.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 13:
                states.append(torch.get_rng_state())

    for number, target in enumerate((Sharpened(), Agreement(3))):
        trained(tmp_path / str(number), resampler(target=target), callbacks=[State()])
    assert torch.equal(*states)


def test_nothing_accepted_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trained(tmp_path, resampler(min_confidence=1.0))
    assert "Round 0 accepted no label of 34 rows, so its epochs read labelled rows only." in caplog.text
    assert logged(trainer, "drawn") == [0, 0, 0]


def test_limits_per_class(tmp_path: Path) -> None:
    trained(tmp_path, resampler(min_confidence=torch.tensor([0.0, 1.0])))
    assert set(load_pseudo_labels(tmp_path)["label"]) <= {0, 1}
    everything = load_pseudo_labels(tmp_path, only_accepted=False)
    assert len(everything) == 68


REFUSED = [
    ({"unlabelled_dataset": None}, "There is nothing to label"),
    ({"temperature": 0}, "`temperature`=0 must lie in"),
    ({"pseudo_fraction": 1.0}, "`pseudo_fraction`=1.0 must lie in"),
    ({"min_confidence": 1.5}, "`min_confidence`=1.5 must lie in"),
    ({"min_confidence": [0.5, -1]}, "`min_confidence`=-1 must lie in"),
    ({"confidence_quantile": 1.0}, "`confidence_quantile`=1.0 must lie in"),
    ({"ema_decay": 1.0}, "`ema_decay`=1.0 must lie in"),
    ({"num_draws": 0}, "`num_draws`=0 must be an integer"),
    ({"num_proposals": 0}, "`num_proposals`=0 must be an integer"),
    ({"every_n_epochs": 0}, "`every_n_epochs`=0 must be an integer"),
    ({"warmup_epochs": -1}, "`warmup_epochs`=-1 must be an integer"),
    ({"target": Sharpened}, "`target` must be a rule"),
    ({"target": 3}, "`target` must be a rule"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        resampler(**options)


def stream() -> Any:
    return datasets.IterableDataset.from_generator(lambda: iter(POOL))


BAD = [
    ({"unlabelled_dataset": [{"input_ids": [5], "truth": 0}]}, {}, r"lacks the columns \['attention_mask'\]"),
    ({"reference_column": "gold"}, {}, "has no column 'gold'"),
    ({"doubtful_rows": [26]}, {}, "`doubtful_rows` names row 26, and `train_dataset` has 26 rows"),
    ({"unlabelled_dataset": None, "doubtful_rows": range(26)}, {}, "holds all rows of `train_dataset`"),
    ({"accepts_tokens": True}, {}, "`accepts_tokens=True` goes with a list of classes per row"),
    ({"min_confidence": [0.5, 0.5, 0.5]}, {}, "`min_confidence` has 3 numbers, and the model 2 classes"),
    ({"target": lambda proposals: proposals.log_probs[:, :1]}, {}, r"must return log p of shape \(34, 2\)"),
    ({}, {"args": {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}}, "keeps workers that hold"),
    ({}, {"train_dataset": [{**row, "labels": 0.5} for row in runs.rows()]}, "The label 0.5 is no class"),
    ({}, {"train_dataset": [{**row, "labels": 2} for row in runs.rows()], "args": {}}, None),
    ({}, {"model": None}, "generates text"),
    ({"target": Calibrated([{**row, "labels": -100} for row in POOL])}, {}, "None of 34 held-out rows of Calibrated"),
    ({"warmup_epochs": 0}, {"train_dataset": [*runs.rows(1), {**runs.rows()[1], "labels": None}]}, "has no label"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "keywords", "message"), BAD, ids=[str(message) for *_, message in BAD])
def test_what_cannot_be_labelled_is_refused(tmp_path: Path, options: Any, keywords: Any, message: str | None) -> None:
    if "model" in keywords:
        keywords["model"] = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
            )
        )
    if message is None:
        with pytest.raises((ValueError, IndexError)):  # the model's own error, at the first step
            trained(tmp_path, resampler(**options), **keywords)
        return
    with pytest.raises((TypeError, ValueError), match=message):
        trained(tmp_path, resampler(**options), **keywords)


def test_a_streamed_pool_is_refused(tmp_path: Path) -> None:
    made = resampler(doubtful_rows=[1])
    made.unlabelled_dataset = stream()
    with pytest.raises(ValueError, match="must have a length and random access"):
        trained(tmp_path, made)
