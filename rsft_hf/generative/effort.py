"""Tokens and seconds of a round, over all processes.

What a process did enters, a dict of figures leaves.
"""

from dataclasses import dataclass, field

from accelerate import Accelerator

from rsft_hf.distributed import gather_lists


@dataclass
class Effort:
    """Seconds and tokens that this process spent on a round."""

    generate_seconds: float = 0.0
    generate_tokens: int = 0
    score_seconds: float = 0.0
    score_tokens: int = 0
    logged: list[dict[str, float]] = field(default_factory=list)

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns tokens of all processes, tokens per second of the slowest's time, and means of what was logged."""
        efforts = gather_lists(accelerator, [self])
        metrics = {}
        for stage in ("generate", "score"):
            tokens = sum(vars(effort)[f"{stage}_tokens"] for effort in efforts)
            seconds = max(vars(effort)[f"{stage}_seconds"] for effort in efforts)
            if tokens:
                metrics[f"tokens/{stage}"] = float(tokens)
                metrics[f"tokens_per_second/{stage}"] = tokens / max(seconds, 1e-9)
        logged = [values for effort in efforts for values in effort.logged]
        for name in dict.fromkeys(name for values in logged for name in values):
            given = [values[name] for values in logged if name in values]
            metrics[name] = sum(given) / len(given)
        return metrics
