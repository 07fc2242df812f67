"""What an engine has done since it was built."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from server.core.sequence import Sequence
from server.core.step import Outcome
from server.engine.output import Emission


@dataclass(slots=True)
class EngineCounters:
    """Totals since the engine was built.

    Attributes:
        num_steps: Steps of the engine.
        num_verify_steps: Steps of sequences beyond their prompts.
        num_prompt_tokens: Tokens of prompts.
        num_cached_tokens: Prompt tokens whose KV came from the prefix cache.
        num_generated_tokens: Tokens that clients got.
        num_draft_tokens: Tree nodes below the roots.
        num_accepted_tokens: Draft tokens that were accepted and emitted.
        num_preemptions: Sequences that gave their blocks up for older ones.
    """

    num_steps: int = 0
    num_verify_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0

    def count_step(self, outcomes: Seq[Outcome]) -> None:
        """Count a step that landed."""
        self.num_steps += 1
        for outcome in outcomes:
            if outcome.entry.is_decoding:
                self.num_verify_steps += 1
                self.num_draft_tokens += outcome.entry.drafts.tree.num_nodes - 1

    def count_emission(self, sequence: Sequence, emission: Emission) -> None:
        """Count what a sequence emitted; with its first tokens, its prompt."""
        self.num_generated_tokens += len(emission.token_ids)
        self.num_accepted_tokens += sum(depth > 0 for depth in emission.depths)
        if sequence.num_output_tokens == len(emission.token_ids):
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self.num_cached_tokens += sequence.num_cached_tokens
