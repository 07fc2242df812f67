"""`distill`: prompts in, the base model's own answers out; killed and started again, it goes on.

Owns the distilled file and its manifest. Each finished conversation is one appended line, so a
killed run loses only what was in flight.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from server.cli.console import Bar, progress_bar
from server.cli.options import Between, Command, Count, ReadBy, Settings
from server.config import EngineConfig
from server.engine.engine import Engine
from training.commands.common import ModelOptions, save_options
from training.data.data_source import DataOption, OpenData, open_data
from training.data.distilled import (
    WHOLE,
    DistilledConversation,
    Manifest,
    Sampling,
    Shard,
    manifest_path,
    read_distilled,
    read_shard,
)
from training.data.jsonl import LineAppender, drop_torn_line
from training.data.prompt_order import PromptOrder, check_weights
from training.data.prompts import Prompts, read_prompts
from training.data.self_distill import SelfDistiller
from training.errors import DataError, RunError
from training.states.document_states import DocumentStates
from training.states.hidden_cache import HiddenCacheOptions
from training.states.hidden_capture import HiddenCapture

_LOGGER = logging.getLogger("euryale.training")
_SAVE_INTERVAL = 50
_MIN_TOKENS_PER_STEP = 512


@dataclass(frozen=True, kw_only=True)
class DistillOptions(ModelOptions):
    """Prompts, answers and the model that writes them.

    Attributes:
        data: Prompts: JSON lines (.gz) or `hf:NAME#SPLIT`.
        output: JSON lines to write; a run that they hold goes on.
        limit: Conversations, from the beginning of the prompts; not given, all.
        shard: Every Nth of them, from number I on.
        max_tokens: Begin no conversation after so many answer tokens.
        category_weights: Share of the answer tokens of each category, 1 if it is not named; not
            given, the prompts keep their order.
        method: Draft source, such as `medusa`, `mtp` or `lookup`; changes the speed but no token.
        heads: Directory of draft heads, `auto` or `none`; not used if METHOD is `none`.
        concurrency: Conversations in flight.
    """

    data: DataOption
    output: Path
    limit: Count | None = None
    shard: Annotated[Shard, ReadBy(read_shard, "I/N")] = WHOLE
    max_tokens: Count | None = None
    category_weights: Mapping[str, Annotated[float, Between(0, 1000)]] | None = None
    method: str = "none"
    heads: str = "auto"
    concurrency: Count = 64

    @property
    def engine_config(self) -> EngineConfig:
        """The engine that answers."""
        return EngineConfig(
            model=self.model,
            heads="none" if self.method == "none" else self.heads,
            device=self.device,
            dtype=self.dtype,
            num_threads=self.num_threads,
            max_num_seqs=self.concurrency,
            max_tokens_per_step=max(_MIN_TOKENS_PER_STEP, 2 * self.concurrency),
        )


@dataclass(slots=True)
class _Account:
    """What the file holds, and how many tokens this process has drawn."""

    ids: set[str]
    num_tokens_of: list[tuple[str, int]]
    manifest: Manifest
    num_drawn: int = 0


def run(options: DistillOptions, sampling: Sampling, cache: HiddenCacheOptions) -> dict[str, Any]:
    """Answer the prompts that are not answered yet; returns the result to print.

    Raises:
        DataError: If the prompts or the manifest are broken.
        RunError: If `output` holds something else, or the heads change the model.
        EuryaleError: If the engine cannot be built or rejects a prompt.
    """
    if options.output.suffix == ".gz":
        raise RunError(
            f"output is {options.output}, but answers are appended line by line; give a name "
            "without .gz and compress the file later"
        )
    data = open_data(options.data)
    prompts = _prompts(data, options)
    capture = HiddenCapture()
    on_hidden = None if cache.hidden_cache is None else capture.take
    engine = Engine.from_config(options.engine_config, on_hidden)
    kept = cache.open_states(engine.loaded)
    if engine.loaded.adapter_sha256 is not None:
        raise RunError(
            f"the heads {options.heads} bring an adapter, so the answers would not be those of "
            f"{options.model} itself; give other --heads or --method none"
        )
    if options.method not in engine.limits.methods:
        raise RunError(
            f"method is {options.method!r}, but this model and these heads have "
            f"{', '.join(sorted(engine.limits.methods))}; give one of them"
        )
    manifest = Manifest(
        model=options.model,
        fingerprint=engine.loaded.fingerprint,
        sampling=sampling,
        prompts_sha256=data.sha256(),
        prompts_origin=data.origin,
        chat_template_sha256=engine.tokenizer.chat_template_sha256,
        shard=options.shard,
    )
    account = _resumed(options.output, manifest)
    config = options.output.with_name(f"{options.output.name}.toml")
    save_options(config, DISTILL, {"options": options, "sampling": sampling, "cache": cache})
    order = _order(prompts, account, options.category_weights)
    distiller = SelfDistiller(engine, sampling, options.method, options.concurrency)
    _distill(distiller, order, account, options, capture, kept)
    return _result(options.output, account)


def _prompts(data: OpenData, options: DistillOptions) -> list[Prompts]:
    shard = options.shard
    prompts = list(read_prompts(data.rows()))[: options.limit][shard.index :: shard.total]
    if not prompts:
        raise DataError(f"{options.data} has no prompts for shard {shard}; give a smaller N")
    check_weights(options.category_weights, prompts)
    return prompts


def _order(
    prompts: list[Prompts], account: _Account, weights: Mapping[str, float] | None
) -> PromptOrder:
    """The order of the prompts that are left."""
    waiting = [item for item in prompts if item.id not in account.ids]
    if account.ids:
        _LOGGER.info("%d conversations are answered, %d are left", len(account.ids), len(waiting))
    order = PromptOrder(waiting, weights)
    for category, num_tokens in account.num_tokens_of:
        order.count(category, num_tokens)
    return order


def _distill(
    distiller: SelfDistiller,
    order: PromptOrder,
    account: _Account,
    options: DistillOptions,
    capture: HiddenCapture,
    kept: DocumentStates | None,
) -> None:
    """Answer prompts and write what is finished; the file is whole however this ends."""
    bar_of = _progress(len(order), account, options)
    with LineAppender(options.output) as file, bar_of as bar:

        def write(conversation: DistilledConversation) -> None:
            file.append(conversation.to_json())
            if kept is not None:
                capture.keep(conversation, kept)

        try:
            _answer(distiller, order, account, options, write, bar)
        finally:
            file.sync()
            account.manifest.save(options.output)
            if kept is not None:
                capture.flush(kept)


def _progress(
    num_waiting: int, account: _Account, options: DistillOptions
) -> AbstractContextManager[Bar]:
    """A bar over tokens if their number ends the run, else over conversations."""
    if options.max_tokens is None:
        return progress_bar("distilling", num_waiting, "tokens")
    num_left = max(0, options.max_tokens - account.manifest.num_tokens)
    return progress_bar("distilling tokens", num_left, "tokens")


def _resumed(output: Path, manifest: Manifest) -> _Account:
    """Read what is there already; repairs the end of the file.

    Raises:
        RunError: If the file is no distilled file or holds answers of another kind.
    """
    found = Manifest.load(output)
    if not output.exists() or output.stat().st_size == 0:
        manifest.save(output)
        return _Account(set(), [], manifest)
    if found is None:
        raise RunError(
            f"{output} exists, but {manifest_path(output).name} does not; give another --output"
        )
    difference = found.difference(manifest)
    if difference is not None:
        raise RunError(
            f"{output} holds answers of another run: {difference}; give the same options again or "
            "another --output"
        )
    num_dropped = drop_torn_line(output)
    if num_dropped:
        _LOGGER.info("dropped %d bytes of an unfinished last line of %s", num_dropped, output)
    ids: set[str] = set()
    num_tokens_of: list[tuple[str, int]] = []
    num_turns = num_tokens = 0
    if output.stat().st_size:
        for conversation in read_distilled(output):
            ids.add(conversation.id)
            num_turns += len(conversation.turns)
            num_tokens += conversation.num_tokens
            num_tokens_of.append((conversation.category, conversation.num_tokens))
    by_category: Counter[str] = Counter()
    for category, num in num_tokens_of:
        by_category[category] += num
    counted = replace(
        manifest,
        num_conversations=len(ids),
        num_turns=num_turns,
        num_tokens=num_tokens,
        tokens_by_category=dict(by_category),
    )
    return _Account(ids, num_tokens_of, counted)


def _answer(
    distiller: SelfDistiller,
    order: PromptOrder,
    account: _Account,
    options: DistillOptions,
    write: Callable[[DistilledConversation], None],
    bar: Bar,
) -> None:
    num_before = account.manifest.num_tokens

    def wanted() -> Iterator[Prompts]:
        for item in order:
            if options.max_tokens and num_before + account.num_drawn >= options.max_tokens:
                return
            yield item

    def count(num_tokens: int) -> None:
        account.num_drawn += num_tokens
        bar.add(num_tokens)
        if options.max_tokens is not None:
            bar.advance(num_tokens)

    for conversation in distiller.run(wanted(), count):
        manifest = account.manifest
        order.finish(conversation.category, conversation.num_tokens)
        if conversation.turns:
            write(conversation)
            account.manifest = replace(
                manifest,
                num_conversations=manifest.num_conversations + 1,
                num_turns=manifest.num_turns + len(conversation.turns),
                num_tokens=manifest.num_tokens + conversation.num_tokens,
                tokens_by_category={
                    **manifest.tokens_by_category,
                    conversation.category: conversation.num_tokens
                    + manifest.tokens_by_category.get(conversation.category, 0),
                },
            )
        else:
            account.manifest = replace(manifest, num_skipped=manifest.num_skipped + 1)
        if options.max_tokens is None:
            bar.advance()
        if account.manifest.num_conversations % _SAVE_INTERVAL == 0:
            account.manifest.save(options.output)
    account.manifest = replace(account.manifest, is_finished=True)


def _result(output: Path, account: _Account) -> dict[str, Any]:
    manifest = account.manifest
    return {
        "output": str(output),
        "num_conversations": manifest.num_conversations,
        "num_turns": manifest.num_turns,
        "num_tokens": manifest.num_tokens,
        "num_skipped": manifest.num_skipped,
        "num_new_tokens": account.num_drawn,
    }


DISTILL = Command(
    "distill",
    "Have the base model answer prompts.",
    run,
    {
        "options": Settings(DistillOptions),
        "sampling": Settings(Sampling),
        "cache": Settings(HiddenCacheOptions),
    },
)
