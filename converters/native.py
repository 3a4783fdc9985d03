"""Hugging Face folders to native checkpoints and back, a tensor at a time, without a process group
or a GPU.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from converters.hf_config import differing_fields, merge_config, set_dtype
from converters.hf_io import (
    OutputTensor,
    read_json,
    refuse_non_empty,
    write_json,
    write_weights,
    written_aside,
)
from converters.options import ExportOptions, Format
from converters.plan import Plan, check_model, make_plan
from converters.rules import Family, architecture_of
from converters.source import Source, check_tokenizer, family_named, open_source, read_box
from core.checkpoint.assets import ASSETS_NAME, copy_assets
from core.checkpoint.index import SavedTensor, model_key
from core.checkpoint.reader import CheckpointReader, open_checkpoint
from core.checkpoint.writer import write_checkpoint
from core.errors import ConfigError, ConversionError, about
from core.parallel.context import Axis, ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import BoxCopy, DeclaredParameter, declared_parameters

FORMATS: Mapping[Format, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)


def declared_on_rank(
    family: Family, config: Any, tp: int, rank: int
) -> dict[str, DeclaredParameter]:
    """What a tensor-parallel rank would hold, from a model without memory.

    Raises:
        ConfigError: the architecture cannot be cut over `tp`.
    """
    single = ParallelContext.single()
    axis = Axis("tp", tp, rank, tuple(range(tp)), None)
    ctx = dataclasses.replace(single, tp=axis, model=axis, world=axis)
    place = Placement(ctx, torch.float32, torch.device("meta"))
    return declared_parameters(family.build_model(config, place))


def check_source(path: Path, tp: int, family: Family | None = None) -> Source:
    """Everything that can be known of an import before a byte moves.

    Raises:
        TesseraError: it would fail.
    """
    source = open_source(path, family)
    check_tokenizer(path, source.family, source.config)
    with about(path):
        for rank in range(tp):
            check_model(source.plan, declared_on_rank(source.family, source.config, tp, rank))
    return source


def import_checkpoint(path: Path, out: Path, tp: int = 1, family: Family | None = None) -> Path:
    """Turn a Hugging Face folder into a native checkpoint of step 0.

    Peak anonymous memory is a constant and one box. Checkpoints load at any layout, so `tp` only
    decides into how many files and boxes this one is cut.

    Args:
        path: Hugging Face folder.
        out: save directory to make.
        tp: tensor parallel size.
        family: the table; by default that of the architecture.

    Returns:
        The step directory.

    Raises:
        TesseraError: bad input, an output that is not empty, a disk that refuses; nothing is left
            behind.
    """
    refuse_non_empty(out)
    source = check_source(path, tp, family)
    shards = [_meta_tensors(source, tp, rank) for rank in range(tp)]
    sections = {
        "family": source.family.name,
        "config": source.config,
        # Its assets lie in the checkpoint itself.
        "source": {key: v for key, v in source.remembered().items() if key != "assets"},
    }
    natives = {model_key(name): name for name in source.plan.native_shapes}
    with written_aside(out) as aside, _progress("import", source.nbytes) as bar:

        def fetch(saved: SavedTensor, copy: BoxCopy) -> Tensor:
            box = read_box(source, natives[saved.name], copy.global_)
            bar.update(box.numel() * box.element_size())
            return box

        step = write_checkpoint(aside, 0, shards, sections, fetch, assets=path)
    return out / step.name


def _meta_tensors(source: Source, tp: int, rank: int) -> list[SavedTensor]:
    return [
        SavedTensor(
            model_key(name),
            declared.sharding.global_shape,
            declared.sharding.copies,
            torch.empty(declared.parameter.shape, dtype=source.dtype(name), device="meta"),
        )
        for name, declared in declared_on_rank(source.family, source.config, tp, rank).items()
    ]


@contextmanager
def _progress(what: str, nbytes: int) -> "Iterator[tqdm[Any]]":
    with tqdm(desc=what, total=nbytes, unit="B", unit_scale=True, disable=None) as bar:
        yield bar


def export_checkpoint(
    path: Path, out: Path, options: ExportOptions | None = None, family: Family | None = None
) -> Path:
    """Turn a native checkpoint of any layout into a folder that `transformers` loads.

    Peak anonymous memory is a constant and one tensor.

    Args:
        path: step directory, or save directory, of which the newest step is taken.
        out: folder to make.
        options: format, sizes, tokenizer.
        family: the table; by default the checkpoint's.

    Raises:
        TesseraError: the checkpoint is damaged or of another family, no Hugging Face class can say
            its architecture, the output is not empty, a disk that refuses; nothing is left behind.
    """
    options = options or ExportOptions()
    if options.tokenizer is not None and not options.tokenizer.is_dir():
        raise ConversionError(f"--tokenizer {options.tokenizer} is not a folder")
    if not 0 < options.shard_gb < math.inf:
        raise ConfigError(f"--shard-gb is {options.shard_gb}: it must be finite and above 0")
    refuse_non_empty(out)
    reader = open_checkpoint(path)
    family = family or family_of(reader)
    config = config_from_json(family.config_class, reader.sections["config"])
    tokenizer = options.tokenizer or reader.path / ASSETS_NAME
    check_tokenizer(tokenizer, family, config)
    remembered = reader.sections.get("source") or {}
    names = remembered.get("tensors")
    plan = make_plan(family, config, None if names is None else frozenset(names))
    _check_tensors(plan, reader)
    hf_config = _hf_config(family, config, remembered.get("config"))
    if not remembered:
        hf_config |= _special_tokens(tokenizer)
    tensors = _output_tensors(plan, reader, options.dtype)
    formats = {tensor.dtype for tensor in tensors}
    if len(formats) == 1:
        set_dtype(hf_config, str(formats.pop()).removeprefix("torch."))
    with written_aside(out) as aside, _progress("export", sum(t.nbytes for t in tensors)) as bar:

        def fetch(tensor: OutputTensor) -> Tensor:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            for copy in plan.by_hf[tensor.name]:
                part = copy.oriented(whole[copy.hf_box.slices])
                reader.read_box(model_key(copy.native), copy.native_box, part, convert=True)
            bar.update(tensor.nbytes)
            return whole

        write_weights(aside, tensors, fetch, int(options.shard_gb * 1e9))
        write_json(aside / "config.json", hf_config)
        reader.check_assets()
        copy_assets(reader.path / ASSETS_NAME, aside)
        if options.tokenizer is not None:
            copy_assets(options.tokenizer, aside)
        open_source(aside, family)
    return out


def family_of(reader: CheckpointReader) -> Family:
    """The conversion table of a checkpoint's model family.

    Raises:
        ConversionError: the checkpoint names none, or one that is not known.
    """
    name = reader.sections.get("family")
    if not isinstance(name, str):
        raise ConversionError(
            f"{reader.path} does not say of which model family it is: use "
            "`python -m models.FAMILY.convert export`"
        )
    return family_named(name)


def _check_tensors(plan: Plan, reader: CheckpointReader) -> None:
    for name, shape in plan.native_shapes.items():
        record = reader.tensors.get(model_key(name))
        if record is None or record.shape != shape:
            found = "is missing" if record is None else f"has shape {list(record.shape)}"
            raise ConversionError(
                f"{reader.path}: {name} {found} where its config asks for {list(shape)}: it is not "
                "a checkpoint of this family"
            )
    prefix = model_key("")
    for name in reader.tensors:
        if name.startswith(prefix) and name.removeprefix(prefix) not in plan.native_shapes:
            raise ConversionError(
                f"{reader.path} holds {name}, which the family's table does not know: it would be "
                "lost"
            )


def _output_tensors(
    plan: Plan, reader: CheckpointReader, dtype: Format | None
) -> list[OutputTensor]:
    tensors = []
    for name, shape in sorted(plan.hf_shapes.items(), key=lambda item: _by_layer(item[0])):
        stored = reader.tensors[model_key(plan.by_hf[name][0].native)].dtype
        cast = dtype is not None and name not in plan.keep_float32
        tensors.append(OutputTensor(name, FORMATS[dtype] if dtype and cast else stored, shape))
    return tensors


def _by_layer(name: str) -> list[int | str]:
    """Sorts layer 2 before layer 10, so that a layer's tensors lie together."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _hf_config(family: Family, config: Any, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json: the source's with what changed, or a new one of the first class that can say
    the whole architecture.

    Raises:
        ConversionError: what was written would be read as another architecture.
    """
    own = family.canonical(config)
    names = family.architectures if source is None else (architecture_of(source),)
    reasons = []
    for name in names:
        try:
            entries = family.to_hf(config, name)
            if source is not None:
                before = family.to_hf(family.to_native(source), name)
                entries = merge_config(source, before, entries)
            lost = differing_fields(own, family.to_native(entries), family.incidental)
        except ConversionError as reason:
            lost = [str(reason)]
        if not lost:
            return entries
        reasons.append(f"{name} cannot say {lost[0]}")
    raise ConversionError(
        f"the family {family.name} has no Hugging Face class for this architecture "
        f"({'; '.join(reasons)})"
    )


def _special_tokens(tokenizer: Path) -> dict[str, int | None]:
    """Ids of the tokens that begin, end and pad a text. Written even where there are none, since
    the classes' defaults belong to other tokenizers.
    """
    found: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    settings_file, tokenizer_file, pieces_file = (
        tokenizer / name for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    )
    if pieces_file.is_file() and not tokenizer_file.is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(pieces_file))
        ids = zip(found, (pieces.bos_id(), pieces.eos_id(), pieces.pad_id()), strict=True)
        return {key: id if id >= 0 else None for key, id in ids}
    if not (settings_file.is_file() and tokenizer_file.is_file()):
        return found
    from tokenizers import Tokenizer

    settings, encoder = read_json(settings_file), Tokenizer.from_file(str(tokenizer_file))
    for key in found:
        token = settings.get(key.removesuffix("_id"))
        content = token.get("content") if isinstance(token, dict) else token
        found[key] = encoder.token_to_id(content) if isinstance(content, str) else None
    return found


def config_from_json(kind: type[Any], content: Any) -> Any:
    """A config dataclass from the JSON that a checkpoint keeps of it.

    Raises:
        ConversionError: a field that the dataclass does not have, or one that it needs.
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in content.items():
        if name not in hints:
            raise ConversionError(
                f"the checkpoint's config has {name}, which {kind.__name__} does not: use the "
                "version of Tessera that wrote it"
            )
        if dataclasses.is_dataclass(hints[name]):
            value = config_from_json(typing.cast(type[Any], hints[name]), value)
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except TypeError as reason:
        raise ConversionError(f"the checkpoint's config is incomplete: {reason}") from None


def describe(source: Source) -> str:
    """What `check` prints of a source that fills its model."""
    numel = sum(math.prod(shape) for shape in source.plan.hf_shapes.values())
    lines = [
        f"{source.architecture} of the family {source.family.name}: {numel:,} parameters, "
        f"{source.nbytes / 1e9:,.3f} GB in {len(source.plan.hf_shapes)} tensors fill the model "
        "exactly"
    ]
    lines += [f"left out: {name} ({reason})" for name, reason in source.ignored.items()]
    return "\n".join(lines)
