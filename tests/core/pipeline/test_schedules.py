from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as torch_schedules

from core.errors import ConfigError
from core.pipeline.schedules import (
    SCHEDULES,
    Action,
    Edge,
    Kind,
    Message,
    Schedule,
    make_schedule,
    stage_map_for,
)
from core.pipeline.stage_map import StageMap

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741
LETTER = {F: "F", B: "B", I: "I", W: "W"}


def _streams_of_torch(cls: Any, where: StageMap, microbatches: int) -> list[list[str]]:
    """The order that torch computes, with stages that hold no more than their sizes."""
    stages = [
        SimpleNamespace(
            group_size=where.stages,
            group_rank=0,
            num_stages=where.pieces,
            submod=torch.nn.Identity(),
            has_backward=True,
            is_first=False,
            is_last=False,
        )
        for _ in range(where.chunks)
    ]
    order = cls(stages, microbatches, loss_fn=lambda *_: None).pipeline_order
    return [[str(action) for action in order[stage] if action] for stage in range(where.stages)]


def _as_torch(schedule: Schedule) -> list[list[str]]:
    """Our order in torch's spelling: piece, letter, microbatch."""
    where = schedule.stage_map
    return [
        [f"{where.piece(stage, a.chunk)}{LETTER[a.kind]}{a.microbatch}" for a in actions]
        for stage, actions in enumerate(schedule.actions)
    ]


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
def test_interleaved_is_that_of_torch(stages: int, chunks: int) -> None:
    compared = 0
    for microbatches in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20):
        if microbatches % max(1, microbatches // stages):
            continue  # torch serves equal groups alone
        schedule = make_schedule(
            "interleaved", stages=stages, microbatches=microbatches, chunks=chunks
        )
        oracle = _streams_of_torch(
            torch_schedules.ScheduleInterleaved1F1B, schedule.stage_map, microbatches
        )
        assert _as_torch(schedule) == oracle
        compared += 1
    assert compared >= 6


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
def test_zbv_is_that_of_torch(stages: int) -> None:
    for microbatches in (1, 2, 3, 5, 8, 15, 16, 20):
        schedule = make_schedule("zbv", stages=stages, microbatches=microbatches)
        oracle = _streams_of_torch(
            torch_schedules.ScheduleZBVZeroBubble, schedule.stage_map, microbatches
        )
        assert _as_torch(schedule) == oracle


def _text(name: str, stages: int, microbatches: int) -> list[str]:
    schedule = make_schedule(name, stages=stages, microbatches=microbatches)
    return [
        " ".join(f"{LETTER[action.kind]}{action.microbatch}" for action in actions)
        for actions in schedule.actions
    ]


def test_gpipe_and_1f1b_by_hand() -> None:
    assert _text("gpipe", 2, 3) == ["F0 F1 F2 B0 B1 B2"] * 2
    assert _text("1f1b", 3, 4) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    assert _text("1f1b", 3, 1) == ["F0 B0"] * 3


def test_zb_h1_by_hand() -> None:
    """Figure 3 of Qi et al., 2023, on three stages."""
    assert _text("zb_h1", 3, 4) == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


def test_messages_name_the_piece_that_needs_them() -> None:
    v = make_schedule("zbv", stages=2, microbatches=3)  # pieces 0 and 3 on stage 0, 1 and 2 on 1
    assert v.needs(0, Action(F, 0, 1)) is None
    assert v.makes(0, Action(F, 0, 1)) == Message("activation", 1, 1) == v.needs(1, Action(F, 0, 1))
    assert v.makes(1, Action(F, 0, 1)) == Message("activation", 2, 1) == v.needs(1, Action(F, 1, 1))
    assert v.makes(0, Action(F, 1, 1)) is None
    assert v.needs(0, Action(I, 1, 1)) is None
    assert v.makes(0, Action(I, 1, 1)) == Message("gradient", 2, 1) == v.needs(1, Action(I, 1, 1))
    assert v.makes(0, Action(I, 0, 1)) is None
    assert v.needs(0, Action(W, 0, 1)) is None
    assert v.makes(0, Action(W, 0, 1)) is None
    channels = v.channels()
    assert set(channels) == {Edge(0, 1), Edge(1, 0)}  # between pieces 1 and 2 nothing is sent
    for messages in channels.values():
        assert len(messages) == len(set(messages)) == 2 * 3


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_frozen_pieces_do_what_is_needed_alone(name: str) -> None:
    where = stage_map_for(name, 4)
    flags = [False, True, False, *[True] * (where.pieces - 3)]
    schedule = make_schedule(name, stages=4, microbatches=6, trainable=flags)
    kinds = {
        piece: {
            action.kind
            for action in schedule.actions[where.stage(piece)]
            if action.chunk == where.chunk(piece)
        }
        for piece in range(3)
    }
    apart = name.startswith("zb")
    assert kinds[0] == {F}
    assert kinds[1] == ({F, I, W} if apart else {F, B})
    assert kinds[2] == ({F, I} if apart else {F, B})
    sent = {message for messages in schedule.channels().values() for message in messages}
    assert not any(m.content == "gradient" and m.piece == 0 for m in sent)
    assert any(m.content == "gradient" and m.piece == 1 for m in sent)
    with pytest.raises(ConfigError, match=r"none of the \d+ pieces"):
        make_schedule(name, stages=4, microbatches=6, trainable=[False] * where.pieces)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "1f2b"}, "no schedule 1f2b: perhaps you meant 1f1b"),
        ({"name": "zbv", "chunks": 3}, "zbv cannot serve 3 chunks per stage: use exactly 2"),
        ({"name": "zb_h1", "chunks": 2}, "cannot serve 2 chunks .* exactly 1; interleaved"),
        ({"name": "interleaved", "chunks": 1}, "cannot serve 1 chunks .* at least 2; 1f1b"),
        ({"name": "gpipe", "microbatches": 0}, "gpipe cannot serve 0 microbatches"),
        ({"name": "gpipe", "stages": 0}, "0 stages"),
        ({"name": "gpipe", "trainable": [True]}, "1 pieces are said .* 1 chunks hold 2"),
    ],
)
def test_sizes_that_cannot_be_served(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_schedule(**({"stages": 2, "microbatches": 4} | options))
