import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config.parallel import ParallelConfig
from core.errors import ConfigError
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block
from core.parallel.placement import Placement
from core.parallel.random import ZEROS, Init
from core.parallel.sharding import declared_parameters
from core.testing.distributed import WorkerPool
from core.testing.layouts import randomize

CPU = torch.device("cpu")
PLACE = Placement(ParallelContext.single(), torch.float64, CPU)
SOME = Init("normal", 1.0)


def _column(place: Placement = PLACE, bias: bool = True) -> ColumnParallelLinear:
    module = ColumnParallelLinear(place, 6, [Block(2, 3), Block(4)], init=SOME, bias=bias)
    randomize(declared_parameters(module))
    return module


def _parameters(module: ColumnParallelLinear | RowParallelLinear) -> tuple[Tensor, Tensor]:
    assert module.bias is not None
    return module.weight, module.bias


def test_one_process_is_a_plain_linear_layer() -> None:
    x = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    module = _column()
    leaves = (x, *_parameters(module))
    out = module(x)
    assert torch.equal(out, F.linear(*leaves))
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    theirs = torch.autograd.grad((F.linear(*leaves) * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_bias_left_to_the_caller_is_not_added() -> None:
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    for module in (
        ColumnParallelLinear(PLACE, 6, [Block(4)], init=SOME, bias=True, skip_bias_add=True),
        RowParallelLinear(PLACE, Block(6), 4, init=SOME, bias=True, skip_bias_add=True),
    ):
        randomize(declared_parameters(module))
        assert torch.equal(module(x), F.linear(x, module.weight))
        module.skip_bias_add = False
        torch.testing.assert_close(module(x), F.linear(x, *_parameters(module)))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    module = _column()
    leaves = dict(
        zip(
            ("x", "weight", "bias"),
            (torch.randn(3, 2, 6).double(), *_parameters(module)),
            strict=True,
        )
    )
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    module(leaves["x"]).sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is None] == [frozen]


def test_gradients_of_a_second_backward_add_up() -> None:
    module = _column()
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    module(x).sum().backward()
    assert module.weight.grad is not None
    once = module.weight.grad.clone()
    module(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, 2 * once)


def test_meta_device_takes_no_memory() -> None:
    module = ColumnParallelLinear(
        Placement(ParallelContext.single(), torch.bfloat16, torch.device("meta")),
        1 << 20,
        [Block(1 << 20)],
        init=ZEROS,
    )
    assert module.weight.shape == (1 << 20, 1 << 20)
    assert module.weight.dtype == torch.bfloat16


def _refused() -> list[str]:
    """What is refused over two ranks."""
    ctx = ParallelContext.create(ParallelConfig(tp=2), CPU)
    place = Placement(ctx, torch.float32, CPU)
    messages = []
    for build in (
        lambda: ColumnParallelLinear(place, 4, [Block(4), Block(3)], init=ZEROS),
        lambda: RowParallelLinear(place, Block(3, 2), 4, init=ZEROS),
        # A column may replicate fewer units than ranks; a row would count them twice.
        lambda: RowParallelLinear(place, Block(1, 2), 4, init=ZEROS),
    ):
        try:
            build()
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_units_that_do_not_divide(pool: WorkerPool) -> None:
    column, row, replicated = pool.run(_refused, 2)[0]
    assert column.startswith("3 units cannot be divided over tensor parallel size 2")
    assert row.startswith("3 input units cannot be divided over tensor parallel size 2")
    assert replicated.startswith("1 input units cannot be divided over tensor parallel size 2")
