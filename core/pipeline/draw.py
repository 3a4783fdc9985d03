"""Timelines of a pipeline, in text and as a picture."""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from statistics import median
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
        Kind.FORWARD: "#6C9BE8",
        Kind.BACKWARD: "#4DB380",
        Kind.BACKWARD_INPUT: "#4DB380",
        Kind.BACKWARD_WEIGHT: "#F0B34A",
    }
)
_MEANING: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.FORWARD: "F: forward",
        Kind.BACKWARD: "B: backward",
        Kind.BACKWARD_INPUT: "B: gradient of inputs",
        Kind.BACKWARD_WEIGHT: "W: gradient of weights",
    }
)
_IDLE = "#E4E4E4"
_WIDTH = 735.0
"""Points from left to right within a timeline; a letter takes 0.62 of its size."""


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
    # At this width and density a page as wide as a README shows it at half of its size.
    figure = Figure(figsize=(11, 1.0 + 0.75 * len(timelines) + 0.42 * rows), layout="constrained")
    axes = figure.subplots(
        len(timelines), squeeze=False, height_ratios=[len(t) + 1 for t in timelines.values()]
    )
    kinds: set[Kind] = set()
    chunks = 1
    for axis, (title, timeline) in zip(axes[:, 0], timelines.items(), strict=True):
        actions = [entry.action for entries in timeline for entry in entries]
        kinds |= {action.kind for action in actions}
        chunks = max(chunks, 1 + max(action.chunk for action in actions))
        _draw(axis, timeline, longest)
        microbatches = 1 + max(action.microbatch for action in actions)
        axis.set_title(
            f"{title}: {len(timeline)} stages, {microbatches} microbatches, "
            f"idle {bubble_of(timeline):.1%} of the time",
            loc="left",
            fontsize=13,
        )
        axis.set_xlim(0, longest)
    handles = [Patch(color=_COLOURS[kind], label=_MEANING[kind]) for kind in Kind if kind in kinds]
    handles.append(Patch(color=_IDLE, label="idle"))
    notes = "time from left to right; number: microbatch" + (
        "; pale: a stage's later chunks" if chunks > 1 else ""
    )
    figure.legend(
        handles=handles,
        title=notes,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=12,
        title_fontsize=11,
    )
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out {path} cannot be written: {reason}") from error


def _draw(axis: "object", timeline: Timeline, longest: float) -> None:
    """One timeline: a row per stage, the first on top; later chunks are paler."""
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    zero, last = span_of(timeline)
    everything = list(chain.from_iterable(timeline))
    chunks = 1 + max(entry.action.chunk for entry in everything)
    # One size for all numbers, and turned where the longest would not fit into most actions.
    digits = max(len(str(entry.action.microbatch)) for entry in everything)
    usual = _WIDTH * median(entry.end - entry.start for entry in everything) / longest
    rotated = usual < 6.0 * 0.62 * digits
    size = min(9.0, 0.95 * usual if rotated else usual / (0.62 * digits))
    for stage, entries in enumerate(timeline):
        axis.barh(stage, last - zero, height=0.9, color=_IDLE)
        for (kind, chunk, microbatch), start, end in entries:
            label, width = str(microbatch), _WIDTH * (end - start) / longest
            axis.barh(
                stage,
                end - start,
                left=start - zero,
                height=0.9,
                color=_paler(_COLOURS[kind], 0.6 * chunk / chunks),
                edgecolor="white",
                # Of a thin bar an edge of full width would leave nothing.
                linewidth=min(0.5, 0.1 * width),
            )
            if size >= 4.0 and width >= size * (1.0 if rotated else 0.62 * len(label)):
                axis.text(
                    (start + end) / 2 - zero,
                    stage,
                    label,
                    ha="center",
                    va="center" if rotated else "center_baseline",
                    fontsize=size,
                    rotation=90 if rotated else 0,
                )
    axis.set_yticks(
        range(len(timeline)), [f"stage {stage}" for stage in range(len(timeline))], fontsize=11
    )
    axis.tick_params(left=False)
    axis.invert_yaxis()
    axis.spines[["top", "right", "left"]].set_visible(False)


def _paler(colour: str, share: float) -> tuple[float, ...]:
    """A colour mixed with white."""
    return tuple((x + (255 - x) * share) / 255 for x in bytes.fromhex(colour[1:]))
