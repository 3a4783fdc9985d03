import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from core.config.transformer import TransformerConfig
from core.layers.attention import CoreAttention, SelfAttention, SelfAttentionSubmodules
from core.layers.cross_attention import CrossAttention, CrossAttentionSubmodules
from core.layers.forward_info import ForwardInfo
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.norm import RMSNorm
from core.layers.rotary import RotaryEmbedding
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey
from core.parallel.sharding import declared_parameters
from core.spec import ModuleSpec
from core.testing.layouts import randomize

CPU = torch.device("cpu")
PLACE = Placement(ParallelContext.single(), torch.float64, CPU)
COLUMN, ROW = ModuleSpec(ColumnParallelLinear), ModuleSpec(RowParallelLinear)
NORM: ModuleSpec[nn.Module] = ModuleSpec(RMSNorm)
S, B, H, D = 7, 2, 24, 8
CONFIG = TransformerConfig(
    num_layers=2,
    hidden_size=H,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=D,
    ffn_hidden_size=20,
    vocab_size=67,
    max_position_embeddings=64,
    qkv_bias=True,
    attention_output_bias=True,
    norm_epsilon=1e-4,
)


def _x(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _self_attention(**changes: Any) -> SelfAttention:
    module = SelfAttention(
        dataclasses.replace(CONFIG, **changes),
        PLACE,
        name="layer",
        submodules=SelfAttentionSubmodules(
            COLUMN, ModuleSpec(CoreAttention), ROW, q_norm=NORM, k_norm=NORM
        ),
    )
    randomize(declared_parameters(module))
    return module


def test_self_attention_is_hugging_faces() -> None:
    """Qwen3's has everything: grouped heads, norms of heads before rotary embedding, biases."""
    module = _self_attention()
    config = Qwen3Config(
        hidden_size=H,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=D,
        attention_bias=True,
        rms_norm_eps=1e-4,
        attn_implementation="eager",
    )
    theirs = Qwen3Attention(config, layer_idx=0).double()
    sizes = [4 * D, 2 * D, 2 * D]
    bias, output_bias = module.linear_qkv.bias, module.output_bias
    assert bias is not None
    assert output_bias is not None
    state = {f"{n}_norm.weight": getattr(module, f"{n}_norm").weight for n in "qk"}
    state |= {"o_proj.weight": module.linear_proj.weight, "o_proj.bias": output_bias}
    rows, biases = module.linear_qkv.weight.split(sizes), bias.split(sizes)
    for letter, weight, b in zip("qkv", rows, biases, strict=True):
        state |= {f"{letter}_proj.weight": weight, f"{letter}_proj.bias": b}
    theirs.load_state_dict(state)

    x = _x(S, B, H)
    cos, sin = RotaryEmbedding(CONFIG.rope, D)(S, CPU)
    mask = torch.full((S, S), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x.transpose(0, 1), (cos.double()[None], sin.double()[None]), mask)[0]
    out = module(x, ForwardInfo((cos, sin))) + output_bias
    # Hugging Face computes the softmax in fp32 whatever the format.
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_cross_attention() -> None:
    submodules = CrossAttentionSubmodules(COLUMN, COLUMN, ModuleSpec(CoreAttention), ROW)
    module = CrossAttention(CONFIG, PLACE, name="layer", submodules=submodules)
    randomize(declared_parameters(module))
    x, encoded = _x(S, B, H), _x(5, B, H, seed=1)
    q = F.linear(x, module.linear_q.weight, module.linear_q.bias)
    k, v = F.linear(encoded, module.linear_kv.weight, module.linear_kv.bias).chunk(2, -1)
    q, k, v = (y.unflatten(-1, (-1, D)).permute(1, 2, 0, 3) for y in (q, k, v))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    mixed = ((q @ k.transpose(2, 3)) * D**-0.5).softmax(-1) @ v
    expected = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), module.linear_proj.weight)
    out = module(x, ForwardInfo(encoded=encoded))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("given", "used"), [(None, D**-0.5), (0.25, 0.25)])
def test_scale(given: float | None, used: float) -> None:
    pattern = _self_attention(attention_scale=given).core_attention.pattern
    assert pattern.scale == pytest.approx(used, rel=1e-15)


def test_dropout_is_for_training_alone() -> None:
    x, key = _x(S, B, H), DropoutKey(1, 2, 3)
    dropping, plain = _self_attention(attention_dropout=0.5), _self_attention()
    assert torch.equal(dropping(x, ForwardInfo()), plain(x, ForwardInfo()))
    assert torch.equal(plain(x, ForwardInfo(key=key)), plain(x, ForwardInfo()))
    dropped = dropping(x, ForwardInfo(key=key))
    assert not torch.allclose(dropped, plain(x, ForwardInfo()))
    assert torch.equal(dropped, dropping(x, ForwardInfo(key=key)))
