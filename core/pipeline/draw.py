"""Timelines of a pipeline, in text and as a picture."""

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from core.errors import ConfigError
from core.pipeline.schedules import Kind
from core.pipeline.simulate import Timeline, bubble_of, span_of

LETTERS: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.FORWARD: "F",
        Kind.BACKWARD: "B",
        Kind.BACKWARD_INPUT: "I",
        Kind.BACKWARD_WEIGHT: "W",
    }
)
"""The letter of each kind; small letters stand for odd chunks."""
_COLOURS: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.FORWARD: "#4C78C8",
        Kind.BACKWARD: "#3FA66B",
        Kind.BACKWARD_INPUT: "#7CCBA2",
        Kind.BACKWARD_WEIGHT: "#E3A33B",
    }
)


def text_timeline(timeline: Timeline, width: int) -> str:
    """A line per stage, at most `width` columns of letters, each for an equal share of the time.

    Where every time is a whole number and there is room, a column is one unit; a dot is idle time.
    """
    start, end = span_of(timeline)
    span = end - start
    whole = all(
        float(time - start).is_integer()
        for entries in timeline
        for entry in entries
        for time in entry[1:]
    )
    columns = int(span) if whole and 0 < span <= width else width
    label = len(str(len(timeline) - 1))
    lines = []
    for stage, entries in enumerate(timeline):
        entries = tuple(entry for entry in entries if entry.end > entry.start)
        starts = [entry.start for entry in entries]
        cells = []
        for column in range(columns):
            middle = start + span * (column + 0.5) / columns
            index = bisect_right(starts, middle) - 1
            if index < 0 or middle >= entries[index].end:
                cells.append(".")
                continue
            action = entries[index].action
            letter = LETTERS[action.kind]
            cells.append(letter.lower() if action.chunk % 2 else letter)
        lines.append(f"{stage:>{label}} {''.join(cells)}")
    return "\n".join(lines)


def picture(path: Path, timelines: Mapping[str, Timeline]) -> None:
    """Draw timelines one below the other, each with its own clock from 0, on one scale.

    Args:
        path: file to write; its ending decides on the format.
        timelines: what to draw, by title.

    Raises:
        ConfigError: matplotlib is missing, does not know the ending, or cannot write the file.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ConfigError(
            f"--out {path} needs matplotlib: install it with pip install 'tessera-zoo[report]', or "
            "leave --out out for a timeline in text"
        ) from error

    longest = max(end - start for start, end in map(span_of, timelines.values()))
    rows = sum(map(len, timelines.values()))
    figure = Figure(figsize=(16, 1.2 * len(timelines) + 0.45 * rows), layout="constrained")
    axes = figure.subplots(
        len(timelines), squeeze=False, height_ratios=[len(t) + 1 for t in timelines.values()]
    )
    kinds: dict[Kind, None] = {}
    for axis, (title, timeline) in zip(axes[:, 0], timelines.items(), strict=True):
        kinds |= dict.fromkeys(entry.action.kind for entries in timeline for entry in entries)
        _draw(axis, timeline, longest)
        axis.set_title(f"{title}: bubble {bubble_of(timeline):.1%}", loc="left", fontsize=10)
        axis.set_xlim(0, longest)
    figure.legend(
        handles=[Patch(color=_COLOURS[kind], label=str(kind)) for kind in Kind if kind in kinds],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out {path} cannot be written: {reason}") from error


def _draw(axis: "object", timeline: Timeline, longest: float) -> None:
    """One timeline: a row per stage, the first on top; later chunks are paler."""
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    zero, _ = span_of(timeline)
    chunks = 1 + max(entry.action.chunk for entries in timeline for entry in entries)
    for stage, entries in enumerate(timeline):
        for (kind, chunk, microbatch), start, end in entries:
            axis.barh(
                stage,
                end - start,
                left=start - zero,
                height=0.9,
                color=_COLOURS[kind],
                alpha=1.0 - 0.55 * chunk / chunks,
                edgecolor="white",
                linewidth=0.4,
            )
            # Numbers where they fit: about 260 characters cover the width.
            if (end - start) * 260 > longest * len(str(microbatch)):
                axis.text(
                    (start + end) / 2 - zero,
                    stage,
                    str(microbatch),
                    ha="center",
                    va="center",
                    fontsize=6,
                )
    axis.set_yticks(range(len(timeline)), [f"stage {stage}" for stage in range(len(timeline))])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
