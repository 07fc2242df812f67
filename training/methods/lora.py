"""Puts a LoRA adapter on a loaded base model by PEFT, which is imported on first use only."""

import tempfile
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heads.errors import HeadsCheckpointError
from heads.lora import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterFiles, read_updates
from server.model.loading import LoadedModel
from training.errors import RunError

# Of `LoraPlan.targets`: all linear layers but the unembedding.
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Which adapter to train.

    Attributes:
        rank: Rank of each layer's update.
        alpha: The update is scaled by alpha / rank.
        targets: Last parts of layers' names; `all-linear` alone takes all but the unembedding.
        seed: Decides the initial weights.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int


class AdaptedBase:
    """A base model with an adapter, which starts without effect.

    Args:
        loaded: Unpacked base model; changed in place, so that the adapter is part of it wherever it
            runs.
        plan: Says which adapter.

    Attributes:
        parameters: The adapter's weights, float32, by their names in PEFT's model.

    Raises:
        RunError: If PEFT is not installed, or the plan does not fit the model.
    """

    def __init__(self, loaded: LoadedModel, plan: LoraPlan) -> None:
        linears = {n for n, module in loaded.model.named_modules() if type(module) is nn.Linear}
        self._model = _wrapped(loaded, plan)
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }
        self._check(linears, plan)

    def _check(self, linears: set[str], plan: LoraPlan) -> None:
        """Reject now what could not be served later."""
        try:
            adapted = set(read_updates(self.files()))
        except HeadsCheckpointError as error:
            raise RunError(f"lora targets are {', '.join(plan.targets)}: {error}") from error
        unembedding = self._model.get_output_embeddings()
        names = {
            n for n, module in self._model.base_model.model.named_modules() if module is unembedding
        }
        refused = sorted((adapted - linears) | (adapted & names))
        if refused:
            raise RunError(
                f"lora targets are {', '.join(plan.targets)}, which takes in {refused[0]}; only "
                "linear layers other than the unembedding can be adapted"
            )

    def without(self) -> AbstractContextManager[None]:
        """Switch the adapter off for as long as the context lasts."""
        context: AbstractContextManager[None] = self._model.disable_adapter()
        return context

    def files(self) -> AdapterFiles:
        """Return the adapter as PEFT saves it."""
        with tempfile.TemporaryDirectory() as directory:
            # NOTE: left to itself, PEFT asks the hub whether the vocabulary was resized.
            self._model.save_pretrained(directory, save_embedding_layers=False)
            return AdapterFiles(
                (Path(directory) / ADAPTER_CONFIG_FILE).read_bytes(),
                (Path(directory) / ADAPTER_WEIGHTS_FILE).read_bytes(),
            )


def _wrapped(loaded: LoadedModel, plan: LoraPlan) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RunError(
            "training an adapter needs peft; install it with pip install 'euryale[medusa2]'"
        ) from error
    targets = ALL_LINEAR if plan.targets == (ALL_LINEAR,) else list(plan.targets)
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,  # type: ignore[arg-type]  # declared int, used as a number
        target_modules=targets,
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # PEFT asks for a property that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(plan.seed)
        try:
            model = get_peft_model(loaded.model, config).eval()
        except ValueError as error:
            raise RunError(f"lora targets are {', '.join(plan.targets)}: {error}") from error
    # PEFT takes the path that the weights were read from.
    config.base_model_name_or_path = loaded.name
    return model
