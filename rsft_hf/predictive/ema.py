"""EmaTeacher: the moving average of a model's weights. Tarvainen & Valpola 2017, arXiv:1703.01780 (mean teacher)."""

import contextlib
from collections.abc import Iterator

import torch


class EmaTeacher:
    """Exponential moving average of the trainable weights of a model.

    Args:
        model: Model that is trained, whole.
        decay: Weight of the old average in an update, in [0, 1); less in the first updates, (1 + n) / (10 + n).

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> teacher = EmaTeacher(model, decay=0.1)
        >>> before = float(model.weight.detach())
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> teacher.update()
        >>> with teacher.applied():
        ...     print(round(float(model.weight.detach()) - before, 6))  # 0.1 * 0 + 0.9 * 1
        0.9
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self._trained = {name: values for name, values in model.named_parameters() if values.requires_grad}
        # In float32: in half precision a small update would be lost.
        self._average = {name: values.detach().float().clone() for name, values in self._trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present weights into the average; after each optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, average in self._average.items():
            average.lerp_(self._trained[name].to(average), 1 - decay)
        self.num_updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the averaged weights inside the block, and its own back."""
        own = {name: values.detach().clone() for name, values in self._trained.items()}
        try:
            self._copy(self._average)
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: dict[str, torch.Tensor]) -> None:
        for name, values in self._trained.items():
            values.copy_(weights[name])

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the averaged weights by name, on the CPU."""
        return {f"ema.{name}": values.cpu().clone() for name, values in self._average.items()}

    def load(self, tensors: dict[str, torch.Tensor], num_updates: int) -> None:
        """Takes up what `state` returned, after so many updates."""
        for name, values in self._average.items():
            values.copy_(tensors[f"ema.{name}"])
        self.num_updates = num_updates
