"""What a model's prediction says of its own certainty, from the logits alone.

Model outputs of one batch enter, one number per example and statistic leaves.
"""

from typing import Any

import torch

from rsft_hf.weighted.losses import Batch, logits_of

PREDICTION_STATISTICS = ("entropies", "margins", "confidences")


def prediction_statistics(outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Returns entropy (nats), margin and confidence of each example, averaged over labelled positions for tokens.

    Args:
        outputs: Model outputs with `logits`, shape (B, C) or (B, T, C), C >= 2 exclusive classes.
        batch: The inputs, for the positions that count: those with a label, else those attended to.

    Returns:
        The statistics named in `PREDICTION_STATISTICS`, each of shape (B,), float64, on the CPU.

    Raises:
        ValueError: If the outputs have no such logits.
    """
    logits = logits_of(outputs)
    if logits is None or logits.ndim not in (2, 3) or logits.shape[-1] < 2:
        shape = None if logits is None else tuple(logits.shape)
        raise ValueError(
            f"Entropy, Margin and LeastConfidence need logits over at least two classes, got shape {shape}. Use a "
            "rule on the loss, such as Proportional."
        )
    with torch.no_grad():
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        probabilities = log_probs.exp()
        top = probabilities.topk(2, dim=-1).values
        values = {
            "entropies": -(probabilities * log_probs).sum(-1),
            "margins": top[..., 0] - top[..., 1],
            "confidences": top[..., 0],
        }
        if logits.ndim == 3:
            mask = _position_mask(batch, logits)
            values = {name: (value * mask).sum(1) / mask.sum(1).clamp(min=1) for name, value in values.items()}
    return {name: value.cpu().double() for name, value in values.items()}


def _position_mask(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.shape == logits.shape[:2]:
        return labels.ne(-100).to(logits)
    mask = batch.get("attention_mask")
    return mask.to(logits) if mask is not None else torch.ones_like(logits[..., 0])
