"""A training run under torchrun, watched from outside: for tests that kill its processes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class LaunchedRun:
    """`models/llama/train.py` under torchrun; a context manager that leaves no process behind."""

    folder: Path
    """Where it is started."""
    save: Path
    """Its --save."""
    steps: int
    """Its --train.steps."""
    options: Sequence[str]
    """What else it is told."""
    rendezvous: Sequence[str]
    """How torchrun is told of processes and machines."""
    restarts: int = 0
    """torchrun's --max-restarts."""
    node: int = 0
    """Tells the logs of several machines of one run apart."""

    def __enter__(self) -> "LaunchedRun":
        launcher = ["-m", "torch.distributed.run", *self.rendezvous]
        launcher += ["--max-restarts", str(self.restarts)]
        train = [
            str(ROOT / "models/llama/train.py"),
            *self.options,
            "--train.steps",
            str(self.steps),
        ]
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *train, "--save", str(self.save)],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(self, *args: object) -> None:
        # Workers have sessions of their own.
        workers = self.workers()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            for pid in workers.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.save.name}.{self.node}.log"

    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text()

    def workers(self, attempt: int | None = None) -> dict[int, int]:
        """Processes by rank, of one attempt if it is given."""
        found = {}
        pid = self.process.pid
        with suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                environment = Path(f"/proc/{child}/environ").read_bytes().decode()
                values = dict(entry.partition("=")[::2] for entry in environment.split("\0"))
                if attempt is None or values.get("TORCHELASTIC_RESTART_COUNT") == str(attempt):
                    found.update({int(values["RANK"]): int(child)} if "RANK" in values else {})
        return found

    def until(
        self, what: str, condition: Callable[[], bool], seconds: float = 90, every: float = 0.02
    ) -> None:
        """Wait for a condition; fails if the run ends first, or after so many seconds. It is asked
        for `every` so many: more often takes a core from the processes that are waited for.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the run ended before {what}\n{self.log()}"
            assert time.monotonic() < deadline, f"no {what}\n{self.log()}"
            time.sleep(every)

    def until_restarted(self, attempt: int) -> None:
        """Wait for the workers of an attempt."""
        self.until("restart", lambda: bool(self.workers(attempt)))

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.save.is_dir() and any(
            re.fullmatch(r"\.step_.*\.tmp", name) for name in os.listdir(self.save)
        )

    def rows_written(self) -> tuple[int, int]:
        """The metrics file, which every attempt makes anew, and its rows."""
        file = self.save / "metrics.jsonl"
        with suppress(FileNotFoundError):
            return file.stat().st_ino, file.read_text().count("\n")
        return 0, 0

    def last_step(self) -> int:
        """The newest checkpoint's."""
        steps = [int(name[5:]) for name in os.listdir(self.save) if name.startswith("step_")]
        return max(steps, default=0)
