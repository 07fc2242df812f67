"""Prompt lookup as a draft source: copies what followed the newest tokens earlier in the text."""

from heads.lookup import LookupIndex, LookupProposal
from server.core.sequence import Sequence
from server.speculation.source import DraftSource, SourceContext

_NUM_MATCHES = 4
# Longest continuation that is copied.
MAX_TOKENS = 24


class LookupSource(DraftSource):
    """Drafts from a sequence's own tokens and from its predicted output."""

    name = "lookup"

    def prepare(self, sequence: Sequence) -> None:
        """Index the prompt and the prediction."""
        prediction = sequence.request.prediction_token_ids
        sequence.drafting[self.name] = LookupIndex(sequence.token_ids, prediction)

    def propose(self, sequence: Sequence) -> LookupProposal | None:
        """The continuations of the longest matches; None if there are none."""
        index: LookupIndex = sequence.drafting[self.name]
        index.catch_up(sequence.token_ids)
        matches = index.matches(_NUM_MATCHES, MAX_TOKENS)
        return LookupProposal(matches) if matches else None


def make_lookup(context: SourceContext) -> LookupSource | None:
    """Prompt lookup, unless it is switched off."""
    return LookupSource() if context.config.lookup else None
