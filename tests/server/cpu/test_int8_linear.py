"""Layers with int8 weights against a float64 product with the weights that they stand for."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from server.config import EngineConfig, SamplingParams
from server.core.request import Request
from server.cpu.int8_kernel import Int8Kernel
from server.cpu.int8_linear import Int8Linear, can_quantize, quantize_linears
from server.cpu.shared_input import Sibling
from server.engine.engine import Engine
from tests.support.engine_tools import random_prompt
from tests.support.own_code import own_kernel
from tests.support.tiny_heads import save_tiny_heads
from tests.support.tiny_models import TINY_KINDS, TinyKind, save_tiny_model, tiny_config

pytestmark = pytest.mark.skipif(
    not can_quantize(), reason="this build of torch multiplies no int8 on this CPU"
)


@pytest.fixture(scope="module", params=["onednn", "own"])
def kernel(request: pytest.FixtureRequest) -> Int8Kernel | None:
    return own_kernel() if request.param == "own" else None


class DoubledLinear(nn.Linear):
    """A subclass that computes something else, as some models have them."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def make_linear(inputs: int, outputs: int, has_bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=has_bias).requires_grad_(False)


def rounded(weight_OI: Tensor) -> Tensor:
    """The weight in float64 with each row rounded to 255 even steps, one element at a time."""
    rows = []
    for row in weight_OI.double().tolist():
        step = max(abs(w) for w in row) / 127
        rows.append([step * round(w / step) if step else 0.0 for w in row])
    return torch.tensor(rows, dtype=torch.float64)


def slow_product(rows: Tensor, linear: nn.Linear) -> Tensor:
    output = rows.double() @ rounded(linear.weight).T
    return output if linear.bias is None else output + linear.bias.double()


def error_bound(rows: Tensor, linear: nn.Linear) -> Tensor:
    """What activations of 14 bits, the fewest of any machine, may change at most."""
    spread = rows.double().amax(-1, keepdim=True) - rows.double().amin(-1, keepdim=True)
    return spread / 2**14 * rounded(linear.weight).abs().sum(1) + 1e-5


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 33, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 20), (7, 5), (130, 64)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_computes_the_product_with_its_rounded_weights(
    num_rows: int, inputs: int, outputs: int, has_bias: bool, kernel: Int8Kernel | None
) -> None:
    torch.manual_seed(num_rows)
    linear = make_linear(inputs, outputs, has_bias)
    rows = torch.randn(num_rows, inputs)

    computed = Int8Linear(linear, kernel=kernel)(rows)

    assert computed.dtype == torch.float32
    distance = (computed.double() - slow_product(rows, linear)).abs()
    assert (distance <= error_bound(rows, linear)).all()


@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(48),
        torch.full((48,), -3.0),
        torch.cat((torch.full((1,), 2000.0), torch.full((47,), 0.5))),
        torch.cat((torch.full((1,), -2000.0), torch.full((47,), 0.5))),
        torch.linspace(5.0, 6.0, 48),
        torch.linspace(-1e-6, 1e-6, 48),
    ],
    ids=["zeros", "constant", "outlier", "negative outlier", "far from zero", "tiny"],
)
def test_rows_of_any_shape_keep_the_bound(row: Tensor, kernel: Int8Kernel | None) -> None:
    torch.manual_seed(0)
    linear = make_linear(48, 20)
    distance = (
        Int8Linear(linear, kernel=kernel)(row[None]).double() - slow_product(row[None], linear)
    ).abs()

    assert (distance <= error_bound(row[None], linear)).all()


def test_the_largest_codes_and_weights_do_not_overflow(kernel: Int8Kernel | None) -> None:
    linear = make_linear(1536, 8, has_bias=False)
    linear.weight.fill_(1.0)
    rows = torch.ones(3, 1536)
    rows[:, 0] = -1.0

    # An overflow would halve it.
    computed = Int8Linear(linear, kernel=kernel)(rows)
    torch.testing.assert_close(computed, torch.full((3, 8), 1534.0), rtol=1e-4, atol=0.0)


def test_an_output_channel_of_zeros_gives_zero(kernel: Int8Kernel | None) -> None:
    linear = make_linear(16, 4, has_bias=False)
    linear.weight[2] = 0.0

    assert (Int8Linear(linear, kernel=kernel)(torch.randn(3, 16))[:, 2] == 0.0).all()


@pytest.mark.parametrize("num_neighbours", [1, 7, 31, 63])
def test_a_row_does_not_depend_on_its_neighbours(
    num_neighbours: int, kernel: Int8Kernel | None
) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(make_linear(64, 40), kernel=kernel)
    row = torch.randn(1, 64)
    outliers = torch.randn(num_neighbours, 64) * 1e4

    among = layer(torch.cat((outliers, row)))[-1:]

    torch.testing.assert_close(among, layer(row), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(16,), (1, 3, 16), (2, 0, 16), (2, 1, 2, 16)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...], kernel: Int8Kernel | None) -> None:
    layer = Int8Linear(make_linear(16, 8), kernel=kernel)
    rows = torch.randn(shape)
    expected = layer(rows.reshape(-1, 16)).reshape(*shape[:-1], 8)

    torch.testing.assert_close(layer(rows), expected)


def test_a_view_that_is_not_contiguous_is_read_right_and_left_as_it_is(
    kernel: Int8Kernel | None,
) -> None:
    layer = Int8Linear(make_linear(16, 8), kernel=kernel)
    rows = torch.randn(16, 5).T
    before = rows.clone()

    torch.testing.assert_close(layer(rows), layer(rows.contiguous()))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False)])
def test_joined_layers_give_their_outputs_side_by_side(
    biases: tuple[bool, bool], kernel: Int8Kernel | None
) -> None:
    first, second = make_linear(24, 8, biases[0]), make_linear(24, 5, biases[1])
    rows = torch.randn(3, 24)

    expected = torch.cat([Int8Linear(one, kernel=kernel)(rows) for one in (first, second)], dim=-1)
    torch.testing.assert_close(Int8Linear(first, second, kernel=kernel)(rows), expected)


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_a_model_computes_what_it_computes_with_rounded_weights(
    kind: TinyKind, kernel: Int8Kernel | None
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).eval()
    model.requires_grad_(False)
    quantized = copy.deepcopy(model)
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for linear in linears:
        # A new parameter, as the unembedding's may be tied to the embedding, which stays exact.
        linear.weight = nn.Parameter(rounded(linear.weight).float(), requires_grad=False)
    ids = torch.randint(3, 300, (1, 40))

    assert quantize_linears(quantized, kernel) == len(linears) > 0
    with torch.inference_mode():
        expected, computed = model(input_ids=ids).logits, quantized(input_ids=ids).logits
    distance_T = ((computed - expected).norm(dim=-1) / expected.norm(dim=-1))[0]
    # Rounding may turn a close choice of experts, and with it a token and those that see it.
    assert distance_T.median() < 0.005
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())


def test_projections_of_one_input_are_joined() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32)
    quantize_linears(model)
    layer = model.get_submodule("model.layers.0")

    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert type(layer.get_submodule(name)) is Sibling
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert type(layer.get_submodule(name)) is Int8Linear


def test_a_tied_embedding_stays_as_it_is() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32)
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    quantize_linears(model)

    assert model.get_input_embeddings().weight is weight
    assert torch.equal(weight, before)


def test_the_plain_weights_are_not_kept(kernel: Int8Kernel | None) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_linears(model, kernel)

    assert list(model.parameters()) == []
    assert model.state_dict() == {}
    assert repr(model[0]) == "Int8Linear(in_features=8, out_features=8)"


def test_subclasses_of_linear_stay() -> None:
    model = nn.Sequential(DoubledLinear(8, 8), nn.Linear(8, 8))

    assert quantize_linears(model) == 1
    assert type(model[0]) is DoubledLinear


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_a_cpu_with_fewer_instructions_computes_the_same(isa: str) -> None:
    # Without VNNI a product of full codes overflows; oneDNN reads the limit once per process.
    names = (
        "test_a_layer_computes",
        "test_rows_of_any_shape",
        "test_the_largest_codes",
        "test_a_row_does_not_depend",
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", " or ".join(names)], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Engine]:
    """Engines with int8 weights by the size of their trees."""
    model = save_tiny_model("llama", tmp_path_factory.mktemp("int8") / "model")
    heads = save_tiny_heads(model, tmp_path_factory.mktemp("int8") / "heads")
    return {
        num_nodes: Engine.from_config(
            EngineConfig(
                model=str(model),
                heads=str(heads),
                device="cpu",
                quantization="int8",
                num_blocks=256,
                max_nodes=num_nodes,
                tree_size=num_nodes,
            )
        )
        for num_nodes in (1, 12)
    }


def answers(engine: Engine, is_together: bool) -> list[tuple[int, ...]]:
    requests = [
        Request(str(i), random_prompt(i, 4 + i), SamplingParams(max_tokens=24, temperature=0.0))
        for i in range(6)
    ]
    if is_together:
        return [done.token_ids for done in engine.generate(requests)]
    return [engine.generate([request])[0].token_ids for request in requests]


def test_neither_drafts_nor_neighbours_change_a_greedy_text(engines: dict[int, Engine]) -> None:
    alone = answers(engines[1], is_together=False)
    for engine in engines.values():
        assert answers(engine, is_together=True) == alone
        assert engine.counters.num_accepted_tokens > 0 or engine is engines[1]


def test_a_whole_text_gives_the_logits_of_its_beginning(kernel: Int8Kernel | None) -> None:
    """Codes may turn the last bits of a state into a step of 1/65025 of a row's range, no more."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32).eval()
    quantize_linears(model, kernel)
    ids = torch.randint(3, 300, (1, 60))
    with torch.inference_mode():
        whole, beginning = model(input_ids=ids).logits, model(input_ids=ids[:, :9]).logits

    assert (whole[:, :9] - beginning).norm() / beginning.norm() < 1e-3


def test_heads_stay_in_float(engines: dict[int, Engine]) -> None:
    loaded = engines[12].loaded

    assert type(loaded.model.get_output_embeddings()) is Int8Linear
    assert loaded.unembedding().dtype == loaded.input_embedding().dtype == torch.float32
