"""Draft heads for a tiny model, as a checkpoint."""

from pathlib import Path

import torch

from heads.checkpoint import save_heads
from heads.medusa import MedusaConfig, MedusaHeads
from server.model.loading import load_model


def save_tiny_heads(model_dir: Path, directory: Path) -> Path:
    """Heads with small random weights: some of their drafts are accepted, most are not."""
    loaded = load_model(str(model_dir), "cpu", "float32")
    config = MedusaConfig(loaded.hidden_size, loaded.vocab_size, num_heads=2)
    heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    save_heads(directory, heads, loaded.fingerprint, "tiny", None)
    return directory
