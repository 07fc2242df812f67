import pytest

from server.errors import ModelError
from server.model.native_layouts import find_mtp_layer

BASE = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
QWEN = [
    f"mtp.{part}.weight" for part in ("pre_fc_norm_hidden", "pre_fc_norm_embedding", "fc", "norm")
]
DEEPSEEK = [
    f"model.layers.2.{part}.weight" for part in ("hnorm", "enorm", "eh_proj", "shared_head.norm")
]


def test_the_decoder_layers_tensors_are_told_from_the_rest() -> None:
    decoder = ["mtp.layers.0.mlp.up_proj.weight", "mtp.layers.0.input_layernorm.weight"]
    found = find_mtp_layer("m", [*BASE, *QWEN, *decoder], 1)
    assert found.layout.name == "Qwen3-Next"
    assert list(found.decoder) == decoder
    assert found.shared == ()


def test_copies_of_the_bases_matrices_are_no_part_of_the_decoder_layer() -> None:
    copies = ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"]
    found = find_mtp_layer("m", [*BASE, *DEEPSEEK, *copies], 2)
    assert found.layout.name == "DeepSeek-V3"
    assert list(found.shared) == copies
    assert found.decoder == ()


def test_layers_behind_the_first_are_counted_and_left() -> None:
    more = ["model.layers.3.enorm.weight", "model.layers.4.enorm.weight"]
    found = find_mtp_layer("m", [*BASE, *DEEPSEEK, *more], 2)
    # Without a decoder layer nothing but the parts carries the first layer's number.
    assert found.num_layers == 3
    assert found.decoder == ()


def test_layers_of_the_base_are_not_taken_for_an_mtp_layer() -> None:
    with pytest.raises(ModelError, match="m ships no native MTP layer"):
        find_mtp_layer("m", [*BASE, "model.layers.10.mlp.up_proj.weight"], 1)


@pytest.mark.parametrize("missing", [*QWEN, *DEEPSEEK])
def test_a_missing_part_is_named(missing: str) -> None:
    names = [name for name in (QWEN if missing in QWEN else DEEPSEEK) if name != missing]
    with pytest.raises(ModelError, match=f"lacks .*{missing}"):
        find_mtp_layer("m", [*BASE, *names], 2)


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(ModelError, match=r"has the unknown \['mtp.fc_hidden.weight'\]"):
        find_mtp_layer("m", [*BASE, *QWEN, "mtp.fc_hidden.weight"], 2)


def test_two_layouts_in_one_checkpoint_are_refused() -> None:
    with pytest.raises(ModelError, match=r"layouts of \['DeepSeek-V3', 'Qwen3-Next'\]"):
        find_mtp_layer("m", [*BASE, *QWEN, *DEEPSEEK], 2)
