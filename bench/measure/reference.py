"""The plain transformers model that the engine is compared with: own weights, own code.

A second copy of the base model, loaded by transformers alone: none of our attention, packed
weights or step logic is in it.

Shapes: V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from bench.errors import BenchError
from bench.measure.timing import Timing, device_waiter
from server.model.loading import LoadedModel
from server.model.progress import quiet_transformers
from server.model.source import resolve_model


class ReferenceModel:
    """transformers' model and its greedy `generate`, with SDPA attention.

    Args:
        loaded: What the engine runs; name, device, type and end tokens are taken from it.

    Attributes:
        model: In evaluation mode.

    Raises:
        BenchError: If an adapter is merged into what the engine runs.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        if loaded.adapter_sha256 is not None:
            raise BenchError(
                f"the heads bring an adapter for {loaded.name}, which transformers' model would "
                "lack; give heads without one"
            )
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(
                resolve_model(loaded.name),
                dtype=loaded.dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
            )
        model.requires_grad_(False).to(loaded.device)
        self._device = loaded.device
        self._wait_for_device = device_waiter(loaded.device)
        end_ids = sorted(loaded.eos_token_ids)
        # NOTE: generate() fills what a passed configuration leaves open from the model's own one,
        # repetition penalties included. So the model's own one is replaced.
        model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            eos_token_id=end_ids or None,
            pad_token_id=end_ids[0] if end_ids else 0,
        )
        self.model: PreTrainedModel = model
        self._generate: Callable[..., Tensor] = model.generate

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        max_new_tokens: int,
        num_lookup_tokens: int | None = None,
    ) -> tuple[Timing, tuple[int, ...]]:
        """Decode greedily; an end token is part of the output, as it is of the engine's.

        Args:
            prompt_token_ids: At least one token.
            max_new_tokens: Longest output.
            num_lookup_tokens: Draft tokens of transformers' own prompt lookup; None drafts nothing.
        """
        clock = _FirstTokenClock(self._wait_for_device)
        start = time.perf_counter()
        prompt_1T = torch.tensor([list(prompt_token_ids)], device=self._device)
        output_1T = self._generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=max_new_tokens,
            prompt_lookup_num_tokens=num_lookup_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        token_ids = tuple(output_1T[0, prompt_1T.shape[1] :].tolist())
        request_s = time.perf_counter() - start
        return Timing(len(token_ids), request_s, clock.first_token_at - start), token_ids

    @torch.inference_mode()
    def next_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Float32 logits [V] after the given tokens, from one forward pass without a cache."""
        input_1T = torch.tensor([list(token_ids)], device=self._device)
        output = self.model(input_ids=input_1T, use_cache=False, logits_to_keep=1)
        logits_V: Tensor = output.logits[0, -1]
        return logits_V.float()


class _FirstTokenClock(StoppingCriteria):
    """Never stops a generation, but notes when its first token was there."""

    def __init__(self, wait_for_device: Callable[[], None]) -> None:
        self.first_token_at = 0.0
        self._wait_for_device = wait_for_device

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if not self.first_token_at:
            self._wait_for_device()
            self.first_token_at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
