"""What does a round's generation cost, beside `generate`, `generate_batch` and TRL? Seconds, passes and memory.

    make bench-generation                   # or: make bench-generation ARGS="--quick --json -"

All contenders generate the same prompts with the same length of every candidate, checked in each run, by a model with
random weights; they take turns within one process, A B C A B C. A ratio is the contender's seconds over those of
`in_flight`, medians of the repeats, and above 1 means that `in_flight` is faster: processor seconds on a CPU, one
thread; wall seconds on a GPU (`--device cuda`), where TRL's trainers are left out. `generate_batch` is tried in several
settings, of which the best goes on. `useful` is decoding rows needed over rows computed, above 1 where a first step is
shared; `limit` the share of the framework limit (see measures.py); MiB the peak above that of the process before, in a
process for each contender. About an hour on one core, or `--only SECTION`; `--quick` takes a minute.
"""

import argparse
import json
import statistics
import subprocess
import sys
from importlib.metadata import version
from typing import Any

# This process stays small (no torch): a child's peak of memory would otherwise begin at its parent's.
from sections import CUDA_SECTIONS, ENCODER_DECODERS, OURS, QUICK_SECTIONS, SECTIONS, Section, kind_of


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def build(section: Section, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the model and the workload of a section."""
    import torch
    import workloads

    torch.set_num_threads(1)
    size = section.size if arguments.prompts is None else {**section.size, "num_prompts": arguments.prompts}
    model = workloads.build_model(section.model, arguments.device)
    return model, workloads.build_workload(workloads.Size(**size))


def child_times(section: Section, arguments: argparse.Namespace) -> dict:
    """Returns the runs of every contender, facts of the workload, and limits."""
    import measures
    import rollouts
    import workloads

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
        "workload": workload.facts() | {"decode_tokens": measures.decode_tokens(workload, is_encoder_decoder)},
        "limits": measures.limits(model, workload, arguments.device) if section.has_limits else {},
        "seed": workloads.SEED,
    }


def run_once(name: str, contender: Any, workload: Any, device: str) -> dict:
    import measures
    import rollouts

    with measures.counted(contender.model) as count:
        seconds, lengths = measures.seconds_of(lambda: contender.generate(workload), device)
    rollouts.check_lengths(name, lengths, workload)
    # Continuous batching packs the tokens of all requests into one row.
    is_packed = kind_of(name) in ("generate_batch", "trl_continuous")
    return seconds | {"forwards": count.passes, "decode_rows": None if is_packed else count.decode_rows}


def child_memory(section: Section, arguments: argparse.Namespace) -> dict:
    """Returns the peak of memory before and after one run, in MiB."""
    import measures
    import rollouts

    model, workload = build(section, arguments)
    contender = rollouts.build_rollout(arguments.contender, model, workload)
    before = measures.peak_mib(arguments.device)
    contender.generate(workload)
    return {"before_mib": before, "peak_mib": measures.peak_mib(arguments.device)}


def clock_of(arguments: argparse.Namespace) -> str:
    return "wall" if arguments.device == "cuda" else "cpu"


def best_setting(runs: dict[str, list[dict]], clock: str) -> str | None:
    """Returns the setting of `generate_batch` that took the least seconds in the first run."""
    settings = [name for name in runs if kind_of(name) == "generate_batch"]
    return min(settings, key=lambda name: runs[name][0][clock], default=None)


def run_child(mode: str, section: str, arguments: argparse.Namespace, contender: str = "") -> dict:
    command = [sys.executable, __file__, "--child", mode, "--only", section, "--contender", contender]
    command += ["--repeats", str(arguments.repeats), "--device", arguments.device]
    command += [] if arguments.prompts is None else ["--prompts", str(arguments.prompts)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def measure(name: str, section: Section, arguments: argparse.Namespace) -> dict:
    """Returns the numbers of a section's contenders, its workload and its limits."""
    clock = clock_of(arguments)
    found = child_times(section, arguments) if arguments.quick else run_child("times", name, arguments)
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
            row |= run_child("memory", name, arguments, one)
        rows[one] = row
    return {"contenders": rows, "workload": found["workload"], "limits": found["limits"], "seed": found["seed"]}


def ratios_of(sections: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Returns each contender's seconds over ours; of `generate_batch` the best setting, of two models the lesser."""
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
    facts, limits = found["workload"], found["limits"]
    print(
        f"\n{name}: {facts['prompts']} prompts x {facts['candidates_per_prompt']}, {facts['prompt_tokens_mean']:.0f} "
        f"tokens of prompt and {facts['length_mean']:.1f} of answer on average, {facts['length_max']} at most"
    )
    if limits:
        at_best, at_slots = (
            " and ".join(f"{limits[name][clock]:.2f} s {clock}" for clock in ("cpu", "wall"))
            for name in ("limit_s", "chosen_batch_limit_s")
        )
        bound = f", memory-bound limit {limits['memory_bound_s']:.2f} s" if "memory_bound_s" in limits else ""
        print(f"framework limit {at_best}, at {facts['slots']} rows {at_slots}{bound}; {limits['fewest_steps']} steps")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fixed batches of 32 alone, once, 16 prompts x 4")
    parser.add_argument("--repeats", type=int, help="default: 3, or 1 with --quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=(*SECTIONS, "encoder_decoder"), help="one section only")
    parser.add_argument("--prompts", type=int, help="this many prompts instead of the section's")
    parser.add_argument("--json", metavar="PATH", help="also write the numbers to PATH, or - for standard output only")
    parser.add_argument("--child", choices=("times", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 3)
    if arguments.quick and arguments.device == "cuda":
        parser.error("--quick is for a CPU; on a GPU name a section with --only")
    return arguments


def sections_of(arguments: argparse.Namespace) -> dict[str, Section]:
    """Returns the sections that are asked for."""
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
    if arguments.json == "-":
        print(json.dumps(results, indent=2))
    elif arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
