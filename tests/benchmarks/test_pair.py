"""The parity gate, on contestants that run here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.contestants.hugging_face as hugging_face
from benchmarks.contestants.registry import ENTRIES, entry, unavailable, with_option
from benchmarks.contestants.weights import initial_weights
from benchmarks.pair import Pair, measure, parity
from benchmarks.records import Outcome, Timed
from core.config.precision import PrecisionConfig
from core.errors import ConfigError

PAIR = Pair(
    work="tiny", contestants=("ours", "hf-eager"), rounds=2, steps=1, warmup=3, device="cpu"
)


def _run(pair: Pair) -> Outcome:
    outcome = Outcome(pair.work, pair.contestants)
    measure(pair, outcome)
    return outcome


def test_ours_and_hugging_face_compute_the_same_and_are_timed_in_turns(tmp_path: Path) -> None:
    outcome = _run(PAIR)
    assert not outcome.refused
    ours, peer = outcome.timed
    assert len(ours.blocks) == len(peer.blocks) == 2
    assert ours.losses[-1] != ours.losses[0]
    # And each alone against the other's record, as where both do not fit.
    record = tmp_path / "first.json"
    record.write_text(json.dumps(dataclasses.asdict(outcome)))
    again = _run(dataclasses.replace(PAIR, contestants=("ours",), beside=record, rounds=1))
    assert not again.refused
    assert again.timed[0].losses == ours.losses


@pytest.mark.full
@pytest.mark.parametrize("name", ["hf-compile", "hf-tuned"])
def test_hugging_face_compiled_computes_the_same(name: str) -> None:
    outcome = _run(dataclasses.replace(PAIR, contestants=("hf-eager", name), rounds=1))
    assert not outcome.refused
    eager, compiled = (timed.losses for timed in outcome.timed)
    assert compiled == pytest.approx(eager, abs=2e-3)


def test_exchanged_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(*args: Any) -> dict[str, Tensor]:
        found = initial_weights(*args)
        name = "decoder.layers.0.mlp.linear_fc1.weight"
        gate, up = found[name].chunk(2)
        return {**found, name: torch.cat([up, gate])}

    monkeypatch.setattr(hugging_face, "initial_weights", exchanged)
    outcome = _run(PAIR)
    assert "standard deviations apart" in outcome.refused
    assert outcome.timed[0].blocks == []


def _timed(name: str, *losses: float, token: float = 0.0) -> Timed:
    return Timed(name, losses=list(losses), token_losses=[5.0, 6.0 + token, 7.0])


def test_losses_apart_are_refused() -> None:
    ours = _timed("ours", 5.0, 4.9, 4.8)
    assert not parity(ours, _timed("megatron", 5.004, 4.9, 4.8))
    assert "step 2" in parity(ours, _timed("megatron", 5.0, 4.9, 4.81))
    assert "step 1" in parity(ours, _timed("megatron", 5.0, float("nan"), 4.8))
    assert "tokens" in parity(ours, _timed("megatron", 5.0, 4.9, 4.8, token=0.2))
    # FP8 follows other updates, yet starts from the same loss.
    quantised = "megatron-fp8-delayed"
    assert not parity(ours, _timed(quantised, 5.0, 4.9, 4.81, token=0.2))
    assert "step 0" in parity(ours, _timed(quantised, 5.01, 4.9, 4.8))
    assert "step 1" in parity(ours, _timed(quantised, 5.0, 5.1, 4.8))


def test_contestants_are_known_by_name() -> None:
    assert {unavailable(name) for name in ("ours", "hf-eager", "hf-compile", "hf-tuned")} == {None}
    assert all(isinstance(unavailable(name), str | None) for name in ENTRIES)
    with pytest.raises(ConfigError, match="perhaps you meant megatron"):
        entry("megatrn")
    with pytest.raises(ConfigError, match="has no option colour"):
        with_option(PrecisionConfig(), "colour", "red")
