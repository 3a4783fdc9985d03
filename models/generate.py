"""Generate text with any decoder: `python -m models.generate --model FOLDER --prompt 'Once'`.

FOLDER is a Hugging Face folder, or a checkpoint of a training run (its newest step). With
`--parallel.tp 2` the command starts its processes itself, unless torchrun has. The text appears on
standard output as it comes, the speed on standard error.
"""

import os
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from core.config.generation import GenerationConfig, validate_generation
from core.config.loading import exit_on_user_error, one_sentence
from core.errors import ConfigError

# torch is imported where it is used: it takes seconds, and --help needs none.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from converters.rules import Family
    from core.data.tokenizers import Tokenizer
    from core.parallel.context import ParallelContext
    from core.parallel.sharding import DeclaredParameter


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the process axes."""

    tp: int = 1
    """Tensor parallel size: that many processes share each layer."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generate text with a model of any family that has a next token."""

    model: str
    """Hugging Face folder, or a checkpoint: the folder of a training run or one of its steps."""
    prompt: tuple[str, ...]
    """Texts to go on from, as one batch."""
    chat: bool = False
    """Each prompt is a user's message, put into the tokenizer's chat template; only the answer is
    printed."""
    tokenizer: str | None = None
    """Tokenizer; by default the one that belongs to the model."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format; auto: bf16 on a GPU, else fp32."""
    parallel: Layout = field(default_factory=Layout)
    """Layout over processes."""
    options: Annotated[GenerationConfig, tyro.conf.arg(name="")] = field(
        default_factory=GenerationConfig
    )
    """How tokens are chosen."""


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights are not read yet."""

    family: "Family"
    config: Any
    """The model config."""
    assets: Path
    """Folder in which its tokenizer and generation_config.json are, if there are any."""
    hf_config: Mapping[str, Any]
    """Its config.json, or that of the model it was made of; empty if there is none."""
    tokenizer: str | None
    """The tokenizer that the model was trained with, as far as it is known."""
    fill: "Callable[[dict[str, DeclaredParameter]], object]"
    """Reads a rank's boxes of the weights, on any layout."""


def open_model(path: Path) -> OpenedModel:
    """Open a Hugging Face folder or a checkpoint by what it says of itself.

    Raises:
        ConfigError: it is neither.
        ConversionError, CheckpointError: it cannot be read, or is of no known family.
    """
    from core.checkpoint.assets import ASSETS_NAME
    from core.checkpoint.reader import open_checkpoint

    if (path / "config.json").is_file():
        from converters.source import load_into, open_source

        source = open_source(path)
        return OpenedModel(
            source.family,
            source.config,
            path,
            source.folder.config,
            str(path) if _has_tokenizer(path) else None,
            lambda parameters: load_into(parameters, source),
        )
    if not path.is_dir():
        raise ConfigError(
            f"--model {path} is no folder: name a Hugging Face folder (`hf download NAME "
            "--local-dir FOLDER` makes one) or the --save folder of a training run"
        )
    from converters.native import config_from_json, family_of
    from core.checkpoint.index import saved_parameters
    from core.training.saved_state import load_parameters

    reader = open_checkpoint(path)
    family = family_of(reader)
    reader.check_assets()
    assets = reader.path / ASSETS_NAME
    used = tomllib.loads(reader.sections.get("run") or "").get("tokenizer")
    return OpenedModel(
        family,
        config_from_json(family.config_class, reader.sections["config"]),
        assets,
        (reader.sections.get("source") or {}).get("config") or {},
        str(assets) if _has_tokenizer(assets) else used,
        lambda parameters: load_parameters(reader, saved_parameters(parameters)),
    )


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*.json")) or (folder / "tokenizer.model").is_file()


def build_model(opened: OpenedModel, ctx: "ParallelContext", dtype: "torch.dtype") -> "nn.Module":
    """This rank's part of the model, its weights read, in evaluation mode.

    Raises:
        ConfigError: the model cannot be cut over tp.
        ConversionError, CheckpointError: weights that do not fit, or are damaged.
    """
    from core.parallel.placement import Placement
    from core.parallel.sharding import declared_parameters

    model = opened.family.build_model(opened.config, Placement(ctx, dtype, ctx.device))
    opened.fill(declared_parameters(model))
    return model.eval()


def end_tokens(
    opened: OpenedModel, tokenizer: "Tokenizer", *, chat: bool = False
) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, those of generation_config.json, or of config.json
    where there is no such file, and in a chat that which the template puts after an answer (base
    models are often tuned with one that their tokenizer does not end texts with).
    """
    from converters.hf_io import read_json

    ends = {tokenizer.eos, *(tokenizer.chat_ends() if chat else ())}
    file = opened.assets / "generation_config.json"
    named = (read_json(file) if file.is_file() else opened.hf_config).get("eos_token_id")
    ends.update(named if isinstance(named, list) else [named])
    return frozenset(end for end in ends if end is not None)


@dataclass(frozen=True)
class _Job:
    """All that can be checked before a weight is read."""

    opened: OpenedModel
    tokenizer: "Tokenizer"
    prompts: list[list[int]]


def _prepare(config: GenerateConfig) -> _Job:
    from converters.native import declared_on_rank
    from core.data.tokenizers import load_tokenizer
    from core.generation.loop import check_lengths

    validate_generation(config.options)
    tp = config.parallel.tp
    if tp < 1:
        raise ConfigError(f"--parallel.tp is {tp}: it must be at least 1")
    started = os.environ.get("WORLD_SIZE", str(tp))
    if started != str(tp):
        raise ConfigError(
            f"--parallel.tp is {tp}, and torchrun started {started} processes: start as many, or "
            "leave torchrun out, which this command starts itself"
        )
    opened = open_model(Path(config.model))
    if tp > 1:
        declared_on_rank(opened.family, opened.config, tp, 0)  # which fails if it cannot be cut
    name = config.tokenizer or opened.tokenizer
    if name is None:
        raise ConfigError(f"{config.model} has no tokenizer with it: name one with --tokenizer")
    tokenizer = load_tokenizer(name)
    prompts = [
        tokenizer.chat_prompt([{"role": "user", "content": text}])
        if config.chat
        else tokenizer.encode_prompt(text)
        for text in config.prompt
    ]
    positions = getattr(opened.config, "max_position_embeddings", None)
    if positions is None:
        raise ConfigError(
            f"{config.model} is of the family {opened.family.name}, which generates no text: name "
            "a decoder"
        )
    check_lengths(prompts, config.options.max_tokens, positions)
    worst = max(token for prompt in prompts for token in prompt)
    if worst >= opened.config.vocab_size:
        raise ConfigError(
            f"the tokenizer {name} gives token {worst}, but the model has a vocabulary of "
            f"{opened.config.vocab_size}: name the model's own with --tokenizer"
        )
    return _Job(opened, tokenizer, prompts)


def run(config: GenerateConfig) -> None:
    """Generate in this process, or as one of torchrun's.

    Raises:
        TesseraError: a model, tokenizer, prompt or option that cannot be used.
    """
    import torch
    import torch.distributed as dist

    from converters.native import FORMATS
    from core.config.parallel import ParallelConfig
    from core.generation.loop import GenerativeModel, generate
    from core.generation.text import Printer, TextStream
    from core.parallel.context import ParallelContext
    from core.parallel.rendezvous import init_distributed

    job = _prepare(config)
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = init_distributed("cuda" if cuda else "cpu")
    ctx = ParallelContext.create(ParallelConfig(tp=config.parallel.tp, dp=1), device)
    name = config.dtype if config.dtype != "auto" else ("bf16" if cuda else "fp32")
    model = build_model(job.opened, ctx, FORMATS[name])
    if not isinstance(model, GenerativeModel):
        raise ConfigError(f"the family {job.opened.family.name} generates no text")
    ends = end_tokens(job.opened, job.tokenizer, chat=config.chat)
    steps = generate(model, job.prompts, config.options, tp=ctx.tp, device=device, ends=ends)
    with open(os.devnull, "w") as nowhere:
        out = nowhere if ctx.world.rank else sys.stdout
        streams = [TextStream(job.tokenizer, prompt) for prompt in job.prompts]
        headings = [""] * len(streams) if config.chat else config.prompt
        printer = Printer(out, streams, headings)
        count, begin, first = 0, time.perf_counter(), 0.0
        for tokens in steps:
            first = first or time.perf_counter() - begin
            count += sum(token is not None for token in tokens)
            printer.add(tokens, ends)
        printer.finish()
    seconds = time.perf_counter() - begin
    if ctx.world.rank == 0:
        print(
            f"{count} tokens in {seconds:.2f} s: {count / seconds:,.1f} tokens/s (the first after "
            f"{first:.2f} s)",
            file=sys.stderr,
        )
    if dist.is_initialized():
        dist.destroy_process_group()


def _start_processes(config: GenerateConfig, argv: Sequence[str]) -> None:
    """Replace this process by torchrun, which runs the same command tp times."""
    _prepare(config)  # a mistake is told once, and at once
    sys.stdout.flush()
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    processes = f"--nproc-per-node={config.parallel.tp}"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = [sys.executable, *launcher, processes, "-m", "models.generate", *argv]
    os.execv(sys.executable, arguments)


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Generate by a command line.

    Args:
        argv: arguments; by default those of the process.

    Raises:
        SystemExit: 2 for options that cannot work, 130 after Ctrl-C, 1 for any other failure.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    with one_sentence():
        config = tyro.cli(
            GenerateConfig, args=args, prog="python -m models.generate", description=__doc__
        )
    if config.parallel.tp > 1 and "WORLD_SIZE" not in os.environ:
        _start_processes(config, args)
    try:
        run(config)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
