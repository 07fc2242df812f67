"""What a CPU makes of a model; `test_compiled_layers` and others compare what it computes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from server.cpu.accelerate import accelerate
from server.cpu.int8_linear import Int8Linear, can_quantize
from server.cpu.packed_linear import PackedLinear
from server.device.base import Accelerated, AccelerateOptions
from server.errors import CompilationError, ConfigError
from server.kv.kv_cache import KVLayout
from server.model.loading import LoadedModel, load_model
from tests.support.log_lines import LogLines
from tests.support.own_code import own_attention, own_kernel
from tests.support.tiny_models import save_tiny_model

needs_int8 = pytest.mark.skipif(not can_quantize(), reason="oneDNN multiplies no int8 here")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def loaded(directory: Path) -> LoadedModel:
    return load_model(str(directory), "cpu", "float32")


@pytest.fixture
def _compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.cpu.accelerate.compile_layers", lambda *args: None)


@pytest.fixture
def _does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise CompilationError("there is no compiler")

    monkeypatch.setattr("server.cpu.accelerate.compile_layers", fail)


def run(loaded: LoadedModel, options: AccelerateOptions) -> Accelerated:
    layout = KVLayout(3, 2, 8, 16, loaded.dtype, loaded.device)
    return accelerate(loaded.model, layout, options)


def test_linear_layers_are_packed(loaded: LoadedModel) -> None:
    accelerated = run(loaded, AccelerateOptions())
    assert type(loaded.model.get_output_embeddings()) is PackedLinear
    assert not any(isinstance(part, nn.Linear) for part in loaded.model.modules())
    assert (accelerated.attention, accelerated.quantization) == ("sdpa", "none")
    assert accelerated.own_code == {"layers": False, "weights": False, "heads": False}


@needs_int8
def test_int8_replaces_every_linear_layer_and_keeps_the_matrices(loaded: LoadedModel) -> None:
    matrices = loaded.unembedding().clone(), loaded.input_embedding().clone()
    accelerated = run(loaded, AccelerateOptions(quantization="int8"))
    assert accelerated.quantization == "int8"
    assert type(loaded.model.get_output_embeddings()) is Int8Linear
    assert not any(isinstance(part, nn.Linear | PackedLinear) for part in loaded.model.modules())
    assert torch.equal(loaded.unembedding(), matrices[0])
    assert torch.equal(loaded.input_embedding(), matrices[1])


@pytest.mark.usefixtures("_compiles")
def test_own_code_is_taken_where_it_runs(loaded: LoadedModel) -> None:
    own_kernel()
    own_attention()
    options = AccelerateOptions(compile="auto", has_heads=True)
    accelerated = run(loaded, options)
    assert accelerated.attention == "cpu"
    assert accelerated.draft_products.is_own
    assert accelerated.own_code == {"layers": True, "weights": False, "heads": True}


@pytest.mark.usefixtures("_compiles")
@pytest.mark.parametrize("attention", ["sdpa", "my_package:Backend"])
def test_another_attention_can_be_asked_for(loaded: LoadedModel, attention: str) -> None:
    accelerated = run(loaded, AccelerateOptions(compile="auto", attention=attention))
    assert accelerated.attention == attention


@pytest.mark.usefixtures("_does_not_compile")
def test_what_does_not_compile_runs_uncompiled_with_the_reason(
    loaded: LoadedModel, log: LogLines
) -> None:
    options = AccelerateOptions(compile="auto", attention="sdpa")
    assert not run(loaded, options).is_compiled
    assert "running uncompiled, which is slower: there is no compiler" in log.take()


@pytest.mark.usefixtures("_does_not_compile")
def test_what_does_not_compile_is_an_error_if_that_was_insisted_on(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="compile is 'on', but there is no compiler; install"):
        run(loaded, AccelerateOptions(compile="on", attention="sdpa"))
