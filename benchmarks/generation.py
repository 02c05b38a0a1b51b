"""Cost of generating candidates against `generate`, `generate_batch` and TRL: seconds, forward passes and memory.

    make bench-generation                   # or: make bench-generation ARGS="--quick --json -"

All contenders generate the same prompts with the same length of every candidate, checked in each run, by a model with
random weights; they alternate within one process, A B C A B C. A ratio is the contender's seconds over those of
`in_flight`, medians of the repeats, and above 1 means that `in_flight` is faster: processor seconds on a CPU, one
thread; wall seconds on a GPU (`--device cuda`), where TRL's trainers are left out. `generate_batch` is tried in several
settings, of which the best stays in. `useful` is decoding rows needed over rows computed, above 1 where a first step
is shared; `limit` the share of the framework limit (see limits.py); MiB the peak above that of the process before, in a
process for each contender. About an hour on one core, or `--only SECTION`; `--quick` takes a minute.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import limits
import rollouts
import torch
import workloads
from measures import build_parser, peak_mib, run_child, seconds_of, spread, write_json
from rollouts import kind_of

OURS = "in_flight"
FORKED = ("generate_batch 16 forked", "generate_batch 32 forked", "generate_batch 64 forked")
ALONE = ("generate_batch 32 alone", "generate_batch 64 alone")
OUR_SETTINGS = (OURS, "in_flight log_probs", "in_flight longest_first")
BATCHES = ("fixed", "sorted")
TRL = ("trl", "trl_rloo", "trl_continuous")
SHARED = {"num_prompts": 4, "num_candidates": 16, "slots": 16, "prompt_mean": 512, "prompt_range": (512, 512)}


@dataclass(frozen=True)
class Section:
    """A comparison of contenders on one model and one workload.

    Attributes:
        model: Name of the model in workloads.py.
        contenders: Names for `rollouts.build_rollout`.
        size: Differences from the defaults of `workloads.Size`.
        has_limits: Whether the framework limit is measured.
    """

    model: str
    contenders: tuple[str, ...]
    size: dict[str, Any] = field(default_factory=dict)
    has_limits: bool = True


def shared_prefill(model: str, length: int) -> Section:
    lengths = {"mean": length, "sigma": 0.0, "longest": length}
    return Section(model, ("fixed", OURS), {**SHARED, **lengths}, has_limits=False)


SECTIONS = {
    "causal": Section("llama", ("naive", *BATCHES, *FORKED, *ALONE, *TRL, "generate_engine", *OUR_SETTINGS)),
    "t5": Section("t5", ("naive", *BATCHES, OURS)),
    "marian": Section("marian", ("naive", *BATCHES, OURS)),
    "shared_prefill": shared_prefill("llama", 1),
    "shared_prefill_32": shared_prefill("llama", 32),
    "milder_tail": Section("llama", ("naive", "fixed", OURS), {"sigma": 0.4}),
    "causal_56m": Section("llama_56m", ("naive", "fixed", *FORKED[1:], OURS), {"num_prompts": 8}),
}
LARGE = {"num_prompts": 256, "slots": 256}
CUDA_SECTIONS = {
    "causal": Section("qwen_half_billion", (*BATCHES, "generate_batch 256 forked", *OUR_SETTINGS), LARGE),
    "shared_prefill": shared_prefill("qwen_half_billion", 1),
    "shared_prefill_32": shared_prefill("qwen_half_billion", 32),
}
SMALL = {"num_prompts": 16, "num_candidates": 4, "slots": 32}
QUICK_SECTIONS = {
    "causal": Section("llama", ("fixed", OURS), SMALL, has_limits=False),
    "t5": Section("t5", ("fixed", OURS), SMALL, has_limits=False),
}
ENCODER_DECODERS = ("t5", "marian")


def build(section: Section, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the model and the workload of a section."""
    torch.set_num_threads(1)
    size = section.size if arguments.prompts is None else {**section.size, "num_prompts": arguments.prompts}
    model = workloads.build_model(section.model, arguments.device)
    return model, workloads.build_workload(workloads.Size(**size))


def child_times(section: Section, arguments: argparse.Namespace) -> dict:
    """Returns the runs of every contender, facts of the workload, and its limits."""
    model, workload = build(section, arguments)
    contenders = {name: rollouts.build_rollout(name, model, workload) for name in section.contenders}
    for contender in contenders.values():
        contender.generate(workloads.warm_up_of(workload))
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, contender in contenders.items():
            runs[name].append(run_once(name, contender, workload, arguments.device))
        best = best_setting(runs, clock_of(arguments))
        contenders = {
            name: one for name, one in contenders.items() if kind_of(name) != "generate_batch" or name == best
        }
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    return {
        "runs": runs,
        "workload": workload.facts() | {"decode_tokens": limits.decode_tokens(workload, is_encoder_decoder)},
        "limits": limits.measure_limits(model, workload, arguments.device) if section.has_limits else {},
        "seed": workloads.SEED,
    }


def run_once(name: str, contender: Any, workload: Any, device: str) -> dict:
    with limits.count_forwards(contender.model) as count:
        seconds, lengths = seconds_of(lambda: contender.generate(workload), device)
    rollouts.check_lengths(name, lengths, workload)
    # Continuous batching packs the tokens of all requests into one row.
    is_packed = kind_of(name) in ("generate_batch", "trl_continuous")
    return seconds | {"forwards": count.passes, "decode_rows": None if is_packed else count.decode_rows}


def child_memory(section: Section, arguments: argparse.Namespace) -> dict:
    """Returns the peak memory before and after one run, in MiB."""
    model, workload = build(section, arguments)
    contender = rollouts.build_rollout(arguments.contender, model, workload)
    before = peak_mib(arguments.device)
    contender.generate(workload)
    return {"before_mib": before, "peak_mib": peak_mib(arguments.device)}


def clock_of(arguments: argparse.Namespace) -> str:
    return "wall" if arguments.device == "cuda" else "cpu"


def best_setting(runs: dict[str, list[dict]], clock: str) -> str | None:
    """Returns the setting of `generate_batch` that took the least seconds in the first run."""
    settings = [name for name in runs if kind_of(name) == "generate_batch"]
    return min(settings, key=lambda name: runs[name][0][clock], default=None)


def words_of(section: str, arguments: argparse.Namespace) -> list[str]:
    """Returns the command-line words with which a child process measures one section."""
    words = ["--only", section, "--repeats", str(arguments.repeats), "--device", arguments.device]
    return words + ([] if arguments.prompts is None else ["--prompts", str(arguments.prompts)])


def measure(name: str, section: Section, arguments: argparse.Namespace) -> dict:
    """Returns the numbers of a section's contenders, its workload and its limits."""
    clock = clock_of(arguments)
    words = words_of(name, arguments)
    found = child_times(section, arguments) if arguments.quick else run_child(__file__, "--child", "times", *words)
    runs, best = found["runs"], best_setting(found["runs"], clock)
    medians = {one: statistics.median(run[clock] for run in tries) for one, tries in runs.items()}
    rows = {}
    for one, tries in runs.items():
        is_best = kind_of(one) != "generate_batch" or one == best
        row = {"is_best_setting": is_best, "forwards": tries[0]["forwards"], "decode_rows": tries[0]["decode_rows"]}
        row |= {f"{each}_s": spread([run[each] for run in tries]) for each in ("cpu", "wall")}
        row["tokens_per_s"] = found["workload"]["tokens"] / medians[one]
        row["ratio_to_ours"] = medians[one] / medians[OURS]
        row["ratio_to_naive"] = medians["naive"] / medians[one] if "naive" in medians else None
        row["useful_share"] = found["workload"]["decode_tokens"] / row["decode_rows"] if row["decode_rows"] else None
        if found["limits"]:
            row["limit_share"] = found["limits"]["limit_s"][clock] / medians[one]
            row["forwards_per_fewest_steps"] = row["forwards"] / found["limits"]["fewest_steps"]
        if is_best and not arguments.quick:
            row |= run_child(__file__, "--child", "memory", "--contender", one, *words)
        rows[one] = row
    return {"contenders": rows, "workload": found["workload"], "limits": found["limits"], "seed": found["seed"]}


def ratios_of(sections: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Returns each contender's seconds over ours: the best setting of `generate_batch`, the lesser of two models."""
    ratios: dict[str, dict[str, float]] = {}
    for section, found in sections.items():
        kept = {name: row["ratio_to_ours"] for name, row in found["contenders"].items() if row["is_best_setting"]}
        ratios[section] = {kind_of(name): ratio for name, ratio in kept.items() if kind_of(name) != OURS}
        own = {name.partition(" ")[2]: ratio for name, ratio in kept.items() if kind_of(name) == OURS and name != OURS}
        ratios |= {setting: {OURS: ratio} for setting, ratio in own.items()}
    models = [ratios[name] for name in ENCODER_DECODERS if name in ratios]
    if models:
        ratios["encoder_decoder"] = {name: min(one[name] for one in models) for name in models[0]}
    return ratios


def report(name: str, found: dict) -> None:
    facts, bounds = found["workload"], found["limits"]
    print(
        f"\n{name}: {facts['prompts']} prompts x {facts['candidates_per_prompt']}, {facts['prompt_tokens_mean']:.0f} "
        f"tokens of prompt and {facts['length_mean']:.1f} of answer on average, {facts['length_max']} at most"
    )
    if bounds:
        at_best, at_slots = (
            " and ".join(f"{bounds[name][clock]:.2f} s {clock}" for clock in ("cpu", "wall"))
            for name in ("limit_s", "chosen_batch_limit_s")
        )
        memory = f", memory-bound limit {bounds['memory_bound_s']:.2f} s" if "memory_bound_s" in bounds else ""
        print(f"framework limit {at_best}, at {facts['slots']} rows {at_slots}{memory}; {bounds['fewest_steps']} steps")
    print(f"{'':26s} {'cpu s':^22s} {'wall s':^22s} {'tokens':>7s} {'/ ours':>6s} {'naive /':>7s} "
          f"{'passes':>6s} {'rows':>6s} {'useful':>6s} {'limit':>5s} {'MiB':>6s}")  # fmt: skip
    print(f"{'':26s} {'median    min    max':>22s} {'median    min    max':>22s} {'per s':>7s}")
    for contender, row in found["contenders"].items():
        seconds = " ".join(
            " ".join(f"{row[clock][place]:7.2f}" for place in ("median", "min", "max")) for clock in ("cpu_s", "wall_s")
        )
        grown = row["peak_mib"] - row["before_mib"] if "peak_mib" in row else None
        rest = ((row["ratio_to_ours"], "6.2f"), (row["ratio_to_naive"], "7.2f"), (row["forwards"], "6d"),
                (row["decode_rows"], "6d"), (row["useful_share"], "6.2f"), (row.get("limit_share"), "5.2f"),
                (grown, "6.0f"))  # fmt: skip
        cells = " ".join(f"{'-':>{form[0]}s}" if value is None else f"{value:{form}}" for value, form in rest)
        print(f"{contender:26s} {seconds} {row['tokens_per_s']:7.0f} {cells}")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fixed batches of 32 alone, once, 16 prompts x 4")
    parser.add_argument("--repeats", type=int, help="default: 3, or 1 with --quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=(*SECTIONS, "encoder_decoder"), help="one section only")
    parser.add_argument("--prompts", type=int, help="this many prompts instead of the section's")
    parser.add_argument("--child", choices=("times", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 3)
    if arguments.quick and arguments.device == "cuda":
        parser.error("--quick is for a CPU; on a GPU name a section with --only")
    return arguments


def sections_of(arguments: argparse.Namespace) -> dict[str, Section]:
    """Returns the sections that the command line asks for."""
    if arguments.quick:
        sections = QUICK_SECTIONS
    else:
        sections = CUDA_SECTIONS if arguments.device == "cuda" else SECTIONS
    names = ENCODER_DECODERS if arguments.only == "encoder_decoder" else (arguments.only,)
    return {name: section for name, section in sections.items() if arguments.only is None or name in names}


def main() -> None:
    arguments = parse()
    sections = sections_of(arguments)
    if arguments.child:
        child = {"times": child_times, "memory": child_memory}[arguments.child]
        print(json.dumps(child(sections[arguments.only], arguments)))
        return
    found = {}
    for name, section in sections.items():
        found[name] = measure(name, section, arguments)
        if arguments.json != "-":
            report(name, found[name])
    results = {
        "ratios": ratios_of(found),
        **{part: {name: one[part] for name, one in found.items()} for part in ("contenders", "workload", "limits")},
        "seeds": {name: one["seed"] for name, one in found.items()},
        "versions": {package: version(package) for package in ("torch", "transformers", "trl")},
        "device": arguments.device,
    }
    write_json(results, arguments.json)


if __name__ == "__main__":
    main()
