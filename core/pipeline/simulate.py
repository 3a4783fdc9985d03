"""Runs a schedule on paper: proves it complete, ordered and free of deadlock, and measures it.

What an executor must do for this to hold:

- A stage computes its actions in order, each as soon as the message that it needs is there.
- Every directed edge between two stages is one channel (a communicator of its own), which passes
  messages one at a time, in the order in which the source makes them (`Schedule.channels`). So the
  target must receive in *that* order, which need not be the order in which it uses them.
- Sends do not hold up the source's computation. A transfer waits until the target has posted its
  receive (NCCL's sends rendezvous), and until then the source keeps the tensor.
- The target posts receives ahead of use: at most `receive_slots` received messages wait per edge
  before a further one can come. A slot is free again when the action that uses it starts. Two
  slots are enough for every schedule here, and cost no time; with one, `zbv` and some sizes of
  `interleaved` deadlock, since activations and gradients of different chunks share an edge. (The
  executor receives a message when an action needs it, with those before it on its edge: as free of
  deadlock, but the transfer is not hidden.)
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from core.errors import ConfigError
from core.pipeline.costs import Work
from core.pipeline.schedules import Action, Edge, Kind, Message, Schedule

RECEIVE_SLOTS = 2
"""Received messages that may wait for their use, per edge, in the executor."""

EQUAL_WORK = Work(1.0, 1.0, 1.0)
"""Forward, input gradient and weight gradient take equally long."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What actions and messages cost."""

    work: tuple[Work, ...] | Work = EQUAL_WORK
    """Time of each piece for one microbatch; one for all pieces alike."""
    transfer: float = 0.0
    """Time that a message takes on its channel."""
    activation_bytes: tuple[int, ...] | int = 0
    """What each piece keeps for its backward pass, per microbatch; one for all alike."""
    product_bytes: tuple[int, ...] | int | None = None
    """What each piece keeps from the input gradient to the weight gradient, where these are apart;
    None: all of the activations."""
    working_bytes: tuple[int, ...] | int = 0
    """The most that a backward pass of each piece holds beside the activations of all."""
    message_bytes: int = 0
    """Size of one message."""
    receive_slots: int | None = None
    """Received messages that may wait for their use, per edge; None: any number."""

    def duration(self, piece: int, kind: Kind) -> float:
        """Time of an action."""
        work = self.work if isinstance(self.work, Work) else self.work[piece]
        match kind:
            case Kind.FORWARD:
                return work.forward
            case Kind.BACKWARD:
                return work.backward_input + work.backward_weight
            case Kind.BACKWARD_INPUT:
                return work.backward_input
            case Kind.BACKWARD_WEIGHT:
                return work.backward_weight

    def bytes_of(self, piece: int) -> tuple[int, int, int]:
        """Activations, products and working memory of a piece for a microbatch."""
        products = self.activation_bytes if self.product_bytes is None else self.product_bytes
        sizes = (self.activation_bytes, products, self.working_bytes)
        first, second, third = (x if isinstance(x, int) else x[piece] for x in sizes)
        return first, second, third

    def check(self, pieces: int) -> None:
        """Check that there is a value for each piece.

        Raises:
            ConfigError: too many or too few, or no receive slot.
        """
        for name in ("work", "activation_bytes", "product_bytes", "working_bytes"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != pieces:
                raise ConfigError(
                    f"{name} has {len(value)} values, but the schedule has {pieces} pieces: give "
                    "one for each"
                )
        if self.receive_slots is not None and self.receive_slots < 1:
            raise ConfigError(
                f"receive_slots is {self.receive_slots}: no message could ever arrive; use 1 or "
                "more"
            )


class Timed(NamedTuple):
    """When an action ran."""

    action: Action
    start: float
    end: float


Timeline = tuple[tuple[Timed, ...], ...]
"""For every stage, its actions with their times, in order."""


def span_of(timeline: Timeline) -> tuple[float, float]:
    """First start and last end of all stages."""
    entries = list(chain.from_iterable(timeline))
    return min(e.start for e in entries), max(e.end for e in entries)


def bubble_of(timeline: Timeline) -> float:
    """Share of all stages' time, from the first start to the last end, in which they compute
    nothing.
    """
    start, end = span_of(timeline)
    busy = sum(entry.end - entry.start for entry in chain.from_iterable(timeline))
    return 1.0 - busy / (len(timeline) * (end - start)) if end > start else 0.0


@dataclass(frozen=True)
class Simulation:
    """How a schedule went."""

    schedule: Schedule
    """What was run."""
    timeline: Timeline
    """When everything was computed."""
    peak_live: tuple[int, ...]
    """For every stage, the most microbatches times pieces whose activations it kept at a time: from
    the start of the forward pass to the end of the last backward action."""
    peak_bytes: tuple[int, ...]
    """The same in bytes, with what the backward passes hold beside."""
    peak_messages: Mapping[Edge, int]
    """For every edge, the most messages that were made and not yet used at a time."""
    message_bytes: int
    """Size of one message."""

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        start, end = span_of(self.timeline)
        return end - start

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they compute nothing."""
        return bubble_of(self.timeline)

    @property
    def bytes_in_flight(self) -> int:
        """The most bytes of messages on any edge, made and not yet used."""
        return max(self.peak_messages.values(), default=0) * self.message_bytes


def check(schedule: Schedule) -> None:
    """Prove that every stage does all of its work once and in order.

    That is, for each microbatch of each piece: forward, then either the whole backward pass or
    input gradient and weight gradient, less what frozen parts do not need.

    Raises:
        ConfigError: an action is missing, too much, or out of order.
    """
    where = schedule.stage_map
    if len(schedule.actions) != where.stages:
        raise ConfigError(
            f"schedule {schedule.name} has actions for {len(schedule.actions)} stages, but there "
            f"are {where.stages}"
        )
    for stage, actions in enumerate(schedule.actions):
        found: dict[tuple[int, int], tuple[Kind, ...]] = defaultdict(tuple)
        for action in actions:
            found[action.chunk, action.microbatch] += (action.kind,)
        for chunk in range(where.chunks):
            allowed = _allowed(schedule, where.piece(stage, chunk))
            for microbatch in range(schedule.microbatches):
                kinds = found.pop((chunk, microbatch), ())
                if kinds not in allowed:
                    raise ConfigError(
                        f"schedule {schedule.name}: stage {stage} runs {_listed(kinds)} for chunk "
                        f"{chunk}, microbatch {microbatch}, where "
                        f"{' or '.join(map(_listed, allowed))} is right"
                    )
        if found:
            chunk, microbatch = next(iter(found))
            raise ConfigError(
                f"schedule {schedule.name}: stage {stage} runs chunk {chunk}, microbatch "
                f"{microbatch}, but there are {where.chunks} chunks and {schedule.microbatches} "
                "microbatches"
            )


def _allowed(schedule: Schedule, piece: int) -> tuple[tuple[Kind, ...], ...]:
    if not schedule.has_backward(piece):
        return ((Kind.FORWARD,),)
    whole = (Kind.FORWARD, Kind.BACKWARD)
    apart = (Kind.FORWARD, Kind.BACKWARD_INPUT)
    return (whole, (*apart, Kind.BACKWARD_WEIGHT) if schedule.trainable[piece] else apart)


def _listed(kinds: tuple[Kind, ...]) -> str:
    return ", ".join(kinds) or "nothing"


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Run a schedule.

    Args:
        schedule: what each stage does.
        costs: times and sizes; by default every action of every piece takes 1 (a whole backward
            pass 2) and messages take no time.

    Raises:
        ConfigError: the schedule is not complete, not in order, or comes to a deadlock.
    """
    costs = costs or Costs()
    check(schedule)
    costs.check(schedule.stage_map.pieces)
    run = _Run(schedule, costs)
    run.to_the_end()
    live = [_peak_live(schedule, costs, stage) for stage in range(schedule.stage_map.stages)]
    return Simulation(
        schedule,
        tuple(map(tuple, run.timeline)),
        tuple(count for count, _ in live),
        tuple(size for _, size in live),
        {edge: channel.peak() for edge, channel in sorted(run.channels.items())},
        costs.message_bytes,
    )


@dataclass
class _Channel:
    """One directed edge: messages in the order of sending, with the times of their lives."""

    messages: tuple[Message, ...]
    made: list[float] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)  # in the order of use

    def advance(self, costs: Costs) -> Message | None:
        """Transfer the next message, if it is made and there is a slot for it."""
        index, slots = len(self.arrived), costs.receive_slots
        if index == len(self.made):
            return None
        start = max(self.made[index], self.arrived[-1] if self.arrived else 0.0)
        if slots is not None and index >= slots:
            # The target uses messages one after another, so the known times of use are the first.
            if len(self.used) <= index - slots:
                return None
            start = max(start, self.used[index - slots])
        self.arrived.append(start + costs.transfer)
        return self.messages[index]

    def peak(self) -> int:
        """The most messages that were made and not yet used; at one instant, making goes first."""
        events = sorted([(t, -1) for t in self.made] + [(t, 1) for t in self.used])
        now = most = 0
        for _, step in events:
            now -= step
            most = max(most, now)
        return most


class _Run:
    """Stages and channels on the way through a schedule."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        stages = schedule.stage_map.stages
        self.timeline: list[list[Timed]] = [[] for _ in range(stages)]
        self.channels = {edge: _Channel(sent) for edge, sent in schedule.channels().items()}
        self.there: dict[Message, float] = {}  # when a message came to the stage that needs it

    def to_the_end(self) -> None:
        """Let every stage and channel go as far as it can, until all are done or none can move.

        Times depend on what came before and not on the order of these visits.
        """
        moved = True
        while moved:
            moved = False
            for channel in self.channels.values():
                while message := channel.advance(self.costs):
                    self.there[message] = channel.arrived[-1]
                    moved = True
            for stage in range(len(self.timeline)):
                while self._advance(stage):
                    moved = True
        if any(map(self._next, range(len(self.timeline)))):
            raise ConfigError(self._deadlock())

    def _next(self, stage: int) -> Action | None:
        actions, done = self.schedule.actions[stage], len(self.timeline[stage])
        return actions[done] if done < len(actions) else None

    def _advance(self, stage: int) -> bool:
        """Run a stage's next action, if it can start."""
        action, where = self._next(stage), self.schedule.stage_map
        if action is None:
            return False
        needed = self.schedule.needs(stage, action)
        if needed and needed not in self.there:
            return False
        done = self.timeline[stage]
        start = done[-1].end if done else 0.0
        if needed:
            start = max(start, self.there[needed])
            source = self._source(needed)
            if source != stage:
                self.channels[Edge(source, stage)].used.append(start)
        end = start + self.costs.duration(where.piece(stage, action.chunk), action.kind)
        done.append(Timed(action, start, end))
        made = self.schedule.makes(stage, action)
        if made and (target := where.stage(made.piece)) != stage:
            self.channels[Edge(stage, target)].made.append(end)
        elif made:
            self.there[made] = end
        return True

    def _source(self, message: Message) -> int:
        """The stage that makes a message."""
        step = -1 if message.content == "activation" else 1
        return self.schedule.stage_map.stage(message.piece + step)

    def _deadlock(self) -> str:
        waits = []
        for stage, done in enumerate(self.timeline):
            action = self._next(stage)
            if action is None:
                continue
            needed = self.schedule.needs(stage, action)
            assert needed is not None  # nothing else can hold up a stage
            waits.append(
                f"stage {stage} waits before action {len(done)} ({action}) for stage "
                f"{self._source(needed)}"
            )
        slots = self.costs.receive_slots
        limit = "" if slots is None else f" with {slots} receive slots per edge"
        more = f", and {len(waits) - 3} more wait" if len(waits) > 3 else ""
        return f"schedule {self.schedule.name} deadlocks{limit}: {', '.join(waits[:3])}{more}"


def _peak_live(schedule: Schedule, costs: Costs, stage: int) -> tuple[int, int]:
    """The most activations that a stage keeps at a time: how many, and their bytes."""
    last = {(a.chunk, a.microbatch): a.kind for a in schedule.actions[stage]}
    count = size = most = largest = 0
    kept: dict[tuple[int, int], int] = {}
    for kind, chunk, microbatch in schedule.actions[stage]:
        piece = schedule.stage_map.piece(stage, chunk)
        activations, products, working = costs.bytes_of(piece)
        if kind == Kind.FORWARD:
            kept[chunk, microbatch] = activations
            count, size = count + 1, size + activations
            most, largest = max(most, count), max(largest, size)
        elif kind != Kind.BACKWARD_WEIGHT:
            largest = max(largest, size + working)
        if kind == last[chunk, microbatch]:
            count, size = count - 1, size - kept[chunk, microbatch]
        elif kind == Kind.BACKWARD_INPUT:
            size += products - kept[chunk, microbatch]
            kept[chunk, microbatch] = products
    return most, largest
