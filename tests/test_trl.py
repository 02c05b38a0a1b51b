"""The mixin over TRL's SFTTrainer, whose fused head calls no criterion and whose loss updates metrics."""

import inspect
from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

import runs
from rsft_hf import LossResampler, RejectionSamplingMixin, Tempered, measure_losses

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")

WORDS = ["<pad>", "<eos>", *"a b c d e f g h i j k l m n o p".split()]


class RejectionSamplingSFTTrainer(RejectionSamplingMixin, trl.SFTTrainer):
    """The class as a user writes it."""


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def texts() -> Dataset:
    generator = torch.Generator().manual_seed(runs.SEED)
    lines = []
    for number in range(14):
        picks = torch.randint(2, len(WORDS), (3 + number % 5,), generator=generator).tolist()
        lines.append({"prompt": WORDS[picks[0]], "completion": " " + " ".join(WORDS[pick] for pick in picks[1:])})
    return Dataset.from_list(lines)


def train(trainer_class: type, output_dir: Path, **keywords) -> hf.Trainer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runs.SEED)
        sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, initializer_range=0.4))
    args = trl.SFTConfig(
        str(output_dir),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = trainer_class(model=model, args=args, train_dataset=texts(), processing_class=tokenizer(), **keywords)
    trainer.train()
    return trainer


@pytest.mark.parametrize("source", ["forward", "training"])
def test_equal_weights_are_plain_sft_trainer(tmp_path: Path, source: str) -> None:
    plain = train(trl.SFTTrainer, tmp_path)
    ours = train(RejectionSamplingSFTTrainer, tmp_path, resampler=LossResampler(Tempered(0.0), losses=source))
    assert runs.largest_difference(ours, plain) == 0.0
    kept = ("loss", "entropy", "mean_token_accuracy", "num_tokens")  # measuring must leave TRL's metrics alone
    for line, expected in zip(ours.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        assert {key: line[key] for key in kept} == {key: expected[key] for key in kept}


def test_losses_of_completions_are_batch_of_one_losses(tmp_path: Path) -> None:
    trainer = train(RejectionSamplingSFTTrainer, tmp_path)
    loader = trainer.get_train_dataloader()
    model = trainer.model.eval()
    with torch.no_grad():
        expected = [
            trainer.compute_loss(model, trainer._prepare_inputs(loader.collate_fn([row]))).item()
            for row in loader.dataset
        ]
    measured = measure_losses(trainer, batch_size=5).losses
    torch.testing.assert_close(measured, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_the_ledger_reads_the_fused_head(tmp_path: Path) -> None:
    trainer = train(RejectionSamplingSFTTrainer, tmp_path, resampler=LossResampler(losses="training"))
    table = trainer.resampler.table().to_pandas()
    assert table.query("epoch == 1")["loss"].between(0, 30).all()
    assert table.query("epoch == 2")["loss"].nunique() == 14


@pytest.mark.skipif("add_fused_lm_head" not in inspect.getsource(trl.SFTTrainer), reason="TRL without a fused head")
def test_the_safe_rule_draws_from_the_losses_of_a_fused_head_without_correction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = train(RejectionSamplingSFTTrainer, tmp_path).resampler.source
    assert (source.is_from_training, source.importance_correction) == (True, 0.0)
    assert sum("they come from a fused head" in record.message for record in caplog.records) == 1
    with pytest.raises(ValueError, match=r"this loss is computed another way .* a fused head"):
        train(RejectionSamplingSFTTrainer, tmp_path, resampler=LossResampler(importance_correction=1.0))
