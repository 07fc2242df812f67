from pathlib import Path

import pytest
import torch

from heads.mtp import MTPModule
from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.core.completion import Completion
from server.core.request import Request
from server.engine.engine import Engine
from server.model.draft_heads import load_draft_heads
from server.model.loading import LoadedModel
from tests.training.launched import launch
from tests.training.running import error_text, evaluate, kill_when_exists, result, train_argv
from training.__main__ import main
from training.loop.metrics import read_metrics
from training.loop.run_state import STATE_FILE
from training.measure.acceptance import load_acceptance

pytestmark = pytest.mark.slow

SMALL = (
    "--draft-vocab-size",
    "100",
    "--num-depths",
    "3",
    "--batch-tokens",
    "100",
    "--log-interval",
    "1",
)


def argv_of(data: Path, output: Path, model: Path, *more: str) -> list[str]:
    return train_argv(data, output, model, "--method", "mtp", "--epochs", "20", *SMALL, *more)


def train(data: Path, output: Path, model: Path, *more: str) -> int:
    return main(argv_of(data, output, model, *more))


def weights(directory: Path, loaded: LoadedModel) -> list[torch.Tensor]:
    module = load_draft_heads(directory, loaded).heads
    assert isinstance(module, MTPModule)
    return list(module.parameters())


@pytest.fixture(scope="module")
def module_dir(
    distilled_file: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("mtp") / "module"
    assert train(distilled_file, directory, model_dir) == 0
    return directory


def test_a_trained_module_can_be_loaded_with_its_layer_and_profile(
    module_dir: Path, loaded: LoadedModel
) -> None:
    found = load_draft_heads(module_dir, loaded)
    assert isinstance(found.heads, MTPModule)
    assert found.heads.config.draft_vocab_size == 100
    assert found.layer is not None
    assert found.profile is not None
    assert found.profile.max_depth == 3
    assert load_acceptance(module_dir)["num_answers"] > 0
    assert not (module_dir / STATE_FILE).exists()


def test_every_depth_learns(module_dir: Path) -> None:
    lines = read_metrics(module_dir)
    assert len(lines[0]["loss_per_head"]) == 3
    for depth in range(3):
        losses = [line["loss_per_head"][depth] for line in lines]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_evaluation_measures_as_many_depths_as_asked_or_profiled(
    module_dir: Path, distilled_file: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(module_dir, distilled_file, model_dir, "--no-save") == 0
    assert len(result(capsys)["accept_rates"]) == 3
    argv = ("--no-save", "--num-depths", "5")
    assert evaluate(module_dir, distilled_file, model_dir, *argv) == 0
    rates = result(capsys)["accept_rates"]
    assert len(rates) == 5
    assert sum(rates[0]) > 0.1


def test_evaluation_keeps_the_weights(
    module_dir: Path, distilled_file: Path, model_dir: Path
) -> None:
    before = (module_dir / "heads.safetensors").read_bytes()
    assert evaluate(module_dir, distilled_file, model_dir) == 0
    assert (module_dir / "heads.safetensors").read_bytes() == before


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    loaded: LoadedModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, more = tmp_path / "killed", ("--epochs", "20", "--save-interval", "5")
    argv = argv_of(distilled_file, output, model_dir, *more)
    kill_when_exists([*argv, "--num-threads", "1"], output / STATE_FILE)
    assert train(distilled_file, output, model_dir, *more, "--learning-rate", "0.5") == 2
    assert "learning_rate 0.001, but now it is 0.5" in error_text(capsys)
    assert train(distilled_file, output, model_dir, *more, "--num-threads", "1") == 0
    assert "goes on after step" in error_text(capsys)
    assert train(distilled_file, tmp_path / "whole", model_dir, *more) == 0
    pairs = zip(weights(output, loaded), weights(tmp_path / "whole", loaded), strict=True)
    assert all(torch.equal(ours, expected) for ours, expected in pairs)


def test_two_processes_and_parts_take_the_steps_of_one(
    distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    # At a small rate, because a tiny model blows rounding up from step to step.
    more = ("--epochs", "2", "--learning-rate", "1e-6", "--num-threads", "1")
    argv = argv_of(distilled_file, tmp_path / "two", model_dir, *more)
    running = launch([*argv, "--gradient-accumulation", "2"], tmp_path / "logs")
    assert running.wait() == [0, 0]
    assert train(distilled_file, tmp_path / "one", model_dir, *more) == 0
    ours, expected = (
        torch.tensor(
            [[*line["loss_per_head"], line["gradient_norm"]] for line in read_metrics(path)]
        )
        for path in (tmp_path / "two", tmp_path / "one")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "argv", "message"),
    [
        ("mtp", ("--num-heads", "3"), "--num-heads is an option of --method medusa"),
        ("mtp", ("--no-root-conditioned",), "--root-conditioned is an option of --method medusa"),
        ("mtp", ("--batch-size", "9"), "--method medusa or medusa2"),
        ("medusa", ("--num-depths", "3"), "--num-depths is an option of --method mtp"),
        ("medusa", ("--batch-tokens", "9"), "--method mtp"),
        ("medusa2", ("--kl-weight", "0.5"), "--method medusa or mtp"),
    ],
)
def test_an_option_of_another_method_is_an_error_that_names_it(
    method: str,
    argv: tuple[str, ...],
    message: str,
    distilled_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "heads"
    command = ["train", "--method", method, "--data", str(distilled_file), "--output", str(output)]
    assert main([*command, "--model", str(model_dir), *argv]) == 2
    assert message in error_text(capsys)
    assert not output.exists()


def test_depths_cannot_be_chosen_for_medusa_heads(
    distilled_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--data", str(distilled_file), "--output", str(tmp_path / "heads")]
    assert main([*argv, "--model", str(model_dir), "--epochs", "1", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert evaluate(tmp_path / "heads", distilled_file, model_dir, "--num-depths", "2") == 2
    assert "num_depths is 2, but" in error_text(capsys)


def generated(model: Path, heads: str) -> list[Completion]:
    config = EngineConfig(model=str(model), heads=heads, device="cpu", num_blocks=64, tree_size=6)
    params, speculation = SamplingParams(max_tokens=24, temperature=0.0), SpeculationParams()
    return Engine.from_config(config).generate(
        [Request(str(i), (1, 40 + i, 60), params, speculation) for i in range(4)]
    )


def test_a_trained_module_is_served_and_changes_no_token(module_dir: Path, model_dir: Path) -> None:
    plain, drafted = generated(model_dir, "none"), generated(model_dir, str(module_dir))
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert sum(c.stats.num_draft_tokens for c in drafted) > 0
