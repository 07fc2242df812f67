"""Attention backends by name, one of them outside of the tree."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from server.attention.backend import AttentionBackend, AttentionBatch
from server.attention.create import ATTENTION_BACKENDS, create_attention
from server.attention.sdpa import SDPABackend
from server.config import EngineConfig
from server.cpu import own_library
from server.cpu.tree_attention import OwnAttention
from server.engine.engine import Engine
from server.errors import ConfigError
from server.kv.kv_cache import KVCache, KVLayout
from tests.support.engine_tools import SlowModel, assert_as_expected, make_request, random_prompt
from tests.support.own_code import own_attention
from tests.support.tiny_models import save_tiny_model

LAYOUT = KVLayout(1, 2, 8, 4, torch.float32, torch.device("cpu"))


class ToyAttention(AttentionBackend):
    """Lets another backend attend and counts the layers."""

    num_layers = 0

    def __init__(self, kv_cache: KVCache) -> None:
        self._inner = SDPABackend(kv_cache)

    @override
    def prepare(self, batch: AttentionBatch) -> object:
        return self._inner.prepare(batch)

    @override
    def forward(self, queries_HTC: Tensor, *args: object) -> Tensor:
        ToyAttention.num_layers += 1
        return self._inner.forward(queries_HTC, *args)  # type: ignore[arg-type]


TOY = f"{ToyAttention.__module__}:ToyAttention"


def test_names_stand_for_backends() -> None:
    assert type(create_attention("sdpa", KVCache(LAYOUT, 2))) is SDPABackend
    own_attention()
    assert type(create_attention("cpu", KVCache(LAYOUT, 2))) is OwnAttention


def test_a_backend_from_outside_is_its_factorys_name(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(save_tiny_model("llama", tmp_path)),
        heads="none",
        device="cpu",
        attention=TOY,
        num_blocks=32,
    )
    engine, request = Engine.from_config(config), make_request(random_prompt(2, 9), max_tokens=12)
    before = ToyAttention.num_layers
    (completion,) = engine.generate([request])
    assert_as_expected(completion, SlowModel().complete(request))
    assert ToyAttention.num_layers > before


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=rf"attention is 'flash'; give one of .*{'sdpa'}"):
        create_attention("flash", KVCache(LAYOUT, 2))
    assert "flash" not in ATTENTION_BACKENDS


@pytest.mark.parametrize("name", ["no_such_package:Backend", "server.attention.sdpa:Nothing"])
def test_a_factory_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"attention is '{name}', which cannot be imported"):
        create_attention(name, KVCache(LAYOUT, 2))


def test_our_own_attention_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_library, "cpu_features", lambda: "flags : sse")
    with pytest.raises(ConfigError, match="'cpu', but this CPU has no avx512f; give 'sdpa'"):
        create_attention("cpu", KVCache(LAYOUT, 2))


def test_our_own_attention_is_refused_for_a_cache_that_it_does_not_take() -> None:
    own_attention()
    layout = KVLayout(1, 2, 8, 4, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"'cpu', but KV is torch\.bfloat16 on cpu"):
        create_attention("cpu", KVCache(layout, 2))


def test_a_backend_without_an_operator_cannot_be_entered() -> None:
    backend = SDPABackend(KVCache(LAYOUT, 2))
    assert backend.operator is None
    with pytest.raises(NotImplementedError, match="SDPABackend has no operator"):
        backend.enter_layer(0, None)
