"""Keeps measured step costs on disk, so that later starts need not measure again.

A file holds what its measurement hangs on beside the costs. One that is damaged or of something
else is measured again, and so is one whose machine has become faster or slower since.
"""

import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from heads.files import atomic_write
from server.device.base import Accelerated
from server.device.create import create_device
from server.model.draft_heads import DraftHeads
from server.model.loading import LoadedModel
from server.speculation.cost_model import CostModel, Probes, measure, root_step_s

# A step of one token may take that many times what it took when it was measured, or that part.
_TOLERANCE = 1.5
_log = logging.getLogger("euryale.speculation")


@dataclass(frozen=True, slots=True)
class CostCache:
    """Where the costs of one server are kept.

    Attributes:
        directory: Of all measurements; need not exist.
        key: What the costs hang on; plain JSON.
    """

    directory: Path
    key: Mapping[str, object]

    @property
    def path(self) -> Path:
        """The file of this key."""
        text = json.dumps(self.key, sort_keys=True)
        return self.directory / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def load(self) -> CostModel | None:
        """Read the costs; None if they were never measured.

        Raises:
            ValueError: If the file is damaged or belongs to another key.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror})") from error
        try:
            found = json.loads(text)
            key, costs = found["key"], _cost_model(found["costs"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"is damaged ({error})") from error
        if key != json.loads(json.dumps(self.key)):
            raise ValueError("belongs to another model, machine or version")
        return costs

    def save(self, costs: CostModel) -> None:
        """Write the costs; the file is whole or as it was.

        Raises:
            OSError: If it cannot be written.
        """
        with atomic_write(self.path) as file:
            json.dump({"key": self.key, "costs": asdict(costs)}, file)


def cached_costs(cache: CostCache, probes: Probes, remeasure: bool = False) -> CostModel:
    """Take the costs from the cache if they still hold, or measure and keep them.

    Args:
        cache: Of this server.
        probes: What a measurement runs.
        remeasure: Measure whatever the cache holds.
    """
    costs = None if remeasure else _costs_that_hold(cache, probes)
    if costs is not None:
        _log.info("step cost as measured before (kept in %s)", cache.path)
        return costs
    costs = measure(probes)
    try:
        cache.save(costs)
    except OSError as error:
        _log.info("the step cost cannot be kept in %s (%s)", cache.path, error.strerror)
    return costs


def cost_key(
    loaded: LoadedModel,
    draft: DraftHeads | None,
    block_size: int,
    max_nodes: int,
    probes: Probes,
    accelerated: Accelerated,
) -> dict[str, object]:
    """Name all that the costs of a server hang on.

    Args:
        loaded: The base model.
        draft: The draft heads, if there are any.
        block_size: Tokens of a KV block.
        max_nodes: Of a tree; an MTP module grows so many.
        probes: Their sizes count.
        accelerated: How the model was made fast.
    """
    return {
        "model": asdict(loaded.fingerprint),
        "adapter": loaded.adapter_sha256,
        "heads": None if draft is None else _shapes_of(draft),
        "dtype": str(loaded.dtype),
        "quantization": accelerated.quantization,
        "attention": accelerated.attention,
        "own_code": dict(accelerated.own_code),
        "device": create_device(loaded.device).model_name,
        "num_threads": torch.get_num_threads(),
        "num_cpus": os.cpu_count(),
        "torch": torch.__version__,
        "euryale": _own_version(),
        "block_size": block_size,
        "max_nodes": max_nodes,
        "context_len": probes.context_len,
        "num_further_tokens": probes.num_further_tokens,
        "num_sequences": probes.num_sequences,
        "max_tokens": probes.max_tokens,
    }


def _costs_that_hold(cache: CostCache, probes: Probes) -> CostModel | None:
    try:
        costs = cache.load()
    except ValueError as error:
        _log.info("%s %s; measuring again", cache.path, error)
        return None
    if costs is None:
        return None
    step_s, kept_s = root_step_s(probes), costs.step_s[0]
    if not 1.0 / _TOLERANCE <= step_s / kept_s <= _TOLERANCE:
        _log.info(
            "a step of one token takes %.1f ms, but took %.1f ms when its cost was kept; measuring "
            "again",
            1e3 * step_s,
            1e3 * kept_s,
        )
        return None
    return costs


def _cost_model(found: Mapping[str, object]) -> CostModel:
    costs = CostModel(**found)  # type: ignore[arg-type]
    sizes, steps_s = tuple(costs.num_tokens), tuple(costs.step_s)
    rising = all(low < high for low, high in itertools.pairwise(sizes))
    never_falling = list(steps_s) == sorted(steps_s)
    if len(sizes) != len(steps_s) or len(sizes) < 2 or not (rising and never_falling):
        raise ValueError(f"step sizes {sizes} with seconds {steps_s}")
    numbers = (*sizes, *steps_s, *astuple(costs)[2:])
    if not all(math.isfinite(number) and number >= 0.0 for number in numbers) or steps_s[0] <= 0.0:
        raise ValueError(f"costs {numbers}")
    return CostModel(sizes, steps_s, *astuple(costs)[2:])


def _shapes_of(draft: DraftHeads) -> str:
    shapes = [(name, tuple(p.shape)) for name, p in draft.heads.named_parameters()]
    depth = None if draft.profile is None else draft.profile.max_depth
    text = repr((type(draft.heads).__name__, sorted(shapes), depth))
    return hashlib.sha256(text.encode()).hexdigest()


def _own_version() -> str:
    try:
        return version("euryale")
    except PackageNotFoundError:
        return "unknown"
