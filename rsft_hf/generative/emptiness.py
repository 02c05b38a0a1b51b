"""Why a round accepted nothing, and what to change."""

from collections import Counter
from collections.abc import Sequence

from rsft_hf.acceptance import Acceptance
from rsft_hf.generative.candidates import CandidateStore
from rsft_hf.generative.selection import RoundTable


def explain_empty_round(
    store: CandidateStore, table: RoundTable, verdicts: Sequence[str], acceptance: Acceptance
) -> str:
    """Returns the message of a round in which no candidate was accepted: how many fell to what, and the remedy."""
    counts, remedies = Counter(verdicts), []
    parts = [f"{counts['rejected']} rejected by {acceptance!r}"] if counts["rejected"] else []
    rewards = [reward for reward in table.columns["reward"] if reward is not None]
    if rewards and counts["rejected"]:
        parts[-1] += f" (rewards {min(rewards):.4g} to {max(rewards):.4g})"
        remedies.append("loosen the rule, raise `num_candidates` or `max_attempts`, or use TopKPerPrompt")
    if counts["filtered"]:
        columns = store.columns(["rule", "verdict"])
        filtered = Counter(rule for rule, verdict in zip(*columns.values(), strict=True) if verdict == "filtered")
        parts.append(
            f"{counts['filtered']} filtered out ({', '.join(f'{n} by {rule}' for rule, n in filtered.items())})"
        )
        if any("Truncated" in rule for rule in filtered):
            remedies.append("raise `max_new_tokens`, or check that the model writes its `eos_token_id`")
    if counts["unjudged"]:
        parts.append(f"{counts['unjudged']} that no reward function could judge (all returned None)")
        remedies.append("look at the reward functions' inputs")
    if counts["duplicate"]:
        parts.append(f"{counts['duplicate']} duplicates")
    remedies.append('or set on_nothing_accepted="best", "reference" or "skip"')
    return (
        f"No candidate was accepted in {store.directory.name}: of {len(verdicts)}, {', '.join(parts)}. "
        f"Remedies: {'; '.join(remedies)}. The candidates are kept in {store.directory}, and can be judged again "
        "without being generated again."
    )
