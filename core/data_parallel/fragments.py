"""What a run of a parameter's elements is in the global tensor: boxes, since a flat region may
begin and end in the midst of a row.
"""

import math
from collections.abc import Iterator, Sequence

from core.data_parallel.regions import Fragment, aligned
from core.parallel.sharding import Box, BoxCopy, ParamSharding


def cut_fragments(
    sharding: ParamSharding, shape: Sequence[int], first: int, stop: int, start: int
) -> Iterator[Fragment]:
    """The fragments that elements `first` to `stop` of a local tensor, in row-major order, make up.

    Args:
        sharding: of the whole local tensor.
        shape: of the local tensor.
        first: first element of the run.
        stop: element after its last.
        start: where the run lies in the region.
    """
    ends_parameter = stop == math.prod(shape)
    for box in row_major_boxes(first, stop, tuple(shape)):
        end = start + box.numel
        last = end - start == stop - first
        copies = []
        for copy in sharding.copies:
            common = copy.local.intersect(box)
            if common is not None:
                moved = common.relative_to(copy.local).start
                place = tuple(g + m for g, m in zip(copy.global_.start, moved, strict=True))
                copies.append(BoxCopy(common.relative_to(box), Box(place, common.shape), copy.grad))
        yield Fragment(
            sharding.name,
            sharding.global_shape,
            start,
            aligned(end) if last and ends_parameter else end,
            box.shape,
            tuple(copies),
        )
        first, start = first + box.numel, end


def row_major_boxes(first: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The fewest boxes that elements `first` to `stop` of a tensor in row-major order make up, each
    without gaps in memory, in order.
    """
    if first >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    row, last_row = first // inner, (stop - 1) // inner

    def part(index: int, begin: int, end: int) -> Iterator[Box]:
        for box in row_major_boxes(begin, end, shape[1:]):
            yield Box((index, *box.start), (1, *box.shape))

    if row == last_row and stop - first < inner:
        yield from part(row, first - row * inner, stop - row * inner)
        return
    if first % inner:
        yield from part(row, first - row * inner, inner)
        row += 1
    whole_rows = stop // inner - row
    if whole_rows:
        yield Box((row, *(0,) * (len(shape) - 1)), (whole_rows, *shape[1:]))
    if stop % inner:
        yield from part(last_row, 0, stop % inner)
