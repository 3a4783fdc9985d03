"""The process axes of a run, made once and passed down. There is no ambient state: a layer that
communicates is given the context, and one process is `ParallelContext.single()`.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

from core.config.parallel import ParallelConfig, TpOverlap
from core.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One dimension of the process mesh, as seen by this rank."""

    name: str
    size: int
    rank: int
    """Position of this process on the axis."""
    ranks: tuple[int, ...]
    """Global ranks on the axis, in order."""
    group: dist.ProcessGroup | None
    """None where the axis has one process: collectives are then no operations."""


def _unit_axis(name: str, rank: int = 0) -> Axis:
    return Axis(name, 1, 0, (rank,), None)


@dataclass(frozen=True)
class ParallelContext:
    """Axes tp (innermost: neighbouring ranks), dp, pp (outermost), and `model`, the ranks of one
    model replica.
    """

    tp: Axis
    dp: Axis
    pp: Axis
    model: Axis
    """All ranks that together hold one replica: tp x pp at this dp coordinate."""
    world: Axis
    device: torch.device
    sequence_parallel: bool = False
    """Activations between tensor-parallel regions are cut along the sequence over tp."""
    tp_overlap: TpOverlap = "none"
    """How communication over tp is hidden."""
    hosts: dist.ProcessGroup | None = None
    """All ranks over gloo, for what the hosts of stages tell each other; None without stages. One
    group for all: where NCCL is the default, torch hangs in `new_group` of a part of the ranks over
    gloo (the others split a communicator of NCCL, which those ranks do not)."""
    _groups: dict[tuple[int, ...], dist.ProcessGroup | None] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Groups by their ranks, those of other processes too; None or no group where this is not in
    it."""
    _timeout: timedelta | None = field(default=None, repr=False, compare=False)
    _channels: dict[tuple[int, int], dist.ProcessGroup | None] = field(
        default_factory=dict, repr=False, compare=False
    )
    """By the two places on pp: messages go from the first to the second. None where this rank is in
    neither."""

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "ParallelContext":
        """The context of one process without torch.distributed."""
        tp, dp, pp, model, world = map(_unit_axis, ("tp", "dp", "pp", "model", "world"))
        return cls(tp, dp, pp, model, world, torch.device(device))

    @classmethod
    def create(
        cls,
        config: ParallelConfig,
        device: torch.device,
        timeout: timedelta | None = None,
    ) -> "ParallelContext":
        """Make the axes over the initialised default process group; collective over all ranks.

        Args:
            config: sizes of the axes.
            device: this rank's.
            timeout: of collectives over an axis; by default torch's own.

        Raises:
            ConfigError: the number of processes is not tp * pp * dp, or the device cannot hide
                communication as is asked.
        """
        _check_overlap(config, device)
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        dp = config.data_parallel_size(world_size)
        if world_size == 1:
            return cls.single(device)
        mesh = init_device_mesh(
            device.type, (config.pp, dp, config.tp), mesh_dim_names=("pp", "dp", "tp")
        )
        rank = dist.get_rank()

        def axis(name: str, size: int) -> Axis:
            if size == 1:
                return _unit_axis(name, rank)
            group = mesh[name].get_group()
            ranks = tuple(dist.get_process_group_ranks(group))
            return Axis(name, size, ranks.index(rank), ranks, group)

        tp, dp_axis, pp = axis("tp", config.tp), axis("dp", dp), axis("pp", config.pp)
        world = Axis("world", world_size, rank, tuple(range(world_size)), dist.group.WORLD)
        known = {world.ranks: world.group}
        for dim, one in enumerate((pp, dp_axis, tp)):
            for ranks in mesh.mesh.movedim(dim, -1).reshape(-1, one.size).tolist():
                known[tuple(ranks)] = one.group if rank in ranks else None
        if timeout is not None:
            for group in {id(one): one for one in known.values() if one is not None}.values():
                set_timeout(timeout, group)
        hosts = None
        if config.pp > 1:
            hosts = dist.new_group(timeout=timeout, backend="gloo")
        context = cls(
            *(tp, dp_axis, pp, world, world, device),
            sequence_parallel=config.sequence_parallel,
            tp_overlap=config.tp_overlap,
            hosts=hosts,
            _groups=known,
            _timeout=timeout,
        )
        if dp == 1:
            return context
        if pp.size == 1:
            model = Axis("model", tp.size, tp.rank, tp.ranks, tp.group)
        else:
            replicas = mesh.mesh.permute(1, 0, 2).reshape(dp, -1).tolist()
            groups = context.new_groups([tuple(replica) for replica in replicas])
            ranks = next(tuple(replica) for replica in replicas if rank in replica)
            model = Axis("model", len(ranks), ranks.index(rank), ranks, groups[ranks])
        return dataclasses.replace(context, model=model)

    def new_groups(
        self, rank_sets: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], dist.ProcessGroup | None]:
        """Process groups for these sets of global ranks; collective over all ranks, which pass the
        same list.

        Groups are remembered, those of the axes included, so that parts of the program asking for
        the same ranks share a communicator. A set of one rank gives None.
        """
        found: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for ranks in sorted(set(rank_sets)):
            # Every rank takes the same way here, since all remember the groups of all.
            if len(ranks) > 1 and ranks not in self._groups:
                self._groups[ranks] = dist.new_group(list(ranks), timeout=self._timeout)
            found[ranks] = self._groups.get(ranks)
        return found

    def new_channels(
        self, edges: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], dist.ProcessGroup]:
        """A communicator for each of these pairs of places on pp, at every place on the other axes;
        collective over all ranks, which pass the same list. They are remembered, as groups are.

        Returns:
            Those that this rank is in. Two pairs never share one, (0, 1) and (1, 0) neither.
        """
        places = self.world.size // self.pp.size
        for source, target in edges:
            if (source, target) in self._channels:
                continue
            self._channels[source, target] = None
            for place in range(places):
                # pp is the outermost axis.
                ranks = (source * places + place, target * places + place)
                group = dist.new_group(list(ranks), timeout=self._timeout)
                if self.world.rank in ranks:
                    self._channels[source, target] = group
        own = {edge: self._channels[edge] for edge in edges}
        return {edge: group for edge, group in own.items() if group is not None}

    def describe_groups(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """This rank's groups: torch's name of each, to what a person calls it and its ranks."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for ranks, group in self._groups.items():
            # Groups of other ranks are placeholders.
            if isinstance(group, dist.ProcessGroup) and self.world.rank in ranks:
                found[group.group_name] = ("", ranks)
        for axis in (self.world, self.model, self.pp, self.dp, self.tp):
            if axis.group is not None:
                found[axis.group.group_name] = (axis.name, axis.ranks)
        if self.hosts is not None:
            found[self.hosts.group_name] = ("hosts", self.world.ranks)
        for (source, target), group in self._channels.items():
            if group is not None:
                ranks = (self.pp.ranks[source], self.pp.ranks[target])
                found[group.group_name] = (f"pp from stage {source} to {target}", ranks)
        return found


def _check_overlap(config: ParallelConfig, device: torch.device) -> None:
    if config.tp_overlap != "symmetric_memory":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"--parallel.tp-overlap symmetric_memory needs GPUs, not {device.type}: leave it out"
        )
    if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") != "1":
        raise ConfigError(
            "--parallel.tp-overlap symmetric_memory would turn on the multicast of NVLink: set "
            "TORCH_SYMM_MEM_DISABLE_MULTICAST=1 in the environment of every process"
        )
