"""Zoo of 26 small models with a slow oracle of their per-example losses, built offline from configs and one seed.

Each of `CASES` has the parts of a plain Trainer over seven examples of different lengths. No case has dropout or other
noise, so losses in training and in evaluation are equal. Independent of the package under test.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import zoo_examples as rows
from zoo_examples import NUM_LABELS, SEED, VOCABULARY, Example

CLASS_WEIGHTS = (0.5, 1.0, 4.0)


@dataclass(frozen=True)
class Parts:
    """Arguments of a Trainer: `arguments` go to TrainingArguments, `keywords` to the Trainer."""

    model: nn.Module
    dataset: list[Example]
    data_collator: Callable[[list[Example]], dict[str, Tensor]]
    arguments: dict[str, Any] = field(default_factory=dict)
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        name: Unique; the id of a parametrised test.
        build: Returns fresh parts, equal at every call.
        unlabelled: Examples without a label, whose loss is NaN in a batch of one.
        has_batch_term: Whether the loss adds a term of the whole batch (router balance).
        is_in_batch: Whether an example's loss depends on its neighbours, so that no per-example loss exists.
    """

    name: str
    build: Callable[[], Parts]
    unlabelled: tuple[int, ...] = ()
    has_batch_term: bool = False
    is_in_batch: bool = False

    def trainer(self, output_dir: Path, trainer_class: type = hf.Trainer, arguments: dict | None = None, **keywords):
        """Returns a trainer on fresh parts, with batches of three, three and one unless `arguments` say otherwise."""
        parts = self.build()
        defaults = {"per_device_train_batch_size": 3, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        return trainer_class(
            model=parts.model,
            args=hf.TrainingArguments(str(output_dir), **{**defaults, **parts.arguments, **(arguments or {})}),
            train_dataset=parts.dataset,
            data_collator=parts.data_collator,
            **{**parts.keywords, **keywords},
        )

    def batch_of_one_losses(self, output_dir: Path) -> list[float]:
        """Returns plain Trainer's `compute_loss` of each example alone, in nats, in data-set order."""
        trainer = self.trainer(output_dir)
        model = trainer.model.eval()
        with torch.no_grad():
            return [trainer.compute_loss(model, trainer.data_collator([row])).item() for row in trainer.train_dataset]


# Sizes shared by all text models. Wide initial weights spread the losses: near-equal ones would hide a wrong order.
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "max_position_embeddings": 32, "initializer_range": 0.4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
BERT = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.4}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **SPECIAL}
DECODER = {**SMALL, **SPECIAL, "num_key_value_heads": 1, "attention_dropout": 0.0}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
T5 |= {
    "dropout_rate": 0.0,
    "initializer_factor": 1.5,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.4, **SPECIAL}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART |= {"dropout": 0.0, "max_position_embeddings": 32, "decoder_start_token_id": 1, "forced_eos_token_id": None}

HEAD = {"num_labels": NUM_LABELS}
SMOOTH = {"label_smoothing_factor": 0.1}


class InBatchContrastive(nn.Module):
    """Contrastive model: each text is classified among the labels of its batch; a single example has loss zero."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 16)
        self.labels = nn.Embedding(NUM_LABELS, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        mask = attention_mask.unsqueeze(-1)
        texts = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        logits = texts @ self.labels(labels).T
        return {"loss": F.cross_entropy(logits, torch.arange(len(logits), device=logits.device)), "logits": logits}


def class_weighted_loss(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
    """Returns sum(w l) / sum(w) with the weight of each label: an example alone loses its weight."""
    return nn.CrossEntropyLoss(weight=outputs.logits.new_tensor(CLASS_WEIGHTS))(outputs.logits, labels)


def focal_loss(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
    """Returns mean((1 - p)^2 l), p = e^-l the probability of the label. # Lin et al. 2017, arXiv:1708.02002."""
    losses = F.cross_entropy(outputs.logits, labels, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def focal_loss_by_hand(outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
    """Returns the focal loss from log-probabilities, without a call of a criterion of torch."""
    log_p = outputs.logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def parts(model_class: type, config, examples: Callable, arguments=None, **keywords) -> Callable[[], Parts]:
    """Returns the function that builds a case, with weights from one seed and without changing the global RNG."""

    def build() -> Parts:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = model_class(config()) if config else model_class()
        return Parts(model, examples(), rows.pad_and_stack, dict(arguments or {}), keywords)

    return build


def bert(**head) -> Callable:
    return lambda: hf.BertConfig(**BERT, **head)


def gpt2(**head) -> Callable:
    return lambda: hf.GPT2Config(**GPT2, **head)


def llama() -> hf.LlamaConfig:
    return hf.LlamaConfig(**DECODER)


def qwen3() -> hf.Qwen3Config:
    return hf.Qwen3Config(**DECODER, head_dim=8)


def mixtral() -> hf.MixtralConfig:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return hf.MixtralConfig(**DECODER, **experts, router_aux_loss_coef=0.1)


def t5() -> hf.T5Config:
    return hf.T5Config(**T5)


def bart() -> hf.BartConfig:
    return hf.BartConfig(**BART)


def marian() -> hf.MarianConfig:
    return hf.MarianConfig(**BART)


def vit() -> hf.ViTConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.ViTConfig(**sizes, **HEAD, image_size=16, patch_size=8, initializer_range=0.4)


def convnext() -> hf.ConvNextConfig:
    return hf.ConvNextConfig(**HEAD, num_stages=2, depths=[1, 1], hidden_sizes=[8, 16], initializer_range=0.4)


def wav2vec2() -> hf.Wav2Vec2Config:
    # A group norm over time would let a neighbour's length, by way of padding, into an example's loss.
    ears = {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 3), "feat_extract_norm": "layer"}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    noise = "hidden_dropout attention_dropout activation_dropout feat_proj_dropout final_dropout layerdrop".split()
    return hf.Wav2Vec2Config(
        **ears, **sizes, **dict.fromkeys(noise, 0.0), intermediate_size=32, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, apply_spec_augment=False, ctc_loss_reduction="mean", initializer_range=0.4,
    )  # fmt: skip


def some_continuations() -> list[Example]:
    return rows.without_labels(rows.continuations(), (2, 5))


def some_classes() -> list[Example]:
    return rows.without_labels(rows.classes(), (2, 5))


CLASSES, ROUTED = hf.BertForSequenceClassification, hf.MixtralForCausalLM
CASES = (
    Case("bert_single_label", parts(CLASSES, bert(**HEAD), rows.classes)),
    Case("bert_multi_label", parts(CLASSES, bert(**HEAD, problem_type="multi_label_classification"), rows.tag_sets)),
    Case("bert_regression", parts(CLASSES, bert(num_labels=1), rows.ratings)),
    Case("bert_token_classification", parts(hf.BertForTokenClassification, bert(**HEAD), rows.tags)),
    Case("bert_question_answering", parts(hf.BertForQuestionAnswering, bert(), rows.spans)),
    Case("bert_multiple_choice", parts(hf.BertForMultipleChoice, bert(), rows.choices)),
    Case("bert_masked_lm", parts(hf.BertForMaskedLM, bert(), rows.masked)),
    Case("gpt2_lm", parts(hf.GPT2LMHeadModel, gpt2(), rows.continuations)),
    Case("gpt2_classification", parts(hf.GPT2ForSequenceClassification, gpt2(**HEAD), rows.classes)),
    Case("llama_lm", parts(hf.LlamaForCausalLM, llama, rows.continuations)),
    Case("qwen3_lm", parts(hf.Qwen3ForCausalLM, qwen3, rows.continuations)),
    Case("t5_seq2seq", parts(hf.T5ForConditionalGeneration, t5, rows.translations)),
    Case("bart_seq2seq", parts(hf.BartForConditionalGeneration, bart, rows.translations)),
    Case("marian_seq2seq", parts(hf.MarianMTModel, marian, rows.translations)),
    Case("vit_classification", parts(hf.ViTForImageClassification, vit, rows.images)),
    Case("convnext_classification", parts(hf.ConvNextForImageClassification, convnext, rows.images)),
    Case("wav2vec2_ctc", parts(hf.Wav2Vec2ForCTC, wav2vec2, rows.recordings)),
    Case("mixtral_router_loss", parts(ROUTED, mixtral, rows.continuations), has_batch_term=True),
    Case("bert_label_smoothing", parts(CLASSES, bert(**HEAD), rows.classes, SMOOTH)),
    Case("llama_label_smoothing", parts(hf.LlamaForCausalLM, llama, rows.continuations, SMOOTH)),
    Case("class_weighted", parts(CLASSES, bert(**HEAD), rows.classes, compute_loss_func=class_weighted_loss)),
    Case("focal", parts(CLASSES, bert(**HEAD), rows.classes, compute_loss_func=focal_loss)),
    Case("focal_by_hand", parts(CLASSES, bert(**HEAD), rows.classes, compute_loss_func=focal_loss_by_hand)),
    Case("in_batch_contrastive", parts(InBatchContrastive, None, rows.classes), is_in_batch=True),
    Case("bert_without_labels", parts(CLASSES, bert(**HEAD), some_classes), unlabelled=(2, 5)),
    Case("gpt2_without_labels", parts(hf.GPT2LMHeadModel, gpt2(), some_continuations), unlabelled=(2, 5)),
)
