"""Our own int8 kernel: to the bit where it can be, how it is built, and what happens if not.

`test_int8_linear` compares what it computes with a slow product.
"""

from pathlib import Path

import pytest
import torch

from server.config import EngineConfig
from server.engine.engine import Engine
from server.errors import CompilationError
from server.model import int8_kernel
from server.model.cache import CACHE_VARIABLE
from server.model.int8_kernel import Int8Kernel, load_int8_kernel
from tests.int8_kernels import own_kernel
from tests.tiny_models import save_tiny_model


@pytest.fixture
def kernel() -> Int8Kernel:
    return own_kernel()


@pytest.fixture
def empty_cache(kernel: Int8Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a process that has not loaded the kernel, on a machine that has not built it."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(int8_kernel, "_kernels", {})
    return tmp_path / "kernels"


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
def test_a_row_is_the_same_to_the_bit_in_any_company(
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


def test_the_kernel_is_built_once_and_kept(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    load_int8_kernel(lines.append)
    (kept,) = empty_cache.glob("*.so")
    assert lines == [f"building the int8 kernel (once; kept in {kept})"]

    # Another process finds it; the compiler is not asked again.
    monkeypatch.setattr(int8_kernel, "_kernels", {})
    monkeypatch.setenv("CXX", "no-such-compiler")
    lines.clear()
    load_int8_kernel(lines.append)
    assert lines == []


def test_a_kept_file_that_cannot_be_loaded_is_made_anew(empty_cache: Path) -> None:
    kept = empty_cache / f"int8_{int8_kernel._digest()}.so"
    kept.parent.mkdir()
    kept.write_bytes(b"no library")
    lines: list[str] = []

    load_int8_kernel(lines.append)
    assert [line.startswith(f"{kept} cannot be used") for line in lines] == [True, False]
    assert kept.stat().st_size > 1000


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_reason_is_told(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(CompilationError, match=compiler):
        load_int8_kernel(lambda line: None)
    assert list(empty_cache.glob("*.so")) == []


def test_a_cpu_without_the_instructions_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_kernel, "cpu_features", lambda: "flags : sse avx2 avx512f")
    with pytest.raises(CompilationError, match="this CPU has no avx512_vnni, avx512bw"):
        load_int8_kernel(lambda line: None)


def test_a_kernel_that_computes_nonsense_is_not_used(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "wrong.cpp"
    source = int8_kernel._SOURCE.read_text(encoding="utf-8")
    wrong.write_text(source.replace("BASE = 256.0f", "BASE = 255.0f"), encoding="utf-8")
    monkeypatch.setattr(int8_kernel, "_SOURCE", wrong)
    with pytest.raises(CompilationError, match="computes something else"):
        load_int8_kernel(lambda line: None)


def engine_config(model: Path, **options: object) -> EngineConfig:
    common = {"model": str(model), "device": "cpu", "quantization": "int8", "num_blocks": 16}
    return EngineConfig(**{**common, **options})  # type: ignore[arg-type]


def test_an_engine_takes_the_kernel_where_it_may_compile(
    kernel: Int8Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.parts.compile_blocks", lambda model, report: None)
    model = save_tiny_model("llama", tmp_path / "model")
    engines = {
        compile: Engine.from_config(engine_config(model, compile=compile))
        for compile in ("auto", "off")
    }
    has_kernel = {name: engine.loaded.has_int8_kernel for name, engine in engines.items()}
    assert has_kernel == {"auto": True, "off": False}


def test_an_engine_without_the_kernel_says_why_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.parts.compile_blocks", lambda model, report: None)
    monkeypatch.setattr(int8_kernel, "cpu_features", lambda: "flags : sse")
    lines: list[str] = []
    model = save_tiny_model("llama", tmp_path / "model")
    engine = Engine.from_config(engine_config(model, compile="auto"), lines.append)

    assert not engine.loaded.has_int8_kernel
    assert any(
        "without the int8 kernel, which is faster: this CPU has no" in line for line in lines
    )
