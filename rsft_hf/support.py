"""What can be resampled and what cannot, told before the first step."""

from collections.abc import Sized
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from transformers import TrainingArguments


def refuse_dataset(dataset: Any) -> None:
    """Raises if a training set cannot be resampled; None is left to Trainer.

    Raises:
        ValueError: If it is iterable only, has no length or no rows.
    """
    if dataset is None:
        return
    if isinstance(dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset)):
        raise ValueError(
            f"`train_dataset` is a {type(dataset).__name__}, whose rows cannot be chosen by index. Pass a data set "
            "with a length and random access: for a streamed one, `datasets.Dataset.from_generator(...)`, or "
            "`load_dataset` without `streaming=True`."
        )
    if isinstance(dataset, dict):
        raise ValueError(
            f"`train_dataset` is a {type(dataset).__name__} with the keys {list(dataset)}, not rows. Pass one split, "
            'such as dataset["train"].'
        )
    if not isinstance(dataset, Sized):
        raise ValueError(
            f"`train_dataset` ({type(dataset).__name__}) has no length. Give it a `__len__`, so that its rows can be "
            "drawn by index."
        )
    if len(dataset) == 0:
        raise ValueError("`train_dataset` has no rows. Check the split name and the filters applied to it.")


def refuse_setting(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raises if the training arguments leave the order of the rows to something other than the sampler.

    Raises:
        ValueError: For `dispatch_batches`, torch.nn.DataParallel, `train_sampling_strategy="batch_rebalance"`, and
            tensor, context or sequence parallelism.
    """
    parallel = accelerator.parallelism_config
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            "Tensor, context and sequence parallelism spread one row over several processes, which score and count "
            "rows each for itself here. Use data parallelism (DDP, FSDP, ZeRO)."
        )
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "`dispatch_batches=True` lets the main process read every batch, so that no process knows which rows it "
            "trains on. Leave it at None in `accelerator_config`."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process drives {args.n_gpu} GPUs (torch.nn.DataParallel), whose replicas hide the losses of single "
            "rows. Start one process per GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES."
        )
    if str(args.train_sampling_strategy) == "batch_rebalance":
        raise ValueError(
            '`train_sampling_strategy="batch_rebalance"` fixes the batches for the whole run. Use "random", '
            '"group_by_length" or "sequential", which arrange the rows that were accepted.'
        )
