import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from server.api.config import ServerConfig
from server.core.request import RequestOutput
from server.engine.engine import Engine
from tests.support.serving import DEADLINE_S, complete, running_server, wait_until

pytestmark = pytest.mark.slow

LONG = {"ignore_eos": True}
ROOT = Path(__file__).parents[2]


def test_draining_lets_running_streams_end_and_admits_no_others(
    engine_factory: Callable[..., Engine],
) -> None:
    config = ServerConfig(port=0, drain_s=DEADLINE_S, log_level="warning")
    with (
        running_server(engine_factory(), config=config) as server,
        server.openai() as client,
        server.http() as http,
    ):
        asked = {"model": server.model, "prompt": "a", "extra_body": LONG}
        stream = complete(client, **asked, max_tokens=400, stream=True)
        first = next(stream)
        server.begin_stop()
        wait_until(lambda: not server.engine.is_ready)
        assert http.get("/ready").status_code == 503
        assert http.get("/health").status_code == 200
        with pytest.raises(openai.InternalServerError) as caught:
            complete(client, **asked)
        assert caught.value.status_code == 503
        assert caught.value.code == "engine_stopped"
        chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        server.thread.join(DEADLINE_S)
        assert not server.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


@pytest.mark.parametrize("second_signal", [True, False])
def test_a_second_signal_or_the_end_of_the_time_ends_streams_with_an_error(
    engine_factory: Callable[..., Engine], second_signal: bool
) -> None:
    drain_s = DEADLINE_S if second_signal else 0.2
    config = ServerConfig(port=0, drain_s=drain_s, log_level="error")
    with (
        running_server(engine_factory(), config=config) as server,
        server.openai() as client,
    ):
        stream = complete(
            client,
            model=server.model,
            prompt="a",
            extra_body=LONG,
            max_tokens=1900,
            stream=True,
        )
        next(stream)
        started_s = time.monotonic()
        server.begin_stop()
        if second_signal:
            server.begin_stop()
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
        server.thread.join(DEADLINE_S)
        assert time.monotonic() - started_s < 20


def test_an_engine_that_fails_ends_its_streams_and_is_reported_as_unhealthy(
    engine_factory: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_factory()
    config = ServerConfig(port=0, log_level="error")
    with (
        running_server(engine, config=config) as server,
        server.openai() as client,
        server.http() as http,
    ):

        def fail() -> list[RequestOutput]:
            raise RuntimeError("secret")

        asked = {"model": server.model, "prompt": "a", "extra_body": LONG, "max_tokens": 1900}
        stream = complete(client, **asked, stream=True)
        next(stream)
        monkeypatch.setattr(engine, "step", fail)
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            complete(client, **asked)
        assert caught.value.status_code == 503
        assert "secret" not in str(caught.value)
        assert http.get("/health").status_code == 503
        assert http.get("/ready").status_code == 503


@contextmanager
def serving_process(
    model_dir: Path, log: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`euryale serve` in a process of its own, ready, with its address; it logs to a file."""
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(model_dir)]
    command += ["--heads", "none", "--num-threads", "1", "--num-blocks", "256"]
    environment = {**os.environ, "EURYALE_PORT": "0", "EURYALE_SERVED_MODEL_NAME": "tiny"}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *options], cwd=ROOT, env=environment, stderr=stderr, text=True
        )
    try:
        wait_until(lambda: process.poll() is not None or _answers(_address(log)))
        assert process.poll() is None, log.read_text()
        yield process, _address(log)
    finally:
        process.kill()
        process.wait()


def _address(log: Path) -> str:
    found = re.search(r"serving \S+ on (http://127\.0\.0\.1:\d+)", log.read_text())
    return "" if found is None else found[1]


def _answers(url: str) -> bool:
    try:
        return bool(url) and httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_a_process_drains_at_sigterm_and_ends_cleanly(model_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving_process(model_dir, log) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client:
            stream = complete(
                client, model="tiny", prompt="a", extra_body=LONG, max_tokens=300, stream=True
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        process.wait(DEADLINE_S)
    assert process.returncode == 0
    assert "draining" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_process_stops_at_once_at_the_second_signal(model_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving_process(model_dir, log, "--drain-s", "60") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client:
            stream = complete(
                client, model="tiny", prompt="a", extra_body=LONG, max_tokens=1900, stream=True
            )
            next(stream)
            started_s = time.monotonic()
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="stopping"):
                list(stream)
        process.wait(DEADLINE_S)
    assert process.returncode == 0
    assert time.monotonic() - started_s < 30
    assert "Traceback" not in log.read_text()
