"""Predicted memory against what is really kept, counted storage by storage."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import core.kernels.elementwise
import core.layers.attention
import core.layers.dropout
import core.layers.linear
import core.layers.mlp
import core.layers.norm
from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.data.loader import Batch
from core.layers.forward_info import ForwardInfo
from core.layers.products import Factor
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.pipeline.costs import language_model_parts
from core.pipeline.layout import balanced
from core.pipeline.memory import (
    Kept,
    Microbatch,
    language_model_kept,
    predict_peak,
    state_bytes,
)
from core.pipeline.schedules import SCHEDULES, make_schedule, stage_map_for
from core.pipeline.stage_map import StageMap
from core.testing.distributed import WorkerPool
from core.training.staged_model import StagedModel
from core.training.trainer import DTYPES
from core.transformer.language_model import LanguageModel
from models.llama.config import PRESETS
from models.llama.train import llama_task

MODEL = TransformerConfig(
    num_layers=6,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=96,
    vocab_size=256,
    max_position_embeddings=256,
)
CPU = torch.device("cpu")
SEQUENCE, MICROBATCHES = 64, 8
MICROBATCH = Microbatch(seq_length=SEQUENCE, dtype="fp32")
COMPILED = (
    (core.kernels.elementwise, "plain_rms_norm"),
    (core.kernels.elementwise, "plain_layer_norm"),
    (core.kernels.elementwise, "plain_rotary"),
    (core.kernels.elementwise, "plain_mlp_activation"),
    (core.kernels.elementwise, "add_bias"),
    (core.layers.dropout, "add_bias"),
)


class Ledger:
    """Counts the storages that autograd and deferred products keep alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()
        self.peak = 0

    def note(self, tensor: Tensor) -> None:
        """Count a tensor from now on until nothing holds it."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._before:
            self._known[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, self.now)

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count this one: it is there in any case."""
        self._before.add(StorageWeakRef(tensor.untyped_storage()).cdata)

    @property
    def now(self) -> int:
        """Bytes alive."""
        self._known = {k: v for k, v in self._known.items() if not v[0].expired()}
        return sum(size for _, size in self._known.values())


@cache
def _as_compiled(module: Any, name: str) -> Callable[..., Any]:
    """The function cut into forward and backward pass as it is on CUDA, but not compiled."""
    return torch.compile(getattr(module, name).__wrapped__, backend="aot_eager_decomp_partition")


@contextmanager
def counted(model: StagedModel) -> Iterator[Ledger]:
    """Count what the model's passes keep."""
    ledger = Ledger()
    for declared in model.data_parallel.parameters.values():
        ledger.leave_out(declared.parameter)
    for chunk in model.chunks:
        assert isinstance(chunk, LanguageModel)
        assert chunk.rotary is not None
        for table in chunk.rotary(SEQUENCE, CPU):
            ledger.leave_out(table)
    later = core.layers.linear._later

    def noted_later(plan: Any, weight: Any, dy: Factor, x: Factor) -> Callable[[], None]:
        for tensor in dy.by_token:
            ledger.note(tensor)
        return later(plan, weight, dy, x)

    def pack(tensor: Tensor) -> Tensor:
        ledger.note(tensor)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        for module, name in COMPILED:
            patch.setattr(module, name, _as_compiled(module, name))
        patch.setattr(core.layers.linear, "_later", noted_later)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield ledger


def _built(
    model: TransformerConfig, parallel: ParallelConfig, ctx: ParallelContext
) -> tuple[StagedModel, list[Batch]]:
    config = RunConfig(
        model=model,
        parallel=parallel,
        data=DataConfig(synthetic=True, seq_length=SEQUENCE),
        train=TrainConfig(steps=1),
    )
    staged = StagedModel(llama_task(config), config, ctx, torch.float32)
    tokens = torch.arange(SEQUENCE + 1)[None] % model.vocab_size
    mask = torch.ones(1, SEQUENCE, dtype=torch.bool)
    batches = [
        Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone(), mask, i) for i in range(MICROBATCHES)
    ]
    return staged, batches


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization": "layernorm", "gated_mlp": False, "qk_norm": "rmsnorm"},
        {"num_query_groups": None, "mlp_bias": True, "qkv_bias": True},
    ],
    ids=str,
)
def test_a_layer_keeps_what_is_predicted(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(MODEL, **changes)
    staged, _ = _built(config, ParallelConfig(), ParallelContext.single())
    (model,) = staged.chunks
    assert isinstance(model, LanguageModel)
    assert model.rotary is not None
    with counted(staged) as ledger:
        info = ForwardInfo(model.rotary(SEQUENCE, CPU), None)
        hidden = torch.randn(SEQUENCE, 1, config.hidden_size, requires_grad=True)
        out = model.decoder.layers["1"](hidden, info)
        _, layer, *_ = language_model_kept(config, MICROBATCH)
        assert ledger.now == layer.activations
        with staged.data_parallel.deferred.collect() as products:
            out.sum().backward()
        del out, hidden
        # The gradient of what two branches were added to is one tensor for both.
        shared = MICROBATCH.hidden_bytes(config)
        assert layer.products - shared <= ledger.now <= layer.products
        assert len(products) == 4


def _peaks(parallel: ParallelConfig) -> dict[str, tuple[int, ...]]:
    """For each schedule, this stage's peak with all microbatches, with half of them, and what is
    predicted for all."""
    found = {}
    ctx = ParallelContext.create(parallel, CPU)
    for name in SCHEDULES:
        chosen: Any = name
        staged, batches = _built(MODEL, dataclasses.replace(parallel, schedule=chosen), ctx)
        peaks = []
        for number in (MICROBATCHES, MICROBATCHES // 2):
            with counted(staged) as ledger:
                for batch in batches:
                    for tensor in (batch.tokens, batch.labels, batch.loss_mask):
                        ledger.leave_out(tensor)
                staged.train(batches[:number], {"lm": torch.ones(())}, 1, 0)
            peaks.append(ledger.peak)
        # What passes only through a backward pass is not counted.
        kept = [dataclasses.replace(x, working=0) for x in language_model_kept(MODEL, MICROBATCH)]
        schedule = staged.schedule(MICROBATCHES)
        predicted = predict_peak(staged.layout, schedule, kept, [0.0] * ctx.pp.size, 0)
        found[name] = (*peaks, predicted[ctx.pp.rank].total)
    return found


def test_stages_keep_what_is_predicted(pool: WorkerPool) -> None:
    """And but for gpipe no more if there are more microbatches."""
    for found in pool.run(_peaks, 2, ParallelConfig(pp=2)):
        for name, (whole, half, predicted) in found.items():
            assert whole == pytest.approx(predicted, rel=0.05), name
            if name == "gpipe":
                assert whole == pytest.approx(2 * half, rel=0.01)
            else:
                assert whole == half


MODES: list[tuple[PrecisionConfig, Literal["zero1", "replicated"], float]] = [
    (PrecisionConfig(), "zero1", 6 + 12 / 2),
    (PrecisionConfig(), "replicated", 18),
    (PrecisionConfig(master_weights="remainder"), "zero1", 6 + 10 / 2),
    (PrecisionConfig(master_weights="remainder", moments="bf16"), "zero1", 6 + 6 / 2),
    (PrecisionConfig(dtype="fp32"), "zero1", 8 + 8 / 2),
]


def _real_state() -> list[float]:
    """Bytes per parameter of what this rank really holds."""
    found = []
    for precision, mode, _ in MODES:
        parallel = ParallelConfig(data_parallel=mode)
        ctx = ParallelContext.create(parallel, CPU)
        config = RunConfig(
            model=MODEL,
            parallel=parallel,
            precision=precision,
            data=DataConfig(synthetic=True, seq_length=SEQUENCE),
            train=TrainConfig(steps=1),
        )
        staged = StagedModel(llama_task(config), config, ctx, DTYPES[precision.dtype])
        optimizer = OptimizerStep(
            staged.data_parallel, staged.sharing, ctx, OptimizerConfig(), precision
        )
        tensors = [state.tensor for state in optimizer.state_tensors()]
        for declared in staged.data_parallel.parameters.values():
            parameter: Any = declared.parameter
            tensors += [parameter.data, parameter.main_grad]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        found.append(size / staged.sharing.elements)
    return found


def test_state_takes_what_is_predicted(pool: WorkerPool) -> None:
    found = pool.run(_real_state, 2)
    for (precision, mode, expected), *real in zip(MODES, *found, strict=True):
        assert state_bytes(precision, mode, 2).total == expected
        assert sum(real) / 2 == expected


def test_fully_sharded_state() -> None:
    assert state_bytes(PrecisionConfig(), "fsdp2", 8).total == 16 / 8
    assert state_bytes(PrecisionConfig(moments="bf16"), "fsdp2", 8).total == 12 / 8
    # One rank has nothing to share out.
    assert state_bytes(PrecisionConfig(), "fsdp2", 1).total == 18


@pytest.mark.parametrize(
    ("layers", "tp", "precision", "gib"),
    [
        (8, 1, PrecisionConfig(), 58.2),
        (8, 1, PrecisionConfig(master_weights="remainder", moments="bf16"), 42.6),
        (32, 1, PrecisionConfig(master_weights="remainder", moments="bf16"), 128.5),
        (8, 2, PrecisionConfig(), 29.3),
        (8, 4, PrecisionConfig(), 14.7),
    ],
)
def test_peaks_measured_on_a_gpu(
    layers: int, tp: int, precision: PrecisionConfig, gib: float
) -> None:
    """Llama-3-8B layers at 8192 tokens, from the records in benchmarks/results."""
    config = dataclasses.replace(PRESETS["llama3-8b"](), num_layers=layers)
    layout = balanced(language_model_parts(config, 8192), StageMap(1))
    microbatch = Microbatch(seq_length=8192, tp=tp, sequence_parallel=tp > 1)
    (count,) = layout.stage_parameters
    state = count / tp * state_bytes(precision, "replicated", 1).total
    schedule = make_schedule("1f1b", stages=1, microbatches=4)
    kept = language_model_kept(config, microbatch)
    (peak,) = predict_peak(layout, schedule, kept, [state], microbatch.hidden_bytes(config))
    assert peak.messages == 0
    assert peak.total / 2**30 == pytest.approx(gib, rel=0.01)


def test_the_working_memory_of_the_last_layers_counts() -> None:
    """What the head kept is gone when a layer before it works, unless its products wait."""
    parts = language_model_parts(dataclasses.replace(MODEL, num_layers=2), SEQUENCE)
    kept = [Kept(1, 1), Kept(10, 8, working=50), Kept(10, 8, working=5), Kept(100, 90, working=30)]
    for name, activations in (("1f1b", 121 + 30), ("zb_h1", 121 + 38)):
        layout = balanced(parts, stage_map_for(name, 1))
        schedule = make_schedule(name, stages=1, microbatches=1)
        (peak,) = predict_peak(layout, schedule, kept, [7.0], 1000)
        assert (peak.state, peak.activations, peak.messages) == (7, activations, 0)
