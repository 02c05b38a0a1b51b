"""The order in which the rows of an epoch are read, as `train_sampling_strategy` says.

A trainer, its rows and the accepted indices enter; the same indices leave, arranged.
"""

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from rsft_hf.lengths import example_lengths
from rsft_hf.resampling import run_seed


def arranged(trainer: Trainer, dataset: Any, indices: torch.Tensor, epoch: int) -> torch.Tensor:
    """Returns the accepted rows in the order to read them; "random" is the order of acceptance. Collective.

    Args:
        trainer: Says how, and in what batches.
        dataset: What the indices point into.
        indices: Rows, shape (num_draws,), int64.
        epoch: Number of the epoch, for the seed.

    Raises:
        ValueError: If rows are to be grouped by a length that they do not have.
    """
    strategy = trainer.args.train_sampling_strategy
    if strategy == "sequential":
        return indices.sort().values
    if strategy != "group_by_length":
        return indices
    lengths = _lengths(trainer, dataset)
    # Trainer's own sampler draws from the global generator and so does not resume exactly.
    generator = torch.Generator().manual_seed(run_seed(trainer) + epoch)
    positions = get_length_grouped_indices(
        [lengths[row] for row in indices.tolist()],
        trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps,
        generator=generator,
    )
    return indices[positions]


def _lengths(trainer: Trainer, dataset: Any) -> list[int]:
    lengths = example_lengths(dataset, trainer.args.length_column_name)
    if lengths is not None:
        return lengths
    name = "input_ids" if trainer.processing_class is None else trainer.processing_class.model_input_names[0]
    if name not in dataset[0]:
        raise ValueError(
            f'`train_sampling_strategy="group_by_length"` finds no {name!r} in the rows of the training set. Add a '
            f"column {trainer.args.length_column_name!r} (`length_column_name`) with the length of each row."
        )
    return [len(dataset[row][name]) for row in range(len(dataset))]
