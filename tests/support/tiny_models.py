"""Tiny random base models, saved as ordinary checkpoints, for tests of everything above them.

Weights are float32 and large enough that greedy outputs wander and the gap between the best two
logits is wide: floating-point noise between two ways to compute a step cannot flip an argmax.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TinyKind = Literal["llama", "qwen2", "qwen3", "mistral", "gemma3", "mixtral", "glm4_moe"]
TINY_KINDS: tuple[TinyKind, ...] = get_args(TinyKind)

VOCAB_SIZE = 320
MAX_MODEL_LEN = 512
# Shorter than most tests' texts, so that sliding windows slide.
SLIDING_WINDOW = 12
# Tokenizer classes of some architectures insist on an <|endoftext|>.
PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<|begin|>", "<|endoftext|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_CORPUS = (
    "The euryale is a jellyfish, and its many arms reach for prey at the same time.",
    "A draft tree has a root and many nodes; the target model verifies all of them at once.",
    "user: How many tokens does one step emit? assistant: At least one, and often three or four.",
    "Accepted tokens leave the tree along a path, and the bonus token becomes the next root.",
    "def step(self): return [output for output in self.outputs if output.is_finished]",
    "Was es nicht gibt: Bäume ohne Wurzel. Ça va très bien, merci. 你好世界。 Привет, мир!",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` tokens with a chat template."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD_TOKEN, BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rust.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(kind: TinyKind) -> PreTrainedConfig:
    """A configuration of a few layers with grouped key/value heads."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": MAX_MODEL_LEN,
        "initializer_range": 0.7,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    match kind:
        case "llama":
            return LlamaConfig(**sizes, tie_word_embeddings=True)
        case "qwen2":
            return Qwen2Config(**sizes, tie_word_embeddings=False)
        case "qwen3":
            return Qwen3Config(**sizes, tie_word_embeddings=True)
        case "mistral":
            return MistralConfig(**sizes, sliding_window=SLIDING_WINDOW)
        case "gemma3":
            return Gemma3TextConfig(
                **sizes,
                tie_word_embeddings=False,
                sliding_window=SLIDING_WINDOW,
                query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            )
        case "mixtral":
            return MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
        case "glm4_moe":
            return Glm4MoeConfig(
                **sizes, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2
            )


def save_tiny_model(kind: TinyKind, directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint that `load_model` takes; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
