import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.benches.exactness import RequestMaker

pytestmark = pytest.mark.slow

STABLE_FIELDS = {
    "latency": {"tokens_per_s", "speedup_vs_plain", "speedup_vs_transformers"},
    "acceptance": {
        "mean_acceptance_length",
        "by_category",
        "accept_rate_by_depth",
        "without_repeats",
    },
    "exactness": {"num_outputs", "num_mismatches", "num_unexplained", "mismatches"},
    "quantization": {"prompts", "answers", "same_share", "steps", "num_speculation_differences"},
    "overhead": {"overhead_share", "draft_share", "step_ms"},
    "serving": {"rounds", "by_concurrency"},
    "prefill": {"ttft_per_token_ratio", "itl_p95_rise_ms", "chunk_cost_p95_ms"},
    "peers": {"tokens_per_s", "ratios", "not_installed"},
}
QUICK = {
    "serving": ["--rounds", "1", "--concurrency", "2", "--requests-per-round", "2"],
    "prefill": ["--rounds", "1", "--prompt-tokens", "90", "--long-prompt-tokens", "80"],
}
COMMON_FIELDS = {"command", "model", "heads", "data", "num_rows", "num_prompts", "context"}


@pytest.fixture
def arguments(model_dir: Path, heads_dir: Path) -> list[str]:
    options = "--device cpu --compile off --max-new-tokens 16 --max-nodes 8 --limit 3"
    return ["--model", str(model_dir), "--heads", str(heads_dir), *options.split()]


def run_main(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(argv)
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return status, report


@pytest.mark.parametrize("command", list(STABLE_FIELDS))
def test_a_bench_ends_in_one_json_object(
    command: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    options = [*arguments, *QUICK.get(command, []), "--output", str(output)]
    status, report = run_main([command, *options], capsys)
    assert status == 0
    assert report.keys() >= STABLE_FIELDS[command] | COMMON_FIELDS
    assert report == json.loads(output.read_text())
    assert (report["command"], report["num_prompts"], report["num_rows"]) == (command, 3, 24)
    assert report["context"]["command_line"].startswith(f"python -m bench {command} --model")
    assert report["context"]["dtype"] == "float32"


def test_the_plain_figures_are_shown_on_stderr(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["acceptance", *arguments]) == 0
    captured = capsys.readouterr()
    assert "mean_acceptance_length" in captured.err
    assert "num_steps" in captured.err
    assert len(captured.out.splitlines()) == 1


def test_acceptance_fixes_the_tree_at_max_nodes(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = run_main(["acceptance", *arguments], capsys)
    assert report["tree_size"] == 8
    # Only the step for the last token of an output has no drafts.
    assert 6.0 < report["mean_draft_tokens"] <= 7.0
    assert report["mean_acceptance_length"] >= 1.0


def test_outputs_do_not_depend_on_the_concurrency(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Trees learn from what other requests accepted, so only the outputs are the same.
    counts = []
    for concurrency in ("1", "3"):
        command = ["acceptance", *arguments, "--concurrency", concurrency]
        _, report = run_main(command, capsys)
        counts.append([report["num_outputs"], report["num_output_tokens"]])
    assert counts[0] == counts[1]


def test_plain_steps_do_not_depend_on_the_concurrency(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for concurrency in ("1", "3"):
        command = ["acceptance", *arguments, "--tree-size", "1", "--concurrency", concurrency]
        _, report = run_main(command, capsys)
        del report["context"]
        reports.append(report)
    assert reports[0] == reports[1]


def test_latency_reports_the_step_and_its_limit(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = run_main(["latency", *arguments], capsys)
    assert report["speeds"].keys() == {"speculation", "plain", "transformers"}
    assert report["speedups"]["plain"].keys() == {
        "total",
        "median",
        "decode_total",
        "decode_median",
    }
    assert report["draft_ms"] > 0.0
    assert report["limit"]["weight_bytes"] > 0
    assert report["num_different_outputs"] == 0


def test_overhead_shares_complete_each_other(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = run_main(["overhead", *arguments], capsys)
    assert sum(report["parts_share"].values()) == pytest.approx(1.0, abs=1e-4)
    shares = report["overhead_share"] + report["draft_share"] + report["forward_share"]
    assert shares == pytest.approx(1.0, abs=1e-4)


def test_without_heads_every_bench_runs_plainly(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run_main(["exactness", *arguments, "--heads", "none"], capsys)
    assert (status, report["heads"]) == (0, None)
    assert report["mean_acceptance_lengths"] == {"greedy": 1.0, "sampled": 1.0}


def test_bad_data_ends_with_the_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    assert main(["acceptance", "--data", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rows.jsonl, line 2" in captured.err


def test_medusa_without_heads_is_rejected(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["acceptance", *arguments, "--heads", "none", "--method", "medusa"]
    assert main(command) == 2
    assert "no draft heads" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["acceptance", "overhead"])
def test_an_unknown_method_is_rejected(
    command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *arguments, "--method", "eagle"]) == 2
    assert "eagle" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["latency", "acceptance", "exactness", "overhead"])
def test_prompts_that_do_not_fit_are_an_error_if_none_is_left(
    command: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "x " * 2000}) + "\n")
    assert main([command, *arguments, "--data", str(path)]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_failed_check_ends_with_one(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Planted: a greedy output stands where a sample without speculation should.
    monkeypatch.setattr(RequestMaker, "sampled_off", RequestMaker.greedy_off)
    status, report = run_main(["exactness", *arguments], capsys)
    assert status == 1
    assert report["num_unexplained"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("command", list(STABLE_FIELDS))
def test_a_bench_runs_on_cuda(
    command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    on_cuda = [*arguments, *QUICK.get(command, []), "--device", "cuda", "--dtype", "float32"]
    status, report = run_main([command, *on_cuda], capsys)
    assert status == 0
    assert report["context"]["device"] == "cuda"


def test_exactness_rejects_quantized_weights(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["exactness", *arguments, "--quantization", "int8"]) == 2
    assert "quantization is 'int8', but exactness compares" in capsys.readouterr().err


def test_quantization_needs_something_to_compare(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantization", *arguments, "--quantization", "none"]) == 2
    assert "quantization is 'none', which leaves nothing to compare" in capsys.readouterr().err
