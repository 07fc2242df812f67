"""An MTP module as a draft source: what the host keeps and reserves for it."""

from heads.calibration import head_ratios
from heads.mtp import MTPModule
from server.attention.create import create_attention
from server.core.sequence import Sequence
from server.core.step import Outcome, StepEntry
from server.kv.block_manager import BlockManager
from server.speculation.source import DraftSource, SourceContext
from server.speculation.sources.medusa import profile_of
from server.speculation.sources.mtp_drafter import NAME, Growth, MTPDrafter, MTPState


class MTPSource(DraftSource):
    """Drafts with a module that attends, in blocks that its sequences own.

    Args:
        drafter: Runs the module.
        blocks: Gives the slots of growing trees, and knows which blocks the module has computed.
        block_size: Tokens of a block.
    """

    name = NAME

    def __init__(self, drafter: MTPDrafter, blocks: BlockManager, block_size: int) -> None:
        self.drafter: MTPDrafter = drafter
        self._blocks = blocks
        self._block_size = block_size

    def prepare(self, sequence: Sequence) -> None:
        """Gather the unembedding rows of prompt tokens that the draft vocabulary lacks."""
        seen_rows = self.drafter.seen_rows(sequence.request.prompt_token_ids)
        sequence.drafting[self.name] = MTPState(seen_rows)

    def admit(self, sequence: Sequence) -> None:
        """Find how much of the blocks' beginning the module has computed before."""
        num_blocks = self._blocks.num_drafted(sequence.block_table)
        num_tokens = num_blocks * self._block_size
        self._state(sequence).num_tokens = min(num_tokens, sequence.num_computed_tokens)

    def reserve(self, entry: StepEntry) -> None:
        """Reserve slots for the next root and for a tree behind it, wherever that comes to lie."""
        last_root = entry.root_position + entry.drafts.tree.max_depth + 1
        num_slots = last_root + 1 + self.drafter.growth.num_scratch
        self._state(entry.sequence).has_room = self._blocks.extend(
            entry.sequence.block_table, num_slots
        )

    def learn(self, outcome: Outcome) -> None:
        """Take note of the blocks that the module has computed whole."""
        sequence = outcome.entry.sequence
        num_whole = self._state(sequence).num_tokens // self._block_size
        self._blocks.mark_drafted(sequence.block_table[:num_whole])

    def _state(self, sequence: Sequence) -> MTPState:
        state: MTPState = sequence.drafting[self.name]
        return state


def make_mtp(context: SourceContext) -> MTPSource | None:
    """An MTP module, if one is loaded."""
    draft, config = context.draft, context.config
    if draft is None or not isinstance(draft.heads, MTPModule):
        return None
    if draft.layer is None:
        raise AssertionError("an MTP module came without its decoder layer")
    profile = profile_of(draft)
    drafter = MTPDrafter(
        draft.heads,
        draft.layer,
        context.cache,
        # NOTE: Its levels are few tokens with masks of their own; our own attention is not
        # measured for them.
        create_attention("sdpa", context.cache),
        context.products,
        Growth(num_nodes=config.max_nodes, num_depths=profile.max_depth),
        config.max_tokens_per_step,
    )
    source = MTPSource(drafter, context.blocks, config.block_size)
    source.ratios = head_ratios(profile.calibration_KC or ())
    return source
