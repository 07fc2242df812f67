"""The toys of `docs/extending.md` are registered as the page says, and an engine runs with them."""

import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from server.cache import CACHE_VARIABLE
from server.config import EngineConfig, SpeculationParams
from server.core.completion import Completion
from server.core.request import Request
from server.engine.engine import Engine
from server.executor import EXECUTORS
from server.sampling.acceptance import RULES
from server.sampling.processors import PROCESSORS
from server.speculation.sources import SOURCES
from tests.docs.pages import page
from tests.support.engine_tools import make_request, random_prompt
from tests.support.tiny_models import save_tiny_model

BLOCK = re.compile(r"## (?P<title>.+?)\n.*?^```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
PLAIN = SpeculationParams(method="none")


def toys() -> dict[str, str]:
    """Source of the toy in each section of the page."""
    sections = re.split(r"^(?=## )", page("extending.md"), flags=re.MULTILINE)
    found = (BLOCK.match(section) for section in sections)
    return {match["title"]: match["code"] for match in found if match is not None}


def toy(title: str) -> dict[str, Any]:
    """What the source of a toy defines."""
    names: dict[str, Any] = {"__name__": "toy"}
    exec(toys()[title], names)
    return names


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return save_tiny_model("llama", tmp_path / "model")


def completions(model_dir: Path, *requests: Request, **options: Any) -> list[Completion]:
    sizes: dict[str, Any] = {"heads": "none", "device": "cpu", "num_blocks": 64, "tree_size": 8}
    config = EngineConfig(model=str(model_dir), **(sizes | options))
    return Engine.from_config(config).generate(requests)


def ask(speculation: SpeculationParams | None = None, **sampling: Any) -> Request:
    return make_request(
        random_prompt(5, 9), speculation, max_tokens=16, ignore_eos=True, **sampling
    )


def test_a_draft_source(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "echo", toy("A draft source")["make_echo"])
    drafted, plain = completions(model_dir, ask(SpeculationParams(method="echo")), ask(PLAIN))
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.method == "echo"
    assert drafted.stats.num_draft_tokens > 0


def test_an_acceptance_rule(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "reject", toy("An acceptance rule")["RejectAll"]())
    sampling = {"temperature": 0.8, "seed": 3}
    rule = SpeculationParams(acceptance="reject")
    rejecting, plain = completions(model_dir, ask(rule, **sampling), ask(PLAIN, **sampling))
    assert rejecting.token_ids == plain.token_ids
    assert rejecting.stats.num_accepted_tokens == 0


def test_a_logit_processor(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROCESSORS, "no_repeat", toy("A logit processor")["make_no_repeat"])
    asked: dict[str, Any] = {
        "processor_options": {"no_repeat": True},
        "temperature": 0.9,
        "seed": 1,
        # Without the processor the model would say nothing else.
        "logit_bias": {7: 20.0},
    }
    bound, plain = completions(model_dir, ask(**asked), ask(PLAIN, **asked))
    assert bound.token_ids == plain.token_ids
    assert 7 in bound.token_ids
    assert all(one != other for one, other in itertools.pairwise(bound.token_ids))


def test_an_attention_backend(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("toy_attention")
    backend = toy("An attention backend")["CountingBackend"]
    monkeypatch.setattr(module, "CountingBackend", backend, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    [counted] = completions(model_dir, ask(), attention="toy_attention:CountingBackend")
    assert counted.token_ids == completions(model_dir, ask())[0].token_ids


def test_a_device() -> None:
    device = toy("A device")["PlainCpu"](torch.device("cpu"))
    linear = torch.nn.Sequential(torch.nn.Linear(2, 2))
    device.pack(linear)
    assert type(linear[0]) is torch.nn.Linear


def test_an_executor(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(EXECUTORS, "cpu", toy("An executor")["LoggingExecutor"])
    [completion] = completions(model_dir, ask())
    sizes = [int(line) for line in capsys.readouterr().out.split()]
    # The first step computes the prompt, and each further one a tree.
    assert sizes[0] == 9
    assert len(sizes) >= 1 + completion.stats.num_steps


def test_a_training_method() -> None:
    method = toy("A training method")["Frozen"](num_heads=2)
    assert (method.name, method.kept_options()) == ("frozen", {"num_heads": 2})


def test_every_section_has_a_toy_that_is_tried_here() -> None:
    rows = page("extending.md").partition("| member |")[2].splitlines()[2:]
    members = [row.partition("](#")[2].partition(")")[0] for row in rows if row.startswith("| [")]
    assert [title.lower().replace(" ", "-") for title in toys()] == members
