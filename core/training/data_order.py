"""The order of samples, which a resumed run must share with the one that it goes on from: a
checkpoint's position in the data is one number.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.checkpoint.directory import step_directories
from core.config.run import RunConfig
from core.errors import ConfigError
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
        "--train.allow-changed-data to go on all the same, or --load in place of --save to start "
        "afresh with these weights"
    )


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
