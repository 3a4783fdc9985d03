import dataclasses
import threading
import time
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core.config.parallel import ParallelConfig
from core.data_parallel.buffers import GradBuffers
from core.data_parallel.deferred import DeferredProducts
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.random import normal_init
from core.parallel.sharding import declared_parameters
from core.pipeline.executor import Executor
from core.pipeline.p2p import Awaited, Mailbox, Wires, _Sender
from core.pipeline.schedules import Edge, Kind, Message, Schedule, make_schedule
from core.testing.distributed import WorkerError, WorkerPool

CPU = torch.device("cpu")
MICROBATCHES = 4
SHAPE = (3, 2, 8)


class _Layers(nn.Module):
    """Two linear layers and a norm's weight, whose gradient is not put off."""

    def __init__(self, ctx: ParallelContext) -> None:
        super().__init__()
        place = Placement(ctx, torch.float64, CPU)
        init = normal_init(0.3)
        self.first = ColumnParallelLinear(place, 8, [Block(8)], init=init, bias=True)
        self.second = ColumnParallelLinear(place, 8, [Block(8)], init=init)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x).tanh()
        out: Tensor = self.second(hidden)
        return out


def _buffers(model: _Layers, ctx: ParallelContext) -> GradBuffers:
    parameters = declared_parameters(model)
    initialize_parameters(parameters, seed=1)
    return GradBuffers(parameters, ctx, bucket_mib=1)


def _wires(schedule: Schedule, ctx: ParallelContext, width: int = 8) -> Wires:
    shapes: list[Mapping[str, tuple[int, ...]]] = [{}]
    shapes += [{"x": (*SHAPE[:2], width)}] * (schedule.stage_map.pieces - 1)
    return Wires.connect(schedule.stage_map, ctx, shapes, torch.float64)


def _input(microbatch: int) -> Tensor:
    return torch.linspace(-1, 1, 48, dtype=torch.float64).view(SHAPE).roll(microbatch) + microbatch


def _one_stage(name: str, **options: Any) -> tuple[dict[str, Tensor], int]:
    """Gradients and FLOPs of a step."""
    ctx = ParallelContext.single()
    model = _Layers(ctx)
    buffers = _buffers(model, ctx)
    schedule = make_schedule(name, stages=1, microbatches=MICROBATCHES, **options)
    buffers.begin_step(MICROBATCHES)

    def forward(chunk: int, microbatch: int, received: Mapping[str, Tensor]) -> Tensor:
        assert not received
        out: Tensor = model(_input(microbatch)).square().sum()
        return out

    with FlopCounterMode(display=False) as counter:
        Executor(schedule, _wires(schedule, ctx), buffers.deferred).run(forward)
    gradients = {n: p.main_grad.clone() for n, p in model.named_parameters()}  # type: ignore[attr-defined]
    return gradients, counter.get_total_flops()


@pytest.mark.parametrize("name", ["gpipe", "zb_h1"])
def test_one_stage_gives_the_same_gradients_for_the_same_work(name: str) -> None:
    expected, flops = _one_stage("1f1b")
    assert all(gradient.abs().max() > 0.1 for gradient in expected.values())
    found, needed = _one_stage(name)
    assert needed == flops
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-12, atol=1e-12)


def test_weight_gradients_wait_for_their_action() -> None:
    ctx = ParallelContext.single()
    model = _Layers(ctx)
    buffers = _buffers(model, ctx)
    calls: list[str] = []
    weight: Any = model.second.weight
    ready = weight.grad_ready

    def note_ready() -> None:
        calls.append("ready")
        ready()

    weight.grad_ready = note_ready
    with buffers.deferred.collect() as products:
        model(_input(0)).sum().backward()
    assert calls == []
    assert len(products) == 2
    assert weight.main_grad.count_nonzero() == 0
    assert model.first.bias.main_grad.count_nonzero() > 0  # type: ignore[union-attr]
    with torch.no_grad():
        for product in products:
            product()
    assert calls == ["ready"]
    assert weight.main_grad.count_nonzero() > 0
    model(_input(0)).sum().backward()  # outside, nothing is put off
    assert calls == ["ready", "ready"]


def test_an_open_collection_is_not_opened_again() -> None:
    deferred = DeferredProducts()
    with deferred.collect(), pytest.raises(AssertionError), deferred.collect():
        pass
    with deferred.collect() as products:
        assert products == []


def _outputs_die(name: str) -> list[bool]:
    """Whether each output of the first stage was gone when the next forward pass began, and all of
    them at the end."""
    ctx = ParallelContext.create(ParallelConfig(pp=2), CPU)
    model = _Layers(ctx)
    buffers = _buffers(model, ctx)
    schedule = make_schedule(name, stages=2, microbatches=MICROBATCHES)
    buffers.begin_step(MICROBATCHES)
    outputs: list[Any] = []
    gone: list[bool] = []

    def forward(chunk: int, microbatch: int, received: Any) -> Any:
        gone.extend(ref() is None for ref in outputs[-1:])
        out = model(received["x"] if received else _input(microbatch))
        outputs.append(weakref.ref(out))
        return out.square().sum() if received else {"x": out}

    Executor(schedule, _wires(schedule, ctx), buffers.deferred).run(forward)
    assert len(outputs) == MICROBATCHES
    return [*gone, *(ref() is None for ref in outputs)]


@pytest.mark.parametrize("name", ["gpipe", "zb_h1"])
def test_an_output_is_freed_once_sent(pool: WorkerPool, name: str) -> None:
    first, _ = pool.run(_outputs_die, 2, name)
    assert len(first) == 2 * MICROBATCHES - 1
    assert all(first)


class _Piece(nn.Module):
    """A multilayer perceptron over tp, that takes and gives two tensors of different shapes."""

    def __init__(self, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        place, init = Placement(ctx, dtype, CPU), normal_init(0.3)
        self.first = ColumnParallelLinear(place, 8, [Block(8)], init=init, bias=True)
        self.second = RowParallelLinear(place, Block(8), 8, init=init)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.second(self.first(x).tanh())
        return {"x": x + out * y, "y": out.mean(0, keepdim=True)}


def _gradients(name: str, pp: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a step over stages, those of this stage; over one stage, all of the same pieces."""
    ctx = ParallelContext.create(ParallelConfig(pp=pp), CPU)
    schedule = make_schedule(name, stages=pp, microbatches=8)
    where = schedule.stage_map
    shapes: list[Mapping[str, tuple[int, ...]]] = [{}]
    shapes += [{"x": SHAPE, "y": (1, *SHAPE[1:])}] * (where.pieces - 1)
    wires = Wires.connect(where, ctx, shapes, dtype)
    pieces = [where.piece(ctx.pp.rank, chunk) for chunk in range(where.chunks)]
    model, buffers = _pieces(ctx, pieces, dtype)

    def forward(chunk: int, microbatch: int, received: Any) -> Any:
        out = model[f"piece_{pieces[chunk]}"](**(received or _first(microbatch, dtype)))
        return out["x"].square().sum() if pieces[chunk] == where.pieces - 1 else out

    for _ in range(2):  # wires serve any number of runs
        buffers.begin_step(8)
        Executor(schedule, wires, buffers.deferred).run(forward)
    return {n: p.main_grad.clone() for n, p in model.named_parameters()}  # type: ignore[attr-defined]


def _expected_gradients(pieces: int, dtype: torch.dtype) -> dict[str, Tensor]:
    model, buffers = _pieces(ParallelContext.single(), list(range(pieces)), dtype)
    for _ in range(2):
        buffers.begin_step(8)
        for microbatch in range(8):
            out = _first(microbatch, dtype)
            for piece in range(pieces):
                out = model[f"piece_{piece}"](**out)
            out["x"].square().sum().backward()
    return {n: p.main_grad.clone() for n, p in model.named_parameters()}  # type: ignore[attr-defined]


def _pieces(
    ctx: ParallelContext, pieces: list[int], dtype: torch.dtype
) -> tuple[nn.ModuleDict, GradBuffers]:
    model = nn.ModuleDict({f"piece_{piece}": _Piece(ctx, dtype) for piece in pieces})
    parameters = declared_parameters(model)
    initialize_parameters(parameters, seed=1)
    return model, GradBuffers(parameters, ctx, bucket_mib=1)


def _first(microbatch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    x = (_input(microbatch) / 8).to(dtype)
    return {"x": x, "y": x[:1]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "pp"), [("1f1b", 2), ("interleaved", 2), ("interleaved", 4), ("zbv", 4)]
)
def test_messages_of_two_tensors(pool: WorkerPool, name: str, pp: int, dtype: torch.dtype) -> None:
    expected = _expected_gradients(pp if name == "1f1b" else 2 * pp, dtype)
    found: dict[str, Tensor] = {}
    for gradients in pool.run(_gradients, pp, name, pp, dtype):
        found |= gradients
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        assert gradient.count_nonzero() > 0, parameter
        assert torch.equal(expected[parameter], gradient), parameter


def test_a_message_is_freed_once_sent() -> None:
    """Not only when the next one is."""
    sender, message = _Sender("send"), torch.zeros(3)
    gone = weakref.ref(message)
    sender.submit(partial(torch.sum, message))  # type: ignore[arg-type]
    del message
    deadline = time.monotonic() + 5.0
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert gone() is None
    sender.close()


def _in_thread_fails() -> str:
    """What a run says whose message cannot be sent."""
    ctx = ParallelContext.create(ParallelConfig(pp=2), CPU)
    schedule = make_schedule("1f1b", stages=2, microbatches=2)
    wires = _wires(schedule, ctx)
    if ctx.pp.rank == 0:

        class Broken(Wires):
            def transfer(self, *args: Any) -> Any:
                raise RuntimeError("the cable is cut")

        fields = {field.name: getattr(wires, field.name) for field in dataclasses.fields(wires)}
        mailbox = Mailbox(schedule, Broken(**fields))
        message = next(m for m in schedule.channels()[Edge(0, 1)])
        mailbox.put(message, {"x": torch.zeros(SHAPE, dtype=torch.float64)})
        with pytest.raises(RuntimeError, match="the cable is cut"):
            mailbox._senders[Edge(0, 1)].close()
        return "said"
    wires.note(Edge(0, 1), sends=True)
    wires.note(Edge(0, 1), sends=False)
    return "said"


def test_what_cannot_be_sent_is_said(pool: WorkerPool) -> None:
    assert pool.run(_in_thread_fails, 2) == ["said", "said"]


def _awaited(late: float) -> set[Awaited | None]:
    """What each stage is seen to wait for in a step whose last stage is slow."""
    ctx = ParallelContext.create(ParallelConfig(pp=2), CPU)
    model, schedule = _Layers(ctx), make_schedule("1f1b", stages=2, microbatches=2)
    buffers, wires = _buffers(model, ctx), _wires(schedule, ctx)
    buffers.begin_step(2)
    seen: set[Awaited | None] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            seen.add(wires.waiting.now)

    def forward(chunk: int, microbatch: int, received: Any) -> Any:
        if not received:
            return {"x": model(_input(microbatch))}
        time.sleep(late)
        return model(received["x"]).square().sum()

    watcher = threading.Thread(target=look)
    watcher.start()
    Executor(schedule, wires, buffers.deferred).run(forward)
    over.set()
    watcher.join()
    assert wires.waiting.now is None
    return seen


def test_a_stage_knows_what_it_waits_for(pool: WorkerPool) -> None:
    first, last = pool.run(_awaited, 2, 0.2)
    receipt = "the receipt of gradient for piece 0, microbatch"
    assert {Awaited(f"{receipt} 0", 1), Awaited(f"{receipt} 1", 1)} <= first
    assert None in last  # while it sleeps


def _wrong_width() -> None:
    ctx = ParallelContext.create(ParallelConfig(pp=2), CPU)
    schedule = make_schedule("1f1b", stages=2, microbatches=1)
    wires = _wires(schedule, ctx, width=7)
    mail = Mailbox(schedule, wires)
    if ctx.pp.rank == 0:
        mail.put(Message("activation", 1, 0), {"x": _input(0)})
    else:
        mail.take(Message("activation", 1, 0))


def test_a_payload_of_another_shape_is_refused(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match=r"activation for piece 1, microbatch 0 is .*\(3, 2, 8\)"):
        pool.run(_wrong_width, 2)


def test_a_loss_in_the_wrong_piece_is_refused() -> None:
    ctx = ParallelContext.single()
    schedule = make_schedule("1f1b", stages=1, microbatches=1)
    executor = Executor(schedule, _wires(schedule, ctx), DeferredProducts())
    with pytest.raises(ValueError, match="chunk 0, microbatch 0 gave no loss"):
        executor.run(lambda chunk, microbatch, received: {"x": _input(0)})


def test_forward_only_leaves_forward_passes() -> None:
    schedule = make_schedule("zbv", stages=2, microbatches=3).forward_only()
    assert {action.kind for stage in schedule.actions for action in stage} == {Kind.FORWARD}
    assert all(len(stage) == 6 for stage in schedule.actions)
