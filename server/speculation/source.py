"""What a draft source is, and what one is made from.

A source proposes tokens for a sequence's next step. Some do so from the text alone, on the host;
others run on the device at the end of a step, from the base model's hidden states (`drafter`).
Members lie in `server.speculation.sources`, whose table names them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from heads.proposals import Proposal
from server.config import EngineConfig
from server.core.sequence import Sequence
from server.core.step import Outcome, StepEntry
from server.device.base import DraftProducts
from server.executor.executor import Drafter
from server.kv.block_manager import BlockManager
from server.kv.kv_cache import KVCache
from server.model.draft_heads import DraftHeads


class DraftSource(Protocol):
    """Proposes tokens; everything that it need not do has a default.

    Attributes:
        name: Its name in requests and usage, and the key of its state in `Sequence.drafting`.
        drafter: The part that runs on the device; None for a source of the host alone.
        ratios: What its raw probabilities are multiplied by at first, by cell.
    """

    name: str
    drafter: Drafter | None = None
    ratios: Mapping[int, float] = {}

    def prepare(self, sequence: Sequence) -> None:
        """Gather what drafting needs of a prompt; once per request, before its first step."""
        return

    def admit(self, sequence: Sequence) -> None:
        """Take note that the sequence got blocks that hold the beginning of its tokens.

        Comes after `prepare`, and again after each preemption.
        """
        return

    def reserve(self, entry: StepEntry) -> None:
        """Reserve what drafting behind this verified entry's step needs."""
        return

    def propose(self, sequence: Sequence) -> Proposal | None:
        """What may follow the sequence's last token; sources without a `drafter` are asked."""
        return None

    def learn(self, outcome: Outcome) -> None:
        """Take note of what became of a step of a sequence that this source drafts for."""
        return


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What sources are made from.

    Attributes:
        config: Options of the engine.
        draft: The draft heads; None if none are loaded.
        cache: Has room for an MTP module's KV if the heads are one.
        blocks: Blocks of that cache.
        products: What draft heads are to multiply with.
    """

    config: EngineConfig
    draft: DraftHeads | None
    cache: KVCache
    blocks: BlockManager
    products: DraftProducts


# Returns None where the server does not have the source.
MakeSource = Callable[[SourceContext], DraftSource | None]
