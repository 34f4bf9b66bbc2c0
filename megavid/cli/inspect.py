"""``megavid inspect PATH``: look at a data set of shards or at a checkpoint.

Owns the options and the choice between the two; ``megavid.data.inspect`` and ``megavid.checkpoint.inspect`` do the
work.
"""

import argparse
from pathlib import Path
from typing import NoReturn

from megavid.errors import ConfigError, DataError

HELP = "look at shards (counts, captions, hashes, a contact sheet) or at a checkpoint"

_DESCRIPTION = """\
Look at what `megavid prepare` or `megavid train` wrote.

PATH is a folder of shards (it has dataset.json): counts, buckets, captions, tokenizer, every hash, and a contact sheet
of decoded latents, PATH/contact_sheet.png; or a checkpoint, a run's folder or its checkpoints: tensors, shapes, layout,
state, config, every hash. Exit status 2 if anything is damaged."""


class _Parser(argparse.ArgumentParser):
    """Raises, so that a bad option is one line and exit status 2 like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"inspect: {message}; see `megavid inspect --help`")


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    parser = _Parser(
        prog="megavid inspect",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="folder of shards, or checkpoint")
    shards = parser.add_argument_group("shards")
    add = shards.add_argument
    add("--sheet", type=Path, metavar="FILE.png", help="where the contact sheet goes (default PATH/contact_sheet.png)")
    add("--clips", type=int, default=12, help="clips of the contact sheet (default %(default)s)")
    add("--max-verified", type=int, help="samples whose hashes are checked, evenly spread (default: all)")
    add("--tokenizer", default="", metavar="FOLDER", help="weights, for latents of a tokenizer that has some")
    arguments = parser.parse_args(argv)
    if not arguments.path.exists():
        raise DataError(f"{arguments.path} does not exist; PATH is a folder of shards or a checkpoint")
    if (arguments.path / "dataset.json").exists():
        return _inspect_shards(arguments)
    if any(arguments.path.glob("shard_*.tar*")) and not (arguments.path / "checkpoints").exists():
        raise DataError(
            f"{arguments.path} has shards but no dataset.json: `megavid prepare` did not finish; run it again"
        )
    from megavid.checkpoint.inspect import describe

    print(describe(arguments.path), end="")
    return 0


def _inspect_shards(arguments: argparse.Namespace) -> int:
    if arguments.clips < 1:
        raise ConfigError(f"--clips {arguments.clips} must be at least 1")
    # Imported late, so that help answers at once.
    from tqdm import tqdm

    from megavid.data.inspect import inspect_shards
    from megavid.data.video import write_png

    with tqdm(desc="verify", unit="sample", dynamic_ncols=True, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = inspect_shards(
            arguments.path,
            tokenizer_folder=arguments.tokenizer,
            clips=arguments.clips,
            max_verified=arguments.max_verified,
            on_progress=show,
        )
    print(found.text)
    if found.sheet is None:
        print("sheet      none: pass --tokenizer FOLDER with the tokenizer's weights to decode latents")
    else:
        file = arguments.sheet or arguments.path / "contact_sheet.png"
        write_png(file, found.sheet)
        print(f"sheet      {file}: open it and look")
    if found.bad:
        raise DataError(f"{arguments.path}: {len(found.bad)} damaged samples, the first: {found.bad[0]}")
    return 0
