"""Whether a Trainer class, its arguments and its loader leave the rows to the resampler, and checkpoints are whole."""

from typing import Any

import datasets
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from rsft_hf.resampler import EpochSampler

logger = logging.get_logger(__name__)

_OUT_OF_ORDER = (
    "lets the workers hand over their batches as they finish them, so nobody knows which rows a step trains on: losses "
    "would be booked on other rows, and a run could not be resumed."
)
_LOADER_HOOKS = ("get_train_dataloader", "_get_train_sampler", "get_batch_sampler")


def validate_arguments(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Validate TrainingArguments: the sampler must control the order of the rows, and each process its own rows.

    Raises:
        ValueError: For `dispatch_batches`, batches of several workers out of order, torch.nn.DataParallel,
            `train_sampling_strategy="batch_rebalance"`, and tensor, context or sequence parallelism.
    """
    parallel = accelerator.parallelism_config
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        raise ValueError(
            "Tensor, context and sequence parallelism split one row over several processes, but here each process "
            "scores and counts its own rows. Use data parallelism (DDP, FSDP, ZeRO)."
        )
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "`dispatch_batches=True` lets the main process read every batch, so the processes do not know which rows "
            "they train on. Leave it at None in `accelerator_config`."
        )
    if not getattr(args, "dataloader_in_order", True) and args.dataloader_num_workers > 1:
        raise ValueError(f"`dataloader_in_order=False` {_OUT_OF_ORDER} Leave it at True.")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process drives {args.n_gpu} GPUs (torch.nn.DataParallel), whose replicas hide the losses of single "
            "rows. Start one process per GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES."
        )
    if str(args.train_sampling_strategy) == "batch_rebalance":
        raise ValueError(
            '`train_sampling_strategy="batch_rebalance"` fixes the batches for the whole run. Use "random", '
            '"group_by_length" or "sequential", which order the accepted rows.'
        )


_GENERATING = ("OnlineDPOTrainer", "NashMDTrainer", "XPOTrainer")  # of TRL


def validate_trainer_class(trainer_class: type, mixin: type) -> None:
    """Validate that the Trainer class reads the rows it trains on, as it does not if it generates them in its steps.

    Raises:
        ValueError: If a class below the mixin orders its rows for inputs of its own, as TRL's GRPOTrainer does, or is
            known to generate what it trains on.
    """
    below = trainer_class.__mro__[trainer_class.__mro__.index(mixin) + 1 :]
    for owner in below:
        is_own = not owner.__module__.startswith("transformers.")
        has_order = {"_get_train_sampler", "_prepare_inputs"} <= vars(owner).keys()
        if is_own and (has_order or owner.__name__ in _GENERATING):
            raise ValueError(
                f"{owner.__qualname__} generates inside its training steps what it trains on, so no rows are left to "
                "choose. Put the mixin over SFTTrainer, whose completions CandidateResampler generates and accepts."
            )


def warn_of_unsaved_parameters(model: torch.nn.Module) -> None:
    """Warns of parameters that are trained and saved in no checkpoint.

    transformers loads the fixed positions of Marian's translators as trainable (seen in 5.24), and never saves them: a
    saved or resumed model is another one than the trained.
    """
    fixed = set(model._keys_to_ignore_on_save or ()) if isinstance(model, PreTrainedModel) else set()
    if found := [name for name, values in model.named_parameters() if values.requires_grad and name in fixed]:
        logger.warning(
            f"{type(model).__name__} trains {' and '.join(found)}, which no checkpoint holds, so that a saved or "
            "resumed model differs from the trained one. Freeze them before training: "
            f'model.get_parameter("{found[0]}").requires_grad_(False).'
        )


def validate_loader(trainer: Any, loader: Any, sampler: EpochSampler, dataset: Any) -> None:
    """Validate that the loader which is iterated reads the drawn rows of the resampler's data set.

    A trainer class may build its own loader or sampler, above the mixin or below it; without this check it would train
    on other rows than the ones that are logged.

    Args:
        trainer: Trainer with the mixin.
        loader: Training loader, prepared or not.
        sampler: Sampler with the rows of the epoch.
        dataset: Data set that the resampler is bound to.

    Raises:
        ValueError: If it does not, with the override named, or if its batches come out of order.
    """
    # A pool of candidates must be read itself; a training set may be wrapped, or have lost unused columns.
    may_be_wrapped = dataset is trainer.train_dataset or isinstance(dataset, datasets.Dataset)
    read = getattr(loader, "dataset", None)
    if read is not None:  # a loader over several loaders has none
        is_own_dataset = read is dataset or (may_be_wrapped and len(read) == len(dataset))
        if not getattr(loader, "in_order", True) and loader.num_workers > 1:
            raise ValueError(f"`in_order=False` of the training loader {_OUT_OF_ORDER} Leave it out.")
        if is_own_dataset and sampler.is_read_by(loader):
            return
    owners = [
        owner for owner in type(trainer).__mro__ if not owner.__module__.startswith(("transformers.", "rsft_hf."))
    ]
    overrides = [
        f"{owner.__module__.split('.')[0]}.{owner.__qualname__}.{name}"
        for owner in owners
        for name in _LOADER_HOOKS
        if name in vars(owner)
    ]
    raise ValueError(
        "The training loader does not read the rows that the resampler draws, so training would ignore the resampler; "
        f"see {' and '.join(overrides) or type(trainer).__qualname__}. Remove the override, or build the loader over "
        "`self.train_dataset` with `sampler=self._get_train_sampler()`, in a class below RejectionSamplingMixin."
    )
