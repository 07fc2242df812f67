import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from server.attention.hook import AttentionContext, install_attention
from server.errors import ModelError
from server.model.loading import load_model
from server.model.native_mtp import NativeMTP, load_native_mtp
from tests.support.native_checkpoints import (
    NATIVE_NAMES,
    NUM_LAYERS,
    WIDTH,
    NativeName,
    random_ids,
    reference_states,
    save_native,
)
from tests.support.tiny_models import VOCAB_SIZE, save_tiny_model
from training.methods.unrolled_attention import Unroll, UnrolledAttention

pytestmark = pytest.mark.slow

LENGTH = 12
# Norms of small vectors blow float noise up; a swapped half or norm shows at 1.
TOLERANCE = 1e-3


def read(directory: Path) -> NativeMTP:
    return load_native_mtp(load_model(str(directory), "cpu", "float32"))


def unrolled(native: NativeMTP, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """States of depth 1 at positions 1, 2, ... and of depth 2 at 2, 3, ..."""
    memory = Unroll()
    context = AttentionContext(UnrolledAttention(), memory)
    states = []
    before, positions = hidden, torch.arange(1, len(ids) + 1)
    with torch.no_grad():
        for _ in range(2):
            memory.begin_depth([positions])
            run = native.layer.runner(positions, context)
            states.append(native.module(before, ids[positions - 1], run))
            before, positions = states[-1][:-1], positions[1:]
    return states[0], states[1]


@pytest.mark.parametrize("name", NATIVE_NAMES)
def test_two_depths_are_what_the_published_formula_gives(name: NativeName, tmp_path: Path) -> None:
    checkpoint = save_native(name, tmp_path)
    native = read(tmp_path)
    assert (native.layout, native.num_layers) == (checkpoint.kind.layout, 1)
    hidden, ids = torch.randn(LENGTH, WIDTH), random_ids(LENGTH)
    first, second = unrolled(native, hidden, ids)
    with torch.no_grad():
        expected = reference_states(checkpoint, hidden, ids)
        assert torch.allclose(first, expected, atol=TOLERANCE)
        for root in range(1, LENGTH):
            # The draft after the root, whose state before it is the layer's own output.
            chained = torch.cat((hidden[:root], expected[root - 1 : root]))
            deeper = reference_states(checkpoint, chained, ids[: root + 1])[-1]
            assert torch.allclose(second[root - 1], deeper, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_a_draft_is_what_transformers_gives(name: NativeName, tmp_path: Path) -> None:
    checkpoint = save_native(name, tmp_path)
    native = read(tmp_path)
    hidden, ids = torch.randn(LENGTH, WIDTH), random_ids(LENGTH)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    # It knows the layer's number only for the checkpoints that were published.
    pattern = checkpoint.kind.prefix.replace(".", r"\.")
    base._keys_to_ignore_on_load_unexpected = [pattern]
    theirs = MtpModel.from_pretrained(base)
    expected = theirs.forward_layer(
        0, hidden[None], torch.arange(1, LENGTH + 1)[None], None, input_ids=ids[None]
    )[0]
    assert torch.allclose(unrolled(native, hidden, ids)[0], expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["glm4_moe", "qwen2"])
def test_it_drafts_from_the_whole_vocabulary_by_the_bases_own_matrix(
    name: NativeName, tmp_path: Path
) -> None:
    save_native(name, tmp_path)
    loaded = load_model(str(tmp_path), "cpu", "float32")
    module = load_native_mtp(loaded).module
    states = torch.randn(3, WIDTH)
    assert torch.equal(module.draft_logits(states), states @ loaded.unembedding().T)
    assert module.draft_rows_UD.data_ptr() == loaded.unembedding().data_ptr()
    assert module.draft_vocab_ids.tolist() == list(range(VOCAB_SIZE))


def test_it_is_frozen_and_in_the_dtypes_of_the_base(tmp_path: Path) -> None:
    save_native("glm4_moe", tmp_path)
    loaded = load_model(str(tmp_path), "cpu", "bfloat16")
    native = load_native_mtp(loaded)
    last = f"layers.{loaded.num_layers - 1}."
    # transformers keeps a router in float32, from 5.24 on its weight too. Packed linear layers of
    # the base have no parameters any more.
    of_base = {
        f"block.{name.partition(last)[2]}": weight.dtype
        for name, weight in loaded.model.named_parameters()
        if last in name
    }
    dtypes = {name: weight.dtype for name, weight in native.module.named_parameters()}
    assert of_base.keys() <= dtypes.keys()
    assert dtypes == {name: of_base.get(name, torch.bfloat16) for name in dtypes}
    assert not any(weight.requires_grad for weight in native.module.parameters())
    assert not native.module.training


def test_it_loads_beside_a_base_that_attends_through_the_engine(tmp_path: Path) -> None:
    save_native("qwen3", tmp_path)
    loaded = load_model(str(tmp_path), "cpu", "float32")
    expected = load_native_mtp(loaded).module.state_dict()
    install_attention(loaded.model)
    found = load_native_mtp(loaded).module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_sharded_checkpoint_gives_the_same_module(tmp_path: Path) -> None:
    checkpoint = save_native("glm4_moe", tmp_path)
    expected = read(tmp_path).module.state_dict()
    checkpoint.shard()
    found = read(tmp_path).module.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_copies_of_the_bases_matrices_are_let_go(tmp_path: Path) -> None:
    checkpoint = save_native("glm4_moe", tmp_path)
    expected = read(tmp_path).module.state_dict()
    saved = checkpoint.saved()
    prefix = checkpoint.kind.prefix
    checkpoint.rewrite(
        {
            f"{prefix}embed_tokens.weight": saved["model.embed_tokens.weight"],
            f"{prefix}shared_head.head.weight": saved["lm_head.weight"],
        }
    )
    assert list(read(tmp_path).module.state_dict()) == list(expected)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_layer_with_a_matrix_of_its_own_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint = save_native("glm4_moe", tmp_path)
    checkpoint.rewrite({checkpoint.kind.prefix + name: torch.randn(VOCAB_SIZE, WIDTH)})
    with pytest.raises(ModelError, match=rf"{name} of .* differs from the base's own matrix"):
        read(tmp_path)


def test_the_first_of_two_layers_is_taken(tmp_path: Path) -> None:
    checkpoint = save_native("qwen2", tmp_path)
    expected = read(tmp_path).module.state_dict()
    checkpoint.rewrite(
        {
            name.replace("mtp_layers.0.", "mtp_layers.1."): torch.zeros_like(tensor)
            for name, tensor in checkpoint.tensors.items()
        }
    )
    native = read(tmp_path)
    assert native.num_layers == 2
    found = native.module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_base_without_an_mtp_layer_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    with pytest.raises(ModelError, match=r"no native MTP layer: none .* model.layers.3., mtp"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["self_attn.q_proj.weight", "mlp.shared_experts.up_proj.weight", "mlp.gate.weight"],
)
def test_a_missing_tensor_of_the_decoder_layer_is_named(name: str, tmp_path: Path) -> None:
    checkpoint = save_native("glm4_moe", tmp_path)
    checkpoint.rewrite({}, without=checkpoint.kind.block_prefix + name)
    with pytest.raises(ModelError, match=f"missing keys, like .*{name}"):
        read(tmp_path)


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    checkpoint = save_native("glm4_moe", tmp_path)
    checkpoint.rewrite({}, without=f"model.layers.{NUM_LAYERS}.mlp.experts.2.up_proj.weight")
    with pytest.raises(ModelError, match="MTP layer"):
        read(tmp_path)


def test_an_unknown_tensor_of_the_decoder_layer_is_named(tmp_path: Path) -> None:
    checkpoint = save_native("qwen3", tmp_path)
    checkpoint.rewrite({"mtp.layers.0.self_attn.sinks": torch.zeros(4)})
    with pytest.raises(ModelError, match=r"unexpected keys, like .*mtp.layers.0.self_attn.sinks"):
        read(tmp_path)


def test_a_decoder_layer_of_other_sizes_is_named(tmp_path: Path) -> None:
    checkpoint = save_native("qwen3", tmp_path)
    checkpoint.rewrite({"mtp.layers.0.mlp.up_proj.weight": torch.zeros(48, WIDTH)})
    with pytest.raises(ModelError, match=r"mtp.layers.0.mlp.up_proj.weight"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"), [("mtp.fc.weight", (WIDTH, WIDTH)), ("mtp.norm.weight", (WIDTH + 1,))]
)
def test_a_part_of_another_width_is_named(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    save_native("qwen3", tmp_path).rewrite({name: torch.zeros(shape)})
    with pytest.raises(ModelError, match=rf"{name} of .* has shape .*the base asks for"):
        read(tmp_path)


def test_a_layer_that_attends_unlike_the_last_one_is_refused(tmp_path: Path) -> None:
    save_native("qwen3", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"mtp_layer_types": ["sliding_attention"]}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'sliding_attention' and its last layer of the kind"):
        read(tmp_path)


def test_a_base_of_another_norm_is_refused(tmp_path: Path) -> None:
    save_native("qwen3", tmp_path)
    loaded = load_model(str(tmp_path), "cpu", "float32")
    del loaded.model.base_model.norm
    with pytest.raises(ModelError, match="no plain final RMS norm"):
        load_native_mtp(loaded)
