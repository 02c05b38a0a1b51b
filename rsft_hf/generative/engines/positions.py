"""Positions of rows of different ages in decoders that take them from the length of the cache, the same for all rows.

The decoders of BART, Marian, M2M100 and their kin have a module `embed_positions`, and no argument for positions.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def row_positions(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Gives each row its own position while the block runs; decoders with relative positions are left as they are.

    Args:
        model: Encoder-decoder.
        positions: Of each row's token, shape (rows,), int64.
    """
    embedding = dict(model.get_decoder().named_children()).get("embed_positions")
    names = [] if embedding is None else list(inspect.signature(embedding.forward).parameters)
    with contextlib.ExitStack() as hooks:
        if embedding is not None and "position_ids" in names:
            hooks.enter_context(_as_one_sequence(embedding, positions))
        elif embedding is not None and "past_key_values_length" in names:
            hooks.enter_context(_one_by_one(embedding, positions))
        yield


@contextlib.contextmanager
def _as_one_sequence(embedding: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Embeds the positions of the rows as those of one sequence would be, then gives each row its own."""
    signature = inspect.signature(embedding.forward)

    def replace(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["position_ids"] = positions
        return bound.args, bound.kwargs

    def separate(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.reshape(len(positions), 1, -1)

    with embedding.register_forward_pre_hook(replace, with_kwargs=True), embedding.register_forward_hook(separate):
        yield


@contextlib.contextmanager
def _one_by_one(embedding: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Embeds as often as there are different positions, each time as if the cache were that long."""
    signature = inspect.signature(embedding.forward)

    def embed(_: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        bound, rows = signature.bind(*args, **kwargs), output.expand(len(positions), 1, -1).clone()
        for position in positions.unique().tolist():
            bound.arguments["past_key_values_length"] = position
            here = positions == position
            rows[here] = embedding.forward(*bound.args, **bound.kwargs).expand_as(rows)[here]
        return rows

    with embedding.register_forward_hook(embed, with_kwargs=True):
        yield
