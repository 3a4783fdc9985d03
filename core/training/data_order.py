"""The order of samples, which a resumed run must share with the one that it goes on from (a
checkpoint's position in the data is one number), and all ranks of a run with each other.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from core.checkpoint.directory import step_directories
from core.checkpoint.index import plain_json
from core.config.run import RunConfig
from core.errors import ConfigError
from core.parallel.context import ParallelContext
from core.training.start import find_checkpoint

SECTION = "sample_order"
"""Of a checkpoint's index."""


def sample_order(dataset: Any, seed: int) -> dict[str, Any]:
    """What the order of training samples follows from, as JSON. A corpus counts by its size and
    shape, not by where it lies.

    Args:
        dataset: the training set; one without `order` is taken to depend on the seed alone.
        seed: `--train.seed`.
    """
    found: dict[str, Any] = json.loads(
        json.dumps({"seed": seed, "data": getattr(dataset, "order", {})})
    )
    return found


def check_same_order(config: RunConfig[Any], dataset: Any) -> None:
    """Check that a run which goes on in its --save folder still reads the same samples in the same
    order. A checkpoint of --load is not looked at: its run may have been on other data.

    Raises:
        ConfigError: it does not, and --train.allow-changed-data is not given.
        CheckpointError: see `find_checkpoint`.
    """
    if config.save is None or config.train.allow_changed_data:
        return
    if not step_directories(Path(config.save)):
        return
    reader = find_checkpoint(config)
    saved = None if reader is None else reader.sections.get(SECTION)
    if reader is None or not saved:
        return  # an older checkpoint, or weights alone
    own = sample_order(dataset, config.train.seed)
    if own == saved:
        return
    (name, new, old), *_ = _differences(own, saved)
    raise ConfigError(
        f"this run would read other samples than the one that saved {reader.path}: {name} is "
        f"{new}, and was {old}; give --train.seed, --train.steps and --data options as before, or "
        "--train.allow-changed-data to go on all the same; to train these weights on other data "
        f"from step 0, choose another --save and give --init-from {config.save}"
    )


def check_ranks_agree(
    config: RunConfig[Any], order: Mapping[str, Any], ctx: ParallelContext
) -> None:
    """Check that all ranks train the same thing: each machine has its own command, files of options
    and perhaps corpora. Paths may differ. Otherwise ranks would go different ways at a step border
    and hang, or each update its part with a learning rate of its own, which nothing would notice.

    Collective over the world: one gather.

    Raises:
        ConfigError: on every rank, naming the first difference.
    """
    if ctx.world.group is None:
        return
    parts = ("model", "parallel", "precision", "optimizer", "train", "backend")
    own = plain_json({**{name: getattr(config, name) for name in parts}, "sample order": order})
    found: list[Any] = [None] * ctx.world.size
    dist.all_gather_object(found, own, group=ctx.world.group)
    for rank, other in enumerate(found):
        for name, theirs, first in _differences(other, found[0]):
            raise ConfigError(
                f"rank {rank} was started with other options or data than rank 0: {name} is "
                f"{theirs}, and {first} on rank 0: give all machines the same"
            )


def consumed_before(config: RunConfig[Any]) -> tuple[int, int]:
    """Steps of the checkpoint that a run would start from, and the samples they consumed.

    Raises:
        CheckpointError: see `find_checkpoint`.
    """
    reader = find_checkpoint(config)
    state = None if reader is None else reader.sections.get("train_state")
    return (state["step"], state["consumed_samples"]) if state else (0, 0)


def _differences(new: Any, old: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        for key in dict.fromkeys([*new, *old]):
            inner = f"{name}, {key}" if name and name != "data" else key
            yield from _differences(new.get(key), old.get(key), inner)
    elif isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        for number, (one, other) in enumerate(zip(new, old, strict=True), 1):
            yield from _differences(one, other, f"{name} {number}")
    elif new != old:
        yield name, new, old
