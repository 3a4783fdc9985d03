import dataclasses

import pytest
import torch

from benchmarks.gemm_ceiling import ceiling, products
from benchmarks.workloads import WORKLOADS, Workload


@pytest.mark.parametrize("work", WORKLOADS.values(), ids=str)
def test_products_are_all_of_the_models_gemms(work: Workload) -> None:
    config = work.config()
    # Attention grows with the sequence, products do not.
    one, two = (config.flops_per_token(s, causal=True) for s in (1024, 2048))
    flops = sum(6 * p.outputs * p.inputs * p.count for p in products(config))
    assert flops == pytest.approx(2 * one - two)


def test_the_ceiling_lies_between_its_parts() -> None:
    work = dataclasses.replace(WORKLOADS["tiny"], seq_length=8)
    whole, parts = ceiling(work, work.config(), torch.device("cpu"), seconds=0.001)
    assert len(parts) == 15
    assert min(parts.values()) <= whole <= max(parts.values())
