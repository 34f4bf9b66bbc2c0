"""``megavid prepare``: videos, images and captions become shards of latents.

Owns which items make which shard, the ranks' shares, the vocabulary, and the end; the work of one shard is
``prepare_shard``'s. Files: those of ``shard_format``; ``text.model``, the vocabulary; and ``NAME.report.json`` of each
shard: from what it was made and what was left out.

Shard n is made of items n * shard_sources to (n + 1) * shard_sources - 1 of the source, so ranks and Slurm array tasks
share the work by arithmetic: rank r of R makes shards r, r + R, ... Every rank may be started again at any time. A
shard that is finished and was made from the same items in the same way is kept. Whoever finds every shard finished
writes dataset.json.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from megavid.data.captions import SourceItem, read_source
from megavid.data.conditioning import condition_spec, require_rule
from megavid.data.prepare_shard import (
    PrepareOptions,
    ShardReport,
    ShardTask,
    finished_report,
    image_encoder_for,
    make_shard,
    tokenizer_for,
)
from megavid.data.sample import ConditionSpec, TextSpec, TokenizerSpec
from megavid.data.shard_format import DatasetInfo, hash_of, to_json_bytes, write_aside
from megavid.data.shard_writer import shard_name, write_dataset
from megavid.data.text import (
    SentencePieceEncoder,
    Umt5Encoder,
    spec_of,
    train_sentencepiece,
)
from megavid.data.tokenizer import latent_shape
from megavid.errors import ConfigError, DataError

VOCABULARY_FILE = "text.model"


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """The end of ``prepare``: the shards' reports, and the data set if every shard is finished."""

    shards: tuple[ShardReport, ...]
    num_shards: int
    dataset: DatasetInfo | None


def prepare(
    source: Path,
    out: Path,
    options: PrepareOptions,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    processes: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PrepareReport:
    """Make this rank's shards of a data set.

    Args:
        source: see ``captions.read_source``.
        out: the data set's folder.
        options: how.
        rank: 0 to num_ranks - 1.
        num_ranks: how many processes or machines share the work; each is given the same source and options.
        processes: processes that this rank starts.
        on_progress: called with the items that are done, and all items of this rank.

    Raises:
        ConfigError: an option that cannot be.
        DataError: the source cannot be used, too many items are bad, or ``out`` holds another data set.
        StorageError: storage failed.
    """
    if not 0 <= rank < num_ranks:
        raise ConfigError(f"--rank {rank} must be from 0 to {num_ranks - 1} with --num-ranks {num_ranks}")
    items = read_source(source)
    tokenizer = tokenizer_for(options)
    for size in options.rules.buckets:
        latent_shape(tokenizer.spec, *size)
    condition = _condition(options)
    text = _text_spec(items, out, options)
    tasks = _tasks(items, out, options, text, tokenizer.spec)
    mine = tasks[rank::num_ranks]
    total, done = sum(len(task.items) for task in mine), 0
    todo: list[ShardTask] = []
    reports: dict[int, ShardReport] = {}
    for task in mine:
        kept = finished_report(task)
        if kept is None:
            todo.append(task)
        else:
            reports[task.number] = kept
            done += len(task.items)
    on_progress(done, total)
    _refuse_too_many_bad(reports.values(), options.max_bad)
    for number, report in _run(todo, processes, lambda: on_progress(-1, total)):
        reports[number] = report
        _refuse_too_many_bad(reports.values(), options.max_bad)
    dataset = _finish(tasks, out, tokenizer.spec, text, condition)
    return PrepareReport(tuple(reports[number] for number in sorted(reports)), len(tasks), dataset)


def _refuse_too_many_bad(reports: Iterable[ShardReport], max_bad: int) -> None:
    bad = [item for report in reports for item in report.bad]
    if len(bad) > max_bad:
        raise DataError(f"{len(bad)} items cannot be used, more than --max-bad {max_bad}; the last: {bad[-1].reason}")


def _run(tasks: Sequence[ShardTask], processes: int, on_item: Callable[[], None]) -> Iterator[tuple[int, ShardReport]]:
    """Do the tasks here, or in ``processes`` others; ``on_item`` is called for each item that is done."""
    if processes <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task.number, make_shard(task, on_item)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = {pool.submit(make_shard, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                report = future.result()
                for _ in futures[future].items:
                    on_item()
                yield futures[future].number, report
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _condition(options: PrepareOptions) -> ConditionSpec:
    """What samples will carry of known frames.

    Raises:
        ConfigError: no such rule or encoder, or an encoder without known frames to show it.
    """
    if not options.known:
        if options.image_encoder:
            raise ConfigError(f"--image-encoder {options.image_encoder} needs --known: the frames that it is shown")
        return ConditionSpec()
    require_rule(options.known, "--known")
    folder = Path(options.image_encoder)
    file = str(folder.resolve()) if options.image_encoder and folder.is_dir() else ""
    return condition_spec(options.known, image_encoder_for(options), file)


def _text_spec(items: Sequence[SourceItem], out: Path, options: PrepareOptions) -> TextSpec:
    """The text encoder; a vocabulary is trained on all captions and written, the same by every rank."""
    if options.text_encoder != "sentencepiece":
        folder = Path(options.text_encoder)
        if not folder.is_dir():
            raise ConfigError(
                f"--text-encoder {options.text_encoder!r} is not sentencepiece, nor the folder of a UMT5 or T5"
            )
        return spec_of(Umt5Encoder(folder, options.text_length, options.device), str(folder.resolve()))
    model = train_sentencepiece(item.caption for item in items)
    file = out / VOCABULARY_FILE
    if not file.exists():
        write_aside(file, model)
    if file.read_bytes() != model:
        raise DataError(
            f"{file} was trained on other captions, so {out} holds another data set; choose another --out or delete it"
        )
    encoder = SentencePieceEncoder(model, options.text_width, options.text_length)
    return spec_of(encoder, VOCABULARY_FILE)


def _tasks(
    items: Sequence[SourceItem], out: Path, options: PrepareOptions, text: TextSpec, tokenizer: TokenizerSpec
) -> list[ShardTask]:
    how = {
        "rules": asdict(options.rules),
        "tokenizer": asdict(tokenizer),
        "text": asdict(text),
        "encode_text": options.encode_text,
        "shard_sources": options.shard_sources,
    }
    if options.known:
        how["condition"] = asdict(_condition(options))
    tasks = []
    for number, first in enumerate(range(0, len(items), options.shard_sources)):
        part = tuple(items[first : first + options.shard_sources])
        what = [[str(item.file), item.caption, item.start_s, item.end_s, dict(item.fields)] for item in part]
        tasks.append(ShardTask(number, part, out, options, text, hash_of(to_json_bytes({"how": how, "items": what}))))
    return tasks


def _finish(
    tasks: Sequence[ShardTask], out: Path, tokenizer: TokenizerSpec, text: TextSpec, condition: ConditionSpec
) -> DatasetInfo | None:
    """Write dataset.json if every shard of every rank is finished."""
    reports = [finished_report(task) for task in tasks]
    names = [shard_name(task.number) for task, report in zip(tasks, reports) if report and report.samples]
    if any(report is None for report in reports):
        return None
    if not names:
        raise DataError(f"no clip was made; the first item: {next(r.bad[0].reason for r in reports if r and r.bad)}")
    return write_dataset(out, tokenizer, text, names, condition)
