"""Commands to a voice assistant from a grammar: words, slots as BIO tags, and the intent."""

import random
from typing import Any

PEOPLE = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hugo", "ida", "jonas")
CITIES = ("london", "paris", "new york", "rome", "san francisco", "oslo", "cape town", "madrid")
TIMES = ("seven", "half past nine", "noon", "tomorrow evening", "monday morning", "six thirty", "midnight")
GENRES = ("jazz", "folk songs", "classical music", "rock", "piano music", "salsa")
ITEMS = ("milk", "green apples", "bread", "olive oil", "coffee", "washing powder", "eggs")
LISTS = ("shopping list", "camping list", "party list")
SLOTS = {
    "artist": PEOPLE,
    "contact": PEOPLE,
    "city": CITIES,
    "time": TIMES,
    "genre": GENRES,
    "item": ITEMS,
    "list": LISTS,
}
PATTERNS = {
    "play_music": ("play some {genre}", "i want to hear {genre} by {artist}", "put on a song of {artist}"),
    "set_alarm": ("wake me at {time}", "set an alarm for {time}", "alarm at {time} please"),
    "get_weather": ("what is the weather in {city}", "will it rain in {city} {time}", "how warm is it in {city}"),
    "call": ("call {contact}", "ring {contact} at {time}", "i want to talk to {contact}"),
    "add_to_list": ("add {item} to my {list}", "put {item} on the {list}", "we need {item}"),
}
OPENINGS = ("", "", "please", "hey", "could you", "now")


def make_commands(num_train: int, num_test: int) -> dict[str, list[dict[str, Any]]]:
    """Returns distinct commands, equal at every call: `text`, `tokens`, `tags`, `intent`, in the splits train and test.

    "call" has a fifth of the others' share: a rare intent.
    """
    rng, seen = random.Random(0), dict[str, dict[str, Any]]()
    intents = [name for name in PATTERNS for _ in range(1 if name == "call" else 5)]
    while len(seen) < num_train + num_test:
        row = _command(rng, rng.choice(intents))
        seen.setdefault(row["text"], row)
    rows = list(seen.values())
    return {"train": rows[:num_train], "test": rows[num_train:]}


def _command(rng: random.Random, intent: str) -> dict[str, Any]:
    tokens, tags = list[str](), list[str]()
    for word in f"{rng.choice(OPENINGS)} {rng.choice(PATTERNS[intent])}".split():
        if word.startswith("{"):
            name = word.strip("{}")
            value = rng.choice(SLOTS[name]).split()
            tokens += value
            tags += [f"B-{name}", *[f"I-{name}"] * (len(value) - 1)]
        else:
            tokens.append(word)
            tags.append("O")
    return {"text": " ".join(tokens), "tokens": tokens, "tags": tags, "intent": intent}
