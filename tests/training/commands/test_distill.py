import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny_adapters import save_adapted_heads, save_tiny_adapter
from tests.training.corpora import PROMPT_LINES, write_lines
from tests.training.running import error_text, result
from training.__main__ import main
from training.data.distilled import Manifest, Shard, manifest_path, read_distilled


def distill(data: Path, output: Path, model: Path, *more: str) -> int:
    argv = ["distill", "--data", str(data), "--output", str(output), "--model", str(model)]
    return main([*argv, "--device", "cpu", "--max-new-tokens", "24", *more])


def by_id(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    found = {json.loads(line)["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def test_every_prompt_is_answered_and_counted(distilled_file: Path) -> None:
    conversations = list(read_distilled(distilled_file))
    assert {c.id for c in conversations} == {str(line["id"]) for line in PROMPT_LINES}
    manifest = Manifest.load(distilled_file)
    assert manifest is not None
    assert manifest.num_conversations == len(PROMPT_LINES)
    assert manifest.num_turns == sum(len(c.turns) for c in conversations) == len(PROMPT_LINES) + 3
    assert manifest.num_tokens == sum(c.num_tokens for c in conversations)
    assert manifest.is_finished
    assert sum(manifest.tokens_by_category.values()) == manifest.num_tokens
    assert set(manifest.tokens_by_category) == {"", "chat", "qa"}
    assert len(manifest.chat_template_sha256) == 64


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8, 1.0])
def test_a_torn_file_is_completed_with_the_same_answers(
    keep: float,
    distilled_file: Path,
    prompts_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "torn.jsonl"
    whole = distilled_file.read_bytes()
    output.write_bytes(whole[: int(len(whole) * keep)])
    manifest_path(output).write_bytes(manifest_path(distilled_file).read_bytes())
    kept = output.read_bytes().count(b"\n")
    assert distill(prompts_file, output, model_dir) == 0
    assert by_id(output) == by_id(distilled_file)
    printed = result(capsys)
    assert printed["num_conversations"] == len(PROMPT_LINES)
    assert (printed["num_new_tokens"] == 0) == (kept == len(PROMPT_LINES))


def test_a_killed_process_loses_only_what_was_in_flight(
    distilled_file: Path, prompts_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed.jsonl"
    argv = ["distill", "--data", str(prompts_file), "--output", str(output)]
    argv += ["--model", str(model_dir), "--device", "cpu", "--max-new-tokens", "24"]
    command = [sys.executable, "-m", "training", *argv, "--concurrency", "1", "--num-threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if output.exists() and output.read_bytes().count(b"\n") >= 2:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.005)
        assert process.poll() is not None
    assert output.read_bytes().count(b"\n") >= 2
    assert distill(prompts_file, output, model_dir) == 0
    assert by_id(output) == by_id(distilled_file)


def test_no_conversation_begins_after_enough_tokens(
    prompts_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "few.jsonl"
    few = ("--max-tokens", "40", "--concurrency", "1")
    assert distill(prompts_file, output, model_dir, *few) == 0
    first = result(capsys)
    # Only the conversation in flight may go beyond: three turns of 24 tokens at most.
    assert 40 <= first["num_tokens"] < 40 + 3 * 24
    assert distill(prompts_file, output, model_dir, *few) == 0
    assert result(capsys)["num_new_tokens"] == 0
    assert distill(prompts_file, output, model_dir) == 0
    assert result(capsys)["num_conversations"] == len(PROMPT_LINES)


def test_categories_are_balanced_by_weight(
    prompts_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "qa.jsonl"
    only = ("--category-weights", "chat=0,qa=3,=0", "--concurrency", "2")
    assert distill(prompts_file, output, model_dir, *only) == 0
    assert {c.category for c in read_distilled(output)} == {"qa"}
    # What is answered already counts when the run goes on, here with all categories.
    assert distill(prompts_file, output, model_dir) == 0
    assert len(by_id(output)) == len(PROMPT_LINES)
    assert distill(prompts_file, output, model_dir, "--category-weights", "maths=1") == 2
    assert "'maths' has a weight, but no prompt is of it" in " ".join(
        capsys.readouterr().err.split()
    )


def test_each_conversation_takes_one_of_the_temperatures(
    prompts_file: Path, distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mixed.jsonl"
    assert distill(prompts_file, output, model_dir, "--temperatures", "0,1.5") == 0
    greedy, mixed = by_id(distilled_file), by_id(output)
    num_greedy = sum(mixed[name] == line for name, line in greedy.items())
    assert 0 < num_greedy < len(greedy)
    manifest = Manifest.load(output)
    assert manifest is not None
    assert manifest.sampling.temperatures == (0.0, 1.5)


def test_the_options_of_a_run_lie_next_to_its_answers(
    prompts_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "two.jsonl"
    assert distill(prompts_file, output, model_dir, "--limit", "2", "--shard", "0/2") == 0
    capsys.readouterr()
    config = ["--config", f"{output}.toml"]
    assert main(["distill", *config]) == 0
    assert result(capsys)["num_new_tokens"] == 0
    assert main(["distill", *config, "--limit", "3"]) == 0
    assert set(by_id(output)) == {"two", "plain"}


def test_the_limit_counts_from_the_beginning_of_the_file(
    prompts_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "two.jsonl"
    assert distill(prompts_file, output, model_dir, "--limit", "2") == 0
    assert set(by_id(output)) == {"two", "long"}


def test_shards_answer_all_prompts_once_and_as_one_run_would(
    distilled_file: Path,
    prompts_file: Path,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outputs = [tmp_path / f"shard-{index}.jsonl" for index in range(3)]
    for index, output in enumerate(outputs):
        assert distill(prompts_file, output, model_dir, "--shard", f"{index}/3") == 0
        expected = [str(line["id"]) for line in PROMPT_LINES][index::3]
        assert set(by_id(output)) == set(expected)
        manifest = Manifest.load(output)
        assert manifest is not None
        assert manifest.shard == Shard(index, 3)
    joined = by_id(outputs[0]) | by_id(outputs[1]) | by_id(outputs[2])
    assert joined == by_id(distilled_file)
    capsys.readouterr()
    assert distill(prompts_file, outputs[0], model_dir, "--shard", "1/3") == 2
    assert "the shard: 0/3 against 1/3" in " ".join(capsys.readouterr().err.split())
    assert distill(prompts_file, outputs[0], model_dir) == 2
    assert "the shard: 0/3 against 0/1" in " ".join(capsys.readouterr().err.split())


def test_a_shard_is_of_the_prompts_below_the_limit(
    prompts_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "few.jsonl"
    assert distill(prompts_file, output, model_dir, "--limit", "3", "--shard", "1/2") == 0
    assert set(by_id(output)) == {"long"}
    nothing = tmp_path / "nothing.jsonl"
    assert distill(prompts_file, nothing, model_dir, "--limit", "3", "--shard", "3/4") == 2
    assert "no prompts for shard 3/4" in " ".join(capsys.readouterr().err.split())
    assert not nothing.exists()


def test_prompts_that_do_not_fit_are_counted(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": "huge", "prompt": "word " * 900}, {"id": "fine", "prompt": "hello"}]
    prompts = write_lines(tmp_path / "p.jsonl", lines)
    assert distill(prompts, tmp_path / "d.jsonl", model_dir) == 0
    printed = result(capsys)
    assert (printed["num_conversations"], printed["num_skipped"]) == (1, 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--temperatures", "0.5"), "temperatures: (0.0,) against (0.5,)"),
        (("--seed", "7"), "seed: 0 against 7"),
    ],
)
def test_a_file_of_another_run_is_left_alone(
    more: tuple[str, ...],
    message: str,
    distilled_file: Path,
    prompts_file: Path,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = distilled_file.read_bytes()
    assert distill(prompts_file, distilled_file, model_dir, *more) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert distilled_file.read_bytes() == before


def test_a_file_without_manifest_is_left_alone(
    prompts_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine.jsonl"
    output.write_text("precious")
    assert distill(prompts_file, output, model_dir) == 2
    assert "mine.jsonl.manifest.json does not" in " ".join(capsys.readouterr().err.split())
    assert output.read_text() == "precious"


def test_a_compressed_output_is_an_error(
    prompts_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(prompts_file, tmp_path / "d.jsonl.gz", model_dir) == 2
    assert "without .gz" in " ".join(capsys.readouterr().err.split())


def test_a_broken_prompt_is_found_before_any_work(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "fine"}\n{"prompt": ')
    assert distill(prompts, tmp_path / "d.jsonl", model_dir) == 2
    assert "line 2: no valid JSON" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "d.jsonl").exists()


def test_a_model_that_is_not_there_is_one_line(
    prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(prompts_file, tmp_path / "d.jsonl", tmp_path / "absent") == 2
    assert "error: " in capsys.readouterr().err


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_is_whole(
    distilled_file: Path, prompts_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "full.jsonl"
    limit = len(distilled_file.read_bytes()) // 2
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from training.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    argv = ["distill", "--data", str(prompts_file), "--output", str(output)]
    argv += ["--model", str(model_dir), "--device", "cpu", "--max-new-tokens", "24"]
    run = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "cannot be written" in " ".join(run.stderr.split())
    assert 0 < len(output.read_bytes()) <= limit
    assert distill(prompts_file, output, model_dir) == 0
    assert by_id(output) == by_id(distilled_file)


def test_heads_that_change_the_model_are_an_error(
    prompts_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_tiny_adapter(model_dir, tmp_path / "adapter")
    heads = save_adapted_heads(model_dir, tmp_path / "heads", adapter)
    output = tmp_path / "answers.jsonl"
    argv = ("--method", "medusa", "--heads", str(heads))
    assert distill(prompts_file, output, model_dir, *argv) == 2
    assert "bring an adapter" in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_a_draft_source_that_is_not_there_is_an_error_before_anything_is_written(
    prompts_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    assert distill(prompts_file, output, model_dir, "--method", "magic") == 2
    assert "method is 'magic', but this model and these heads have auto, " in error_text(capsys)
    assert not output.exists()
