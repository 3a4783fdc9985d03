"""Messages between pipeline stages: what each neighbour sends, in the order in which it sends it.

An NCCL send or receive is a kernel that runs until its peer comes. While it runs, much may wait for
it: the loading of a kernel, an allocation, whatever CUDA puts into the same queue; and if the peer
waits for that, neither goes on. So no transfer is started before both ends are there. When the
target needs a message, its host notes so to the source, where a thread waits for it; once the
tensors are computed, the thread answers and sends, and the host receives.

Sends hold up nothing. The host of the target waits for messages, so it is at most one action ahead
of its device.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from queue import SimpleQueue
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from core.parallel.context import ParallelContext
from core.pipeline.schedules import Edge, Message, Schedule
from core.pipeline.stage_map import StageMap

Payload = Mapping[str, Tensor]
"""What passes from a piece to the next, by name."""


class Awaited(NamedTuple):
    """What a host waits for."""

    what: str
    rank: int
    """Of whom, as a global rank."""


class Waiting:
    """What this rank's host waits for now: torch's flight recorder does not note the host's
    messages, and a watchdog must look from its own thread.
    """

    def __init__(self) -> None:
        self.now: Awaited | None = None

    @contextmanager
    def until(self, what: str, rank: int) -> Iterator[None]:
        """Wait inside."""
        self.now = Awaited(what, rank)
        yield
        # After a failure it stays: that is where this rank stood.
        self.now = None


@dataclass(frozen=True)
class Wires:
    """How a stage is connected, the same in every step."""

    stage: int
    ranks: tuple[int, ...]
    """Global rank of every stage, at this rank's place on the other axes."""
    channels: Mapping[Edge, dist.ProcessGroup]
    """For the messages of every edge that begins or ends here."""
    hosts: dist.ProcessGroup | None
    """For notes; None without edges."""
    streams: Mapping[Edge, torch.cuda.Stream]
    """On CUDA, what the transfers of every such edge are ordered by: not the computation's stream,
    whose end they would wait for."""
    shapes: Sequence[Mapping[str, tuple[int, ...]]]
    """For every piece, the tensors that it receives from the piece before; none for the first.
    Their gradients have the same shapes."""
    dtype: torch.dtype
    device: torch.device
    waiting: Waiting = field(default_factory=Waiting)
    """For a watchdog."""

    @classmethod
    def connect(
        cls,
        where: StageMap,
        ctx: ParallelContext,
        shapes: Sequence[Mapping[str, tuple[int, ...]]],
        dtype: torch.dtype,
    ) -> "Wires":
        """Connect all stages.

        Collective over the world: groups for every edge at every place on the other axes.

        Args:
            where: which stage holds which piece.
            ctx: the process axes; pp are the stages.
            shapes: see the field.
            dtype: format of all messages.
        """
        stages = [where.stage(piece) for piece in range(where.pieces)]
        edges = {edge for a, b in pairwise(stages) if a != b for edge in (Edge(a, b), Edge(b, a))}
        own = ctx.new_channels(sorted(edges))
        channels = {edge: own[edge] for edge in sorted(edges) if edge in own}
        streams = {}
        if ctx.device.type == "cuda":
            streams = {edge: torch.cuda.Stream(ctx.device) for edge in channels}
        return cls(
            ctx.pp.rank, ctx.pp.ranks, channels, ctx.hosts, streams, shapes, dtype, ctx.device
        )

    def shapes_of(self, message: Message) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of a message's tensors."""
        return self.shapes[message.piece + (message.content == "gradient")]

    def note(self, edge: Edge, *, sends: bool) -> None:
        """Send an empty note to the other end of an edge, or wait for one from there."""
        other = edge.target if edge.source == self.stage else edge.source
        call = dist.send if sends else dist.recv
        # Two edges between the same stages begin at different ones.
        call(torch.zeros(1), self.ranks[other], group=self.hosts, tag=edge.source)

    def transfer(self, edge: Edge, tensors: Sequence[Tensor]) -> list[dist.Work]:
        """Start to send tensors over an edge that begins here, or to receive them over one that
        ends here.
        """
        begins = edge.source == self.stage
        call, other = (dist.isend, edge.target) if begins else (dist.irecv, edge.source)
        group = self.channels[edge]
        works = [call(tensor, self.ranks[other], group=group) for tensor in tensors]
        return [work for work in works if work is not None]

    def on_stream(self, edge: Edge) -> AbstractContextManager[object]:
        """Makes the edge's stream the current one, where there is one."""
        return torch.cuda.stream(self.streams[edge]) if edge in self.streams else nullcontext()


class Mailbox:
    """The messages of one stage in one run of a schedule."""

    def __init__(self, schedule: Schedule, wires: Wires) -> None:
        """Start a thread for every edge that begins here."""
        self._wires, self._where = wires, schedule.stage_map
        self._expected = {
            edge: deque(messages)
            for edge, messages in schedule.channels().items()
            if edge.target == wires.stage
        }
        self._source = {m: edge for edge, messages in self._expected.items() for m in messages}
        self._received: dict[Message, tuple[dict[str, Tensor], list[dist.Work]]] = {}
        self._local: dict[Message, Payload] = {}
        self._senders = {
            edge: _Sender(f"send to stage {edge.target}")
            for edge in wires.channels
            if edge.source == wires.stage
        }

    def take(self, message: Message) -> Payload:
        """Wait for a message, and for those that its source sends before it. On CUDA the host waits
        until it is on its way, and the current stream until it is here.
        """
        if message in self._local:
            return self._local.pop(message)
        edge = self._source[message]
        with self._wires.waiting.until(f"the receipt of {message}", self._wires.ranks[edge.source]):
            while message not in self._received:
                self._receive(edge)
            tensors, works = self._received.pop(message)
            for work in works:
                work.wait()
        for tensor in tensors.values():
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensors

    def put(self, message: Message, payload: Payload) -> None:
        """Send a message, or keep it if its piece lies on this stage; waits for nothing.

        Raises:
            ValueError: the tensors are not what the target makes room for.
        """
        wires, target = self._wires, self._where.stage(message.piece)
        found = {name: tuple(tensor.shape) for name, tensor in payload.items()}
        formats = {tensor.dtype for tensor in payload.values()}
        if found != dict(wires.shapes_of(message)) or formats - {wires.dtype}:
            raise ValueError(
                f"{message} is {found} in {formats}, but {dict(wires.shapes_of(message))} in "
                f"{wires.dtype} was agreed"
            )
        if target == wires.stage:
            self._local[message] = payload
            return
        edge = Edge(wires.stage, target)
        tensors = [payload[name].contiguous() for name in sorted(payload)]
        computed = None
        if wires.device.type == "cuda":
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(wires.device))
        self._senders[edge].submit(lambda: _send(wires, edge, tensors, computed))

    def close(self) -> None:
        """Wait until all is sent.

        Raises:
            RuntimeError: something could not be sent.
        """
        unused = [*self._received, *self._local]
        assert not unused, f"the schedule left {unused} unused"
        for edge, sender in self._senders.items():
            with self._wires.waiting.until("sending", self._wires.ranks[edge.target]):
                sender.close()

    def _receive(self, edge: Edge) -> None:
        """Receive the next message of an edge."""
        message, wires = self._expected[edge].popleft(), self._wires
        for sender in self._senders.values():
            sender.check()
        wires.note(edge, sends=True)
        wires.note(edge, sends=False)
        shapes = wires.shapes_of(message)
        with wires.on_stream(edge):
            tensors = {
                name: torch.empty(shapes[name], dtype=wires.dtype, device=wires.device)
                for name in sorted(shapes)
            }
            self._received[message] = tensors, wires.transfer(edge, list(tensors.values()))


def _send(
    wires: Wires, edge: Edge, tensors: Sequence[Tensor], computed: torch.cuda.Event | None
) -> None:
    """Send a message once its target needs it and it is computed; returns when it is there, as the
    tensors must live until then.
    """
    wires.note(edge, sends=False)
    if computed is not None:
        torch.cuda.set_device(wires.device)  # every thread has a device of its own
        computed.synchronize()
    # Nothing comes between this and the transfer: the target begins to receive now.
    wires.note(edge, sends=True)
    with wires.on_stream(edge):
        for work in wires.transfer(edge, tensors):
            work.wait()
    if edge in wires.streams:
        wires.streams[edge].synchronize()


class _Sender:
    """Runs calls one after another in a thread of its own, which does not keep the process."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._pending: deque[Future[None]] = deque()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, call: Callable[[], None]) -> None:
        """Run a call after those before it; raises what one of those has raised."""
        self.check()
        future: Future[None] = Future()
        self._pending.append(future)
        self._calls.put((call, future))

    def check(self) -> None:
        """Raise what a call has raised that is over."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def close(self) -> None:
        """Wait for all calls and end the thread; raises what one of them has raised."""
        self._calls.put(None)
        while self._pending:
            self._pending.popleft().result()

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            del item, call  # and with them what was sent: the next may be long in coming
