"""What methods share that leave the base model as it is: its hidden states can be kept."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from server.cli.console import progress_bar
from server.cli.values import Between
from server.errors import ModelError
from training.errors import RunError
from training.methods.method import Task
from training.states.hidden_cache import HiddenCacheOptions, HiddenStateCache
from training.states.hidden_states import HiddenStates

_LOGGER = logging.getLogger("euryale.training")


class CachedSource(Protocol):
    """A source of batches that can keep all hidden states in memory."""

    def fill_cache(self, on_documents: Callable[[int], None]) -> None:
        """Compute all hidden states now; see `ExampleSource.fill_cache`."""


@dataclass(frozen=True, kw_only=True)
class FrozenBase(HiddenCacheOptions):
    """Options of methods whose base model is frozen.

    Attributes:
        kl_weight: Share of the loss that is the divergence from the base model's own distribution,
            in place of the cross-entropy with the token that it drew.
    """

    is_base_frozen: ClassVar[bool] = True

    kl_weight: Annotated[float, Between(0, 1)] = 0.0

    def check_sharded(self) -> None:
        """Reject a cache on disk, for which one process runs the base without the others.

        Raises:
            RunError: If there is one.
        """
        if self.hidden_cache is not None:
            raise RunError(
                f"hidden_cache is {self.hidden_cache}, of which each process computes what it "
                "lacks, but with sharding all must run the base together; leave out one of them"
            )

    def hidden_states(self, task: Task) -> HiddenStates:
        """Return where hidden states come from; those that disk lacks are computed now.

        Each process computes its share of them.

        Raises:
            ModelError: If the model's distribution counts but is not known.
            DataError: If a file of the cache is damaged.
            RunError: If the cache is no directory or cannot be written.
        """
        if self.kl_weight > 0.0 and not task.encoder.has_plain_logits:
            raise ModelError(
                f"kl_weight is {self.kl_weight:g}, but model {task.loaded.name!r} scales, caps or "
                "shifts its logits, so that its distribution is not known; leave it out"
            )
        cache = self.open_cache(task.encoder, task.loaded)
        if cache is None:
            return task.encoder
        _fill(cache, task)
        return cache


def _fill(cache: HiddenStateCache, task: Task) -> None:
    documents, processes = task.answers.documents, task.processes
    missing = cache.missing(documents)
    # None writes before all have looked.
    processes.wait()
    share = missing[processes.rank :: processes.count]
    if missing:
        _LOGGER.info(
            "hidden states of %d of %d documents are missing", len(missing), len(documents)
        )
    bar_of = progress_bar("hidden states to disk", len(share))
    with task.usage.stage("hidden_states"), bar_of as bar:
        cache.fill(share, bar.advance)
        processes.wait()
    cache.refresh()


def fill_memory(task: Task, source: CachedSource) -> None:
    """Compute the hidden states that are to be kept in memory, while a bar shows how far it is."""
    if task.is_cached:
        bar_of = progress_bar("hidden states", len(task.train.documents))
        with task.usage.stage("hidden_states"), bar_of as bar:
            source.fill_cache(bar.advance)
