import torch

from core.backends.chosen import chosen_backend
from core.backends.local import LocalSpecProvider
from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.products import PLAIN, Fp8Products
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.transformer.decoder import build_decoder

MODEL = TransformerConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=2,
    ffn_hidden_size=64,
    vocab_size=67,
    max_position_embeddings=64,
)


def test_without_fp8_the_local_backend() -> None:
    assert chosen_backend(PrecisionConfig(), 4) == LocalSpecProvider()


def test_fp8_reaches_the_linear_layers_of_a_model() -> None:
    precision = PrecisionConfig(fp8="rowwise", fp8_bf16_first_layers=1, fp8_bf16_last_layers=1)
    place = Placement(ParallelContext.single(), torch.bfloat16, torch.device("meta"))
    model = build_decoder(MODEL, place, None, chosen_backend(precision, 4))
    found = {
        name: module.plan.products
        for name, module in model.named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    }
    assert len(found) == 4 * 4
    for name, products in found.items():
        inner = ".layers.1." in name or ".layers.2." in name
        assert products == (Fp8Products(by_row=True) if inner else PLAIN), name
    assert chosen_backend(PrecisionConfig(fp8="current"), 4) == LocalSpecProvider(Fp8Products())
