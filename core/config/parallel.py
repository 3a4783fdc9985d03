"""How a run is laid out over processes, and what it recomputes."""

from dataclasses import dataclass, field
from typing import Literal

from core.errors import ConfigError

TpOverlap = Literal["none", "symmetric_memory"]
RECOMPUTE_MODULES = ("core_attention", "mlp", "norm")


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass instead of kept."""

    granularity: Literal["none", "selective", "full"] = "none"
    """none; selective: the named modules of every layer; full: whole layers."""
    method: Literal["uniform", "block"] = "uniform"
    """full only. uniform: layers in groups of `num_layers`, each group recomputed from its input;
    block: only the first `num_layers` layers of every pipeline piece, one by one."""
    num_layers: int = 1
    """full only. Layers per group (uniform) or layers recomputed (block)."""
    modules: tuple[Literal["core_attention", "mlp", "norm"], ...] = ()
    """selective only. Modules recomputed in every layer."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the process axes. Data parallelism takes what the others leave."""

    tp: int = 1
    """Tensor parallel size: neighbouring ranks share each layer."""
    pp: int = 1
    """Pipeline parallel size: stages that each hold a part of the layers."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zbv"] = "1f1b"
    """Order in which stages compute; `python -m core.pipeline show` draws them. interleaved:
    several pieces per stage, so less idle time and more messages; zb_h1, zbv: weight gradients are
    put off until a stage would be idle."""
    virtual_stages: int | None = None
    """interleaved: pieces per stage; by default 2."""
    layout: str | None = None
    """Parts of each piece, as in 'E t*3|t*3|t*2|L' (E embedding, t layer, L head and loss); by
    default such that the simulated step is short."""
    dp: int | None = None
    """Data parallel size; by default the number of processes over tp * pp."""
    cp: int = 1
    """Context parallel size. Above 1 is refused until it is built."""
    ep: int = 1
    """Expert parallel size. Above 1 is refused until it is built."""
    sequence_parallel: bool = False
    """Cut activations between tensor-parallel regions along the sequence (Korthikanti et al.,
    2022); needs tp > 1."""
    tp_overlap: TpOverlap = "none"
    """sequence_parallel: how to hide the gather before a product and the sum after it. none: not,
    other than behind weight gradients; symmetric_memory: one rank's part of the sequence is
    multiplied while the next is on its way, by torch's fused operations on GPUs that reach each
    other's memory, in bf16 and without the multicast of NVLink."""
    data_parallel: Literal["zero1", "fsdp2", "replicated"] = "zero1"
    """What data-parallel ranks share out. zero1: optimizer state (Rajbhandari et al., "ZeRO",
    2020); fsdp2: fp32 parameters and gradients too (torch's `fully_shard`), which takes the least
    memory and gathers every layer twice a microbatch; replicated: nothing."""
    bucket_mib: int = 100
    """zero1 and replicated: size of a gradient bucket, in MiB of fp32, which is what one reduction
    sums."""
    overlap_grad_reduce: bool = True
    """zero1 and replicated: start a bucket's reduction as soon as its gradients are complete, under
    the rest of the backward pass."""
    overlap_param_gather: bool = True
    """zero1: gather updated parameters under the next forward pass."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """Activation recompute."""

    def data_parallel_size(self, world_size: int) -> int:
        """The data parallel size for a number of processes.

        Raises:
            ConfigError: the axes do not multiply to `world_size`.
        """
        model = self.tp * self.pp
        if world_size % model:
            raise ConfigError(
                f"{world_size} processes cannot be divided by tp * pp = {self.tp} * {self.pp} = "
                f"{model}: start a multiple of it, or change --parallel.tp or --parallel.pp"
            )
        dp = world_size // model
        if self.dp not in (None, dp):
            raise ConfigError(
                f"--parallel.dp is {self.dp}, but {world_size} processes over tp * pp = {model} "
                f"leave {dp}: leave the option out or start {model * (self.dp or 1)} processes"
            )
        return dp


def _sizes_are_positive(config: ParallelConfig) -> None:
    for name in ("tp", "pp", "dp", "cp", "ep", "bucket_mib", "virtual_stages"):
        value = getattr(config, name)
        if value is not None and value < 1:
            option = f"--parallel.{name.replace('_', '-')}"
            raise ConfigError(f"{option} is {value}: it must be at least 1")


def _axes_are_built(config: ParallelConfig) -> None:
    for name in ("cp", "ep"):
        if getattr(config, name) > 1:
            raise ConfigError(
                f"--parallel.{name} is {getattr(config, name)}, but this axis is not built yet: "
                "set it to 1 and use --parallel.tp or more data-parallel processes"
            )


def _sequence_parallel_needs_tp(config: ParallelConfig) -> None:
    if config.sequence_parallel and config.tp == 1:
        raise ConfigError(
            "--parallel.sequence-parallel does nothing with --parallel.tp 1: raise tp or leave it "
            "out"
        )


def _tp_overlap_has_something_to_hide(config: ParallelConfig) -> None:
    if config.tp_overlap != "none" and not config.sequence_parallel:
        raise ConfigError(
            f"--parallel.tp-overlap {config.tp_overlap} does nothing without "
            "--parallel.sequence-parallel: add it, or leave the option out"
        )


def _pipeline_knobs_do_something(config: ParallelConfig) -> None:
    for name, option in (
        ("schedule", f"schedule {config.schedule}"),
        ("virtual_stages", f"virtual-stages {config.virtual_stages}"),
        ("layout", f"layout {config.layout!r}"),
    ):
        if config.pp == 1 and getattr(config, name) != getattr(ParallelConfig, name):
            raise ConfigError(
                f"--parallel.{option} does nothing with --parallel.pp 1: raise pp or leave it out"
            )


def _fsdp2_has_one_stage(config: ParallelConfig) -> None:
    if config.data_parallel == "fsdp2" and config.pp > 1:
        raise ConfigError(
            "--parallel.data-parallel fsdp2 gathers every layer in every microbatch, of which "
            f"--parallel.pp {config.pp} needs many: use zero1, or set pp to 1"
        )


def _data_parallel_knobs_do_something(config: ParallelConfig) -> None:
    bucketed = ("zero1", "replicated")
    for name, option, modes in (
        ("bucket_mib", f"bucket-mib {config.bucket_mib}", bucketed),
        ("overlap_grad_reduce", "no-overlap-grad-reduce", bucketed),
        ("overlap_param_gather", "no-overlap-param-gather", ("zero1",)),
    ):
        is_default = getattr(config, name) == getattr(ParallelConfig, name)
        if config.data_parallel not in modes and not is_default:
            raise ConfigError(
                f"--parallel.{option} does nothing with --parallel.data-parallel "
                f"{config.data_parallel}: leave it out"
            )


def _recompute_knobs_do_something(config: ParallelConfig) -> None:
    recompute = config.recompute
    if recompute.granularity == "selective" and not recompute.modules:
        raise ConfigError(
            "--parallel.recompute.granularity selective needs --parallel.recompute.modules, some "
            f"of {', '.join(RECOMPUTE_MODULES)}"
        )
    if recompute.granularity != "selective" and recompute.modules:
        raise ConfigError(
            f"--parallel.recompute.modules {' '.join(recompute.modules)} does nothing with "
            f"granularity {recompute.granularity}: set it to selective"
        )
    if recompute.granularity != "full" and (recompute.num_layers, recompute.method) != (
        1,
        "uniform",
    ):
        raise ConfigError(
            "--parallel.recompute.num-layers and .method do nothing with granularity "
            f"{recompute.granularity}: set "
            "it to full"
        )
    if recompute.num_layers < 1:
        raise ConfigError(
            f"--parallel.recompute.num-layers is {recompute.num_layers}: it must be at least 1"
        )


PARALLEL_RULES = (
    _sizes_are_positive,
    _fsdp2_has_one_stage,
    _axes_are_built,
    _sequence_parallel_needs_tp,
    _tp_overlap_has_something_to_hide,
    _pipeline_knobs_do_something,
    _data_parallel_knobs_do_something,
    _recompute_knobs_do_something,
)


def validate_parallel(config: ParallelConfig) -> None:
    """Apply every rule.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for rule in PARALLEL_RULES:
        rule(config)
