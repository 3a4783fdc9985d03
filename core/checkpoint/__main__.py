"""`python -m core.checkpoint inspect DIR`: what a checkpoint holds, and whether it is intact."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from core.config.loading import exit_on_user_error, one_sentence

if TYPE_CHECKING:
    from core.checkpoint.reader import CheckpointReader


@dataclass(frozen=True)
class Inspect:
    """Print step, tensors, sizes and config of a checkpoint."""

    directory: Annotated[Path, tyro.conf.Positional]
    """A step directory, or a save directory, of which the newest step is shown."""
    verify: bool = False
    """Read every file and compare all checksums."""

    def run(self) -> None:
        """Open and print.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        from core.checkpoint.reader import open_checkpoint  # torch is too slow to load for --help

        reader = open_checkpoint(self.directory)
        print(describe(reader))
        if self.verify:
            reader.verify()
            print("verified: every block matches its checksum, and no tensor has a hole")


def describe(reader: "CheckpointReader") -> str:
    """The report of `inspect` as text."""
    rows, sizes, formats = [], dict[str, int](), dict[str, set[str]]()
    for name, record in reader.tensors.items():
        kind = name.rpartition("/")[0] or "other"
        dtype = str(record.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + record.nbytes
        formats.setdefault(kind, set()).add(dtype)
        shape = "x".join(map(str, record.shape)) or "scalar"
        boxes = _count(len(record.boxes), "box", "es")
        spread = _count(len({file for _, file in record.boxes}), "file")
        rows.append((name, shape, dtype, f"{boxes} in {spread}"))
    files = reader.index.files
    lines = [
        f"{reader.path}: step {reader.step}, {_count(len(rows), 'tensor')} in "
        f"{_count(len(files), 'file')}, {_size(sum(file.size for file in files.values()))}"
    ]
    lines += _table(rows)
    lines += _table([(name, _size(file.size)) for name, file in sorted(files.items())])
    lines += [
        f"{kind}: {_size(size)} of {', '.join(sorted(formats[kind]))}"
        for kind, size in sorted(sizes.items())
    ]
    for name, section in reader.sections.items():
        lines += _section_lines(name, section)
    return "\n".join(lines)


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}" + (plural if number != 1 else "")


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(text.ljust(n) for text, n in zip(row, widths, strict=True))
        yield "  " + line.rstrip()


def _section_lines(name: str, section: Any) -> Iterator[str]:
    """A section as JSON; a text of several lines, such as a run's TOML, as these lines."""
    if isinstance(section, str) and "\n" in section:
        yield f"{name}:"
        yield textwrap.indent(section.rstrip("\n"), "  ")
    else:
        yield f"{name}: {json.dumps(section, indent=2)}"


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: arguments; by default the command line's.

    Raises:
        SystemExit: bad options, or a checkpoint that is missing or damaged.
    """
    prog = "python -m core.checkpoint"
    with one_sentence():
        command: Inspect = tyro.extras.subcommand_cli_from_dict(
            {"inspect": Inspect}, args=argv, prog=prog
        )
    command.run()


if __name__ == "__main__":
    main()
