"""Which parts of a model each pipeline stage holds: balanced automatically, or written as a string.

A layout cuts the sequence of a model's parts into contiguous pieces, `stages * chunks` of them, and
a `StageMap` says which stage holds which piece. As a string: one letter per part, `t*3` for `ttt`,
`(tt|)*2` for `tt|tt|`, pieces divided by `|`, spaces and commas for the eye, as in Megatron-LM:
`E t*3|t*3|t*2|L`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, groupby, pairwise

from core.errors import ConfigError
from core.pipeline.costs import Part, Work, effective_work
from core.pipeline.stage_map import StageMap

_LONGEST = 100_000
"""Letters that a layout string may expand to."""


@dataclass(frozen=True)
class Layout:
    """A model's parts, cut into pieces."""

    parts: tuple[Part, ...]
    """The whole model in the order in which data passes it."""
    bounds: tuple[int, ...]
    """Piece i holds the parts from `bounds[i]` to before `bounds[i + 1]`."""
    stage_map: StageMap
    """Where the pieces lie."""

    def piece(self, piece: int) -> tuple[Part, ...]:
        """The parts of a piece; none, if it only passes data on."""
        return self.parts[self.bounds[piece] : self.bounds[piece + 1]]

    @property
    def work(self) -> tuple[Work, ...]:
        """What each piece costs, given which parts are frozen."""
        costs = effective_work(self.parts)
        return tuple(sum(costs[start:stop], Work()) for start, stop in pairwise(self.bounds))

    @property
    def stage_costs(self) -> tuple[float, ...]:
        """Forward and backward cost of each stage."""
        totals = [0.0] * self.stage_map.stages
        for piece, work in enumerate(self.work):
            totals[self.stage_map.stage(piece)] += work.total
        return tuple(totals)

    @property
    def stage_parameters(self) -> tuple[int, ...]:
        """Parameters of each stage, which holds a tied table once."""
        where, counts = self.stage_map, []
        for stage in range(where.stages):
            held = [self.piece(where.piece(stage, chunk)) for chunk in range(where.chunks)]
            parts = [part for piece in held for part in piece]
            again = [part.tied for part in parts if part.tied][1:]
            counts.append(sum(part.parameters for part in parts) - sum(again))
        return tuple(counts)

    @property
    def trainable(self) -> tuple[bool, ...]:
        """For each piece, whether it holds weights that take a gradient."""
        return tuple(
            any(part.trainable for part in self.piece(i)) for i in range(self.stage_map.pieces)
        )

    def __str__(self) -> str:
        """The layout as a string, from which `parse_layout` makes the same layout."""
        return "|".join(_brief(self.piece(i)) for i in range(self.stage_map.pieces))

    def table(self, *, parameters: bool = True) -> str:
        """Stages with their parts and shares of the cost, and with `parameters` those, as text."""
        where, costs = self.stage_map, self.stage_costs
        total, slowest = sum(costs) or 1.0, max(costs)
        rows = [("stage", "parts", "parameters", "cost", "of slowest")]
        for stage, (cost, count) in enumerate(zip(costs, self.stage_parameters, strict=True)):
            held = [self.piece(where.piece(stage, chunk)) for chunk in range(where.chunks)]
            rows.append(
                (
                    str(stage),
                    " | ".join(_brief(parts) or "-" for parts in held),
                    f"{count:,}",
                    f"{cost / total:.1%}",
                    f"{cost / (slowest or 1.0):.0%}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[1] = row[1].ljust(widths[1])
            if not parameters:
                del cells[2]
            lines.append("  ".join(cells))
        busy = total / (slowest * where.stages) if slowest else 1.0
        lines.append(
            f"stage {costs.index(slowest)} is the slowest: it alone lets all stages together be "
            f"busy {busy:.1%} of the time"
        )
        return "\n".join(lines)


def _brief(parts: Sequence[Part]) -> str:
    """Parts as a string, with runs of one kind counted."""
    runs = [(symbol, len(list(run))) for symbol, run in groupby(part.symbol for part in parts)]
    return " ".join(symbol if count == 1 else f"{symbol}*{count}" for symbol, count in runs)


def parse_layout(text: str, parts: Sequence[Part], stage_map: StageMap) -> Layout:
    """Read a layout string.

    Raises:
        ConfigError: the string cannot be read, does not have a piece for each chunk of each stage,
            does not hold the model's parts in their order, or begins or ends with an empty piece
            (an empty one between others passes data on).
    """
    pieces = expand_layout(text).split("|")
    if len(pieces) != stage_map.pieces:
        raise ConfigError(
            f"layout {text!r} has {len(pieces)} pieces, but {stage_map.stages} stages of "
            f"{stage_map.chunks} chunks hold {stage_map.pieces}: divide it by "
            f"{stage_map.pieces - 1} signs |"
        )
    named, expected = "".join(pieces), "".join(part.symbol for part in parts)
    for symbol in dict.fromkeys(expected + named):
        if named.count(symbol) != expected.count(symbol):
            raise ConfigError(
                f"layout {text!r} names {symbol} {named.count(symbol)} times, but the model, "
                f"{_brief(parts)}, has {expected.count(symbol)}: change the counts"
            )
    if named != expected:
        raise ConfigError(
            f"layout {text!r} has its parts in another order than the model, {_brief(parts)}: keep "
            "that order"
        )
    for which, piece in (("first", pieces[0]), ("last", pieces[-1])):
        if not piece:
            raise ConfigError(
                f"layout {text!r} has an empty {which} piece, to or from which no data could pass: "
                f"put a part there"
            )
    return Layout(tuple(parts), (0, *accumulate(map(len, pieces))), stage_map)


def expand_layout(text: str) -> str:
    """A layout string as letters and dividers alone, with every multiple written out.

    Raises:
        ConfigError: the string cannot be read.
    """
    unit = re.compile(r"(?:([A-Za-z])|\(([A-Za-z|]*)\))\*(\d{1,6})(?!\d)")
    found, done = "".join(text.replace(",", " ").split()), ""
    while found != done and len(found) <= _LONGEST:
        done = found
        while match := unit.search(found):
            inner, count = match[1] or match[2], int(match[3])
            if len(inner) * count > _LONGEST:
                break
            found = found[: match.start()] + inner * count + found[match.end() :]
    wrong = re.search(r"[^A-Za-z|].{,9}", found)
    if wrong:
        raise ConfigError(
            f"layout {text!r} cannot be read at {wrong[0]!r}: write letters, counts such as t*3 or "
            "(tt|)*2, and | between pieces, as in 'E t*3|t*3|t*2|L'"
        )
    return found


def balanced(parts: Sequence[Part], stage_map: StageMap) -> Layout:
    """Cut a model so that the slowest stage is as fast as can be; no piece stays empty.

    Exact for one chunk per stage: the least possible cost of the slowest stage and, among the cuts
    that reach it, the most even one (least sum of squares), then the one with the fewest parts on
    the first and last stage. With several chunks the same is done for pieces, then parts move from
    slow stages to others as long as that helps. That is exact as well where all layers cost the
    same; a mixture may end above the best (1 in 11 small random models did, by 22 % at worst).

    Raises:
        ConfigError: fewer parts than pieces.
    """
    if len(parts) < stage_map.pieces:
        raise ConfigError(
            f"{stage_map.stages} stages of {stage_map.chunks} chunks hold {stage_map.pieces} "
            f"pieces, but the model, {_brief(parts)}, has {len(parts)} parts: use fewer stages or "
            "chunks, or a layout string with empty pieces"
        )
    # Whole numbers add up exactly, so that equal costs compare as equal. Every float is a fraction.
    costs = [Fraction(work.total) for work in effective_work(parts)]
    common = math.lcm(*(cost.denominator for cost in costs))
    whole = [int(cost * common) for cost in costs]
    bounds = _even_cut(whole, stage_map.pieces)
    if stage_map.chunks > 1:
        bounds = _move_parts(whole, bounds, stage_map)
    return Layout(tuple(parts), tuple(bounds), stage_map)


def _least_bound(costs: Sequence[int], pieces: int) -> int:
    """The least cost of the dearest piece: bisection over what a piece may cost."""
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        used, filled = 1, 0
        for cost in costs:
            if filled + cost > middle:
                used, filled = used + 1, 0
            filled += cost
        # Fewer pieces than allowed may always be cut further.
        low, high = (low, middle) if used <= pieces else (middle + 1, high)
    return low


def _even_cut(costs: Sequence[int], pieces: int) -> list[int]:
    """Bounds of the most even cut among those whose dearest piece is as cheap as can be.

    Dynamic programming over the end of each piece, with what is to be least as a pair that adds up:
    the sum of squares, and the parts in the first and last piece.
    """
    bound, count = _least_bound(costs, pieces), len(costs)
    before = [0, *accumulate(costs)]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    origins: list[dict[int, int]] = []
    for piece in range(pieces):
        at_end = piece in (0, pieces - 1)
        reached: dict[int, tuple[int, int]] = {}
        origin: dict[int, int] = {}
        for start, (squares, ends) in best.items():
            for stop in range(start + 1, count - (pieces - 1 - piece) + 1):
                cost = before[stop] - before[start]
                if cost > bound:
                    break
                score = (squares + cost * cost, ends + (stop - start if at_end else 0))
                if stop not in reached or score < reached[stop]:
                    reached[stop], origin[stop] = score, start
        best = reached
        origins.append(origin)
    bounds = [count]
    for origin in reversed(origins):
        bounds.append(origin[bounds[-1]])
    return bounds[::-1]


def moved(bounds: Sequence[int], source: int, target: int) -> list[int]:
    """Bounds with one part fewer in one piece and one more in another; those between pass one
    on.
    """
    low, high = min(source, target), max(source, target)
    step = 1 if target < source else -1
    return [at + step if low < i <= high else at for i, at in enumerate(bounds)]


def _move_parts(costs: Sequence[int], bounds: list[int], where: StageMap) -> list[int]:
    """Shift one part at a time from a piece of a slowest stage to any other piece, the pieces
    between passing one on, as long as the stages become more even.
    """
    before = [0, *accumulate(costs)]

    def score(bounds: Sequence[int]) -> tuple[int, int, int, int]:
        pieces = [before[stop] - before[start] for start, stop in pairwise(bounds)]
        stages = [0] * where.stages
        for piece, cost in enumerate(pieces):
            stages[where.stage(piece)] += cost
        ends = bounds[1] - bounds[-2]
        return max(stages), sum(c * c for c in stages), sum(c * c for c in pieces), ends

    now = score(bounds)
    while True:
        candidates = (
            moved(bounds, source, target)
            for source in range(where.pieces)
            if bounds[source + 1] - bounds[source] > 1
            for target in range(where.pieces)
            if target != source
        )
        best = min(candidates, key=score, default=bounds)
        if score(best) >= now:
            return bounds
        bounds, now = best, score(best)
