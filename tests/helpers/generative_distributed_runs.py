"""The rounds of two gloo processes, for `test_generative_distributed.py`: started by torchrun.

torchrun --nproc_per_node 2 tests/helpers/generative_distributed_runs.py OUTPUT_DIR [broken]
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import generative_runs
import generators
from process_groups import write_and_leave
from rsft_hf import Deduplicate, DensityRatio, Threshold
from rsft_hf.generative import RejectTruncated


def first_letter(text: str) -> str:
    """What makes answers count as equal, so that some do."""
    return text[:1]


SOME = Threshold(minimum=0.2)
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attempts": {"acceptance": SOME, "max_attempts": 3, "on_nothing_accepted": "reference"},
    "best": {"acceptance": SOME, "max_attempts": 2, "on_nothing_accepted": "best", "dedup": Deduplicate(first_letter)},
    "density": {
        "acceptance": DensityRatio(),
        "filters": (RejectTruncated(),),
        "on_nothing_accepted": "skip",
        "generation_config": generators.sampling(temperature=1.5),
    },
}
FIGURES = ("reward", "rewards/share_of_wanted/mean", "length", "truncated", "distinct_1", "distinct_2", "texts")


def broken(completions: list, **_: Any) -> list[float]:
    """A reward function that fails in the second process alone."""
    if os.environ["RANK"] == "1":
        raise OSError("the grader of this machine is down")
    return [0.0] * len(completions)


def run(name: str, output_dir: Path) -> dict[str, Any]:
    """Returns what one run ended with, as this process sees it."""
    ours = generative_runs.trainer(
        output_dir / name,
        generative_runs.resampler(**RUNS[name]),
        args={"per_device_train_batch_size": 1},
        eval_dataset=generators.prompts(5, first=82),
        compute_metrics=lambda prediction: {"texts": float(len(" ".join(prediction.predictions)))},
    )
    before = ours.evaluate()
    ours.train()
    ours.create_model_card()
    return {
        "evaluation": {figure: before[f"eval_{figure}"] for figure in FIGURES},
        "indices": ours._progress.indices.tolist(),
        "pool": list(ours.resampler.pool.accepted),
        "parameters": [float(values.double().sum()) for values in ours.model.state_dict().values()],
        "metrics": {
            name: value
            for name, value in ours.resampler.metrics().items()
            if "second" not in name  # no time of day repeats
        },
    }


def main() -> None:
    """Trains with every setting, or with a reward function that fails in one process."""
    output_dir = Path(sys.argv[1])
    torch.set_num_threads(1)
    if sys.argv[2:] == ["broken"]:
        generative_runs.trained(output_dir / "broken", generative_runs.resampler(broken))
    results = {name: run(name, output_dir) for name in RUNS}
    write_and_leave(output_dir, results)


if __name__ == "__main__":
    main()
