import importlib.util

import pytest
import torch

from core.backends.chosen import chosen_backend
from core.backends.local import LocalSpecProvider
from core.backends.transformer_engine import TransformerEngineSpecProvider
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.errors import ConfigError
from core.layers.fp8_products import Fp8Products
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.products import PLAIN
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.testing.fake_transformer_engine import installed
from core.transformer.decoder import build_decoder

MODEL = TransformerConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=2,
    ffn_hidden_size=64,
    vocab_size=67,
    max_position_embeddings=64,
)


def test_fp8_reaches_the_linear_layers_of_a_model() -> None:
    precision = PrecisionConfig(fp8="rowwise", fp8_bf16_first_layers=1, fp8_bf16_last_layers=1)
    place = Placement(ParallelContext.single(), torch.bfloat16, torch.device("meta"))
    backend = chosen_backend("local", precision, ParallelConfig(), 4)
    model = build_decoder(MODEL, place, None, backend)
    found = {
        name: module.plan.products
        for name, module in model.named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    }
    assert len(found) == 4 * 4
    for name, products in found.items():
        inner = ".layers.1." in name or ".layers.2." in name
        assert products == (Fp8Products(by_row=True) if inner else PLAIN), name
    current = chosen_backend("local", PrecisionConfig(fp8="current"), ParallelConfig(), 4)
    assert current == LocalSpecProvider(Fp8Products())


def test_local_needs_nothing() -> None:
    assert chosen_backend("local", PrecisionConfig(), ParallelConfig(), 4) == LocalSpecProvider()


def test_transformer_engine_gets_what_concerns_it() -> None:
    precision = PrecisionConfig(fp8="delayed", fp8_bf16_first_layers=1, fp8_bf16_last_layers=2)
    with installed():
        for schedule, splits in (("1f1b", False), ("zb_h1", True), ("zbv", True)):
            parallel = ParallelConfig(pp=2, schedule=schedule)  # type: ignore[arg-type]
            assert chosen_backend(
                "transformer_engine", precision, parallel, 8
            ) == TransformerEngineSpecProvider(8, "delayed", 1, 2, split_backward=splits)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="it is installed"
)
def test_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"not installed: `pip install 'tessera-zoo\[te\]'`"):
        chosen_backend("transformer_engine", PrecisionConfig(), ParallelConfig(), 4)
