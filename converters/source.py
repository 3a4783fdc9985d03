"""A Hugging Face folder as the source of a model: opened, understood, checked, and read straight
into live parameters of any layout.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.hf_config import differing_fields
from converters.hf_io import HFFolder, tokenizer_length
from converters.plan import Plan, check_disk, check_model, check_tiling, make_plan
from converters.rules import Family, architecture_of
from core.errors import ConversionError, about
from core.parallel.sharding import Box, DeclaredParameter
from models import registry


def family_named(name: str) -> Family:
    """The conversion table of a folder under `models`."""
    family: Family = registry.family(name).load("convert").FAMILY
    return family


@dataclass(frozen=True)
class Source:
    """An opened folder whose tensors are known to fill a model exactly."""

    folder: HFFolder
    architecture: str
    family: Family
    config: Any
    """The model config."""
    plan: Plan
    ignored: Mapping[str, str]
    """Tensors on disk that are left out, with the reason."""

    def dtype(self, native: str) -> torch.dtype:
        """Number format of a native tensor: that of the tensors it is made of."""
        return self.folder.dtype(self.plan.by_native[native][0].hf)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are used."""
        return sum(
            math.prod(shape) * self.folder.dtype(name).itemsize
            for name, shape in self.plan.hf_shapes.items()
        )

    def remembered(self) -> dict[str, Any]:
        """What a checkpoint keeps of the source (its section `source`), for a faithful export.

        `assets` is the folder that the checkpoint's `hf/` is copied from
        (`core.checkpoint.assets`).
        """
        return {
            "family": self.family.name,
            "config": self.folder.config,
            "tensors": list(self.plan.hf_shapes),
            "assets": str(self.folder.path.resolve()),
        }


def open_source(path: Path, family: Family | None = None) -> Source:
    """Open a Hugging Face folder and check it against its family's table, from headers alone
    (embedding and head are compared where both are there and config.json calls them tied).

    Args:
        path: the folder.
        family: the table; by default that of the architecture in config.json.

    Raises:
        ConversionError: the folder cannot be read, is of another or no known family, is quantised,
            or its tensors do not fill the model exactly.
        ConfigError: config.json describes no possible model.
    """
    with about(path):
        return _understand(HFFolder(path), family)


def _understand(folder: HFFolder, family: Family | None) -> Source:
    architecture = architecture_of(folder.config)
    if family is None:
        family = family_named(registry.family_for_architecture(architecture).name)
    if architecture not in family.architectures:
        raise ConversionError(
            f"{architecture} is not of the family {family.name}, which has "
            f"{', '.join(family.architectures)}: take weights of these, or use "
            "`python -m converters`, which picks the family"
        )
    if folder.config.get("quantization_config"):
        raise ConversionError(
            "its weights are quantised (quantization_config in config.json): take the original ones"
        )
    config = _decide_tie(folder, family, _native_config(family, folder.config))
    plan = make_plan(family, config, folder.shapes)
    check_tiling(plan)
    ignored = check_disk(plan, family, config, folder.shapes)
    for native, copies in plan.by_native.items():
        first = copies[0].hf
        other = next((c.hf for c in copies if folder.dtype(c.hf) != folder.dtype(first)), None)
        if other is not None:
            raise ConversionError(
                f"{first} is {folder.dtype(first)} and {other} is {folder.dtype(other)}, but both "
                f"become part of {native}: cast one of them"
            )
    return Source(folder, architecture, family, config, plan, ignored)


def _native_config(family: Family, hf_config: Mapping[str, Any]) -> Any:
    try:
        return family.to_native(hf_config)
    except TypeError as reason:  # text for a number, a number for a list: JSON has no schema
        raise ConversionError(
            f"config.json has a value of another kind than its model takes ({reason}): correct it"
        ) from reason


def _decide_tie(folder: HFFolder, family: Family, config: Any) -> Any:
    """Whether embedding and head are one is seen in the tensors: two different ones are never
    tied, whatever config.json says.
    """
    head = family.head
    if head is None or not getattr(config, head.field):
        return config
    tables = [name for name in head.embedding if name in folder.shapes]
    heads = [name for name in head.output if name in folder.shapes]
    if tables and heads and not folder.same_bits(tables[0], heads[0]):
        return dataclasses.replace(config, **{head.field: False})
    return config


def check_tokenizer(folder: Path, family: Family, config: Any) -> None:
    """Check that every token of a folder's tokenizer, if it has one, has a row in the embedding.

    Raises:
        ConversionError: the tokenizer cannot be read, or is larger than the vocabulary.
    """
    length = tokenizer_length(folder)
    vocabulary = family.sizes(config).get("vocab")
    if length is not None and vocabulary is not None and length > vocabulary:
        raise ConversionError(
            f"the tokenizer in {folder} has {length} tokens and the model a vocabulary "
            f"of {vocabulary}: take the tokenizer that belongs to the model"
        )


def read_box(source: Source, native: str, box: Box) -> Tensor:
    """A box of a native tensor in the source's format: a view of a file where it lies in one
    piece, else a new tensor.
    """
    parts = list(source.plan.parts(native, box))
    if len(parts) == 1:
        copy, part = parts[0]
        return copy.oriented(source.folder.read(copy.hf, copy.hf_part(part)))
    out = torch.empty(box.shape, dtype=source.dtype(native))
    _fill(source, native, box, out)
    return out


def _fill(source: Source, native: str, box: Box, out: Tensor) -> None:
    for copy, part in source.plan.parts(native, box):
        view = source.folder.read(copy.hf, copy.hf_part(part))
        out[part.relative_to(box).slices].copy_(copy.oriented(view))


@torch.no_grad()
def load_into(
    parameters: Mapping[str, DeclaredParameter], source: Source, config: Any | None = None
) -> dict[str, Any]:
    """Fill a rank's live parameters from the folder, in their own format and on their device.

    Reads this rank's boxes only (columns of a row-parallel weight pass through the page cache
    whole); beside the parameters, one slice is in memory. No communication.

    Args:
        parameters: of the model as this rank has it.
        source: the opened folder.
        config: the model's config, compared with the source's. Without it this rank must have some
            of every parameter, which a pipeline stage has not.

    Returns:
        What a checkpoint should remember of the source.

    Raises:
        ConversionError: the model is another one than the source describes.
    """
    if config is not None:
        family = source.family
        found = differing_fields(
            family.canonical(config), family.canonical(source.config), family.incidental
        )
        if found:
            raise ConversionError(
                f"the model and {source.folder.path} differ in {'; '.join(found[:4])}: choose the "
                "preset that belongs to the weights"
            )
    check_model(source.plan, parameters, whole=config is None)
    for name, declared in parameters.items():
        data = declared.local
        for copy in declared.sharding.copies:
            _fill(source, name, copy.global_, data[copy.local.slices])
    return source.remembered()
