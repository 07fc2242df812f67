"""What heads are worth while they are trained: mean acceptance length on a few held-out answers."""

import hashlib
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from heads.tree_search import best_tree
from training.data.dataset import Corpus, Document
from training.errors import DataError
from training.loop.early_stopping import EarlyStopping, NoValidation, StoppingPlan, Validation
from training.measure.acceptance import NUM_RANKS
from training.measure.calibration import CalibrationCounter
from training.measure.evaluate import measure_profile, rank_answers, walk
from training.methods.drafts import Drafts
from training.methods.task import Task
from training.states.hidden_states import HiddenStates

TREE_SIZE = 16
# Prompts included; so many are measured in seconds.
MAX_TOKENS = 16_384


class KeptStates:
    """Hidden states of documents that are asked for again and again, computed once.

    Args:
        states: Where they come from first; of a model that does not change.
    """

    def __init__(self, states: HiddenStates) -> None:
        self.dtype = states.dtype
        self._states = states
        self._kept: dict[tuple[str, Document], Tensor] = {}

    def encode(self, documents: Sequence[Document]) -> list[Tensor]:
        """See `HiddenStateEncoder.encode`."""
        return self._of("roots", documents, self._states.encode)

    def encode_all(self, documents: Sequence[Document]) -> list[Tensor]:
        """See `HiddenStateEncoder.encode_all`."""
        return self._of("all", documents, self._states.encode_all)

    def encode_answers(self, documents: Sequence[Document]) -> list[Tensor]:
        """See `HiddenStateEncoder.encode_answers`."""
        return self._of("answers", documents, self._states.encode_answers)

    def _of(
        self,
        which: str,
        documents: Sequence[Document],
        encode: Callable[[Sequence[Document]], list[Tensor]],
    ) -> list[Tensor]:
        missing = [document for document in documents if (which, document) not in self._kept]
        if missing:
            for document, hidden in zip(missing, encode(missing), strict=True):
                self._kept[which, document] = hidden
        return [self._kept[which, document] for document in documents]


def sample(held_out: Corpus, max_tokens: int = MAX_TOKENS) -> Corpus:
    """Take some documents with examples, at most so many tokens but at least one document.

    Which ones hangs on their ids alone, so that a file sorted by category gives some of each.
    """
    documents: list[Document] = []
    num_tokens = 0
    for document in sorted(held_out.documents, key=_digest):
        num_tokens += len(document.token_ids_T) if document.num_examples else 0
        if documents and num_tokens > max_tokens:
            break
        if document.num_examples:
            documents.append(document)
    return Corpus(tuple(documents))


def _digest(document: Document) -> bytes:
    return hashlib.sha256(f"validation {document.conversation_id}".encode()).digest()


def acceptance_length(corpus: Corpus, drafts: Drafts) -> float:
    """Return the tokens per verify step with the best static tree of `TREE_SIZE` nodes.

    Raises:
        DataError: If no answer has two tokens.
    """
    counter = CalibrationCounter(drafts.num_depths)
    answers = rank_answers(corpus, drafts, counter, lambda _: None)
    profile = measure_profile(answers, NUM_RANKS, TREE_SIZE)
    return walk(answers, best_tree(profile, TREE_SIZE)).mean_acceptance_length


def validation(
    task: Task, module: nn.Module, drafts_of: Callable[[HiddenStates], Drafts]
) -> Validation:
    """Return what the options ask for.

    Args:
        task: With the held-out answers.
        module: That is trained.
        drafts_of: What the module drafts from given hidden states.

    Raises:
        DataError: If there is nothing to measure on.
    """
    options = task.options
    if options.early_stopping == 0:
        return NoValidation()
    corpus = sample(task.held_out)
    if corpus.num_examples == 0:
        raise DataError(
            f"early_stopping is {options.early_stopping}, but nothing is held out to measure on; "
            f"give a larger --held-out than {options.held_out:g}, or leave --early-stopping out"
        )
    # An adapted base changes from step to step.
    is_fixed = options.method != "medusa2"
    drafts = drafts_of(KeptStates(task.states) if is_fixed else task.states)

    def measure() -> float:
        with task.usage.stage("validation"):
            return acceptance_length(corpus, drafts)

    plan = StoppingPlan(options.validation_interval, options.early_stopping)
    return EarlyStopping(module, measure, plan, task.processes)
