"""Requests to a completions server shared by the tests of the endpoint engine."""

import generators as g
from completions_server import NAME
from rsft_hf.engines.base import GenerationRequest
from rsft_hf.engines.endpoint.engine import EndpointEngine
from rsft_hf.engines.random_streams import candidate_seed

MODEL, IDS = g.tiny_model().eval(), g.prompt_ids(5)


VOUCHED = {"weights": lambda model: None}  # the server holds the weights of the model


def engine(server, **keywords) -> EndpointEngine:
    defaults = {"timeout_seconds": 20, "max_retries": 2, "backoff_seconds": 0.01}
    made = EndpointEngine(server.base_url, NAME, **{**defaults, **keywords})
    if made.weights is not None:
        made.sync_weights(MODEL, is_main_process=True)
    return made


def request(
    num_candidates=3, ids=IDS, with_log_probs=False, is_greedy=False, more=None, **settings
) -> GenerationRequest:
    seeds = [[candidate_seed(0, 0, number, 0, index) for index in range(num_candidates)] for number in range(len(ids))]
    config = g.complete(MODEL, is_greedy, **settings)
    return GenerationRequest(ids, seeds, config, with_log_probs, g.tokenizer(), **(more or {}))


def run(engine, asked) -> dict:
    """Sequences by prompt and candidate; none comes twice."""
    found = list(engine(MODEL, asked))
    by_place = {(one.prompt, one.index): one for one in found}
    assert len(by_place) == len(found)
    return by_place


def tokens(found) -> dict:
    return {place: (one.token_ids, one.finish_reason) for place, one in found.items()}


def whole(asked) -> set:
    return {(prompt, index) for prompt in range(len(asked.prompts)) for index in range(asked.num_candidates)}
