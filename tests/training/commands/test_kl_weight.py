from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GraniteConfig

from tests.support.tiny_models import tiny_config, tiny_tokenizer
from tests.training import running
from tests.training.corpora import write_lines
from tests.training.running import error_text
from training.loop.metrics import read_metrics

pytestmark = pytest.mark.slow


def train(data: Path, output: Path, model: Path, method: str, weight: str = "0.5") -> int:
    more = ("--method", method, "--kl-weight", weight, "--held-out", "0")
    return running.train(data, output, model, *more, "--epochs", "30", "--log-interval", "1")


@pytest.mark.parametrize("method", ["medusa", "mtp"])
def test_soft_labels_change_what_is_learnt(
    method: str, distilled_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    found = {}
    for weight in ("0", "0.5"):
        output = tmp_path / weight
        assert train(distilled_file, output, model_dir, method, weight) == 0
        found[weight] = [line["loss"] for line in read_metrics(output)]
    assert found["0.5"][0] != found["0"][0]
    assert found["0.5"][-1] < found["0.5"][0]


def test_soft_labels_are_rejected_where_they_are_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GraniteConfig(**tiny_config("llama").to_dict() | {"logits_scaling": 8.0})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "scaled")
    tiny_tokenizer().save_pretrained(tmp_path / "scaled")
    line = {"id": "a", "turns": [{"prompt_token_ids": [1, 20], "token_ids": [5, 6, 7]}]}
    data = write_lines(tmp_path / "data.jsonl", [line])
    assert train(data, tmp_path / "heads", tmp_path / "scaled", "medusa") == 2
    assert "kl_weight is 0.5, but model" in error_text(capsys)
