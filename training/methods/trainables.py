"""What runs over a frozen base model are put together from, beside the heads."""

from heads.medusa import MedusaHeads
from training.data.dataset import Corpus
from training.loop.objective import ParameterGroup, Trainable
from training.methods.losses import MedusaObjective, medusa_groups
from training.methods.mtp_objective import MTPObjective
from training.methods.mtp_start import FreshMTP
from training.methods.task import Task
from training.progress import note, progress_bar
from training.states.encoded import EncodedBatch, EncodedSource
from training.states.examples import Examples, ExampleSource
from training.states.hidden_cache import open_cache
from training.states.hidden_states import HiddenStates


def medusa_trainable(task: Task, heads: MedusaHeads) -> Trainable[Examples]:
    """Put Medusa heads together with their examples."""
    options = task.options
    source = ExampleSource(task.train, task.states, heads.config.num_heads, options.batch_plan)
    _fill_cache(task, source)
    groups = medusa_groups(heads, options.root_rate_factor)
    objective = MedusaObjective(heads, task.compute_dtype, task.options.kl_weight)
    return Trainable(heads, groups, source, objective)


def mtp_trainable(task: Task, fresh: FreshMTP) -> Trainable[EncodedBatch]:
    """Put an MTP module together with its documents."""
    source = EncodedSource(task.train, task.states, task.options.token_plan)
    _fill_cache(task, source)
    module, num_depths = fresh.module, task.options.num_depths
    return Trainable(
        module,
        (ParameterGroup(tuple(module.parameters())),),
        source,
        MTPObjective(module, fresh.block, num_depths, task.compute_dtype, task.options.kl_weight),
    )


def hidden_states(task: Task, corpus: Corpus) -> HiddenStates:
    """Where hidden states come from; each process computes its share of what disk lacks."""
    cache, processes = open_cache(task.options, task.encoder, task.loaded), task.processes
    if cache is None:
        return task.encoder
    missing = cache.missing(corpus.documents)
    # None writes before all have looked.
    processes.wait()
    share = missing[processes.rank :: processes.count]
    if missing:
        note(f"hidden states of {len(missing)} of {len(corpus.documents)} documents are missing")
    bar_of = progress_bar("hidden states to disk", len(share))
    with task.usage.stage("hidden_states"), bar_of as bar:
        cache.fill(share, bar.advance)
        processes.wait()
    cache.refresh()
    return cache


def _fill_cache(task: Task, source: ExampleSource | EncodedSource) -> None:
    if task.options.cache:
        bar_of = progress_bar("hidden states", len(task.train.documents))
        with task.usage.stage("hidden_states"), bar_of as bar:
            source.fill_cache(bar.advance)
