import subprocess
import sys
import time

import pytest
import torch

from tests.training.corpora import corpus, document
from training.data.dataset import Corpus
from training.loop.usage import Usage, peak_cuda_memory_bytes, peak_memory_bytes

CPU = torch.device("cpu")
# A process says how much memory it has, having touched so many bytes; then another, started by it.
PRINTS_PEAK = "from training.loop.usage import peak_memory_bytes as p; print(p())"
TOUCHES_MUCH = (
    "import subprocess, sys; from training.loop.usage import peak_memory_bytes as p;"
    "x = bytearray(b'1' * 2**30); print(p(), flush=True);"
    f"subprocess.run([sys.executable, '-c', {PRINTS_PEAK!r}], check=True)"
)


def test_a_stage_that_comes_twice_is_added_up() -> None:
    usage = Usage()
    for _ in range(2):
        with usage.stage("steps"):
            time.sleep(0.01)
    assert 0.02 <= usage.seconds("steps") < 5.0
    assert usage.seconds("measuring") == 0.0


def test_a_stage_that_fails_is_counted() -> None:
    usage = Usage()
    with pytest.raises(ValueError, match="no"), usage.stage("steps"):
        raise ValueError("no")
    assert list(usage.summary(corpus(1), CPU)["seconds"]) == ["steps"]


def test_rates_of_tokens_are_those_of_the_corpus_for_each_example() -> None:
    # 4 examples of 5 answer tokens, 10 with the prompt; a document without examples is not run.
    train = Corpus((document(10, (5, 10)), document(7, (6, 7))))
    usage = Usage()
    with usage.stage("steps"):
        time.sleep(0.05)
    usage.add_examples(30)
    usage.add_examples(10)
    found = usage.summary(train, CPU)
    assert found["examples_per_s"] == pytest.approx(40 / usage.seconds("steps"), rel=0.01)
    assert found["answer_tokens_per_s"] == pytest.approx(found["examples_per_s"] * 5 / 4, rel=0.01)
    per_document = found["document_tokens_per_s"] / found["examples_per_s"]
    assert per_document == pytest.approx(10 / 4, rel=0.01)


def test_a_run_without_steps_has_no_speed() -> None:
    found = Usage().summary(Corpus(()), CPU)
    assert (found["examples_per_s"], found["seconds"]) == (0.0, {})


def test_without_cuda_there_is_no_memory_of_it() -> None:
    assert peak_cuda_memory_bytes(CPU) == 0
    found = Usage().summary(corpus(1), CPU)
    assert found["peak_cuda_memory_bytes"] == 0
    assert found["peak_memory_bytes"] == pytest.approx(peak_memory_bytes(), rel=0.01)


@pytest.mark.slow
def test_peak_memory_is_in_bytes_and_that_of_the_process_before_does_not_count() -> None:
    found = subprocess.run(
        [sys.executable, "-c", TOUCHES_MUCH], capture_output=True, text=True, check=True
    )
    outer, inner = map(int, found.stdout.split())
    assert outer > 2**30
    assert inner < outer - 2**29
