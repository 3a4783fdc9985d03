"""Pipeline schedules as data: for every stage, the list of what it computes, in order.

A schedule is written as a generator of steps, one per stage. A step is a kind of work and a chunk;
which microbatch it is for follows, since every schedule here takes the microbatches of a chunk in
order. Whoever runs a schedule needs no more than `Schedule.actions` and, for every action, the
message that it needs and the one that it makes: `core/pipeline/simulate.py` says what it must obey.

Sources: GPipe (Huang et al., 2019); 1F1B (Narayanan et al., "PipeDream", 2019, and Megatron-LM);
interleaved 1F1B (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters",
2021); ZB-H1 (Qi et al., "Zero Bubble Pipeline Parallelism", 2023); ZB-V (Qi et al., "Pipeline
Parallelism with Controllable Memory", 2024).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Literal, NamedTuple

from core.config.suggestions import did_you_mean
from core.errors import ConfigError
from core.pipeline.stage_map import StageMap


class Kind(StrEnum):
    """What an action computes for one microbatch and one chunk."""

    FORWARD = "forward"
    BACKWARD = "backward"
    """Gradients of inputs and weights together."""
    BACKWARD_INPUT = "backward_input"
    """Gradient of the inputs alone: what the stage before waits for."""
    BACKWARD_WEIGHT = "backward_weight"
    """Gradient of the weights alone: nobody waits for it."""


F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


class Action(NamedTuple):
    """One thing that a stage computes."""

    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of chunk {self.chunk}, microbatch {self.microbatch}"


class Message(NamedTuple):
    """What passes between two neighbouring pieces."""

    content: Literal["activation", "gradient"]
    piece: int
    """The piece that needs it."""
    microbatch: int

    def __str__(self) -> str:
        return f"{self.content} for piece {self.piece}, microbatch {self.microbatch}"


class Edge(NamedTuple):
    """A directed connection of two stages."""

    source: int
    target: int


@dataclass(frozen=True)
class Schedule:
    """The actions of every stage for one training step."""

    name: str
    """What it is called."""
    stage_map: StageMap
    """Where the pieces lie."""
    microbatches: int
    """Microbatches of the step."""
    trainable: tuple[bool, ...]
    """For every piece, whether it holds weights that take a gradient."""
    actions: tuple[tuple[Action, ...], ...]
    """For every stage, its actions in order."""

    def has_backward(self, piece: int) -> bool:
        """Whether a piece has a backward pass: something trainable is in it or before it."""
        return any(self.trainable[: piece + 1])

    def sends_gradient(self, piece: int) -> bool:
        """Whether a piece's backward pass sends a gradient: something trainable is before it."""
        return any(self.trainable[:piece])

    def forward_only(self) -> "Schedule":
        """The forward passes alone, for an evaluation: nothing is trained."""
        return replace(
            self,
            trainable=(False,) * len(self.trainable),
            actions=tuple(tuple(a for a in stage if a.kind == F) for stage in self.actions),
        )

    def needs(self, stage: int, action: Action) -> Message | None:
        """The message without which an action cannot start."""
        piece = self.stage_map.piece(stage, action.chunk)
        if action.kind == F and piece > 0:
            return Message("activation", piece, action.microbatch)
        if action.kind in (B, I) and piece + 1 < self.stage_map.pieces:
            return Message("gradient", piece, action.microbatch)
        return None

    def makes(self, stage: int, action: Action) -> Message | None:
        """The message that an action makes. If its piece lies on the same stage, it is not sent."""
        piece = self.stage_map.piece(stage, action.chunk)
        if action.kind == F and piece + 1 < self.stage_map.pieces:
            return Message("activation", piece + 1, action.microbatch)
        if action.kind in (B, I) and self.sends_gradient(piece):
            return Message("gradient", piece - 1, action.microbatch)
        return None

    def channels(self) -> dict[Edge, tuple[Message, ...]]:
        """For every directed edge, its messages in the order in which they are sent, which is also
        the order in which the target has to receive them.
        """
        return self._channels

    @cached_property
    def _channels(self) -> dict[Edge, tuple[Message, ...]]:
        sent: dict[Edge, list[Message]] = {}
        for stage, actions in enumerate(self.actions):
            for action in actions:
                message = self.makes(stage, action)
                if message and (target := self.stage_map.stage(message.piece)) != stage:
                    sent.setdefault(Edge(stage, target), []).append(message)
        return {edge: tuple(messages) for edge, messages in sent.items()}


Step = tuple[Kind, int]
"""A kind of work and a chunk."""


def gpipe(stage: int, where: StageMap, microbatches: int) -> Iterator[Step]:
    """All forward passes, then all backward passes: every microbatch's activations are alive."""
    yield from [(F, 0)] * microbatches
    yield from [(B, 0)] * microbatches


def one_f_one_b(stage: int, where: StageMap, microbatches: int) -> Iterator[Step]:
    """As many forward passes as there are stages behind, then forward and backward in turn.

    The idle time is that of GPipe, but a stage holds at most `stages - stage` microbatches.
    """
    warmup = min(where.stages - 1 - stage, microbatches)
    yield from [(F, 0)] * warmup
    yield from [(F, 0), (B, 0)] * (microbatches - warmup)
    yield from [(B, 0)] * warmup


def interleaved(stage: int, where: StageMap, microbatches: int) -> Iterator[Step]:
    """1F1B over several chunks per stage, whose shorter pieces make the start and end shorter.

    Microbatches go through the chunks in groups of at least `stages`: a chunk serves a whole group
    before the next chunk begins. Sizes are as equal as can be; where they differ, the larger ones
    come first, since the warm-up must reach the last chunk of every group in time. A number of
    microbatches that is no multiple of the stages costs some idle time. Fewer than `stages` form
    one group.
    """
    count = max(1, microbatches // where.stages)
    size, rest = divmod(microbatches, count)
    sizes = [size + (group < rest) for group in range(count)]
    chunks = [chunk for size in sizes for chunk in range(where.chunks) for _ in range(size)]
    # Two steps per stage behind: one for the forward pass to get there, one for the gradient back.
    warmup = (where.chunks - 1) * sizes[0] + 2 * (where.stages - 1 - stage)
    warmup = min(warmup, len(chunks))
    forward = [(F, chunk) for chunk in chunks]
    backward = [(B, where.chunks - 1 - chunk) for chunk in chunks]
    yield from forward[:warmup]
    for pair in zip(forward[warmup:], backward, strict=False):
        yield from pair
    yield from backward[len(forward) - warmup :]


def zb_h1(stage: int, where: StageMap, microbatches: int) -> Iterator[Step]:
    """1F1B with weight gradients apart: they wait until no other stage waits for this one.

    A stage puts off as many weight gradients as there are stages before it. So each has `stages`
    microbatches alive at most, which is what the first has under 1F1B; gradients start upwards
    after one step instead of two; and the weight gradients left over fill the end. The idle time is
    a third of 1F1B's if the three kinds take equally long.
    """
    warmup = min(where.stages - 1 - stage, microbatches)
    yield from [(F, 0)] * warmup
    for done in range(microbatches):
        if warmup + done < microbatches:
            yield F, 0
        yield I, 0
        if done >= stage:
            yield W, 0
    yield from [(W, 0)] * min(stage, microbatches)


def zbv(stage: int, where: StageMap, microbatches: int) -> Iterator[Step]:
    """Two chunks in a V and weight gradients apart: idle time only at the two slanted ends.

    The first stage has both the first and the last piece, so the first backward pass starts as soon
    as one microbatch has gone down and up. If forward, input gradient and weight gradient take
    equally long, each stage is busy without a break from its first action to its last; it has
    `2 * stages` pieces alive at most, as many as 1F1B's first stage has in half pieces.

    Written for at least 2 * stages - 1 microbatches: what the first stage sends before the first
    one is back.
    """
    behind = where.stages - stage  # this stage and those after it
    yield from [(F, 0)] * (2 * behind - 1)
    yield from [(F, 1), (F, 0)] * stage
    yield from [(F, 1), (I, 1), (W, 1)] * behind
    upper, lower = [(I, 0), (W, 0)], [(F, 1), (I, 1), (W, 1)]
    yield from [(F, 0), *upper, *lower] * (microbatches - where.stages + 1 - behind)
    yield from [*upper, *lower] * (behind - 1)
    yield from [(I, 0), (I, 1)] * stage
    yield from [(I, 0), (W, 0)] * behind
    yield from [(W, 1)] * stage
    yield from [(W, 0)] * stage


@dataclass(frozen=True, kw_only=True)
class ScheduleKind:
    """A schedule that can be asked for by name. Each serves any number of microbatches."""

    steps: Callable[[int, StageMap, int], Iterator[Step]]
    """The steps of a stage, given the stage, where the pieces lie, and the microbatches."""
    min_chunks: int = 1
    """Least chunks per stage."""
    max_chunks: int | None = 1
    """Most chunks per stage; None: any number."""
    shape: Literal["loop", "v"] = "loop"
    """How the pieces lie."""
    min_microbatches: Callable[[int], int] = lambda stages: 1
    """Fewest microbatches for which the steps are written, given the stages. With fewer, those of
    this number are taken and the actions of microbatches that do not exist left out."""

    @property
    def summary(self) -> str:
        """One line of what it is."""
        return (self.steps.__doc__ or "").partition("\n")[0]


SCHEDULES: Mapping[str, ScheduleKind] = MappingProxyType(
    {
        "gpipe": ScheduleKind(steps=gpipe),
        "1f1b": ScheduleKind(steps=one_f_one_b),
        "interleaved": ScheduleKind(steps=interleaved, min_chunks=2, max_chunks=None),
        "zb_h1": ScheduleKind(steps=zb_h1),
        "zbv": ScheduleKind(
            steps=zbv,
            min_chunks=2,
            max_chunks=2,
            shape="v",
            min_microbatches=lambda stages: 2 * stages - 1,
        ),
    }
)
"""Every schedule by name."""


def stage_map_for(name: str, stages: int, chunks: int | None = None) -> StageMap:
    """Where the pieces lie under a schedule.

    Args:
        name: the schedule.
        stages: stages.
        chunks: pieces per stage; by default the fewest that the schedule takes.

    Raises:
        ConfigError: an unknown schedule, or sizes that it cannot serve.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"there is no schedule {name}: {did_you_mean(name, SCHEDULES)}")
    kind = SCHEDULES[name]
    chunks = kind.min_chunks if chunks is None else chunks
    if chunks < kind.min_chunks or (kind.max_chunks is not None and chunks > kind.max_chunks):
        if kind.max_chunks is None:
            allowed = f"at least {kind.min_chunks}; 1f1b is the schedule for 1"
        else:
            allowed = f"exactly {kind.max_chunks}"
            if kind.max_chunks == 1:
                allowed += "; interleaved is the schedule for more"
        raise ConfigError(f"schedule {name} cannot serve {chunks} chunks per stage: use {allowed}")
    return StageMap(stages, chunks, kind.shape)


def make_schedule(
    name: str,
    *,
    stages: int,
    microbatches: int,
    chunks: int | None = None,
    trainable: Sequence[bool] | None = None,
) -> Schedule:
    """Write a schedule out.

    Args:
        name: one of `SCHEDULES`.
        stages: stages.
        microbatches: microbatches of one training step.
        chunks: pieces per stage; by default the fewest that the schedule takes.
        trainable: for every piece, whether it has weights to train (`Layout.trainable`); by default
            all have. Backward passes and weight gradients that nobody needs are left out.

    Raises:
        ConfigError: an unknown schedule, or sizes that it cannot serve.
    """
    where = stage_map_for(name, stages, chunks)
    if microbatches < 1:
        raise ConfigError(
            f"schedule {name} cannot serve {microbatches} microbatches: use 1 or more"
        )
    flags = (True,) * where.pieces if trainable is None else tuple(trainable)
    if len(flags) != where.pieces:
        raise ConfigError(
            f"{len(flags)} pieces are said to be trainable or not, but {stages} stages of "
            f"{where.chunks} chunks hold {where.pieces}: give one value for each"
        )
    if not any(flags):
        raise ConfigError(
            f"none of the {where.pieces} pieces has weights to train: unfreeze a part of the model"
        )
    kind = SCHEDULES[name]
    written = max(microbatches, kind.min_microbatches(stages))
    first = flags.index(True)

    def wanted(stage: int, action: Action) -> bool:
        piece = where.piece(stage, action.chunk)
        if microbatches <= action.microbatch < written:
            return False
        return action.kind == F or (flags[piece] if action.kind == W else piece >= first)

    return Schedule(
        name,
        where,
        microbatches,
        flags,
        tuple(
            tuple(
                action
                for action in _numbered(kind.steps(stage, where, written))
                if wanted(stage, action)
            )
            for stage in range(stages)
        ),
    )


def _numbered(steps: Iterable[Step]) -> Iterator[Action]:
    """Give steps their microbatches: those of one kind and chunk come in order."""
    seen: Counter[Step] = Counter()
    for step in steps:
        yield Action(*step, seen[step])
        seen[step] += 1
