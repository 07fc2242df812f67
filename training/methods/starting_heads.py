"""The Medusa heads that a run begins with: fresh ones, or those of a checkpoint."""

from dataclasses import fields

from heads.medusa import MedusaConfig, MedusaHeads
from server.model.draft_heads import load_draft_heads
from server.model.loading import LoadedModel
from training.commands.options import TrainOptions
from training.data.dataset import Corpus, frequent_tokens
from training.errors import RunError

_SHAPE = ("num_heads", "num_blocks", "root_conditioned", "draft_vocab_size")


def starting_heads(options: TrainOptions, loaded: LoadedModel, train: Corpus) -> MedusaHeads:
    """Return heads with float32 weights, to be trained.

    Raises:
        RunError: If the heads to begin with are of another shape than the options ask for, or of
            one that is not trained.
        ConfigError: If they cannot be read.
        HeadsMismatchError: If they belong to another base model, or to one with an adapter.
    """
    if options.init_heads is None:
        return _fresh_heads(options, loaded, train)
    heads = load_draft_heads(options.init_heads, loaded).heads
    if not isinstance(heads, MedusaHeads):
        raise RunError(f"{options.init_heads} holds no Medusa heads; give others to --init-heads")
    if heads.config.own_unembedding:
        raise RunError(
            f"the heads in {options.init_heads} have vocabulary matrices of their own, which are "
            "not trained; begin with heads that share the base model's"
        )
    default = {item.name: item.default for item in fields(TrainOptions)}
    for name in _SHAPE:
        asked, found = getattr(options, name), getattr(heads.config, name)
        is_same = asked == found or (asked == 0 and found is None)
        if not is_same and asked != default[name]:
            raise RunError(
                f"{name} is {asked}, but the heads in {options.init_heads} have {found}; leave it "
                "out or begin with other heads"
            )
    return heads.float()


def _fresh_heads(options: TrainOptions, loaded: LoadedModel, train: Corpus) -> MedusaHeads:
    """Untrained heads; the draft vocabulary comes from the answers."""
    draft_vocab_size = min(options.draft_vocab_size, loaded.vocab_size) or None
    config = MedusaConfig(
        hidden_size=loaded.hidden_size,
        vocab_size=loaded.vocab_size,
        num_heads=options.num_heads,
        num_blocks=options.num_blocks,
        root_conditioned=options.root_conditioned,
        draft_vocab_size=draft_vocab_size,
    )
    ids_U = None
    if draft_vocab_size is not None:
        ids_U = frequent_tokens(train.documents, loaded.vocab_size, draft_vocab_size)
    heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding(), ids_U)
    return heads.float()
