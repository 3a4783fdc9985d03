"""One training process, from its configuration to its exit status.

Whatever can be found out before a process group exists is found out there: a mistake then costs
seconds and leaves nothing behind.
"""

import logging
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from core.config.backend import BackendUse, validate_backend
from core.config.run import RunConfig
from core.config.train import TrainConfig, validate_batch_sizes
from core.errors import ConfigError, TesseraError
from core.parallel.context import ParallelContext
from core.parallel.rendezvous import init_distributed, meet
from core.training.datasets import make_datasets
from core.training.failure import FailureBoard, SentenceHandler, exit_now
from core.training.metrics import check_trackers
from core.training.start import find_checkpoint
from core.training.task import TrainTask
from core.training.trainer import Trainer

MakeTask = Callable[[RunConfig[Any]], TrainTask]


def run(config: RunConfig[Any] | TesseraError, make_task: MakeTask) -> None:
    """Train, and leave this process at once with a status if that fails: 2 for options that cannot
    work, else 1.

    Args:
        config: what to train, or why there is no such thing.
        make_task: the family's task for a configuration.
    """
    handler = SentenceHandler()
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING if first else logging.ERROR
    )

    def body() -> None:
        if isinstance(config, TesseraError):
            raise config
        try:
            train(config, make_task, handler)
        except Exception:
            # torchrun ends those who outlive another. What this one has to tell comes first: it
            # would be gone without a word, and others might wait for it.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise

    try:
        record(body, handler)()
    except Exception as error:
        # Reported by the handler. Python's own way out would tear down process groups, and wait
        # there for ranks that are stuck in a collective with this one.
        exit_now(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:  # the second Ctrl-C
        exit_now(128 + signal.SIGINT)


def train(config: RunConfig[Any], make_task: MakeTask, handler: SentenceHandler) -> bool:
    """Check, join the process group that torchrun describes, build and train.

    Returns:
        Whether all steps are done.

    Raises:
        TesseraError: anything that a user can cause.
    """
    task = make_task(config)
    check_before_start(config)
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    kind = "cuda" if cuda else "cpu"
    validate_backend(BackendUse(config.backend, config.precision, config.parallel, kind))
    datasets = make_datasets(task, config)
    timeout = collective_timeout(config.train)
    met = meet(timeout)
    handler.board = FailureBoard.connect(met)
    device = init_distributed(kind, timeout, met)
    ctx = ParallelContext.create(config.parallel, device, timeout)
    trainer = Trainer(task, config, ctx, datasets=datasets, failures=handler)
    done = trainer.fit()
    if dist.is_initialized():
        dist.destroy_process_group()
    return done


def collective_timeout(config: TrainConfig) -> timedelta:
    """How long a rank may wait for others in a collective: longer than the watchdog, whose sentence
    names the rank that is late.
    """
    if config.hang_timeout_seconds == 0:
        return timedelta(days=365)
    return timedelta(seconds=config.hang_timeout_seconds + 60)


def check_before_start(config: RunConfig[Any]) -> None:
    """Check what needs the number of processes or the disk, but no other process.

    Raises:
        ConfigError: options that do not fit together, the number of processes or this machine.
        CheckpointError: there is no checkpoint in --load, or what the run would start from is of
            another architecture.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dp = config.parallel.data_parallel_size(world_size)
    validate_batch_sizes(config.train, dp)
    check_trackers(config.train.track)
    if config.save is not None:
        _check_folder(Path(config.save))
    find_checkpoint(config)


def _check_folder(save: Path) -> None:
    """Check that the save folder is there or can be made: found out now, it costs nothing."""
    whole = save.absolute()
    there = next(path for path in (whole, *whole.parents) if os.path.exists(path))
    if not there.is_dir():
        raise ConfigError(f"--save {save}: {there} is a file: name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--save {save}: {there} may not be written: name another folder")
