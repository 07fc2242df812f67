"""Compiled decoder layers against the same layers as they are."""

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.attention.backend import AttentionBackend, AttentionBatch, AttentionSpan
from server.attention.hook import AttentionContext, install_attention
from server.attention.sdpa import SDPABackend
from server.cache import CACHE_VARIABLE
from server.config import EngineConfig
from server.core.completion import Completion
from server.cpu.compiled_layers import CompiledForward, check_compiled, compile_layers
from server.cpu.int8_kernel import Int8Kernel
from server.cpu.int8_linear import quantize_linears
from server.cpu.layer_calls import NUM_TOKENS, EchoBackend, record_calls
from server.cpu.packed_linear import pack_linears
from server.cpu.tree_attention import OwnAttention, OwnEcho, TreeAttention
from server.engine.engine import Engine
from server.errors import CompilationError, ConfigError
from server.kv.kv_cache import KVCache, KVLayout
from server.model.loading import LoadedModel, load_model
from tests.support.engine_tools import SlowModel, assert_as_expected, make_request, random_prompt
from tests.support.log_lines import LogLines
from tests.support.own_code import own_attention, own_kernel
from tests.support.tiny_heads import save_tiny_heads
from tests.support.tiny_models import TinyKind, save_tiny_model

NUM_SLOTS = 128

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for all tests of this file, empty at first: each kind of layer is compiled once."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(cache))
        yield cache / "compiled"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyKind], Path]:
    def save(kind: TinyKind) -> Path:
        return save_tiny_model(kind, tmp_path_factory.mktemp("model") / kind)

    return save


class Runner:
    """Runs ragged steps through a model over a KV cache of its own."""

    def __init__(self, loaded: LoadedModel, attention: TreeAttention | None = None) -> None:
        layout = KVLayout(
            num_layers=loaded.num_layers,
            num_kv_heads=loaded.num_kv_heads,
            head_dim=loaded.head_dim,
            block_size=16,
            dtype=loaded.dtype,
            device=loaded.device,
        )
        self.model = loaded.model
        cache = KVCache(layout, NUM_SLOTS // 16)
        self._backend: AttentionBackend = (
            SDPABackend(cache) if attention is None else OwnAttention(cache, attention)
        )
        install_attention(loaded.model)

    @torch.inference_mode()
    def logits(self, token_ids: list[int], first: int, mask: Tensor | None = None) -> Tensor:
        """Logits of tokens behind `first` others of one sequence, a tree's if there is a mask."""
        num_tokens = len(token_ids)
        depths = None if mask is None else mask.sum(1) - 1
        span = AttentionSpan(0, num_tokens, first, list(range(NUM_SLOTS // 16)), mask, depths)
        slots_T = torch.arange(first, first + num_tokens)
        positions_T = slots_T if depths is None else first + depths
        context = AttentionContext(
            self._backend, self._backend.prepare(AttentionBatch((span,), slots_T))
        )
        output = self.model(
            input_ids=torch.tensor([token_ids]),
            position_ids=positions_T.unsqueeze(0),
            use_cache=False,
            attention_context=context,
        )
        logits_TV: Tensor = output.logits[0]
        return logits_TV


def all_steps(runner: Runner) -> list[Tensor]:
    """A prompt, a token, a tree, and many tokens: what an engine's steps are like."""
    tree = torch.eye(4, dtype=torch.bool)
    tree[:, 0] = True
    tree[3, 1] = True
    prompt = list(random_prompt(1, 30))
    return [
        runner.logits(prompt, 0),
        runner.logits([5], 30),
        runner.logits([7, 8, 9, 10], 31, tree),
        runner.logits(list(random_prompt(2, 70)), 31),
    ]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.base_model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def is_compiled(model: PreTrainedModel) -> bool:
    return all(isinstance(layer.forward, CompiledForward) for layer in layers_of(model))


def loaded_as(
    directory: Path, quantization: str = "none", kernel: Int8Kernel | None = None
) -> LoadedModel:
    loaded = load_model(str(directory), "cpu", "float32")
    if quantization == "int8":
        quantize_linears(loaded.model, kernel)
    else:
        pack_linears(loaded.model)
    return loaded


def loaded_pair(
    directory: Path, quantization: str, kernel: Int8Kernel | None = None
) -> tuple[LoadedModel, LoadedModel]:
    return loaded_as(directory, quantization, kernel), loaded_as(directory, quantization, kernel)


@pytest.mark.parametrize(
    ("kind", "quantization", "is_own", "num_packages"),
    [
        ("llama", "none", False, 1),
        ("llama", "int8", False, 1),
        ("llama", "int8", True, 1),
        ("qwen2", "int8", True, 1),
        ("llama", "none", True, 1),
        ("gemma3", "none", True, 2),
        ("mixtral", "none", False, 1),
    ],
)
def test_logits_are_those_of_the_plain_model(
    kind: TinyKind,
    quantization: str,
    is_own: bool,
    num_packages: int,
    model_dir: Callable[[TinyKind], Path],
    log: LogLines,
) -> None:
    """With the products and the attention of others, or with our own."""
    kernel = own_kernel() if is_own and quantization == "int8" else None
    attention = own_attention() if is_own else None
    plain, compiled = loaded_pair(model_dir(kind), quantization, kernel)
    echo = None if attention is None else OwnEcho(attention)
    compile_layers(compiled.model, echo)
    # Models of the same size share the unembedding's package, so only those of layers are counted.
    made = [line for line in log.take() if line.startswith("compiling") and "DecoderLayer" in line]
    assert len(made) == num_packages
    assert is_compiled(compiled.model)
    unembedding = compiled.model.get_output_embeddings()
    is_worth_it = quantization == "int8" and kernel is None
    assert isinstance(unembedding.forward, CompiledForward) == is_worth_it
    tolerance = 1e-4 if quantization == "none" else 0.1
    runner = Runner(compiled, attention)
    for ours, theirs in zip(all_steps(runner), all_steps(Runner(plain)), strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance

    # Another start finds what this one compiled.
    again = plain
    compile_layers(again.model, echo)
    assert log.take() == []
    found = all_steps(Runner(again, attention))
    for ours, theirs in zip(found, all_steps(Runner(compiled, attention)), strict=True):
        assert torch.equal(ours, theirs)


def test_layers_with_our_own_attention_run_plainly_with_another(
    model_dir: Callable[[TinyKind], Path],
) -> None:
    plain, compiled = loaded_pair(model_dir("llama"), "none")
    compile_layers(compiled.model, OwnEcho(own_attention()))
    for ours, theirs in zip(all_steps(Runner(compiled)), all_steps(Runner(plain)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_int8_models_of_our_own_code_are_the_same_to_the_bit_in_any_step(
    kind: TinyKind, model_dir: Callable[[TinyKind], Path]
) -> None:
    attention = own_attention()
    loaded = loaded_as(model_dir(kind), "int8", own_kernel())
    compile_layers(loaded.model, OwnEcho(attention))
    text = list(random_prompt(1, 50))
    alone = Runner(loaded, attention)
    expected = torch.cat([alone.logits([token], i) for i, token in enumerate(text)])

    runner = Runner(loaded, attention)
    chunks = torch.cat([runner.logits(text[:17], 0), runner.logits(text[17:40], 17)])
    # Nodes 0, 2 and 3 are the text's next tokens.
    tree = torch.eye(5, dtype=torch.bool)
    tree[:, 0] = True
    tree[3:, 2] = True
    nodes = runner.logits([text[40], 7, text[41], text[42], 9], 40, tree)
    assert torch.equal(chunks, expected[:40])
    assert torch.equal(nodes[[0, 2, 3]], expected[40:43])


def test_layers_in_bfloat16_are_compiled_too(model_dir: Callable[[TinyKind], Path]) -> None:
    directory = str(model_dir("llama"))
    plain, compiled = (load_model(directory, "cpu", "bfloat16") for _ in range(2))
    for loaded in (plain, compiled):
        pack_linears(loaded.model)
    compile_layers(compiled.model)
    assert is_compiled(compiled.model)
    for ours, theirs in zip(all_steps(Runner(compiled)), all_steps(Runner(plain)), strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours - theirs).norm() / theirs.norm()) < 0.1


def test_the_compiled_code_runs_in_the_engine_and_not_outside(
    model_dir: Callable[[TinyKind], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_as(model_dir("llama"))
    compile_layers(loaded.model)
    runs: list[int] = []
    run = CompiledForward.run

    def counted(
        self: CompiledForward, inputs: list[Tensor], context: AttentionContext | None
    ) -> Tensor:
        runs.append(inputs[0].shape[1])
        return run(self, inputs, context)

    monkeypatch.setattr(CompiledForward, "run", counted)
    runner = Runner(loaded)
    inside = runner.logits([3, 4, 5], 0)
    assert runs == [3] * loaded.num_layers
    loaded.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        outside = loaded.model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False).logits[0]
    assert len(runs) == loaded.num_layers
    torch.testing.assert_close(inside, outside, atol=1e-4, rtol=1e-4)


def test_rows_of_other_sizes_or_types_take_the_plain_way(
    model_dir: Callable[[TinyKind], Path],
) -> None:
    plain, compiled = loaded_pair(model_dir("llama"), "int8")
    compile_layers(compiled.model)
    ours, theirs = (pair.model.get_output_embeddings() for pair in (compiled, plain))
    assert isinstance(ours.forward, CompiledForward)
    width = compiled.hidden_size
    for rows in (torch.randn(2, 3, width), torch.randn(4, width), torch.randn(1, 0, width)):
        assert torch.equal(ours(rows), theirs(rows))


def engine(directory: Path, heads: Path, **options: Any) -> Engine:
    sizes: dict[str, Any] = {"num_blocks": 64, "max_num_seqs": 4, "max_tokens_per_step": 32}
    return Engine.from_config(
        EngineConfig(
            model=str(directory),
            heads=str(heads),
            device="cpu",
            dtype="float32",
            max_nodes=8,
            tree_size=8,
            **(sizes | options),
        )
    )


def test_an_engine_generates_the_same_texts_with_trees_and_chunks(
    model_dir: Callable[[TinyKind], Path], tmp_path: Path
) -> None:
    directory = model_dir("llama")
    compiled = engine(directory, save_tiny_heads(directory, tmp_path), compile="on")
    assert is_compiled(compiled.loaded.model)
    oracle = SlowModel()
    requests = [make_request(random_prompt(i, 9 * i), max_tokens=12) for i in range(1, 7)]
    completions: list[Completion] = compiled.generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert_as_expected(completion, oracle.complete(request))


class TestFailures:
    @pytest.fixture(autouse=True)
    def _no_compiler(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        monkeypatch.setenv("CXX", "no-g++")
        monkeypatch.setattr("server.cpu.own_library._loaded", {})
        with torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-g++"),)}):
            yield

    def test_without_a_compiler_auto_runs_the_model_as_it_is(
        self, model_dir: Callable[[TinyKind], Path], tmp_path: Path, log: LogLines
    ) -> None:
        directory = model_dir("qwen2")
        config = EngineConfig(
            model=str(directory), heads="none", num_blocks=8, device="cpu", compile="auto"
        )
        built = Engine.from_config(config)
        assert not is_compiled(built.loaded.model)
        assert any("running uncompiled" in line and "no-g++" in line for line in log.take())
        (completion,) = built.generate([make_request((3, 4, 5), max_tokens=3)])
        assert completion.finish_reason in ("length", "stop")

    def test_without_a_compiler_on_is_an_error_with_the_remedy(
        self, model_dir: Callable[[TinyKind], Path]
    ) -> None:
        config = EngineConfig(
            model=str(model_dir("qwen2")), heads="none", num_blocks=8, device="cpu", compile="on"
        )
        with pytest.raises(ConfigError, match="install a C\\+\\+ compiler if there is none"):
            Engine.from_config(config)


def test_activations_of_fewer_bits_are_compiled_too(
    model_dir: Callable[[TinyKind], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.cpu.int8_linear._part_bits", lambda: 7)
    plain, compiled = loaded_pair(model_dir("llama"), "int8")
    compile_layers(compiled.model)
    assert is_compiled(compiled.model)
    for ours, theirs in zip(all_steps(Runner(compiled)), all_steps(Runner(plain)), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.1


def test_another_process_finds_the_same_package(model_dir: Callable[[TinyKind], Path]) -> None:
    directory = model_dir("llama")
    compile_layers(loaded_as(directory).model)
    program = f"""
import logging
import sys
import torch
from server.cpu.compiled_layers import compile_layers
from server.cpu.packed_linear import pack_linears
from server.model.loading import load_model

logging.getLogger("euryale").addHandler(logging.StreamHandler(sys.stdout))
logging.getLogger("euryale").setLevel("INFO")
torch.set_num_threads({torch.get_num_threads()})
model = load_model({str(directory)!r}, "cpu", "float32").model
pack_linears(model)
compile_layers(model)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.fixture
def own_packages(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for one test alone, which begins with what the other tests compiled so far."""
    own = tmp_path / "compiled"
    own.mkdir()
    for package in packages.glob("*.pt2"):
        shutil.copy(package, own)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return own


def test_a_damaged_package_is_compiled_again(
    model_dir: Callable[[TinyKind], Path], own_packages: Path, log: LogLines
) -> None:
    loaded, again = loaded_pair(model_dir("llama"), "none")
    compile_layers(loaded.model)
    for package in own_packages.glob("*.pt2"):
        package.write_bytes(package.read_bytes()[:100])
    log.take()
    compile_layers(again.model)
    package_path, _, remark = log.take()[0].partition(" ")
    assert Path(package_path).parent == own_packages
    assert remark.startswith("cannot be used, so it is compiled again: ")
    assert torch.equal(Runner(loaded).logits([3, 4], 0), Runner(again).logits([3, 4], 0))


def test_a_kept_package_that_computes_something_else_is_compiled_again(
    model_dir: Callable[[TinyKind], Path], own_packages: Path, log: LogLines
) -> None:
    plain, loaded = loaded_pair(model_dir("llama"), "none")
    other = loaded_as(model_dir("llama"))
    for layer in layers_of(other.model):
        layer.get_submodule("mlp").act_fn = nn.Tanh()
    compile_layers(plain.model)
    right = set(own_packages.glob("*.pt2"))
    compile_layers(other.model)
    (wrong,) = set(own_packages.glob("*.pt2")) - right
    for package in right:
        shutil.copy(wrong, package)

    log.take()
    compile_layers(loaded.model)
    assert "LlamaDecoderLayer computes something else when it is compiled" in log.take()[0]
    assert torch.equal(Runner(loaded).logits([3, 4], 0), Runner(plain).logits([3, 4], 0))


def test_a_cache_that_cannot_be_written_leaves_the_model_as_it_is(
    model_dir: Callable[[TinyKind], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    (tmp_path / "compiled").write_text("in the way")
    loaded = loaded_as(model_dir("llama"))
    with pytest.raises(CompilationError, match="LlamaDecoderLayer cannot be compiled: "):
        compile_layers(loaded.model)
    assert not is_compiled(loaded.model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_token_among_many_is_seen(
    dtype: str, model_dir: Callable[[TinyKind], Path]
) -> None:
    loaded = load_model(str(model_dir("llama")), "cpu", dtype)
    call = record_calls(loaded.model, list(layers_of(loaded.model)))[0]

    def run(tensors: list[Tensor], factor: float) -> Tensor:
        change = (call.output - call.inputs[0])[:, : tensors[0].shape[1]]
        change[:, -1] *= factor
        return tensors[0] + change

    check_compiled(call, functools.partial(run, factor=1.0), EchoBackend())
    with pytest.raises(CompilationError, match=f"token {NUM_TOKENS - 1} of {NUM_TOKENS}"):
        check_compiled(call, functools.partial(run, factor=1.1), EchoBackend())


def test_code_that_computes_something_else_is_refused(
    model_dir: Callable[[TinyKind], Path],
) -> None:
    loaded = loaded_as(model_dir("llama"))
    layers = layers_of(loaded.model)
    forwards = [layer.forward for layer in layers]

    class Odd(nn.Module):
        """Its plain attributes do not tell what it computes."""

        def __init__(self, factor: list[Tensor]) -> None:
            super().__init__()
            self._factor = factor

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * float(self._factor[0])

    for index, layer in enumerate(layers):
        layer.mlp = Odd([torch.tensor(1.0 + index)])
    with pytest.raises(CompilationError, match="computes something else"):
        compile_layers(loaded.model)
    assert [layer.forward for layer in layers] == forwards


def test_a_model_without_layers_is_refused(model_dir: Callable[[TinyKind], Path]) -> None:
    loaded = loaded_as(model_dir("llama"))
    del loaded.model.base_model.layers
    with pytest.raises(CompilationError, match="no plain list of decoder layers"):
        compile_layers(loaded.model)
