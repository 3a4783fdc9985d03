import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from core.data_parallel.fragments import cut_fragments, row_major_boxes
from core.data_parallel.regions import ALIGNMENT, Fragment, aligned
from core.parallel.cutting import Block, split_blocks, split_vocab, whole_copy
from core.parallel.sharding import Box, BoxCopy, ParamSharding

Shape = tuple[int, ...]


def _shapes(count: int) -> list[tuple[random.Random, Shape]]:
    found = []
    for seed in range(count):
        rng = random.Random(seed)
        found.append((rng, tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 4)))))
    return found


def _indices(box: Box, shape: Shape) -> Tensor:
    """Row-major indices of the elements of a box."""
    return torch.arange(math.prod(shape)).view(shape)[box.slices].reshape(-1)


def test_boxes_cover_a_run_in_order() -> None:
    for rng, shape in _shapes(300):
        numel = math.prod(shape)
        first = rng.randint(0, numel)
        stop = rng.randint(first, numel)
        boxes = list(row_major_boxes(first, stop, shape))
        found = [int(i) for box in boxes for i in _indices(box, shape)]
        assert found == list(range(first, stop)), (shape, first, stop)
        assert all(box.numel for box in boxes)


def test_boxes_are_as_few_as_can_be() -> None:
    """Against all ways to cut the run where a box may end; a box is a run without gaps."""
    for shape in [(), (5,), (3, 4), (2, 3, 2), (2, 2, 2, 2), (1, 3, 1, 2), (4, 1, 3)]:
        numel = math.prod(shape)
        runs = {
            (int(i[0]), int(i[-1]) + 1)
            for box in _all_boxes(shape)
            if (i := _indices(box, shape)).tolist() == list(range(int(i[0]), int(i[-1]) + 1))
        }
        for first, stop in itertools.combinations(range(numel + 1), 2):
            fewest = {first: 0}
            for at in range(first, stop):
                for end in range(at + 1, stop + 1):
                    if at in fewest and (at, end) in runs:
                        fewest[end] = min(fewest.get(end, numel), fewest[at] + 1)
            assert len(list(row_major_boxes(first, stop, shape))) == fewest[stop]


def _all_boxes(shape: Shape) -> list[Box]:
    sides = [[(a, n) for a in range(size) for n in range(1, size - a + 1)] for size in shape]
    return [
        Box(tuple(a for a, _ in sides), tuple(n for _, n in sides))
        for sides in itertools.product(*sides)
    ]


def test_an_empty_run_has_no_boxes() -> None:
    assert not list(row_major_boxes(3, 3, (2, 4)))
    assert not list(row_major_boxes(0, 0, ()))


def _shardings() -> list[tuple[ParamSharding, Shape]]:
    """Every way in which layers cut a parameter, and its local shape."""
    heads = (Block(4, 2), Block(1, 2), Block(2, 2))
    found: list[tuple[ParamSharding, Shape]] = [
        (ParamSharding("scalar", (), whole_copy(())), ()),
        (ParamSharding("bias", (7,), whole_copy((7,), "partial")), (7,)),
        (ParamSharding("stack", (3, 2, 5), whole_copy((3, 2, 5))), (3, 2, 5)),
        (ParamSharding("deep", (2, 3, 2, 4), whole_copy((2, 3, 2, 4))), (2, 3, 2, 4)),
    ]
    for size in (1, 2, 4):
        for rank in range(size):
            rows, copies = split_vocab(11, rank, size, 6)
            found.append((ParamSharding("table", (11, 6), copies), (rows, 6)))
            rows, copies = split_blocks(heads, rank, size, other=(5,))
            found.append((ParamSharding("qkv", (14, 5), copies), (rows, 5)))
            width, copies = split_blocks(heads, rank, size, dim=1, other=(3,))
            found.append((ParamSharding("strided", (3, 14), copies), (3, width)))
            width, copies = split_blocks([Block(8)], rank, size, dim=1, other=(2, 3))
            found.append((ParamSharding("experts", (2, 8, 3), copies), (2, width, 3)))
    return found


def _held(copies: tuple[BoxCopy, ...], local: Shape, whole: Shape) -> Tensor:
    """For every element of a local tensor its index in the global one, or -1 for padding."""
    held = torch.full(local, -1)
    for copy in copies:
        part = held[copy.local.slices]
        assert torch.all(part == -1)
        part.copy_(_indices(copy.global_, whole).view(copy.global_.shape))
    return held


def _kinds(copies: tuple[BoxCopy, ...], local: Shape) -> Tensor:
    kinds = torch.zeros(local, dtype=torch.int64)
    for copy in copies:
        kinds[copy.local.slices] = 2 if copy.grad == "partial" else 1
    return kinds


def _check_run(fragments: list[Fragment], sharding: ParamSharding, shape: Shape, run: range) -> int:
    """What the fragments hold, flat, against what the local tensor does; where the last ends."""
    whole = sharding.global_shape
    held = _held(sharding.copies, shape, whole).reshape(-1)
    kinds = _kinds(sharding.copies, shape).reshape(-1)
    at, start = run.start, fragments[0].start
    for fragment in fragments:
        assert (fragment.name, fragment.global_shape) == (sharding.name, whole)
        assert fragment.start == start
        part = slice(at, at + fragment.numel)
        mine = _held(fragment.copies, fragment.shape, whole).reshape(-1)
        assert torch.equal(mine, held[part])
        assert torch.equal(_kinds(fragment.copies, fragment.shape).reshape(-1), kinds[part])
        at, start = at + fragment.numel, fragment.end
        last = at == run.stop == math.prod(shape)
        stop = fragment.start + fragment.numel
        assert fragment.end == (aligned(stop) if last else stop)
    assert at == run.stop
    return start


@pytest.mark.parametrize("seed", range(20))
def test_fragments_hold_what_the_run_holds(seed: int) -> None:
    rng = random.Random(seed)
    for sharding, shape in _shardings():
        numel = math.prod(shape)
        cuts = sorted({0, numel, *(rng.randint(0, numel) for _ in range(rng.randint(0, 4)))})
        covered = []
        for first, stop in itertools.pairwise(cuts):
            start = rng.randint(0, 9) * ALIGNMENT
            fragments = list(cut_fragments(sharding, shape, first, stop, start))
            assert fragments[0].start == start
            _check_run(fragments, sharding, shape, range(first, stop))
            covered += [copy.global_ for f in fragments for copy in f.copies]
        # Together the fragments hold what the whole tensor does.
        found = [int(i) for box in covered for i in _indices(box, sharding.global_shape)]
        held = _held(sharding.copies, shape, sharding.global_shape)
        assert sorted(found) == sorted(held[held >= 0].tolist())


def test_a_fragment_is_a_view_of_the_flat_tensor() -> None:
    sharding, shape = ParamSharding("w", (5, 3), whole_copy((5, 3))), (5, 3)
    flat = torch.zeros(3 * ALIGNMENT)
    # Rest of row 1, rows 2 and 3, start of row 4.
    fragments = list(cut_fragments(sharding, shape, 4, 13, ALIGNMENT))
    assert [f.shape for f in fragments] == [(1, 2), (2, 3), (1, 1)]
    for number, fragment in enumerate(fragments, 1):
        fragment.view(flat).fill_(float(number))
    assert flat[ALIGNMENT : ALIGNMENT + 9].tolist() == [1, 1, 2, 2, 2, 2, 2, 2, 3]
    assert int(flat.count_nonzero()) == 9
    assert [f.end - f.start for f in fragments] == [2, 6, 1]  # the gap follows the last element
    [end] = cut_fragments(sharding, shape, 13, 15, 0)
    assert end.end == ALIGNMENT
