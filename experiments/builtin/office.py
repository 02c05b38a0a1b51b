"""Small texts from grammars about an office: questions on facts, sums in steps, and meetings with their minutes."""

import random
from typing import Any

PEOPLE = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hugo")
ROOMS = ("the blue room", "the red room", "the hall", "the kitchen", "the library", "the old office")
THINGS = ("the printer", "the lamp", "the projector", "the coffee machine", "the big table", "the safe")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday")
TOPICS = ("the budget", "the new office", "the summer party", "the website", "the training", "the move")


def make_facts(num_train: int, num_test: int) -> dict[str, list[dict[str, Any]]]:
    """Returns questions in the format of SQuAD: `context`, `question`, `answers` with `text` and `answer_start`."""
    rng = random.Random(0)
    rows = [_facts(rng) for _ in range(num_train + num_test)]
    return {"train": rows[:num_train], "test": rows[num_train:]}


def _facts(rng: random.Random) -> dict[str, Any]:
    things, rooms, people = rng.sample(THINGS, 3), rng.sample(ROOMS, 3), rng.sample(PEOPLE, 3)
    facts = [f"{t} stands in {r} and belongs to {p} ." for t, r, p in zip(things, rooms, people, strict=True)]
    context, number = " ".join(facts), rng.randrange(3)
    question, answer = rng.choice(
        [(f"where does {things[number]} stand ?", rooms[number]), (f"whose is {things[number]} ?", people[number])]
    )
    start = context.index(facts[number]) + facts[number].rindex(answer)
    return {"context": context, "question": question, "answers": {"text": [answer], "answer_start": [start]}}


def make_sums(num_train: int, num_test: int) -> dict[str, list[dict[str, str]]]:
    """Returns questions with solutions in the format of GSM8K: a line per step, its equation in << >>, then ####."""
    rng, seen = random.Random(0), dict[str, str]()
    while len(seen) < num_train + num_test:
        person, (a, b, c) = rng.choice(PEOPLE), (rng.randint(2, 9) for _ in range(3))
        question = f"{person} has {a} pens , gets {b} more and gives {c} away . how many are left ?"
        total = a + b
        if c <= total:
            steps = f"{person} has {a} + {b} = <<{a}+{b}={total}>> {total} pens ."
            left = f"then {total} - {c} = <<{total}-{c}={total - c}>> {total - c} are left ."
            seen[question] = f"{steps}\n{left}\n#### {total - c}"
    rows = [{"question": question, "answer": answer} for question, answer in seen.items()]
    return {"train": rows[:num_train], "test": rows[num_train:]}


def make_meetings(num_train: int, num_test: int) -> dict[str, list[dict[str, str]]]:
    """Returns dialogues with a summary: who does what until when."""
    rng, seen = random.Random(0), dict[str, str]()
    while len(seen) < num_train + num_test:
        (first, second), topic, day = rng.sample(PEOPLE, 2), rng.choice(TOPICS), rng.choice(DAYS)
        ask = rng.choice((f"can you take care of {topic} ?", f"who looks after {topic} ?", f"what about {topic} ?"))
        answer = rng.choice(("sure .", "of course .", "i can do that .", "fine ."))
        when = rng.choice((f"until {day} ?", f"is {day} possible ?", f"by {day} , please ."))
        seen[f"{first} : {ask} {second} : {answer} {first} : {when} {second} : yes ."] = (
            f"{second} takes care of {topic} until {day} ."
        )
    rows = [{"dialogue": dialogue, "summary": summary} for dialogue, summary in seen.items()]
    return {"train": rows[:num_train], "test": rows[num_train:]}
