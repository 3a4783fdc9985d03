"""Who holds up a run that hangs: found from what every rank says of itself.

torch notes the collectives of each process group in its flight recorder, with a number that counts
them per group. A rank that waits in number 7 of a group waits for those members whose own count has
not come to 7. What a pipeline stage waits for it says itself.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch._C._distributed_c10d as c10d

from core.pipeline.p2p import Awaited

Groups = Mapping[str, tuple[str, tuple[int, ...]]]
"""torch's name of a process group, to the name of its axis and its ranks."""


@dataclass(frozen=True)
class Collective:
    """One collective of one group."""

    group: str
    """Name of the axis and ranks: the same on all members."""
    ranks: tuple[int, ...]
    number: int
    """Counts the group's collectives, from 1; point-to-point transfers are counted apart."""
    kind: str
    """Such as all_reduce."""
    elements: int
    """Of the first input."""

    def __str__(self) -> str:
        return f"{self.kind} number {self.number} over {self.group} ({self.elements:,} elements)"


@dataclass(frozen=True)
class RankState:
    """What a rank says of itself."""

    step: int
    phase: str
    waits_in: Collective | None = None
    """The oldest collective that it has begun and that has not ended."""
    begun: Mapping[str, int] = field(default_factory=dict)
    """By group, the number of the last collective begun."""
    awaited: Awaited | None = None
    """What its host waits for of another stage: then a collective goes on beside that."""

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankState":
        """From the store."""
        values = json.loads(text)
        waits = values.pop("waits_in")
        if waits is not None:
            waits = Collective(**{**waits, "ranks": tuple(waits["ranks"])})
        awaited = values.pop("awaited")
        if awaited is not None:
            awaited = Awaited(*awaited)
        return cls(**values, waits_in=waits, awaited=awaited)


def rank_state(step: int, phase: str, groups: Groups, awaited: Awaited | None = None) -> RankState:
    """The state of this rank, from any thread. Without a flight recorder (older torch, or one that
    is turned off by TORCH_FR_BUFFER_SIZE=0) it says nothing of collectives.
    """
    waits_in: Collective | None = None
    begun: dict[str, int] = {}
    for entry in recorded():
        torch_name = entry["process_group"][0]
        if torch_name not in groups:
            continue
        axis, ranks = groups[torch_name]
        group = f"{axis or 'ranks'} {list(ranks)}"
        transfer = entry["is_p2p"]
        number = entry["p2p_seq_id" if transfer else "collective_seq_id"]
        key = f"{group} transfers" if transfer else group
        begun[key] = max(begun.get(key, 0), number)
        # gloo leaves the state at "scheduled" and only ever retires an entry.
        if waits_in is None and not entry["retired"] and entry["state"] != "completed":
            kind = entry["profiling_name"].rpartition(":")[2]
            elements = 1
            for size in (entry["input_sizes"] or [[0]])[0]:
                elements *= size
            waits_in = Collective(key, ranks, number, kind, elements)
    return RankState(step, phase, waits_in, begun, awaited)


def recorded() -> list[dict[str, Any]]:
    """What the flight recorders of this process hold, oldest first."""
    entries: list[dict[str, Any]] = []
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # NCCL's; that of CPU groups
        dump: Callable[..., bytes] | None = getattr(c10d, name, None)
        if dump is not None:
            entries += json.loads(dump(includeCollectives=True, onlyActive=False)).get(
                "entries", []
            )
    return sorted(entries, key=lambda entry: int(entry["time_created_ns"]))


def diagnose(states: Mapping[int, RankState | None]) -> str:
    """Say in a few words which ranks hold up the run, and where the others wait.

    Args:
        states: of every rank; None for one that did not answer.
    """
    missing = {rank: _late(state, states) for rank, state in states.items() if state is not None}
    # A late rank that waits for another in its turn is not the cause.
    waiting = {rank for rank, late in missing.items() if late}
    silent = {rank for rank, state in states.items() if state is None}
    blamed = sorted(({late for ranks in missing.values() for late in ranks} | silent) - waiting)
    parts = [_about(rank, states.get(rank)) for rank in blamed]
    for rank in sorted(waiting):
        state = states[rank]
        assert state is not None
        late = ", ".join(map(str, missing[rank]))
        where = state.waits_in if state.awaited is None else state.awaited.what
        parts.append(f"rank {rank} waits in {where} of step {state.step} for rank {late}")
    if not parts:
        parts = [_about(rank, state) for rank, state in sorted(states.items())]
    if waiting and not blamed:
        parts.append("they wait for each other: the ranks have gone different ways")
    return "; ".join(parts)


def _late(state: RankState, states: Mapping[int, RankState | None]) -> list[int]:
    """The ranks that one waits for."""
    if state.awaited is not None:
        return [state.awaited.rank]
    if state.waits_in is None:
        return []
    return [
        other
        for other in state.waits_in.ranks
        if (answer := states.get(other)) is None
        or answer.begun.get(state.waits_in.group, 0) < state.waits_in.number
    ]


def _about(rank: int, state: RankState | None) -> str:
    if state is None:
        return f"rank {rank} does not answer: it is stopped, dead or cut off"
    if state.waits_in is None:
        return f"rank {rank} is in {state.phase} of step {state.step}, and in no collective"
    return (
        f"rank {rank} is in {state.phase} of step {state.step}, and in {state.waits_in}, which all "
        "have begun: look at its device and the network"
    )
