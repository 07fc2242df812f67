"""Our own int8 kernel: to the bit where it can be, and what happens where there is none.

`test_int8_linear` compares what it computes with a slow product.
"""

import functools
from pathlib import Path

import pytest
import torch

from server.cache import CACHE_VARIABLE
from server.config import EngineConfig
from server.cpu import int8_kernel, own_library
from server.cpu.int8_kernel import Int8Kernel, load_int8_kernel
from server.cpu.int8_linear import Int8Linear, Int8Product, can_quantize
from server.engine.engine import Engine
from server.errors import CompilationError
from tests.support.engine_tools import heads_for, make_request, tiny_loaded
from tests.support.log_lines import LogLines
from tests.support.own_code import own_kernel
from tests.support.tiny_models import save_tiny_model

needs_int8 = pytest.mark.skipif(not can_quantize(), reason="oneDNN multiplies no int8 here")


@pytest.fixture
def kernel() -> Int8Kernel:
    return own_kernel()


class Layer:
    def __init__(self, kernel: Int8Kernel, inputs: int, outputs: int) -> None:
        self._kernel = kernel
        codes_OI = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        self._scale_O = torch.rand(outputs) + 0.1
        self._ones_O = codes_OI.sum(1) * self._scale_O
        self._weight = kernel.pack(codes_OI)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._kernel.linear(rows, self._weight, self._scale_O, self._ones_O, None)


@pytest.mark.parametrize("num_rows", [2, 3, 4, 5, 6, 7, 11, 13, 191, 192, 193, 400])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_is_the_same_to_the_bit_whatever_is_next_to_it(
    kernel: Int8Kernel, num_rows: int, num_threads: int
) -> None:
    torch.manual_seed(num_rows)
    layer = Layer(kernel, 70, 90)
    rows = torch.randn(num_rows, 70)
    alone = torch.cat([layer(row[None]) for row in rows])

    torch.set_num_threads(num_threads)
    try:
        kernel.follow_threads()
        assert torch.equal(layer(rows), alone)
    finally:
        torch.set_num_threads(1)
        kernel.follow_threads()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 69])
def test_a_row_that_is_not_finite_gives_no_numbers_and_spoils_no_other(
    kernel: Int8Kernel, value: float, place: int
) -> None:
    torch.manual_seed(0)
    layer = Layer(kernel, 70, 90)
    rows = torch.randn(3, 70)
    expected = layer(rows)
    rows[1, place] = value
    computed = layer(rows)

    assert computed[1].isnan().all()
    assert torch.equal(computed[[0, 2]], expected[[0, 2]])


def test_a_weight_is_packed_in_panels_with_zeros_around(kernel: Int8Kernel) -> None:
    codes_OI = torch.randint(-127, 128, (35, 50), dtype=torch.int8)
    packed = kernel.pack(codes_OI)

    assert packed.shape == (2, 16, 32, 4)
    for output in range(64):
        for i in range(64):
            expected = codes_OI[output, i] if output < 35 and i < 50 else 0
            assert packed[output // 32, i // 4, output % 32, i % 4] == expected


def test_a_layer_whose_sums_could_overflow_is_refused(kernel: Int8Kernel) -> None:
    with pytest.raises(ValueError, match="a layer has 65537 inputs"):
        kernel.pack(torch.zeros(1, 65_537, dtype=torch.int8))


def test_a_kernel_that_computes_nonsense_is_not_used(
    kernel: Int8Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    wrong = tmp_path / "wrong.cpp"
    source = int8_kernel._SOURCE.read_text(encoding="utf-8")
    wrong.write_text(source.replace("BASE = 256.0f", "BASE = 255.0f"), encoding="utf-8")
    monkeypatch.setattr(int8_kernel, "_SOURCE", wrong)
    with pytest.raises(CompilationError, match="computes something else"):
        load_int8_kernel()
    assert list(tmp_path.glob("kernels/*.so")) == []


@pytest.mark.parametrize(
    "rows", [torch.zeros(2, 70, dtype=torch.bfloat16), torch.zeros(2, 60), torch.zeros(2, 81)]
)
def test_rows_that_do_not_fit_are_refused(kernel: Int8Kernel, rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="give float32 on cpu with the weight's"):
        Layer(kernel, 70, 90)(rows)


def test_heads_frozen_with_it_propose_nearly_what_they_propose_in_float(
    kernel: Int8Kernel,
) -> None:
    heads = heads_for(tiny_loaded())
    hidden_BD, roots_B = torch.randn(40, heads.config.hidden_size), torch.arange(40)
    expected = heads.propose(hidden_BD, roots_B, 1, [None] * 40)
    heads.freeze(functools.partial(Int8Product, kernel=kernel))
    computed = heads.propose(hidden_BD, roots_B, 1, [None] * 40)

    same = (computed.token_ids_BKR == expected.token_ids_BKR).float().mean()
    assert float(same) > 0.9
    distance = (computed.log_probs_BKR - expected.log_probs_BKR).abs().max()
    assert 0.0 < float(distance) < 0.1


def engine_config(model: Path, **options: object) -> EngineConfig:
    common = {"model": str(model), "device": "cpu", "quantization": "int8", "num_blocks": 16}
    return EngineConfig(**{**common, **options})  # type: ignore[arg-type]


def has_kernel(engine: Engine) -> bool:
    unembedding = engine.loaded.model.get_output_embeddings()
    assert isinstance(unembedding, Int8Linear)
    return unembedding.is_one_call


@needs_int8
def test_an_engine_takes_the_kernel_where_it_may_compile(
    kernel: Int8Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.cpu.accelerate.compile_layers", lambda *args: None)
    model = save_tiny_model("llama", tmp_path / "model")
    engines = {
        compile: Engine.from_config(engine_config(model, compile=compile))
        for compile in ("auto", "off")
    }
    assert {name: has_kernel(engine) for name, engine in engines.items()} == {
        "auto": True,
        "off": False,
    }


@needs_int8
def test_an_engine_without_the_kernel_says_why_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: LogLines
) -> None:
    monkeypatch.setattr("server.cpu.accelerate.compile_layers", lambda *args: None)
    monkeypatch.setattr(own_library, "cpu_features", lambda: "flags : sse")
    model = save_tiny_model("llama", tmp_path / "model")
    engine = Engine.from_config(engine_config(model, compile="auto"))

    assert not has_kernel(engine)
    (completion,) = engine.generate([make_request((3, 4, 5), max_tokens=3)])
    assert completion.finish_reason in ("length", "stop")
    assert any(
        "int8 weights without our own int8 kernel, which is faster: this CPU" in line
        for line in log.take()
    )
