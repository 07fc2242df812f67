"""The Medusa heads that a run begins with: fresh ones, or those of a checkpoint."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from heads.checkpoint import WEIGHTS_FILE
from heads.files import file_sha256
from heads.medusa import MedusaConfig, MedusaHeads
from server.cli.values import Count, Whole
from server.model.draft_heads import load_draft_heads
from server.model.loading import LoadedModel
from training.data.dataset import Corpus, frequent_tokens
from training.errors import RunError
from training.resuming import MAY_CHANGE

_SHAPE = ("num_heads", "num_layers", "root_conditioned", "draft_vocab_size")


@dataclass(frozen=True, kw_only=True)
class StartingHeads:
    """Options of the heads that a run begins with.

    Attributes:
        init_heads: Medusa heads to begin with; not given, the run begins with fresh ones.
        num_heads: Draft heads, hence the largest depth.
        num_layers: Residual layers of each head.
        root_conditioned: Whether the heads see the embedding of the root token.
        draft_vocab_size: Most frequent tokens of the answers, which the heads can draft; 0 is all
            tokens.
    """

    # Compared by content, not by name.
    init_heads: Path | None = field(default=None, metadata=MAY_CHANGE)
    num_heads: Count = 4
    num_layers: Count = 2
    root_conditioned: bool = True
    draft_vocab_size: Whole = 4096

    def digests(self) -> dict[str, str]:
        """Return the digest of the heads to begin with; empty for fresh ones."""
        if self.init_heads is None:
            return {}
        return {"init_heads_sha256": file_sha256(self.init_heads / WEIGHTS_FILE)}

    def starting_heads(self, loaded: LoadedModel, train: Corpus) -> MedusaHeads:
        """Return heads with float32 weights, to be trained.

        Args:
            loaded: Base model of the heads.
            train: Answers that the draft vocabulary of fresh heads comes from.

        Raises:
            RunError: If the heads to begin with are of another shape than the options ask for, or
                of one that is not trained.
            ConfigError: If they cannot be read.
            HeadsMismatchError: If they belong to another base model, or to one with an adapter.
        """
        if self.init_heads is None:
            return self._fresh(loaded, train)
        heads = load_medusa_heads(self.init_heads, loaded)
        self._check(heads.config)
        return heads

    def _check(self, found: MedusaConfig) -> None:
        default = {item.name: item.default for item in fields(StartingHeads)}
        for name in _SHAPE:
            asked, value = getattr(self, name), getattr(found, name)
            is_same = asked == value or (asked == 0 and value is None)
            if not is_same and asked != default[name]:
                raise RunError(
                    f"{name} is {asked}, but the heads in {self.init_heads} have {value}; leave it "
                    "out or begin with other heads"
                )

    def _fresh(self, loaded: LoadedModel, train: Corpus) -> MedusaHeads:
        draft_vocab_size = min(self.draft_vocab_size, loaded.vocab_size) or None
        config = MedusaConfig(
            hidden_size=loaded.hidden_size,
            vocab_size=loaded.vocab_size,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            root_conditioned=self.root_conditioned,
            draft_vocab_size=draft_vocab_size,
        )
        ids_U = None
        if draft_vocab_size is not None:
            ids_U = frequent_tokens(train.documents, loaded.vocab_size, draft_vocab_size)
        heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding(), ids_U)
        return heads.float()


def load_medusa_heads(directory: Path, loaded: LoadedModel) -> MedusaHeads:
    """Load heads with float32 weights, to be trained.

    Raises:
        RunError: If they are of a kind that is not trained.
        ConfigError: If they cannot be read.
        HeadsMismatchError: If they belong to another base model, or to one with an adapter.
    """
    heads = load_draft_heads(directory, loaded).heads
    if not isinstance(heads, MedusaHeads):
        raise RunError(f"{directory} holds no Medusa heads; give others to --init-heads")
    if heads.config.own_unembedding:
        raise RunError(
            f"the heads in {directory} have vocabulary matrices of their own, which are not "
            "trained; begin with heads that share the base model's"
        )
    return heads.float()
