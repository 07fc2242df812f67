import copy
import json
from pathlib import Path

import pytest
import torch

from server.attention.hook import AttentionContext
from server.errors import ModelError
from server.model.decoder_layer import DecoderLayer
from server.model.loading import load_model
from tests.support.tiny_models import TinyKind, save_tiny_model
from training.methods.unrolled_attention import Unroll, UnrolledAttention


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mixtral", "glm4_moe", "gemma3"])
def test_the_layer_computes_what_its_class_does_with_torch_attention(
    kind: TinyKind, tmp_path: Path
) -> None:
    save_tiny_model(kind, tmp_path, 0)
    rotary_keywords = {}
    if kind == "gemma3":
        # The new layer is like the last one, whose rotation is not that of layers with a window.
        path = tmp_path / "config.json"
        types = ["sliding_attention", "sliding_attention", "full_attention"]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": types}))
        rotary_keywords = {"layer_type": "full_attention"}
    model = load_model(str(tmp_path), "cpu", "float32").model
    layer = DecoderLayer(model)
    positions = torch.arange(1, 12)
    memory = Unroll()
    memory.begin_depth([positions])
    u_TD = torch.randn(11, model.config.hidden_size)
    found = layer.run(u_TD, positions, AttentionContext(UnrolledAttention(), memory))

    reference = copy.deepcopy(layer.module)
    for part in reference.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = "eager"  # type: ignore[union-attr]
    mask = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    rotary = model.base_model.get_submodule("rotary_emb")(
        u_TD[None], position_ids=positions[None], **rotary_keywords
    )
    expected = reference(u_TD[None], attention_mask=mask, position_embeddings=rotary)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert torch.allclose(found, expected.view_as(found), rtol=1e-4, atol=1e-4)


def test_the_base_model_stays_as_it_is(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, 0)
    model = load_model(str(tmp_path), "cpu", "float32").model
    before = model.config._attn_implementation
    layer = DecoderLayer(model)
    assert model.config._attn_implementation == before
    assert not any(layer.module is part for part in model.modules())
    own = {id(weight) for weight in model.parameters()}
    assert not own & {id(weight) for weight in layer.module.parameters()}


def test_a_decoder_without_plain_layers_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, 0)
    model = load_model(str(tmp_path), "cpu", "float32").model
    del model.base_model.rotary_emb
    with pytest.raises(ModelError, match="Medusa heads do not"):
        DecoderLayer(model)
