"""Cost of drawing an epoch: ten million heavy-tailed draws against a plain shuffle of as many rows.

    make bench-drawing                      # or: make bench-drawing ARGS="--quick --json -"

Prints the ratio of `rejection_sample` to `torch.randperm`, round by round in alternation, draws beyond the 2^24
elements at which `torch.multinomial` stops, and the cost of the same law by looping over passes, where that ends.
The weights are lognormal with sigma 2: M, the expected number of passes for one epoch of draws, is in the thousands.
"""

import torch
from measures import build_parser, seconds_of, spread, write_json

from rsft_hf import acceptance_probabilities, effective_sample_size, envelope_constant, rejection_sample

BEYOND_MULTINOMIAL = 2**24 + 1


def lognormal_weights(num_rows: int, generator: torch.Generator, sigma: float = 2.0) -> torch.Tensor:
    return torch.exp(sigma * torch.randn(num_rows, dtype=torch.float64, generator=generator))


def looped_draws(weights: torch.Tensor, num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """Returns accepted indices by the textbook loop: permute, accept with w / max w, repeat until there are enough."""
    probabilities = acceptance_probabilities(weights)
    accepted, num_accepted = [], 0
    while num_accepted < num_draws:
        proposed = torch.randperm(len(weights), generator=generator)
        uniforms = torch.rand(len(weights), dtype=torch.float64, generator=generator)
        accepted.append(proposed[uniforms < probabilities[proposed]])
        num_accepted += len(accepted[-1])
    return torch.cat(accepted)[:num_draws]


def compare_with_shuffle(num_rows: int, num_rounds: int, generator: torch.Generator) -> dict:
    """Returns wall seconds of `rejection_sample` and `torch.randperm` in alternation, and their ratio per round."""
    weights = lognormal_weights(num_rows, generator)
    drawing, shuffling = [], []
    for _ in range(num_rounds):
        drawing.append(seconds_of(lambda: rejection_sample(weights, num_rows, generator))[0]["wall"])
        shuffling.append(seconds_of(lambda: torch.randperm(num_rows, generator=generator))[0]["wall"])
    return {
        "rows": num_rows,
        "envelope": envelope_constant(weights),
        "drawing_s": spread(drawing),
        "shuffling_s": spread(shuffling),
        "ratio": spread([draw / shuffle for draw, shuffle in zip(drawing, shuffling, strict=True)]),
    }


def compare_with_loop(num_rows: int, num_rounds: int, generator: torch.Generator) -> dict:
    """Returns wall seconds of drawing from counts and of looping over passes, in alternation."""
    weights = lognormal_weights(num_rows, generator)
    direct, looped = [], []
    for _ in range(num_rounds):
        direct.append(seconds_of(lambda: rejection_sample(weights, num_rows, generator))[0]["wall"])
        looped.append(seconds_of(lambda: looped_draws(weights, num_rows, generator))[0]["wall"])
    return {
        "rows": num_rows,
        "envelope": envelope_constant(weights),
        "effective_sample_size": effective_sample_size(weights),
        "direct_s": spread(direct),
        "looped_s": spread(looped),
        "speed_up": spread([slow / fast for fast, slow in zip(direct, looped, strict=True)]),
    }


def draw_beyond_multinomial(generator: torch.Generator) -> dict:
    """Returns the seconds for 2^24 + 1 rows; an index that passed through float32 could not name the last of them."""
    weights = torch.ones(BEYOND_MULTINOMIAL, dtype=torch.float64)
    weights[:-1] = lognormal_weights(BEYOND_MULTINOMIAL - 1, generator)
    weights[-1] = weights.max()
    seconds, indices = seconds_of(lambda: rejection_sample(weights, BEYOND_MULTINOMIAL, generator))
    expected = BEYOND_MULTINOMIAL * float(weights[-1] / weights.sum())
    last = int((indices == BEYOND_MULTINOMIAL - 1).sum())
    return {
        "rows": BEYOND_MULTINOMIAL,
        "seconds": seconds["wall"],
        "last_row_drawn": last,
        "last_row_expected": expected,
    }


def report(results: dict) -> None:
    shuffle, large, loop = results["shuffle"], results["beyond_multinomial"], results["looping"]

    def show(name: str, values: dict[str, float], unit: str) -> None:
        print(f"  {name:34s} {values['min']:9.3f} {values['median']:9.3f} {values['max']:9.3f} {unit}")

    print(f"{'':36s} {'min':>9s} {'median':>9s} {'max':>9s}")
    print(f"{shuffle['rows']:,} draws from as many rows, M = {shuffle['envelope']:.0f}")
    show("rejection_sample", shuffle["drawing_s"], "s")
    show("torch.randperm", shuffle["shuffling_s"], "s")
    show("ratio", shuffle["ratio"], "")
    print(f"{loop['rows']:,} draws from as many rows, M = {loop['envelope']:.0f}")
    show("rejection_sample", loop["direct_s"], "s")
    show("looping over passes", loop["looped_s"], "s")
    show("speed-up", loop["speed_up"], "")
    print(
        f"{large['rows']:,} rows, one more than torch.multinomial takes: {large['seconds']:.1f} s, the last row drawn "
        f"{large['last_row_drawn']} times, {large['last_row_expected']:.0f} expected"
    )


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    scale = 10 if arguments.quick else 1
    results = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "shuffle": compare_with_shuffle(10_000_000 // scale, arguments.rounds, generator),
        "looping": compare_with_loop(200_000 // scale, arguments.rounds, generator),
        "beyond_multinomial": draw_beyond_multinomial(generator),
    }
    if arguments.json != "-":
        report(results)
    write_json(results, arguments.json)


if __name__ == "__main__":
    main()
