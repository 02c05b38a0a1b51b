"""Engines in a trainer's rounds: whose answers are evaluated, what is never mixed, what is refused beforehand."""

import pytest
import torch
import transformers as hf

import generators as g
from completions_server import NAME, CompletionsServer
from generative_runs import resampler, round_dir, stored, trained, trainer
from rsft_hf.engines.endpoint.engine import EndpointEngine
from rsft_hf.engines.endpoint.weight_sync import SaveAndReload
from rsft_hf.engines.vllm import VLLMEngine
from rsft_hf.generative.generation import completion_log_probabilities

pytest.importorskip("openai", reason="the extra `endpoint` is not installed")


@pytest.fixture
def server():
    """A teacher: the student is `tiny_model()`."""
    server = CompletionsServer(g.tiny_model(seed=3))
    yield server
    server.stop()


def engine(server, **keywords) -> EndpointEngine:
    return EndpointEngine(server.base_url, NAME, **{"timeout_seconds": 20, "max_retries": 0, **keywords})


def following(server, folder, **keywords) -> EndpointEngine:
    return engine(server, weights=SaveAndReload.sglang(server.base_url, folder), **keywords)


def greedy_texts(model, dataset) -> list[str]:
    ids = [g.tokenizer()(text)["input_ids"] for text in dataset["prompt"]]
    found = g.generated(model, g.complete(model, is_greedy=True), ids)
    return [g.tokenizer().decode(one.token_ids, skip_special_tokens=True) for one in found]


def test_a_teachers_student_is_evaluated_itself(server, tmp_path):
    texts, held_out = [], g.prompts(6, first=82)

    def keep(prediction):
        texts.append(prediction.predictions)
        return {}

    ours = trainer(tmp_path, resampler(engine=engine(server)), compute_metrics=keep, args={"learning_rate": 1e-2})
    ours.train()
    num_asked = len(server.bodies)
    ours.evaluate(held_out)
    assert texts == [greedy_texts(ours.model, held_out)]
    assert texts[0] != greedy_texts(server.models[NAME], held_out)
    assert num_asked == len(server.bodies) == 9


def test_a_server_that_follows_is_asked_when_the_policy_is_evaluated(server, tmp_path):
    ours = trained(tmp_path / "run", resampler(engine=following(server, tmp_path / "weights")))
    num_asked = len(server.bodies)
    ours.evaluate(g.prompts(6, first=82))
    assert len(server.bodies) == num_asked + 6
    assert len(server.updates) == 2


def test_candidates_of_two_teachers_are_never_mixed(server, tmp_path):
    other = CompletionsServer(g.tiny_model(seed=7))
    try:
        trained(tmp_path, resampler(engine=engine(server, revision="first")))
        trained(tmp_path, resampler(engine=engine(other, revision="first")))
        assert other.bodies == []  # the same teacher at another address
        first = stored(tmp_path)
        trained(tmp_path, resampler(engine=engine(other, revision="second")))
    finally:
        other.stop()
    assert len(other.bodies) == 9
    assert (tmp_path / "candidates" / "replaced").is_dir()
    assert [row["token_ids"] for row in stored(tmp_path)] != [row["token_ids"] for row in first]


def test_facts_name_what_a_teachers_candidates_depend_on_and_no_address():
    options = {"options": {"priority": (1, 2)}, "revision": "abc"}
    teacher = EndpointEngine("http://host:1/v1", NAME, api_key="sesame", **options)
    own = {"model": NAME, "dialect": "vllm", "revision": "abc"}
    same = {"logprobs_mode": "raw", "options": {"priority": [1, 2]}}
    assert teacher.facts() == same | own
    follower = EndpointEngine("http://host:1/v1", NAME, weights=lambda model: None, **options)
    assert follower.facts() == same  # the model's own digest says whose candidates they are


def test_log_p_of_a_teacher_is_refused_before_anything_is_asked(server, tmp_path):
    """With a temperature the server says log q alone, and the model here is another."""
    server.logprobs_mode = "processed"
    options = {"generation_config": g.sampling(8, temperature=0.7), "keep_log_probs": True}
    teacher = engine(server, logprobs_mode="processed")
    with pytest.raises(ValueError, match=r"log p.*temperature in force.*as `reference_model`"):
        trained(tmp_path / "refused", resampler(engine=teacher, **options))
    with pytest.raises(ValueError, match=r"as `reference_model`"):
        resampler(engine=teacher, **options).generate(g.tiny_model(), g.tokenizer(), g.prompts(2))
    with pytest.raises(ValueError, match=r"temperature in force.*logprobs_mode=.processed"):
        trained(tmp_path / "raw", resampler(engine=engine(server), **options))
    assert server.bodies == []
    student = g.tiny_model().eval()
    named = resampler(engine=teacher, reference_model=student, **options)
    ours = trained(tmp_path / "named", named)
    candidates = g.stored(ours)
    ids = [g.tokenizer()(one.prompt)["input_ids"] for one in candidates]
    with torch.no_grad():
        expected = completion_log_probabilities(
            student, ours.resampler._bound().policy.encoder, ids, [one.token_ids for one in candidates]
        )
    assert [one.log_p for one in candidates] == pytest.approx(expected.tolist(), abs=1e-4)


REFUSED_WHEN_EVALUATING = [
    ("endpoint", {"num_beams": 2}, "num_beams=2, which a completions server cannot be asked for"),
    ("endpoint", {"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
    ("continuous", {"num_beams": 2}, "generate_batch cannot sample with num_beams=2"),
    ("continuous", {"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
    (VLLMEngine(), {"num_beams": 2}, "vLLM cannot sample with num_beams=2"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED_WHEN_EVALUATING, ids=str)
def test_what_cannot_be_evaluated_is_said_before_the_first_round(server, tmp_path, name, settings, message):
    chosen = following(server, tmp_path / "weights") if name == "endpoint" else name
    made = resampler(engine=chosen, eval_generation_config=hf.GenerationConfig(**settings))
    ours = trainer(tmp_path / "run", made, eval_dataset=g.prompts(3, first=82), args={"eval_strategy": "epoch"})
    with pytest.raises(ValueError, match=message):
        ours.train()
    assert server.updates == server.bodies == []
    assert not round_dir(tmp_path / "run").exists()


def test_a_teachers_student_may_be_evaluated_as_no_server_could(server, tmp_path):
    made = resampler(engine=engine(server), eval_generation_config=hf.GenerationConfig(num_beams=2))
    settings = {"eval_dataset": g.prompts(3, first=82), "args": {"eval_strategy": "epoch"}}
    assert "eval_reward" in trained(tmp_path, made, **settings).state.log_history[-2]


def test_an_embedding_padded_beyond_the_tokenizer_is_no_other_tokenizer(server, tmp_path):
    model = g.tiny_model(vocab_size=len(g.WORDS) + 11)
    server.models[NAME] = g.tiny_model(vocab_size=len(g.WORDS) + 11).eval()
    trained(tmp_path, resampler(engine=engine(server)), model=model)
    assert max(token for row in stored(tmp_path) for token in row["token_ids"]) >= len(g.WORDS)


class Dying:
    """A reward that fails at one of its calls."""

    __name__ = "dying"

    def __init__(self, last_call: int) -> None:
        self.calls_left = last_call

    def __call__(self, completions, **_) -> list[float]:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise OSError("no space left")
        return [float(len(answer)) for answer in completions]

    def __repr__(self) -> str:
        return "Dying()"


@pytest.mark.parametrize(("last_call", "is_whole"), [(5, True), (4, False)])
def test_a_round_that_is_generated_goes_on_without_a_server(server, tmp_path, last_call, is_whole):
    """Of five shards all, or all but one, are on disk when the fifth, or the fourth, is scored."""
    with pytest.raises(RuntimeError, match="no space left"):
        trained(tmp_path / "run", resampler(Dying(last_call), engine=following(server, tmp_path / "weights")))
    assert len(list(round_dir(tmp_path / "run").glob("*.parquet"))) == last_call
    absent = EndpointEngine(
        "http://127.0.0.1:9/v1", NAME, weights=SaveAndReload.sglang("http://127.0.0.1:9", tmp_path / "weights")
    )
    again = resampler(Dying(0), engine=absent)
    if is_whole:
        assert trained(tmp_path / "run", again).state.global_step > 0
        assert len(stored(tmp_path / "run")) == 36
    else:
        with pytest.raises(RuntimeError, match=r"did not take over the weights: http://127.0.0.1:9.*refused"):
            trained(tmp_path / "run", again)
