"""The mutable state of one request while it is in the engine.

Index ranges of a decoding sequence (invariant: KV slot i holds token i for i < num_computed):

    token_ids   0 ....... num_prompt ....... num_computed = len - 1
                prompt    generated          root: the last token, its KV comes with the next step
"""

import secrets
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from heads.calibration import RequestCalibration
from heads.candidates import DraftTokens
from server.core.processor import LogitProcessor
from server.core.request import FinishReason, Request, RequestStats
from server.core.text import TextStream


@dataclass(slots=True)
class SpecDecodeCounters:
    """Running counts behind `RequestStats`.

    Attributes:
        drafted_places: Places in the request's prediction whose tokens were drafted.
        accepted_places: Those of them whose tokens were accepted and emitted.
    """

    num_steps: int = 0
    num_draft_tokens: int = 0
    num_emitted_tokens: int = 0
    accepted_per_depth: list[int] = field(default_factory=list)
    drafted_places: set[int] = field(default_factory=set)
    accepted_places: set[int] = field(default_factory=set)

    def count_step(self, num_draft_tokens: int, depths: tuple[int, ...]) -> None:
        """Count a verify step and the depths of the tokens that it emitted (0: the bonus)."""
        self.num_steps += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_emitted_tokens += len(depths)
        for depth in depths:
            if depth > len(self.accepted_per_depth):
                self.accepted_per_depth.append(0)
            if depth:
                self.accepted_per_depth[depth - 1] += 1

    def count_prediction(self, drafts: DraftTokens, accepted: Iterable[int]) -> None:
        """Count what a step's tree copied from the prediction, and of it the emitted nodes."""
        places = [estimate.prediction_place for estimate in drafts.estimates]
        self.drafted_places.update(place for place in places if place >= 0)
        emitted = (places[node - 1] for node in accepted)
        self.accepted_places.update(place for place in emitted if place >= 0)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's tokens, KV blocks, drafts and counters.

    Written by the scheduler (blocks, and what of them is computed), by `engine.commit` (tokens) and
    `engine.output` (text, counters, tokens behind a stop string), by the engine (whether it is
    prepared or has ended), by the speculator (proposal, calibration) and by the draft sources (each
    its own entry of `drafting`; an MTP module also lengthens `block_table`).

    Attributes:
        text: Turns tokens into text, and looks for stop strings.
        seed: Key of the request's uniform numbers; random if the request gave none.
        acceptance: Name of the rule that verifies this sequence's drafts.
        drafts_allowed: Largest tree that the request and the server allow; 1 is plain decoding.
        end_ids: Tokens that end the text; empty if the request ignores them.
        max_len: Largest number of tokens, prompt included.
        sources: Names of the draft sources that draft for it.
        is_prepared: Whether `processors` and `drafting` are set; they wait for the first step.
        is_ended: Whether it has left the engine; a step that is still under way is not its any
            more.
        processors: What changes its logits.
        token_ids: Prompt and generated tokens.
        num_computed_tokens: Tokens whose KV is computed.
        num_cached_tokens: Prompt tokens whose KV came from the prefix cache.
        block_table: KV blocks, in the order of the tokens.
        block_digests: Digests of the full computed blocks at the head of `block_table`.
        drafting: State of each draft source, by the source's name; nobody else looks at it.
        calibration: How well this request's drafts fare.
        proposal: Tree for the next step, nodes by falling value; None if nothing was drafted.
        has_device_drafts: Whether a draft source of the device took part in it.
        counters: Counts for usage.
    """

    request: Request
    text: TextStream
    seed: int
    acceptance: str
    drafts_allowed: int
    end_ids: frozenset[int] = frozenset()
    max_len: int = 1 << 62
    sources: tuple[str, ...] = ()
    is_prepared: bool = False
    is_ended: bool = False
    processors: Seq[LogitProcessor] = ()
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    drafting: dict[str, Any] = field(default_factory=dict)
    calibration: RequestCalibration = field(default_factory=RequestCalibration)
    proposal: DraftTokens | None = None
    has_device_drafts: bool = False
    counters: SpecDecodeCounters = field(default_factory=SpecDecodeCounters)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the request brought."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_lacking_tokens(self) -> int:
        """Tokens that the request may still generate."""
        return self.request.sampling.max_tokens - self.num_output_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Committed tokens without KV, the root included."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only the root lacks KV, and it is a generated token."""
        return self.num_uncomputed_tokens == 1 and self.num_output_tokens > 0

    def end_among(self, new_ids: Seq[int]) -> tuple[int, FinishReason | None]:
        """Where the text ends if these tokens are added; stop strings are not looked for.

        Returns:
            How many of the tokens belong to the text, at least one, and why it ends after them;
            None if it goes on.
        """
        room = min(
            self.request.sampling.max_tokens - self.num_output_tokens,
            self.max_len - len(self.token_ids),
        )
        for count, token_id in enumerate(new_ids, start=1):
            if token_id in self.end_ids:
                return count, "stop"
            if count >= room:
                return count, "length"
        return len(new_ids), None

    def stats(self) -> RequestStats:
        """A snapshot of the counts so far."""
        counters = self.counters
        return RequestStats(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            method="+".join(self.sources) or "none",
            # Without drafts every token is the target's own, whatever the rule.
            acceptance=self.acceptance if self.sources else "exact",
            num_steps=counters.num_steps,
            num_draft_tokens=counters.num_draft_tokens,
            num_accepted_tokens=sum(counters.accepted_per_depth),
            num_emitted_tokens=counters.num_emitted_tokens,
            accepted_per_depth=tuple(counters.accepted_per_depth),
            num_accepted_prediction_tokens=len(counters.accepted_places),
            num_rejected_prediction_tokens=(
                len(counters.drafted_places) - len(counters.accepted_places)
            ),
        )


def request_seed(request: Request) -> int:
    """The seed that keys the request's uniform numbers."""
    return secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed
