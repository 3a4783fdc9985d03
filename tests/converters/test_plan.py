"""The mapping language on a made-up family that uses all of it: a square transposed weight
(GPT-2), qkv by head (GPT-NeoX), blocks in another order (Mamba), name variants, an optional tensor
and one that keeps its format."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from converters.native import export_checkpoint, import_checkpoint
from converters.options import ExportOptions
from converters.plan import check_disk, check_model, check_tiling, make_plan
from converters.rules import Block, Family, Ignore, Rule
from converters.source import load_into, open_source
from core.checkpoint.reader import open_checkpoint
from core.errors import ConversionError
from core.parallel.context import Axis, ParallelContext
from core.parallel.cutting import Block as Cut
from core.parallel.cutting import split_blocks, whole_copy
from core.parallel.placement import Placement
from core.parallel.random import ZEROS
from core.parallel.sharding import Box, Declaration, declare_parameter, declared_parameters

HEADS, DIM, HIDDEN, INNER, LAYERS = 4, 3, 8, 6, 2


@dataclass(frozen=True)
class ToyConfig:
    layers: int = LAYERS
    extra: bool = False


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig, place: Placement) -> None:
        super().__init__()
        heads, inner = Cut(HEADS, DIM), Cut(INNER)
        self._cut("square", place, [Cut(HIDDEN)], (HIDDEN,))
        self._cut("qkv", place, [heads] * 3, (HIDDEN,))
        self._cut("qkv_bias", place, [heads] * 3, ())
        self._cut("mixer", place, [inner, inner], (HIDDEN,))
        self._cut("decay", place, [inner], ())
        if config.extra:
            self._whole("extra", place, (5,))

    def _cut(self, name: str, place: Placement, blocks: list[Cut], other: tuple[int, ...]) -> None:
        tp = place.ctx.tp
        rows, copies = split_blocks(blocks, tp.rank, tp.size, other=other)
        shape = (sum(block.rows for block in blocks), *other)
        declare_parameter(
            self,
            name,
            (rows, *other),
            Declaration(shape, copies, ZEROS),
            dtype=place.dtype,
            device=place.device,
        )

    def _whole(self, name: str, place: Placement, shape: tuple[int, ...]) -> None:
        declaration = Declaration(shape, whole_copy(shape), ZEROS)
        declare_parameter(self, name, shape, declaration, dtype=place.dtype, device=place.device)


def build(config: ToyConfig, place: Placement) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(ToyLayer(config, place) for _ in range(config.layers))
    return model


def neox(what: str) -> tuple[Block, ...]:
    name = f"h.{{layer}}.query_key_value.{what}"
    return tuple(Block(name, "heads", "dim", f"start{i}", "pitch") for i in range(3))


TOY = Family(
    name="toy",
    architectures=("ToyForCausalLM",),
    rules=(
        Rule(
            native="layers.{layer}.square",
            blocks=(Block("h.{layer}.c_proj.weight", "hidden"),),
            other=("hidden",),
            transposed=True,
        ),
        Rule(native="layers.{layer}.qkv", blocks=neox("weight"), other=("hidden",)),
        Rule(native="layers.{layer}.qkv_bias", blocks=neox("bias")),
        Rule(
            native="layers.{layer}.mixer",  # native x then z, on disk z then x
            blocks=(
                Block("h.{layer}.in_proj.weight", "inner", start="inner"),
                Block("h.{layer}.in_proj.weight", "inner"),
            ),
            other=("hidden",),
        ),
        Rule(
            native="layers.{layer}.decay",
            blocks=(Block(("h.{layer}.A_log", "h.{layer}.mixer.A_log"), "inner"),),
            keep_float32=True,
        ),
        Rule(native="layers.{layer}.extra", blocks=(Block("h.{layer}.extra", 5),), optional=True),
    ),
    ignore=(Ignore(r"h\.\d+\.attn\.bias", "a causal mask"),),
    sizes=lambda config: {
        "layer": config.layers,
        "hidden": HIDDEN,
        "heads": HEADS,
        "dim": DIM,
        "inner": INNER,
        "pitch": 3 * DIM,
        "start0": 0,
        "start1": DIM,
        "start2": 2 * DIM,
    },
    to_native=lambda entries: ToyConfig(entries["layers"], entries.get("extra", False)),
    to_hf=lambda config, name: {"architectures": [name], **dataclasses.asdict(config)},
    config_class=ToyConfig,
    canonical=lambda config: config,
    incidental=(),
    build_model=build,
)


def tensors(variant: str = "h.{}.A_log", extra: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    found: dict[str, Tensor] = {}
    for i in range(LAYERS):
        shapes = {
            f"h.{i}.c_proj.weight": (HIDDEN, HIDDEN),
            f"h.{i}.query_key_value.weight": (3 * HEADS * DIM, HIDDEN),
            f"h.{i}.query_key_value.bias": (3 * HEADS * DIM,),
            f"h.{i}.in_proj.weight": (2 * INNER, HIDDEN),
            variant.format(i): (INNER,),
        }
        if extra:
            shapes[f"h.{i}.extra"] = (5,)
        found |= {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return found


def folder(path: Path, content: Mapping[str, Tensor], **entries: Any) -> Path:
    path.mkdir()
    save_file(dict(content), path / "model.safetensors")
    config = {"architectures": ["ToyForCausalLM"], "layers": LAYERS, **entries}
    (path / "config.json").write_text(json.dumps(config))
    return path


def expected(content: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The native tensors of a layer, written down without boxes."""
    qkv = content[f"h.{layer}.query_key_value.weight"].view(HEADS, 3, DIM, HIDDEN)
    bias = content[f"h.{layer}.query_key_value.bias"].view(HEADS, 3, DIM)
    z, x = content[f"h.{layer}.in_proj.weight"].chunk(2)
    return {
        "square": content[f"h.{layer}.c_proj.weight"].t(),
        "qkv": qkv.transpose(0, 1).reshape(-1, HIDDEN),
        "qkv_bias": bias.transpose(0, 1).reshape(-1),
        "mixer": torch.cat([x, z]),
        "decay": content[f"h.{layer}.A_log"],
    }


@pytest.mark.parametrize("tp", [1, 2])
def test_toy_family_lands_where_it_should_and_returns(tmp_path: Path, tp: int) -> None:
    content = tensors()
    source = folder(tmp_path / "hf", content)
    reader = open_checkpoint(import_checkpoint(source, tmp_path / "native", tp, TOY))
    assert len(reader.index.files) == tp
    for layer in range(LAYERS):
        for name, value in expected(content, layer).items():
            out = torch.empty_like(value).contiguous()
            whole = reader.tensors[f"model/layers.{layer}.{name}"]
            reader.read_box(f"model/layers.{layer}.{name}", Box.whole(whole.shape), out)
            assert torch.equal(out, value), name
    export_checkpoint(tmp_path / "native", tmp_path / "back", family=TOY)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == content.keys()
    assert all(torch.equal(back[name], content[name]) for name in content)


def test_live_ranks_hold_their_part(tmp_path: Path) -> None:
    content = tensors()
    source = open_source(folder(tmp_path / "hf", content), TOY)
    for rank in range(2):
        axis = Axis("tp", 2, rank, (0, 1), None)
        ctx = replace(ParallelContext.single(), tp=axis)
        model = build(ToyConfig(), Placement(ctx, torch.float64, torch.device("cpu")))
        load_into(declared_parameters(model), source, ToyConfig())
        for layer in range(LAYERS):
            whole = expected(content, layer)
            for name, blocks in {"square": 1, "qkv": 3, "qkv_bias": 3, "mixer": 2}.items():
                parts = [block.chunk(2)[rank] for block in whole[name].chunk(blocks)]
                held = model.get_parameter(f"layers.{layer}.{name}")
                assert torch.equal(held, torch.cat(parts).double()), name


def test_the_variant_on_disk_is_read_and_written_again(tmp_path: Path) -> None:
    content = tensors("h.{}.mixer.A_log")
    import_checkpoint(folder(tmp_path / "hf", content), tmp_path / "native", 1, TOY)
    export_checkpoint(tmp_path / "native", tmp_path / "back", family=TOY)
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == content.keys()


def test_an_optional_tensor_is_there_or_not(tmp_path: Path) -> None:
    content = tensors(extra=True)
    source = folder(tmp_path / "with", content, extra=True)
    import_checkpoint(source, tmp_path / "native", 1, TOY)
    export_checkpoint(tmp_path / "native", tmp_path / "back", family=TOY)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(back["h.1.extra"], content["h.1.extra"])
    # The model wants it, the disk lacks it: nothing would fill the parameter.
    lacking = folder(tmp_path / "without", tensors(), extra=True)
    with pytest.raises(ConversionError, match=r"layers\.0\.extra"):
        import_checkpoint(lacking, tmp_path / "none", 1, TOY)
    assert not (tmp_path / "none").exists()


def test_another_format_spares_float32_islands(tmp_path: Path) -> None:
    content = tensors()
    import_checkpoint(folder(tmp_path / "hf", content), tmp_path / "native", 1, TOY)
    export_checkpoint(
        tmp_path / "native", tmp_path / "back", ExportOptions(dtype="bf16"), family=TOY
    )
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(back["h.0.A_log"], content["h.0.A_log"])
    square = content["h.0.c_proj.weight"]
    assert torch.equal(back["h.0.c_proj.weight"], square.bfloat16())


def shapes_on_disk() -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors().items()}


def test_ignored_tensors_come_with_their_reason() -> None:
    disk = {**shapes_on_disk(), "h.1.attn.bias": (1, 1, 9, 9)}
    plan = make_plan(TOY, ToyConfig(), disk)
    assert check_disk(plan, TOY, ToyConfig(), disk) == {"h.1.attn.bias": "a causal mask"}


def test_tensors_that_do_not_fit_are_named() -> None:
    disk = shapes_on_disk()
    del disk["h.1.c_proj.weight"]
    disk["h.2.c_proj.weight"] = (HIDDEN, HIDDEN)
    disk["h.0.in_proj.weight"] = (2 * INNER + 1, HIDDEN)
    plan = make_plan(TOY, ToyConfig(), disk)
    with pytest.raises(ConversionError) as caught:
        check_disk(plan, TOY, ToyConfig(), disk)
    for part in (
        "missing: h.1.c_proj.weight",
        "not part of the model: h.2.c_proj.weight",
        "h.0.in_proj.weight is [13, 8] and must be [12, 8]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "blocks",
    [
        (Block("w", 3), Block("w", 3, start=4)),  # a hole in the Hugging Face tensor
        (Block("w", 3), Block("w", 3, start=2)),  # a row taken twice
    ],
)
def test_a_table_with_holes_or_overlaps_is_refused(blocks: tuple[Block, ...]) -> None:
    family = replace(TOY, rules=(Rule(native="w", blocks=blocks, other=(2,)),))
    with pytest.raises(ConversionError, match="the table covers"):
        check_tiling(make_plan(family, ToyConfig()))


def test_a_model_without_a_place_for_a_tensor_is_refused() -> None:
    plan = make_plan(TOY, ToyConfig(), shapes_on_disk())
    place = Placement(ParallelContext.single(), torch.float32, torch.device("meta"))
    check_model(plan, declared_parameters(build(ToyConfig(), place)))
    fewer = declared_parameters(build(ToyConfig(layers=1), place))
    check_model(plan, fewer, whole=False)
    with pytest.raises(ConversionError, match=r"h\.1\.c_proj\.weight"):
        check_model(plan, fewer)
    other = make_plan(replace(TOY, sizes=lambda c: {**TOY.sizes(c), "inner": 4}), ToyConfig())
    with pytest.raises(ConversionError, match=r"layers\.0\.mixer is \[12, 8\]"):
        check_model(other, fewer, whole=False)
