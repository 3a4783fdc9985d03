import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

import benchmarks.compare as compare
from benchmarks.records import Outcome, Timed
from benchmarks.workloads import workload
from core.errors import ConfigError

PAIR = ("ours", "hf-eager")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dense8b", "not of the form"),
        ("dense8b:ours:hf-eager:megatron", "not of the form"),
        ("dense9b:ours", "perhaps you meant dense8b"),
        ("dense8b:hf-eagre", "perhaps you meant hf-eager"),
        ("full8b:ours:megatron", "no peer of the same precision"),
    ],
)
def test_a_wrong_pair_is_refused_before_anything_starts(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compare.parse_pair(text)


def test_all_default_pairs_exist() -> None:
    for text in compare.PAIRS:
        compare.parse_pair(text)


class _Processes:
    """Stands for the processes of pairs: notes who ran, and answers for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, together: str = "") -> None:
        self.ran: list[tuple[str, ...]] = []
        self.beside: list[bool] = []
        self.together = together
        monkeypatch.setattr(compare, "_run", self)

    def __call__(self, command: Sequence[str], limit: float) -> int:
        at = command.index("--contestants") + 1
        names = tuple(command[at : command.index("--rounds")])
        self.ran.append(names)
        self.beside.append("--beside" in command)
        seconds = float(len(self.ran))
        timed = [Timed(name, losses=[1.0], blocks=[[seconds]]) for name in names]
        outcome = Outcome("tiny", names, timed, refused=self.together if len(names) == 2 else "")
        result = Path(command[command.index("--result") + 1])
        result.write_text(json.dumps(dataclasses.asdict(outcome)))
        return 0


def _run(tmp_path: Path, options: compare.Compare) -> Outcome:
    return compare.Runner(options, tmp_path).run(workload("tiny"), PAIR)


CPU = compare.Compare(device="cpu")


def test_both_are_resident_where_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = _Processes(monkeypatch)
    outcome = _run(tmp_path, CPU)
    assert processes.ran == [PAIR]
    assert not outcome.in_turns


@pytest.mark.parametrize("placement", ["turns", "auto"])
def test_in_turns_where_they_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: Literal["turns", "auto"]
) -> None:
    processes = _Processes(monkeypatch, together="out of memory: tried to allocate 2 GiB")
    outcome = _run(tmp_path, dataclasses.replace(CPU, placement=placement))
    tried = [PAIR] if placement == "auto" else []
    assert processes.ran == [*tried, ("ours",), ("hf-eager",), ("ours",)]
    assert processes.beside[-3:] == [False, True, True]
    assert outcome.in_turns
    before = float(len(tried))
    assert outcome.timed[0].blocks == [[before + 1], [before + 3]]
    assert outcome.timed[1].blocks == [[before + 2]] * 2


def test_a_refusal_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Processes(monkeypatch, together="the losses of step 0 are apart")
    assert "step 0" in _run(tmp_path, CPU).refused


def test_no_pair_starts_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = _Processes(monkeypatch)
    options = dataclasses.replace(CPU, budget_seconds=compare.LEAST_SECONDS - 1)
    assert _run(tmp_path, options).refused == "no time left"
    assert processes.ran == []


def test_a_process_is_ended_after_its_time() -> None:
    start = time.monotonic()
    assert compare._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.3) is None
    assert time.monotonic() - start < 30
    assert compare._run([sys.executable, "-c", "raise SystemExit(3)"], 30) == 3
