"""Messages between pipeline stages: what each neighbour sends, in the order in which it sends it.

Every directed edge has a communicator of its own, since sends rendezvous and messages of opposite
directions on one could wait for each other. Sends do not hold up the computation. Receives are
posted ahead, in the sender's order, with up to two unused messages an edge:
`core/pipeline/simulate.py` says why that is enough.

An NCCL receive that is posted ahead is a kernel that spins until the message comes. Loading a
kernel for the first time may wait for all that runs on the device ("Lazy Loading" in NVIDIA's CUDA
programming guide), and so for a message whose sender waits for the stage that is loading. In a run
that loads kernels, messages therefore go through host memory, where a receive occupies no device.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from core.parallel.context import ParallelContext
from core.pipeline.schedules import Edge, Message, Schedule
from core.pipeline.simulate import RECEIVE_SLOTS
from core.pipeline.stage_map import StageMap

Payload = Mapping[str, Tensor]
"""What passes from a piece to the next, by name."""


@dataclass(frozen=True)
class Wires:
    """How a stage is connected, the same in every step."""

    stage: int
    ranks: tuple[int, ...]
    """Global rank of every stage, at this rank's place on the other axes."""
    groups: Mapping[Edge, dist.ProcessGroup]
    """For every edge that begins or ends here, a group of its two ranks."""
    shapes: Sequence[Mapping[str, tuple[int, ...]]]
    """For every piece, the tensors that it receives from the piece before; none for the first.
    Their gradients have the same shapes."""
    dtype: torch.dtype
    device: torch.device
    host: dist.ProcessGroup | None = None
    """On CUDA, the group for messages through host memory, in runs that load kernels. All edges
    share it: gloo keeps order from one rank to another, and the two directions apart."""

    @classmethod
    def connect(
        cls,
        where: StageMap,
        ctx: ParallelContext,
        shapes: Sequence[Mapping[str, tuple[int, ...]]],
        dtype: torch.dtype,
    ) -> "Wires":
        """Connect all stages.

        Collective over the world: one group for every edge at every place on the other axes, one
        element sent over each, and on CUDA a group for the host.

        Args:
            where: which stage holds which piece.
            ctx: the process axes; pp are the stages.
            shapes: see the field.
            dtype: format of all messages.
        """
        stages = [where.stage(piece) for piece in range(where.pieces)]
        edges = {edge for a, b in pairwise(stages) if a != b for edge in (Edge(a, b), Edge(b, a))}
        own = ctx.new_channels(sorted(edges))
        groups = {edge: own[edge] for edge in sorted(edges) if edge in own}
        # NCCL may connect two ranks at their first transfer, which both must then be waiting in: a
        # receive that is posted ahead would never return. In one order of edges, each pair meets.
        element = torch.zeros(1, device=ctx.device)
        for edge, group in groups.items():
            if ctx.pp.rank == edge.source:
                dist.send(element, dst=ctx.pp.ranks[edge.target], group=group)
            else:
                dist.recv(element, src=ctx.pp.ranks[edge.source], group=group)
        host = ctx.host_group() if edges and ctx.device.type == "cuda" else None
        return cls(ctx.pp.rank, ctx.pp.ranks, groups, shapes, dtype, ctx.device, host)

    def shapes_of(self, message: Message) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of a message's tensors."""
        return self.shapes[message.piece + (message.content == "gradient")]


class Mailbox:
    """The messages of one stage in one run of a schedule."""

    def __init__(self, schedule: Schedule, wires: Wires, through_host: bool = False) -> None:
        """Post the first receives.

        Args:
            schedule: of all stages.
            wires: how they are connected.
            through_host: send through host memory, over `Wires.host`; the same on all stages.
        """
        assert wires.host is not None or not through_host
        self._wires, self._where = wires, schedule.stage_map
        self._through_host = through_host
        self._device = torch.device("cpu") if through_host else wires.device
        self._expected = {
            edge: deque(messages)
            for edge, messages in schedule.channels().items()
            if edge.target == wires.stage
        }
        self._source = {m: edge for edge, messages in self._expected.items() for m in messages}
        self._posted: dict[Message, tuple[dict[str, Tensor], list[dist.Work]]] = {}
        self._local: dict[Message, Payload] = {}
        # A tensor must live until it has been sent.
        self._sending: deque[tuple[Tensor, dist.Work]] = deque()
        for edge in self._expected:
            for _ in range(RECEIVE_SLOTS):
                self._post(edge)

    def take(self, message: Message) -> Payload:
        """Wait for a message (over NCCL, the current stream does) and make room for another."""
        if message in self._local:
            return self._local.pop(message)
        tensors, works = self._posted.pop(message)
        for work in works:
            work.wait()
        self._post(self._source[message])
        return {name: tensor.to(self._wires.device) for name, tensor in tensors.items()}

    def put(self, message: Message, payload: Payload) -> None:
        """Send a message, or keep it if its piece lies on this stage; waits for nothing, except for
        the payload where it has to come to the host.

        Raises:
            ValueError: the tensors are not what the target has made room for.
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
        while self._sending and self._sending[0][1].is_completed():
            self._sending.popleft()
        group = self._group(Edge(wires.stage, target))
        for name in sorted(payload):
            tensor = payload[name].to(self._device).contiguous()
            work = dist.isend(tensor, dst=wires.ranks[target], group=group)
            assert work is not None
            self._sending.append((tensor, work))

    def close(self) -> None:
        """Wait until all is sent (over NCCL, the current stream does)."""
        unused = [*self._posted, *self._local]
        assert not unused, f"the schedule left {unused} unused"
        while self._sending:
            self._sending.popleft()[1].wait()

    def _post(self, edge: Edge) -> None:
        if not self._expected[edge]:
            return
        message, wires = self._expected[edge].popleft(), self._wires
        shapes, group = wires.shapes_of(message), self._group(edge)
        tensors, works = {}, []
        for name in sorted(shapes):
            tensors[name] = torch.empty(shapes[name], dtype=wires.dtype, device=self._device)
            work = dist.irecv(tensors[name], src=wires.ranks[edge.source], group=group)
            assert work is not None
            works.append(work)
        self._posted[message] = tensors, works

    def _group(self, edge: Edge) -> dist.ProcessGroup | None:
        return self._wires.host if self._through_host else self._wires.groups[edge]
