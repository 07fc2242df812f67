"""The mutable state of one request while it is in the engine.

Index ranges of a decoding sequence (invariant: KV slot i holds token i for i < num_computed):

    token_ids   0 ....... num_prompt ....... num_computed = len - 1
                prompt    generated          root: the last token, its KV comes with the next step
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from heads.calibration import RequestCalibration
from heads.candidates import DraftTokens
from heads.lookup import LookupIndex
from heads.proposals import HeadProposal
from heads.seen_rows import SeenRows
from server.config import AcceptanceName, DraftMethod
from server.core.request import Request, RequestStats
from server.core.text import TextStream
from server.sampling.logits import LogitAdjuster

AcceptanceRule = Literal["exact", "typical"]


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
        places = [estimate.reference_place for estimate in drafts.estimates]
        self.drafted_places.update(place for place in places if place >= 0)
        emitted = (places[node - 1] for node in accepted)
        self.accepted_places.update(place for place in emitted if place >= 0)


@dataclass(frozen=True, slots=True)
class DraftSources:
    """Who drafts for a sequence.

    Attributes:
        heads: Kind of the draft heads, if they do.
        lookup: Whether prompt lookup does.
    """

    heads: DraftMethod | None = None
    lookup: bool = False

    @property
    def any(self) -> bool:
        """Whether anybody does; otherwise the sequence is decoded plainly."""
        return self.heads is not None or self.lookup

    @property
    def name(self) -> str:
        """For usage: `none`, `medusa`, `mtp`, `lookup`, `medusa+lookup` or `mtp+lookup`."""
        names = [*([self.heads] if self.heads else []), *(["lookup"] if self.lookup else [])]
        return "+".join(names) or "none"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's tokens, KV blocks, drafts and counters.

    Attributes:
        seed: Key of the request's uniform numbers; random if the request gave none.
        acceptance: Rule that verifies this sequence's drafts.
        drafts_allowed: Largest tree that the request and the server allow; 1 is plain decoding.
        sources: Who drafts for it.
        is_prepared: Whether `adjuster`, `seen_rows` and `lookup` are set; they wait for the first
            step.
        adjuster: Penalties and bias, if the request has any.
        seen_rows: Unembedding rows of prompt tokens that the draft vocabulary lacks.
        block_digests: Digests of the full computed blocks at the head of `block_table`.
        num_drafter_tokens: Tokens whose KV a draft module of its own cache has computed.
        lookup: Its tokens, indexed.
        calibration: How this request's drafts fare.
        head_proposal: What the heads said for the next step; None if they were not asked.
        proposal: Tree for the next step, nodes by falling value; None if nothing was drafted.
    """

    request: Request
    text: TextStream
    seed: int
    acceptance: AcceptanceRule
    drafts_allowed: int
    sources: DraftSources = DraftSources()
    is_prepared: bool = False
    adjuster: LogitAdjuster | None = None
    seen_rows: SeenRows | None = None
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    num_drafter_tokens: int = 0
    lookup: LookupIndex | None = None
    calibration: RequestCalibration = field(default_factory=RequestCalibration)
    head_proposal: HeadProposal | None = None
    proposal: DraftTokens | None = None
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

    def stats(self) -> RequestStats:
        """A snapshot of the counts so far."""
        counters = self.counters
        return RequestStats(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            method=self.sources.name,
            # Without drafts every token is the target's own, whatever the rule.
            acceptance="exact" if not self.sources.any else self.acceptance,
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


def acceptance_rule(request: Request, server_default: AcceptanceName) -> AcceptanceRule:
    """Decide how a request's drafts are verified.

    Greedy is always exact. A rule that the request names comes next. Otherwise a seed or
    log-probabilities, which both speak of the target's own distribution, make it exact, and what
    is left follows the server, whose `auto` is typical.
    """
    sampling, asked = request.sampling, request.speculation.acceptance
    if sampling.is_greedy:
        return "exact"
    if asked != "auto":
        return asked
    if sampling.seed is not None or sampling.logprobs is not None:
        return "exact"
    return "exact" if server_default == "exact" else "typical"


def request_seed(request: Request) -> int:
    """The seed that keys the request's uniform numbers."""
    return secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed
