"""`distill`: prompts in, the base model's own answers out; killed and started again, it goes on.

Owns the distilled file and its manifest. Each finished conversation is one appended line, so a
killed run loses only what was in flight.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.config import EngineConfig
from server.engine.engine import Engine
from training.config_file import save_config
from training.data_source import open_data
from training.distilled import DistilledConversation, Manifest, manifest_path, read_distilled
from training.document_states import open_states
from training.errors import DataError, RunError
from training.hidden_capture import HiddenCapture
from training.jsonl import LineAppender, drop_torn_line
from training.options import DistillOptions
from training.progress import Bar, note, progress_bar
from training.prompt_order import PromptOrder, check_weights
from training.prompts import Prompts, read_prompts
from training.self_distill import SelfDistiller

_SAVE_INTERVAL = 50
_MIN_TOKENS_PER_STEP = 512


@dataclass(slots=True)
class _Account:
    """What the file holds, and how many tokens this process has drawn."""

    ids: set[str]
    num_tokens_of: list[tuple[str, int]]
    manifest: Manifest
    num_drawn: int = 0


def run(options: DistillOptions) -> dict[str, Any]:
    """Answer the prompts that are not answered yet; returns the result to print.

    Raises:
        DataError: If the prompts or the manifest are broken.
        RunError: If `output` holds something else, or the heads change the model.
        EuryaleError: If the engine cannot be built or refuses a prompt.
    """
    if options.output.suffix == ".gz":
        raise RunError(
            f"output is {options.output}, but answers are appended line by line; give a name "
            "without .gz and compress the file later"
        )
    shard = options.shard
    data = open_data(options.data)
    prompts = list(read_prompts(data.rows()))[: options.limit][shard.index :: shard.total]
    if not prompts:
        raise DataError(f"{options.data} has no prompts for shard {shard}; give a smaller N")
    check_weights(options.category_weights, prompts)
    capture = HiddenCapture()
    on_hidden = None if options.hidden_cache is None else capture.take
    engine = Engine.from_config(_engine_config(options), on_hidden)
    kept = open_states(options, engine.loaded)
    if engine.loaded.adapter_sha256 is not None:
        raise RunError(
            f"the heads {options.heads} bring an adapter, so the answers would not be those of "
            f"{options.model} itself; give other --heads or --method none"
        )
    manifest = Manifest(
        model=options.model,
        fingerprint=engine.loaded.fingerprint,
        sampling=options.sampling,
        prompts_sha256=data.sha256(),
        prompts_origin=data.origin,
        chat_template_sha256=engine.tokenizer.chat_template_sha256,
        shard=shard,
    )
    account = _take_up(options.output, manifest)
    config = options.output.with_name(f"{options.output.name}.toml")
    save_config(config, "distill", options)
    waiting = [item for item in prompts if item.id not in account.ids]
    if account.ids:
        note(f"{len(account.ids)} conversations are answered, {len(waiting)} are left")
    order = PromptOrder(waiting, options.category_weights)
    for category, num_tokens in account.num_tokens_of:
        order.count(category, num_tokens)
    distiller = SelfDistiller(engine, options.sampling, options.method, options.concurrency)
    with LineAppender(options.output) as file, _progress(len(waiting), account, options) as bar:

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
    return _result(options.output, account)


def _progress(
    num_waiting: int, account: _Account, options: DistillOptions
) -> AbstractContextManager[Bar]:
    """A bar over tokens if their number ends the run, else over conversations."""
    if options.max_tokens is None:
        return progress_bar("distilling", num_waiting, "tokens")
    num_left = max(0, options.max_tokens - account.manifest.num_tokens)
    return progress_bar("distilling tokens", num_left, "tokens")


def _engine_config(options: DistillOptions) -> EngineConfig:
    return EngineConfig(
        model=options.model,
        heads="none" if options.method == "none" else options.heads,
        device=options.device,
        dtype=options.dtype,
        num_threads=options.num_threads,
        max_num_seqs=options.concurrency,
        max_tokens_per_step=max(_MIN_TOKENS_PER_STEP, 2 * options.concurrency),
    )


def _take_up(output: Path, manifest: Manifest) -> _Account:
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
        note(f"dropped {num_dropped} bytes of an unfinished last line of {output}")
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
