"""How the processes of one start of a run find each other.

torchrun keeps one key-value store while it restarts the processes, and torch writes addresses there
under the same keys every time: after a restart a process may read those of the dead, and waits for
them until it gives up. So each start gets a part of the store of its own, named by its rank 0. The
number of restarts would not do as a name: torchrun counts them per machine, and only where a
process has failed.
"""

import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # public, yet not re-exported
    PrefixStore,
    Store,
    TCPStore,
)

from core.errors import TrainingError

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Rendezvous:
    """The processes of one start."""

    name: str
    """No two starts have the same."""
    rank: int
    size: int
    store: Store
    """Shared by these processes alone."""

    def connect(self, timeout: timedelta) -> Store:
        """Another connection to the store: calls on one wait for each other. `timeout` is that of
        a call.
        """
        return PrefixStore(self.name, _connect(False, timeout))


def meet(timeout: timedelta) -> Rendezvous | None:
    """Wait for all processes that torchrun's variables (or others of `env://`) speak of; None
    without such variables, or if this process is alone.

    Args:
        timeout: how long to wait for the others.

    Raises:
        TrainingError: some did not come in time.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return None
    rank = int(os.environ["RANK"])
    # Without torchrun's own store rank 0 holds one, which goes with the process.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _connect(hosts, timeout)
    name = agree_on_name(PrefixStore("tessera/rendezvous", store), rank, size, timeout)
    return Rendezvous(name, rank, size, PrefixStore(name, store))


def agree_on_name(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that only these processes know, whatever earlier ones have left in the store.

    Every process writes a token of its own. Rank 0 answers each token that it reads with the name,
    and does so again for a newer one, until every rank has confirmed the name: an answer to a token
    of a dead process is read by none.

    Raises:
        TrainingError: some did not come in time.
    """
    token = uuid.uuid4().hex
    if rank > 0:
        store.set(f"token/{rank}", token)
        try:
            name = store.get(f"answer/{token}").decode()
        except dist.DistError as error:
            raise TrainingError(
                f"rank {rank} heard nothing of rank 0 for {timeout.total_seconds():.0f} s: start "
                "the command on all machines, and look for the first error above"
            ) from error
        store.set(f"confirmed/{token}", name)
        return name
    deadline = time.monotonic() + timeout.total_seconds()
    tokens = dict.fromkeys(range(1, size), "")
    while tokens:
        for other, old in list(tokens.items()):
            if store.check([f"token/{other}"]):
                new = store.get(f"token/{other}").decode()
                if new != old:
                    store.set(f"answer/{new}", token)
                    tokens[other] = new
                elif store.check([f"confirmed/{new}"]) and (
                    store.get(f"confirmed/{new}").decode() == token
                ):
                    del tokens[other]
        if tokens and time.monotonic() > deadline:
            raise TrainingError(
                f"{len(tokens)} of {size} ranks did not come within "
                f"{timeout.total_seconds():.0f} s, the first of them rank {min(tokens)}: start "
                "the command on all machines, and look for the first error above"
            )
        time.sleep(_POLL_SECONDS if tokens else 0.0)
    return token


def _connect(hosts: bool, timeout: timedelta) -> Store:
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=hosts,
        timeout=timeout,
        wait_for_workers=False,
    )
