"""LoRA adapters for tiny models, written by PEFT itself."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from heads.checkpoint import save_heads
from heads.lora import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterFiles
from heads.medusa import MedusaConfig, MedusaHeads
from server.model.loading import load_model

TARGETS = ("q_proj", "v_proj", "down_proj")


def adapted(model_dir: Path, **options: Any) -> PeftModel:
    """A tiny model with an adapter whose weights are large enough to change its outputs."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS)}
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with warnings.catch_warnings():
        # PEFT asks for a property that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        found = get_peft_model(model, LoraConfig(**(settings | options)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return found.eval()


def adapter_files(directory: Path) -> AdapterFiles:
    """What `save_pretrained` wrote."""
    return AdapterFiles(
        (directory / ADAPTER_CONFIG_FILE).read_bytes(),
        (directory / ADAPTER_WEIGHTS_FILE).read_bytes(),
    )


def save_tiny_adapter(model_dir: Path, directory: Path, **options: Any) -> AdapterFiles:
    """Write an adapter in PEFT's own format and read the files."""
    adapted(model_dir, **options).save_pretrained(str(directory))
    return adapter_files(directory)


def save_adapted_heads(model_dir: Path, directory: Path, adapter: AdapterFiles) -> Path:
    """Random heads that bring an adapter for their base."""
    loaded = load_model(str(model_dir), "cpu", "float32")
    config = MedusaConfig(loaded.hidden_size, loaded.vocab_size, num_heads=2)
    heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    save_heads(directory, heads, loaded.fingerprint, "tiny", None, adapter=adapter)
    return directory
