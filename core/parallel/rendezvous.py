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

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # public, yet not re-exported
    PrefixStore,
    Store,
    TCPStore,
)

from core.errors import ConfigError, TrainingError

DEFAULT_TIMEOUT = timedelta(minutes=10)
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


def init_distributed(
    device_type: str, timeout: timedelta = DEFAULT_TIMEOUT, rendezvous: Rendezvous | None = None
) -> torch.device:
    """Join the process group that torchrun describes, if any, and return this process's device.

    Without torchrun's variables the process is alone and no group is made.

    Args:
        device_type: cpu or cuda.
        timeout: of collectives over all processes, and of waiting for processes to start. Groups
            of an axis have that of `ParallelContext.create`.
        rendezvous: the other processes, if they have been met.

    Raises:
        ConfigError: CUDA was asked for and is not there, or a node has more processes than GPUs.
        TrainingError: a process did not start in time.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU: {count} are visible; start "
                "fewer processes (--nproc-per-node) or run with --device cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if dist.is_initialized():
        return device
    met = rendezvous or meet(timeout)
    if met is not None:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=met.store,
            rank=met.rank,
            world_size=met.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    return device
