import random

import pytest
import torch

from core.checkpoint.index import SavedTensor
from core.checkpoint.plan import Claim, assign_owners, claim, make_plan
from core.errors import CheckpointError
from core.parallel.cutting import whole_copy
from core.parallel.sharding import Box, BoxCopy


def held(name: str, shape: tuple[int, ...], *boxes: Box) -> dict[str, Claim]:
    return {name: Claim(shape, torch.float32, boxes)}


def test_boxes_go_to_the_holder_with_the_fewest_bytes() -> None:
    whole, left, right = Box((0,), (4,)), Box((0,), (2,)), Box((2,), (2,))
    claims = [
        {**held("norm", (4,), whole), **held("w", (4,), left)},
        {**held("norm", (4,), whole), **held("w", (4,), right)},
        {**held("norm", (4,), whole), **held("w", (4,), left)},
    ]
    # `right` has one holder; `left` then goes to the first of two idle ranks, `norm` to the other.
    assert assign_owners(claims) == [[("w", left)], [("w", right)], [("norm", whole)]]


@pytest.mark.parametrize("seed", range(20))
def test_every_box_has_one_owner_that_holds_it(seed: int) -> None:
    rng = random.Random(seed)
    world = rng.randint(1, 6)
    claims: list[dict[str, Claim]] = [{} for _ in range(world)]
    for number in range(rng.randint(1, 30)):
        box = Box((0,), (rng.randint(1, 50),))
        for rank in rng.sample(range(world), rng.randint(1, world)):
            claims[rank] |= held(f"t{number}", box.shape, box)
    owned = assign_owners(claims)
    every = [key for keys in owned for key in keys]
    assert sorted(every) == sorted({(n, b) for c in claims for n, d in c.items() for b in d.boxes})
    for rank, keys in enumerate(owned):
        assert all(box in claims[rank][name].boxes for name, box in keys)
    # Ranks see their claims in another order than their neighbours'.
    shuffled = [dict(rng.sample(list(c.items()), len(c))) for c in claims]
    assert [set(keys) for keys in assign_owners(shuffled)] == [set(keys) for keys in owned]


def test_bytes_are_spread_evenly() -> None:
    """ZeRO-1 on 4 ranks: parameters held by all, unequal optimizer fragments by one each."""
    params = {
        f"p{i}": Claim((n,), torch.bfloat16, (Box((0,), (n,)),))
        for i, n in enumerate([4000, 1000, 1000, 1000, 500, 300, 300, 200, 100, 100])
    }
    fragments = [1500, 900, 1200, 1400]
    claims = [
        {**params, **held("exp_avg", (sum(fragments),), Box((sum(fragments[:r]),), (n,)))}
        for r, n in enumerate(fragments)
    ]
    plan = make_plan(claims)
    sizes = [file.nbytes for file in plan.files]
    assert sum(sizes) == 2 * 8500 + 4 * 5000
    # No better than the largest parameter together with the least that its rank must write.
    assert max(sizes) <= 900 * 4 + 4000 * 2
    assert min(sizes) >= 0.8 * sum(sizes) / 4


def test_pieces_of_one_name_are_one_tensor() -> None:
    row_end, row = Box((0, 2), (1, 2)), Box((1, 0), (1, 4))
    pieces = [
        SavedTensor("w", (3, 4), (BoxCopy(Box((0, 0), box.shape), box),), torch.zeros(box.shape))
        for box in (row_end, row, row)
    ]
    found = claim(pieces)["w"]
    assert found.boxes == (row_end, row)
    assert (found.shape, found.dtype) == ((3, 4), torch.float32)


@pytest.mark.parametrize(("shape", "dtype"), [((4, 3), torch.float32), ((3, 4), torch.bfloat16)])
def test_pieces_of_different_tensors_are_refused(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    one = SavedTensor("w", (3, 4), whole_copy((3, 4)), torch.zeros(3, 4))
    other = SavedTensor("w", shape, whole_copy(shape), torch.zeros(shape, dtype=dtype))
    with pytest.raises(CheckpointError, match="cannot save w: one piece"):
        claim([one, other])


def test_keys_in_a_file_are_unique() -> None:
    a, b = Box((0, 0), (1, 4)), Box((1, 0), (1, 4))
    (file,) = make_plan([held("w", (2, 4), b, a)]).files
    assert list(file.entries) == ["w@1,0", "w@0,0"]
    with pytest.raises(ValueError, match="start at the same index"):
        make_plan([held("w", (2, 4), Box((0, 0), (2, 4)), a)])
