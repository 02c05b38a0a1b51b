"""What translations are measured by, and how a translator is asked for them.

In: a model and sentences, or translations and references. Out: texts, or figures from 0 to 100. It knows no data set.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sacrebleu.metrics import BLEU, CHRF

Measure = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


def corpus_scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns BLEU and chrF of the whole corpus (not means over sentences), from 0 to 100.

    Example:
        >>> corpus_scores(["ein Hund rennt im Park"], ["ein Hund rennt im Park"])
        {'bleu': 100.0, 'chrf': 100.0}
    """
    scores = {"bleu": BLEU(), "chrf": CHRF()}
    return {
        name: round(metric.corpus_score(list(translations), [list(references)]).score, 6)
        for name, metric in scores.items()
    }


def corpus_signatures() -> dict[str, str]:
    """Returns how sacrebleu computes each figure, in its own short form, so that others can compare."""
    signatures = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        metric.corpus_score(["a"], [["a"]])  # the number of references is part of the signature
        signatures[name] = str(metric.get_signature())
    return signatures


def exact_match(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns the share of translations that equal their reference, from 0 to 100.

    Example:
        >>> exact_match(["zwei", "drei "], ["zwei", "vier"])
        {'exact_match': 50.0}
    """
    hits = [text.strip() == expected for text, expected in zip(translations, references, strict=True)]
    return {"exact_match": 100 * sum(hits) / len(hits)}


def text_metric(measure: Measure) -> Callable[[Any], dict[str, float]]:
    """Returns the `compute_metrics` of a trainer whose resampler generates: texts against texts."""
    return lambda prediction: measure(prediction.predictions, prediction.label_ids)


def token_metric(measure: Measure, tokenizer: Any, references: Sequence[str]) -> Callable[[Any], dict[str, float]]:
    """Returns the `compute_metrics` of a plain Seq2SeqTrainer: it gets token ids, -100 where there is none."""

    def compute(prediction: Any) -> dict[str, float]:
        token_ids = np.where(prediction.predictions >= 0, prediction.predictions, tokenizer.pad_token_id)
        return measure(tokenizer.batch_decode(token_ids, skip_special_tokens=True), references)

    return compute


@torch.no_grad()
def translate(
    model: Any, tokenizer: Any, sentences: Sequence[str], max_new_tokens: int, batch_size: int = 64
) -> list[str]:
    """Returns the greedy translation of every sentence, in their order; the model is left as it was."""
    order = sorted(range(len(sentences)), key=lambda row: len(sentences[row]))
    translations = [""] * len(sentences)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([sentences[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
        token_ids = model.generate(
            **batch.to(model.device), do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, max_length=None
        )
        for row, text in zip(rows, tokenizer.batch_decode(token_ids, skip_special_tokens=True), strict=True):
            translations[row] = text
    model.train(was_training)
    return translations
