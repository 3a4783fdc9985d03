import pytest

from core.errors import ConfigError
from core.pipeline.stage_map import StageMap


def test_a_loop_goes_round_and_a_v_comes_back() -> None:
    loop, v = StageMap(3, 2), StageMap(3, 2, "v")
    assert [loop.stage(i) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [v.stage(i) for i in range(6)] == [0, 1, 2, 2, 1, 0]
    assert [v.chunk(i) for i in range(6)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("where", [StageMap(1), StageMap(5, 3), StageMap(4, 3, "v")])
def test_pieces_are_found_again(where: StageMap) -> None:
    for piece in range(where.pieces):
        assert where.piece(where.stage(piece), where.chunk(piece)) == piece


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 stages"):
        StageMap(0)
    with pytest.raises(ConfigError, match="-1 chunks"):
        StageMap(2, -1)
