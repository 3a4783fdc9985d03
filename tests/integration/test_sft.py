"""Supervised fine-tuning from chats to answers: packing, evaluation, resume, generation."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig, validate_run
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.data.loader import BatchLoader
from core.errors import ConfigError
from core.optim.gradients import ReplicaGradients
from core.parallel.context import ParallelContext
from core.parallel.placement import initialize_parameters
from core.testing.chat_tokenizers import save_chat_tokenizer
from core.testing.distributed import WorkerPool
from core.testing.parity import assert_close, gather_regions
from core.training.datasets import make_datasets
from core.training.staged_model import StagedModel
from core.training.trainer import Trainer
from models.generate import main as generate
from models.llama.train import llama_task

FACTS = {"red?": "rose", "blue?": "sea and sky", "green?": "grass", "white?": "snow, milk"}
MODEL = TransformerConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=64,
    vocab_size=290,
    max_position_embeddings=128,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tok`, `chats.jsonl` and `held.jsonl`."""
    root = tmp_path_factory.mktemp("sft")
    # Words of its own for every colour and thing, and for what the template says.
    texts = ["user assistant", *(f"{q} {a}" for q, a in FACTS.items())]
    save_chat_tokenizer(root / "tok", texts=texts)
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in FACTS.items()
    ]
    chats = [{"messages": turn} for turn in [*turns, turns[0] + turns[1], turns[2] + turns[3]]]
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (root / "held.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats[:4]))
    return root


def _run(
    folder: Path, data: dict[str, Any] | None = None, dtype: Any = "fp64", **train: Any
) -> RunConfig[TransformerConfig]:
    options: dict[str, Any] = {"global_batch_size": 2, "gc_interval": 0, **train}
    save = options.pop("save", None)
    config = RunConfig(
        model=MODEL,
        tokenizer=str(folder / "tok"),
        save=None if save is None else str(save),
        device="cpu",
        precision=PrecisionConfig(dtype=dtype),
        optimizer=OptimizerConfig(lr=1e-2),
        data=DataConfig(
            sft=(str(folder / "chats.jsonl"),), seq_length=96, num_workers=0, **(data or {})
        ),
        train=TrainConfig(**options),
    )
    validate_run(config)
    return config


def _epoch(folder: Path, packing: bool, tp: int, sp: bool) -> dict[str, Tensor]:
    """Loss and gradients of all chats once."""
    parallel = ParallelConfig(tp=tp, sequence_parallel=sp)
    ctx = ParallelContext.create(parallel, torch.device("cpu"))
    config = _run(folder, {"sft_packing": packing})
    config = dataclasses.replace(config, parallel=parallel)
    task = llama_task(config)
    dataset = make_datasets(task, dataclasses.replace(config, train=TrainConfig(steps=1)))[0]
    assert dataset is not None
    rows: int = dataset.order["rows"]  # of one epoch
    assert rows < 6 if packing else rows == 6
    loader = BatchLoader(dataset, dp_rank=0, dp_size=1, microbatch_size=1)
    batches = loader.fetch(0, rows)
    model = StagedModel(task, config, ctx, torch.float64)
    initialize_parameters(model.data_parallel.parameters, seed=1)
    count = sum(task.count(batch)["lm"] for batch in batches)
    weight = torch.tensor(1.0 / count, dtype=torch.float64)
    sums = model.train(batches, {"lm": weight}, 0, 0)
    parallel_state = model.data_parallel
    parallel_state.finish()
    ReplicaGradients(
        parallel_state.regions, parallel_state.counted, model.sharing, ctx
    ).reduce_partial()
    found = gather_regions(parallel_state, ctx)
    return {**found, "loss": sums["loss/lm"], "count": torch.tensor(float(count))}


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, True)])
def test_packed_chats_count_as_padded_ones(
    pool: WorkerPool, folder: Path, tp: int, sp: bool
) -> None:
    apart = _epoch(folder, False, 1, False)
    args = (folder, True, tp, sp)
    packed = _epoch(*args) if tp == 1 else pool.run(_epoch, tp, *args)[0]
    assert packed.keys() == apart.keys()
    assert packed["count"] == apart["count"]
    for name, expected in apart.items():
        assert_close(packed[name], expected, 1e-9, name)


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: d.local.clone() for name, d in trainer.state.parameters.items()}


def _fit(config: RunConfig[TransformerConfig]) -> Trainer:
    trainer = Trainer(llama_task(config), config, ParallelContext.single())
    trainer.fit()
    return trainer


def test_a_resumed_run_goes_on_with_the_same_chats(folder: Path, tmp_path: Path) -> None:
    whole = _fit(_run(folder, steps=6))
    _fit(_run(folder, steps=6, save=tmp_path / "run", exit_at_step=4))
    resumed = _fit(_run(folder, steps=6, save=tmp_path / "run"))
    assert resumed.state.position.consumed_samples == 12
    for name, weight in _weights(whole).items():
        assert torch.equal(weight, _weights(resumed)[name]), name
    changed = _run(folder, {"sft_packing": False}, steps=8, save=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"would read other samples .* rows is 6, and was"):
        _fit(changed)


def test_a_tiny_model_learns_its_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"sft_valid": (str(folder / "held.jsonl"),)}
    config = _run(
        folder, held, "fp32", steps=70, save=tmp_path / "run", eval_interval=70, eval_steps=1
    )
    trainer = Trainer(llama_task(config), config, ParallelContext.single())
    before = trainer.evaluate()
    trainer.fit()
    after = trainer.evaluate()
    assert before is not None
    assert after is not None
    assert before["loss"] > 5.0
    assert after["loss"] < 0.05
    capsys.readouterr()
    prompts = ["--prompt", *FACTS, "--chat", "--max-tokens", "24"]
    generate(["--model", str(tmp_path / "run"), *prompts])
    assert capsys.readouterr().out.splitlines() == list(FACTS.values())
