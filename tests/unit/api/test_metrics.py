"""`/metrics`: what Prometheus can read, the figures of a real engine, and who may see them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from starlette.requests import Request
from starlette.responses import Response
from tests.unit.serve.tiny_chat import stream, write_tiny_chat

from outcrop.api import metrics
from outcrop.api.context import Services
from outcrop.data.records import Message
from outcrop.errors import ServingError
from outcrop.identity.api_keys import load_or_make_api_key, put_api_key
from outcrop.identity.credentials import Credentials
from outcrop.models.catalog import shipped_models
from outcrop.serve.client import ModelClient
from outcrop.serve.engine import BatchEngine
from outcrop.serve.histogram import Histogram
from outcrop.serve.request import GenerationRequest, Owner, SamplingParams
from outcrop.settings import Settings
from outcrop.store import servers
from outcrop.store.database import transaction

WEIGHTS = shipped_models()[0].weights
SECRET = "account and model"
SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\]|\\.)*",?)*)\})? (\S+)')


def asked(
    services: Services, *, host: str = "127.0.0.1", method: str = "GET", key: str = ""
) -> Response:
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"type": "http", "method": method, "headers": headers, "client": (host, 1)}

    async def answer() -> Response:
        return await metrics.metrics_page(Request(scope), services)

    return anyio.run(answer)


def read(text: str) -> dict[str, dict[str, float]]:
    """Name of a sample -> its labels as they stand -> value; refuses what Prometheus would."""
    kinds: dict[str, str] = {}
    found: dict[str, dict[str, float]] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# "):
            what, name, rest = line[2:].split(" ", 2)
            assert what in ("HELP", "TYPE")
            if what == "TYPE":
                assert name not in kinds, "a family stands in one piece"
                kinds[name] = rest
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        name, labels, value = match[1], match[2] or "", float(match[3])
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        assert family in kinds or name in kinds, f"{name} before its TYPE"
        assert labels not in found.setdefault(name, {}), f"{line} stands twice"
        found[name][labels] = value
    return found


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a model server tells after three answers, two of which begin alike."""
    folder = write_tiny_chat(tmp_path_factory.mktemp("model"), ends=False)
    engine = BatchEngine(folder, threads=1, dtype=torch.float32)
    for text in ("Hello there, you", "Hello there, me", "Bye"):
        sampling = SamplingParams(temperature=0, max_tokens=5)
        owner = Owner(SECRET, SECRET, "t1" if text == "Bye" else None, 1)
        request = GenerationRequest((Message("user", text),), sampling, owner=owner)
        list(stream(engine, request))
    stats = dataclasses.asdict(engine.stats())
    engine.close()
    return {**stats, "weights": WEIGHTS, "uptime_seconds": 3.5, "max_memory_bytes": 1000}


@pytest.fixture
def served(
    services: Services, figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Services:
    """Services with one model server that is ready and tells these figures."""

    async def stats(client: ModelClient) -> dict[str, Any]:
        return figures

    with transaction(services.engine) as connection:
        servers.want(connection, WEIGHTS)
        servers.mark_starting(connection, WEIGHTS, "/nowhere")
        servers.mark_ready(connection, WEIGHTS, 1)
    monkeypatch.setattr(ModelClient, "stats", stats)
    return services


def test_every_figure_of_a_model_server_is_told_in_prometheus_form(
    served: Services, figures: dict[str, Any]
) -> None:
    response = asked(served)
    assert response.status_code == 200
    assert response.headers["content-type"] == metrics.CONTENT_TYPE
    found = read(bytes(response.body).decode())
    labels = f'weights="{WEIGHTS}"'
    assert found["outcrop_model_server_up"] == {labels: 1}
    for name, (kind, own_name, _) in metrics.SERVER_FIGURES.items():
        assert found[name] == {labels: figures[own_name]}
        assert name.endswith("_total") == (kind == "counter")
    assert found["outcrop_generation_tokens_total"] == {labels: 15}
    assert found["outcrop_requests_total"] == {labels: 3}


def test_classes_are_told_apart_and_neither_accounts_nor_models_are_named(
    served: Services, figures: dict[str, Any]
) -> None:
    text = bytes(asked(served).body).decode()
    found = read(text)
    tokens = found["outcrop_class_tokens_total"]
    names = ("provisioned", "on_demand", "batch")
    labels = {name: f'weights="{WEIGHTS}",class="{name}"' for name in names}
    assert set(tokens) == set(labels.values())
    assert sum(tokens.values()) == figures["input_tokens"] + figures["output_tokens"]
    assert 5 < tokens[labels["provisioned"]] < tokens[labels["on_demand"]]
    assert set(found["outcrop_class_throttled_total"].values()) == {0}
    (used,) = found["outcrop_reservation_used"].items()
    assert used[0] == f'weights="{WEIGHTS}",throughput="t1"'
    assert 0 <= used[1] < 0.1
    assert SECRET not in text


def test_histograms_are_cumulative_and_count_every_token(served: Services) -> None:
    found = read(bytes(asked(served).body).decode())
    labels = f'weights="{WEIGHTS}"'
    wanted = {
        "outcrop_time_to_first_token_seconds": 3,
        "outcrop_time_per_output_token_seconds": 12,
        "outcrop_pass_tokens": 15,
    }
    for name, count in wanted.items():
        buckets = list(found[f"{name}_bucket"].values())
        assert buckets == sorted(buckets)
        assert buckets[-1] == count == found[f"{name}_count"][labels]
        assert list(found[f"{name}_bucket"])[-1] == f'{labels},le="+Inf"'
        assert found[f"{name}_sum"][labels] > 0


def test_a_value_at_a_bound_is_below_it() -> None:
    histogram = Histogram((1, 2, 4))
    for value in (0.5, 1, 1.5, 4, 5):
        histogram.add(value)
    assert histogram.counts().counts == (2, 1, 1, 1)
    assert histogram.counts().total == 12


def test_a_model_server_that_does_not_answer_is_not_up(
    served: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(client: ModelClient) -> dict[str, Any]:
        raise ServingError("nobody listens")

    async def be_silent(client: ModelClient) -> dict[str, Any]:
        await anyio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(metrics, "ANSWER_SECONDS", 0.05)
    for stats in (refuse, be_silent):
        monkeypatch.setattr(ModelClient, "stats", stats)
        found = read(bytes(asked(served).body).decode())
        assert found["outcrop_model_server_up"] == {f'weights="{WEIGHTS}"': 0}
        assert "outcrop_passes_total" not in found


def test_without_a_model_server_the_page_is_whole(services: Services) -> None:
    assert "outcrop_jobs" not in read(bytes(asked(services).body).decode())


def test_elsewhere_than_on_loopback_a_key_is_needed(
    services: Services, settings: Settings, owner: Credentials
) -> None:
    key = load_or_make_api_key(settings)
    with transaction(services.engine) as connection:
        put_api_key(connection, key)
    for host in ("203.0.113.9", "", "not an address"):
        assert asked(services, host=host).status_code == 401
        assert asked(services, host=host, key="wrong").status_code == 401
        assert asked(services, host=host, key=key.key).status_code == 200
    for host in ("127.0.0.1", "127.9.9.9", "::1"):
        assert asked(services, host=host).status_code == 200


def test_another_method_is_refused(services: Services) -> None:
    assert asked(services, method="POST").status_code == 405


@pytest.mark.parametrize("odd", ['a"b', "a\\b", "a\nb"])
def test_odd_characters_in_a_label_are_escaped(odd: str) -> None:
    (sample,) = [f"name{metrics._labels(weights=odd)} 1"]
    assert SAMPLE.fullmatch(sample)
    assert "\n" not in sample


def test_every_figure_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = {
        *metrics.SERVER_FIGURES,
        *metrics.SERVER_HISTOGRAMS,
        *metrics.CLASS_FIGURES,
        metrics.UP[0],
        metrics.JOBS[0],
        metrics.RESERVATION[0],
        metrics.DELIVERIES[0],
        metrics.SPOOL[0],
    }
    assert set(re.findall(r"`(outcrop_[a-z_]+)`", text)) == names
