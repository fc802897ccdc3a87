"""What evaluation harnesses ask over `/v1/completions`, answered by a real engine on a tiny model.

The bodies are those that lm-eval 0.4.13 sends for `local-completions`, byte for byte; what they
come to is held against the model as transformers runs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import torch
from tests.e2e.service import Service
from tests.unit.serve.tiny_chat import END, load_reference, write_tiny_chat

from outcrop.identity.api_keys import load_or_make_api_key
from outcrop.models.describe import add_model
from outcrop.models.tokenizer import Tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TINY = "mylab.tiny-v1:0"
CONTEXT = 1024
CLOSE = 0.05
"""Nats a token by which 16-bit weights may differ from 32-bit ones. A wrong place differs by many
times that: a random model gives the texts below 5 to 8 nats a token."""

OF_TOKENS = (
    b'{"model": "mylab.tiny-v1:0", "prompt": [[51, 257, 220, 81, 78, 66, 74, 220, 72, 82, 220, 220,'
    b" 256, 68, 220, 78, 256, 68, 81, 220, 78, 77, 68], [51, 257, 77, 220, 256, 68, 88, 220, 220,"
    b' 86, 68, 77, 83, 220, 256, 68, 81, 68]], "temperature": 0, "max_tokens": 1, "logprobs": 1,'
    b' "seed": 1234, "echo": true}'
)
"""Log-likelihoods of " the other one" after "The rock is " and of " went there" after "Then they ".
Source: a task of the kind multiple_choice, batch_size=2, tokenizer_backend=huggingface."""
OF_TEXTS = (
    b'{"model": "mylab.tiny-v1:0", "prompt": ["The rock is  caf\\u00e9", "The rock is  hard"],'
    b' "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true}'
)
"""The same with tokenized_requests=False."""
ROLLING = (
    b'{"model": "mylab.tiny-v1:0", "prompt": [[259, 51, 257, 220, 81, 78, 66, 74, 220, 72, 82, 220,'
    b' 220, 71, 64, 81, 67]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,'
    b' "echo": true}'
)
"""A task of the kind loglikelihood_rolling: all of a text, after the end token."""
GENERATE = (
    b'{"prompt": [[51, 257, 220, 81, 78, 66, 74, 220, 72, 82], [51, 257, 77, 220, 256, 68, 88]],'
    b' "model": "mylab.tiny-v1:0", "max_tokens": 12, "temperature": 0, "stop": ["\\n",'
    b' "<|im_end|>"], "seed": 1234}'
)
"""A task of the kind generate_until."""


@dataclass(frozen=True)
class Place:
    """A service with a tiny model, and that model as transformers runs it."""

    service: Service
    key: str
    model: Any
    tokenizer: Tokenizer

    def post(self, body: bytes) -> dict[str, Any]:
        with httpx.Client(trust_env=False, timeout=120) as http:
            answer = http.post(
                f"{self.service.url}/v1/completions",
                content=body,
                headers={"authorization": f"Bearer {self.key}", "content-type": "application/json"},
            )
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def scores_TV(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities of what follows each token."""
        with torch.no_grad():
            logits_TV = self.model(input_ids=torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits_TV.float(), -1)

    def likelihood(self, ids: list[int], num_given: int) -> float:
        """The log-probability of the tokens after the first `num_given`."""
        scores_TV = self.scores_TV(ids)
        return sum(float(scores_TV[at - 1, ids[at]]) for at in range(num_given, len(ids)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("harness")
    folder = write_tiny_chat(root / "tiny", max_position_embeddings=CONTEXT)
    running = Service(root / "data", OUTCROP_JOB_SLOTS="1")
    add_model(running.settings, folder, TINY, license="none", family="llama")
    running.start()
    key = load_or_make_api_key(running.settings).key
    yield Place(running, key, load_reference(folder), Tokenizer(folder))
    running.stop()


@pytest.fixture
def client(place: Place) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=place.key, base_url=f"{place.service.url}/v1") as made:
        yield made


def _as_lm_eval_reads(choice: dict[str, Any], num_given: int) -> tuple[float, bool]:
    """The sum over a continuation and whether it is the greedy one; the one token that was drawn
    stands last and is left out."""
    told = choice["logprobs"]
    own = told["token_logprobs"][num_given:-1]
    likeliest = told["top_logprobs"][num_given:-1]
    return sum(own), all(
        mine == max(top.values()) for mine, top in zip(own, likeliest, strict=True)
    )


def test_the_log_likelihoods_that_lm_eval_asks_for_are_the_models_own(place: Place) -> None:
    answer = place.post(OF_TOKENS)
    prompts = json.loads(OF_TOKENS)["prompt"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice, ids, num_given in zip(answer["choices"], prompts, (10, 7), strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
        found, greedy = _as_lm_eval_reads(choice, num_given)
        num_tokens = len(ids) - num_given
        assert found == pytest.approx(place.likelihood(ids, num_given), abs=CLOSE * num_tokens)
        assert not greedy
        text = place.tokenizer.decode(ids)
        assert choice["text"].startswith(text)
        starts = choice["logprobs"]["text_offset"]
        assert text[starts[num_given] :] == place.tokenizer.decode(ids[num_given:])


def test_texts_have_the_log_likelihoods_of_their_tokens(place: Place) -> None:
    answer = place.post(OF_TEXTS)
    num_given = len(place.tokenizer.encode("The rock is"))
    for choice, text in zip(answer["choices"], json.loads(OF_TEXTS)["prompt"], strict=True):
        ids = place.tokenizer.encode(text)
        found, _ = _as_lm_eval_reads(choice, num_given)
        expected = place.likelihood(ids, num_given)
        assert found == pytest.approx(expected, abs=CLOSE * (len(ids) - num_given))
        assert choice["text"].startswith(text)


def test_a_whole_text_is_scored_after_the_end_token(place: Place) -> None:
    (ids,) = json.loads(ROLLING)["prompt"]
    assert ids[0] == place.tokenizer.token_id(END)
    (choice,) = place.post(ROLLING)["choices"]
    found, _ = _as_lm_eval_reads(choice, 1)
    assert found == pytest.approx(place.likelihood(ids, 1), abs=CLOSE * len(ids))


def test_a_model_that_would_end_at_once_has_the_same_log_likelihood(place: Place) -> None:
    end = place.tokenizer.token_id(END)
    assert end is not None
    prompts = torch.randint(0, 250, (4000, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last_BV = place.model(input_ids=prompts).logits[:, -1].float()
    own_B = last_BV[:, end].clone()
    last_BV[:, end] = -torch.inf
    ids = prompts[int((own_B - last_BV.max(-1).values).argmax())].tolist()
    body = {**json.loads(OF_TOKENS), "prompt": [ids]}
    (choice,) = place.post(json.dumps(body).encode())["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["token_logprobs"][-1] is None
    found, _ = _as_lm_eval_reads(choice, 2)
    assert found == pytest.approx(place.likelihood(ids, 2), abs=CLOSE * 2)


def test_what_lm_eval_has_generated_is_scored_as_greedy(place: Place) -> None:
    answer = place.post(GENERATE)
    asked = json.loads(GENERATE)
    for choice, ids in zip(answer["choices"], asked["prompt"], strict=True):
        assert choice["logprobs"] is None
        assert not choice["text"].startswith(place.tokenizer.decode(ids))
        body = {**json.loads(OF_TOKENS), "prompt": [ids], "max_tokens": 12, "stop": asked["stop"]}
        (scored,) = place.post(json.dumps(body).encode())["choices"]
        assert scored["text"] == place.tokenizer.decode(ids) + choice["text"]
        _, greedy = _as_lm_eval_reads(scored, len(ids))
        assert greedy


def test_openais_client_gets_the_log_probabilities_of_a_prompt_alone(
    place: Place, client: openai.OpenAI
) -> None:
    text = "The café is open."
    answer = client.completions.create(model=TINY, prompt=text, echo=True, logprobs=5, max_tokens=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (text, "length")
    assert choice.logprobs is not None
    ids = place.tokenizer.encode(text)
    told = choice.logprobs
    assert told.tokens is not None
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    assert told.text_offset is not None
    assert len(told.tokens) == len(ids)
    assert sum(told.token_logprobs[1:]) == pytest.approx(
        place.likelihood(ids, 1), abs=CLOSE * len(ids)
    )
    scores_TV = place.scores_TV(ids)
    for at, likeliest in enumerate(told.top_logprobs[1:]):
        assert max(likeliest.values()) == pytest.approx(float(scores_TV[at].max()), abs=5 * CLOSE)
    assert text[told.text_offset[told.tokens.index("p")] :] == "pen."
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)


def test_openais_client_gets_the_likeliest_tokens_of_a_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": TINY, "messages": [{"role": "user", "content": "Hi"}]}
    asked |= {"max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content
    for token in content:
        assert len(token.top_logprobs) == 20
        assert (token.token, token.logprob) == (
            token.top_logprobs[0].token,
            token.top_logprobs[0].logprob,
        )
    with client.chat.completions.create(**asked, stream=True) as stream:
        *_, last = list(stream)
    assert last.choices[0].logprobs is not None
    assert last.choices[0].logprobs.model_dump() == answer.choices[0].logprobs.model_dump()


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([1, 262], "the token 262; the model knows those from 0 to 261"),
        ([[3], [2**31 - 1]], "the token 2147483647"),
        ([1] * CONTEXT, f"{CONTEXT} tokens"),
        ("x" * 1_000_000, "1,000,000 characters"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_the_model_cannot_take_is_refused(
    client: openai.OpenAI, prompt: Any, text: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=text) as refused:
        client.completions.create(model=TINY, prompt=prompt, echo=True, logprobs=1, stream=stream)
    assert refused.value.type == "invalid_request_error"
