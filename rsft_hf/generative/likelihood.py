"""Log probabilities of given answers under a model that did not generate them: one pass, teacher-forced.

Token ids enter, sums of log probabilities in nats leave.
"""

from collections.abc import Sequence
from typing import Any

import torch

from rsft_hf.generative.encoding import IGNORED, Encoder, RowCollator


@torch.no_grad()
def completion_log_probabilities(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_size: int = 16,
) -> torch.Tensor:
    """Returns log p(completion | prompt), end token included, shape (len(completions),), float64, nats.

    Args:
        model: In evaluation mode.
        encoder: Knows where prompt and answer go.
        prompts: Token ids of each prompt.
        completions: Token ids of each answer, as sampled.
        batch_size: Rows per forward pass, sorted by length; halved when memory runs out.
    """
    rows = [encoder.training_row(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
    collate = RowCollator(pad_token_id=encoder.tokenizer.pad_token_id or 0)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    while order:
        chosen = order[:batch_size]
        try:
            sums[chosen] = _batch_sums(model, encoder, collate([rows[row] for row in chosen]))
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            continue
        del order[:batch_size]
    return sums


def _batch_sums(model: Any, encoder: Encoder, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    batch = {name: value.to(model.device) for name, value in rows.items()}
    labels = batch["labels"] if encoder.is_encoder_decoder else batch.pop("labels")
    logits = model(**batch).logits.float()
    if not encoder.is_encoder_decoder:  # position t predicts token t + 1
        logits, labels = logits[:, :-1], labels[:, 1:]
    picked = logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) - logits.logsumexp(-1)
    return torch.where(labels == IGNORED, 0.0, picked.double()).sum(-1).cpu()
