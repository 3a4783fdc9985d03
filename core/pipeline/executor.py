"""Runs this stage's actions of a schedule. What the order is, and whether it can come to a
deadlock, is the schedule's matter alone; one stage without neighbours is run in the same way.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from core.data_parallel.deferred import DeferredProducts
from core.pipeline.p2p import Mailbox, Payload, Wires
from core.pipeline.schedules import Action, Kind, Schedule

Forward = Callable[[int, int, Payload], Payload | Tensor]
"""Chunk, microbatch and what the piece before has sent, to what the next piece gets; in the last
piece to the loss, a scalar that the backward pass starts from."""

Watch = Callable[[Action], AbstractContextManager[object]]
"""What an action is run inside, once its message has come: measures when it ran."""


@dataclass
class _Live:
    """What a microbatch keeps in a piece from its forward to its backward pass."""

    inputs: Payload
    outputs: list[str]
    """Names of the outputs that take a gradient."""
    roots: list[GradientEdge]
    """Where their gradients enter. The outputs themselves are freed once sent."""
    loss: Tensor | None
    """In the last piece."""


class Executor:
    """One run of a schedule on one stage."""

    def __init__(
        self,
        schedule: Schedule,
        wires: Wires,
        deferred: DeferredProducts,
        watch: Watch = nullcontext,
    ) -> None:
        """Prepare a run.

        Args:
            schedule: of all stages.
            wires: how they are connected.
            deferred: where products go that make weight gradients, if the schedule puts them off.
            watch: what every action is run inside.
        """
        self._schedule, self._stage, self._deferred = schedule, wires.stage, deferred
        self._watch = watch
        self._mail = Mailbox(schedule, wires)
        where = schedule.stage_map
        pieces = [where.piece(wires.stage, chunk) for chunk in range(where.chunks)]
        self._has_backward = [schedule.has_backward(piece) for piece in pieces]
        self._sends_gradient = [schedule.sends_gradient(piece) for piece in pieces]
        self._live: dict[tuple[int, int], _Live] = {}
        self._products: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def run(self, forward: Forward) -> None:
        """Run all actions of this stage. On CUDA the host waits for messages, and for nothing else
        of the device.

        Communication: this stage's messages, and what `forward` and its backward pass do.
        """
        for action in self._schedule.actions[self._stage]:
            needed = self._schedule.needs(self._stage, action)
            received = {} if needed is None else self._mail.take(needed)
            with self._watch(action):
                self._run_action(action, received, forward)
        self._mail.close()

    def _run_action(self, action: Action, received: Payload, forward: Forward) -> None:
        match action.kind:
            case Kind.FORWARD:
                self._forward(action, received, forward)
            case Kind.BACKWARD:
                self._backward(action, received)
            case Kind.BACKWARD_INPUT:
                with self._deferred.collect() as products:
                    self._backward(action, received)
                self._products[action.chunk, action.microbatch] = products
            case Kind.BACKWARD_WEIGHT:
                self._run_products(self._products.pop((action.chunk, action.microbatch)))

    @torch.no_grad()
    def _run_products(self, products: list[Callable[[], None]]) -> None:
        # Popped, since each holds activations.
        products.reverse()
        while products:
            products.pop()()

    def _forward(self, action: Action, received: Payload, forward: Forward) -> None:
        if self._sends_gradient[action.chunk]:
            received = {n: x.detach().requires_grad_() for n, x in received.items()}
        result = forward(action.chunk, action.microbatch, received)
        made = self._schedule.makes(self._stage, action)
        outputs = {"loss": result} if isinstance(result, Tensor) else result
        if isinstance(result, Tensor) != (made is None):
            raise ValueError(f"{action} gave {'a loss' if made else 'no loss'}: wrong piece")
        if self._has_backward[action.chunk]:
            names = [name for name, output in outputs.items() if output.requires_grad]
            roots = [get_gradient_edge(outputs[name]) for name in names]
            loss = result.detach() if isinstance(result, Tensor) else None
            self._live[action.chunk, action.microbatch] = _Live(received, names, roots, loss)
        if made is not None:
            self._mail.put(made, {name: output.detach() for name, output in outputs.items()})

    def _backward(self, action: Action, gradients: Payload) -> None:
        live = self._live.pop((action.chunk, action.microbatch))
        if live.loss is not None:
            gradients = {"loss": torch.ones_like(live.loss)}
        torch.autograd.backward(live.roots, [gradients[name] for name in live.outputs])
        made = self._schedule.makes(self._stage, action)
        if made is not None:
            self._mail.put(
                made,
                {
                    name: torch.zeros_like(x) if x.grad is None else x.grad
                    for name, x in live.inputs.items()
                },
            )
