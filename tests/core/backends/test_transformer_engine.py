import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.backends.local import LocalSpecProvider
from core.backends.provider import BackendSpecProvider
from core.backends.transformer_engine import TransformerEngineSpecProvider
from core.checkpoint.reader import open_checkpoint
from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.layers.transformer_engine import EngineOptions
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import DeclaredParameter, declared_parameters
from core.testing.backend_run import BackendRun, train_backend
from core.testing.distributed import WorkerPool
from core.testing.fake_transformer_engine import Globals, installed
from core.training.trainer import Trainer
from core.transformer.decoder import build_decoder

MODEL = TransformerConfig(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=67,
    max_position_embeddings=32,
)
RICH = dataclasses.replace(
    MODEL,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    qk_norm="rmsnorm",
    tie_embeddings=True,
)
LAYERNORM = dataclasses.replace(RICH, normalization="layernorm", gated_mlp=False, activation="gelu")
BF16 = PrecisionConfig(dtype="bf16")


@pytest.fixture
def stand_in() -> Iterator[Globals]:
    with installed() as state:
        yield state


def test_is_read_without_the_package() -> None:
    code = (
        "import sys, core.backends.transformer_engine, core.backends.chosen;"
        "sys.exit('transformer_engine' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _declared(
    config: TransformerConfig, backend: BackendSpecProvider, ctx: ParallelContext
) -> dict[str, DeclaredParameter]:
    model = build_decoder(
        config, Placement(ctx, torch.bfloat16, torch.device("meta")), backend=backend
    )
    return declared_parameters(model)


def _shown(declared: dict[str, DeclaredParameter]) -> dict[str, Any]:
    return {
        name: (d.sharding, d.init, d.weight_decay, tuple(d.local.shape), d.local.dtype)
        for name, d in declared.items()
    }


def _declarations_agree(config: TransformerConfig, parallel: ParallelConfig) -> bool:
    ctx = ParallelContext.create(parallel, torch.device("cpu"))
    with installed():
        engine = _declared(config, TransformerEngineSpecProvider(config.num_layers), ctx)
    local = _declared(config, LocalSpecProvider(), ctx)
    assert _shown(engine) == _shown(local)
    return len(local) > 10


@pytest.mark.parametrize("config", [MODEL, RICH, LAYERNORM], ids=["plain", "rich", "layernorm"])
def test_declares_what_local_declares(config: TransformerConfig) -> None:
    assert _declarations_agree(config, ParallelConfig())


def test_declares_what_local_declares_under_tp(pool: WorkerPool) -> None:
    parallel = ParallelConfig(tp=4, sequence_parallel=True)
    for config in (RICH, LAYERNORM):
        assert all(pool.run(_declarations_agree, 4, config, parallel))


def test_norms_are_fused(stand_in: Globals) -> None:
    place = Placement(ParallelContext.single(), torch.bfloat16, torch.device("meta"))
    model = build_decoder(MODEL, place, backend=TransformerEngineSpecProvider(3))
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    layer = "decoder.layers.1."
    assert kinds[f"{layer}input_norm"] == kinds[f"{layer}pre_mlp_norm"] == "IdentityOp"
    assert kinds[f"{layer}self_attention.linear_qkv"] == "EngineNormColumnParallelLinear"
    assert kinds[f"{layer}mlp.linear_fc1"] == "EngineNormColumnParallelLinear"
    assert kinds[f"{layer}mlp.linear_fc2"] == "EngineRowParallelLinear"
    assert kinds["decoder.final_norm"] == "EngineRMSNorm"


def test_first_and_last_layers_stay_in_bf16() -> None:
    provider = TransformerEngineSpecProvider(6, "current", 1, 2)
    found = [
        provider.for_layer(layer).row_parallel_linear().params["options"] for layer in range(6)
    ]
    stays = EngineOptions("none", among_fp8=True)
    assert found == [stays] + [EngineOptions("current")] * 3 + [stays] * 2


# ---- Training ------------------------------------------------------------------------------------


def _fp8(recipe: Any, **changes: Any) -> BackendRun:
    return BackendRun(
        MODEL,
        TransformerEngineSpecProvider(3, recipe, **changes),
        precision=BF16,
        steps=8,
        microbatches=2,
        std=0.1,
        lr=5e-3,
    )


@pytest.mark.parametrize(
    "recipe", ["current", "delayed", pytest.param("blockwise", marks=pytest.mark.full)]
)
def test_fp8_learns_nearly_as_bf16_does(stand_in: Globals, recipe: Any) -> None:
    plain, eight = train_backend(_fp8("none")), train_backend(_fp8(recipe))
    assert plain.losses != eight.losses
    assert eight.losses[-1] < eight.losses[0] - 0.3
    assert eight.losses == pytest.approx(plain.losses, rel=0.02)


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_recompute_takes_the_scales_of_the_forward_pass(
    stand_in: Globals, recipe: Any, granularity: Any
) -> None:
    run = dataclasses.replace(_fp8(recipe), steps=2)
    modules: Any = ("mlp",) if granularity == "selective" else ()
    recompute = RecomputeConfig(granularity=granularity, modules=modules)
    again = dataclasses.replace(run, parallel=ParallelConfig(recompute=recompute))
    expected, actual = train_backend(run), train_backend(again)
    # The second step starts from what the first one's gradients made. A recomputed pass ages the
    # history once more, as in the package, and its largest values are still there.
    assert actual.losses == expected.losses


def _train(folder: Path, backend: BackendSpecProvider, steps: int, **train: Any) -> Trainer:
    """Train up to this step, and save there."""
    run = BackendRun(MODEL, backend, precision=BF16)
    config = RunConfig(
        model=MODEL,
        save=str(folder),
        device="cpu",
        precision=BF16,
        optimizer=OptimizerConfig(lr=0.01),
        data=DataConfig(synthetic=True, seq_length=16, num_workers=0),
        train=TrainConfig(
            steps=9, exit_at_step=steps, global_batch_size=4, micro_batch_size=2, **train
        ),
    )
    trainer = Trainer(run.task(), config, ParallelContext.single())
    trainer.fit()
    return trainer


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a step starts from."""
    found = {n: d.local.clone() for n, d in trainer.state.parameters.items()}
    for state in trainer.optimizer.state_tensors():
        found[f"{state.name}/{state.fragment.name}"] = state.tensor.clone()
    for saved in trainer.state.modules.tensors:
        found[saved.name] = saved.tensor.clone()
    return found


def _assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


DELAYED = TransformerEngineSpecProvider(3, "delayed")


def test_a_resumed_run_with_delayed_scaling_is_bit_equal(stand_in: Globals, tmp_path: Path) -> None:
    whole = _state(_train(tmp_path / "whole", DELAYED, 4))
    _train(tmp_path / "parts", DELAYED, 2)
    _assert_equal(_state(_train(tmp_path / "parts", DELAYED, 4)), whole)
    scaling = [name for name in whole if name.startswith("module/")]
    assert len(scaling) == 3 * 4 * 4  # layers, linear layers, tensors
    assert all(whole[name].any() for name in scaling if "amax_history_fwd" in name)


def test_without_its_scales_it_would_not_be(
    stand_in: Globals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _state(_train(tmp_path / "whole", DELAYED, 4))
    _train(tmp_path / "parts", DELAYED, 2)
    monkeypatch.setattr("core.training.saved_state.ModuleState.load", lambda self, reader: None)
    parts = _state(_train(tmp_path / "parts", DELAYED, 4))
    assert any(not torch.equal(parts[name], whole[name]) for name in whole)


def test_a_run_may_change_its_backend(
    stand_in: Globals, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """local, Transformer Engine with delayed scaling, local, from checkpoint to checkpoint."""
    local, dropped = LocalSpecProvider(), "the scales of FP8 begin anew"
    first = _train(tmp_path, local, 2)
    assert not first.state.modules.tensors
    assert dropped not in caplog.text
    names = {n for n in open_checkpoint(tmp_path).tensors if not n.startswith("module/")}
    _train(tmp_path, DELAYED, 4)
    assert dropped in caplog.text  # there were none
    caplog.clear()
    assert {n for n in open_checkpoint(tmp_path).tensors if not n.startswith("module/")} == names
    before = _state(_train(tmp_path, DELAYED, 4))
    assert dropped not in caplog.text
    last = _train(tmp_path, local, 4)  # only loads
    assert dropped in caplog.text
    after = _state(last)
    _assert_equal(after, {n: x for n, x in before.items() if not n.startswith("module/")})
    assert _train(tmp_path, local, 5).state.position.step == 5


def _scaled_run(folder: Path, parallel: ParallelConfig, steps: int) -> list[Any]:
    """Names, shapes and sums of the scaling state that this rank holds."""
    run = BackendRun(MODEL, DELAYED, parallel, BF16)
    ctx = ParallelContext.create(parallel, torch.device("cpu"))
    config = RunConfig(
        model=MODEL,
        save=str(folder),
        device="cpu",
        precision=BF16,
        parallel=parallel,
        data=DataConfig(synthetic=True, seq_length=16, num_workers=0),
        train=TrainConfig(steps=9, exit_at_step=steps, global_batch_size=4, micro_batch_size=2),
    )
    with installed():
        trainer = Trainer(run.task(), config, ctx)
        trainer.fit()
    return [
        (saved.name, saved.global_shape, saved.tensor.double().sum().item())
        for saved in trainer.state.modules.tensors
    ]


def test_every_rank_saves_its_own_scales(pool: WorkerPool, tmp_path: Path) -> None:
    two = ParallelConfig(dp=2)
    saved = pool.run(_scaled_run, 2, tmp_path, two, 2)
    assert saved[0] != saved[1]  # other data
    assert pool.run(_scaled_run, 2, tmp_path, two, 2) == saved
    # At another layout they begin anew; nothing else is refused.
    other = pool.run(_scaled_run, 1, tmp_path, ParallelConfig(), 2)[0]
    assert [name for name, _, _ in other] == [name for name, _, _ in saved[0]]
    scales = [value for name, _, value in other if "amax_history" in name]
    assert scales == [0.0] * len(scales)


def test_a_module_that_keeps_nothing_saves_nothing(stand_in: Globals) -> None:
    from core.training.saved_state import ModuleState

    place = Placement(ParallelContext.single(), torch.bfloat16, torch.device("cpu"))
    for fp8 in ("none", "current"):
        model: nn.Module = build_decoder(
            MODEL,
            place,
            backend=TransformerEngineSpecProvider(3, fp8),
        )
        assert ModuleState([model], place.ctx).tensors == []
