import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import bench.benches.peers
from bench.__main__ import main
from bench.benches.peers import Contenders, find_llama_server, gguf_file, summarise
from bench.errors import BenchError
from bench.load.contenders import Race, Run
from bench.measure.timing import Timing
from server.config import SpeculationParams
from server.engine.engine import Engine
from tests.bench.fakes import fake_llama_server

pytestmark = pytest.mark.slow


def run_of(seconds: float, num_tokens: int = 10, token: int = 0) -> Run:
    return Run(Timing(num_tokens, seconds, seconds / 2), (token,) * num_tokens, num_tokens - 1)


def test_ratios_are_ours_by_theirs() -> None:
    first = {"auto": run_of(1.0), "off": run_of(2.0), "slow": run_of(4.0, token=1)}
    second = {"auto": run_of(3.0), "off": run_of(4.0), "slow": run_of(8.0, num_tokens=20)}
    races = [Race("chat", first), Race("chat", second)]
    result = summarise(races, {"other": "not installed: nothing"})
    assert result.tokens_per_s == pytest.approx({"auto": 5.0, "off": 20 / 6, "slow": 2.5})
    assert result.ratios == pytest.approx({"off": 1.5, "slow": 2.0})
    assert result.not_installed == {"other": "not installed: nothing"}
    assert result.num_outputs == 2
    assert result.num_same_outputs == {"off": 2, "slow": 0}


def test_llama_server_is_looked_for_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_llama_server(None) is None
    program = fake_llama_server(tmp_path).rename(tmp_path / "llama-server")
    assert find_llama_server(None) == program
    assert find_llama_server(program) == program
    with pytest.raises(BenchError, match=r"'/nowhere/llama', which is no file"):
        find_llama_server(Path("/nowhere/llama"))


def test_llama_server_needs_the_models_own_file(tmp_path: Path, model_dir: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    assert gguf_file(str(file)) == file
    assert gguf_file(str(model_dir)) is None
    assert gguf_file("owner/name") is None


def prepared(engine: Engine, llama_server: Path | None = None) -> Contenders:
    with ExitStack() as stack:
        contenders = Contenders(engine, SpeculationParams(), llama_server, stack)
        contenders.add_all()
    return contenders


def test_what_is_not_installed_is_listed_with_the_remedy(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.benches.peers, "is_serve_available", lambda: False)
    contenders = prepared(engine)
    assert list(contenders.ready) == ["auto", "off", "transformers", "transformers_lookup"]
    assert contenders.missing.keys() == {"transformers_serve", "llama_cpp"}
    assert "pip install 'transformers[serving]'" in contenders.missing["transformers_serve"]
    assert "--llama-server FILE" in contenders.missing["llama_cpp"]


def test_llama_server_is_left_out_for_other_models(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.benches.peers, "is_serve_available", lambda: False)
    missing = prepared(engine, fake_llama_server(tmp_path)).missing
    assert "it needs a GGUF file" in missing["llama_cpp"]


def test_all_peers_race(
    model_dir: Path,
    heads_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench.benches.peers, "gguf_file", lambda model: tmp_path / "m.gguf")
    arguments = ["peers", "--model", str(model_dir), "--heads", str(heads_dir)]
    arguments += ["--llama-server", str(fake_llama_server(tmp_path))]
    arguments += ["--device", "cpu", "--compile", "off", "--max-new-tokens", "6", "--limit", "2"]
    assert main(arguments) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = {"off", "transformers", "transformers_lookup", "transformers_serve", "llama_cpp"}
    assert report["tokens_per_s"].keys() == names | {"auto"}
    assert report["ratios"].keys() == names
    assert report["not_installed"] == {}
    assert report["num_outputs"] == report["num_prompts"] == 2
    for name in ("off", "transformers", "transformers_lookup"):
        assert report["num_same_outputs"][name] == 2
