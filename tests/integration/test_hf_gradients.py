"""Loss and every gradient against those of `transformers`: logits prove the forward pass alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from converters.source import load_into, open_source
from core.config.data import DataConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.data.loader import Batch
from core.parallel.context import ParallelContext
from core.testing.hf_models import save_hf_model, tiny_hf_model
from core.testing.parity import assert_close, gather_regions
from core.training.staged_model import StagedModel
from models.gpt.train import gpt_task
from models.llama.train import llama_task

TEXT = 24
TASKS = {"gpt": gpt_task, "llama": llama_task}
TOLERANCE = 1e-5
"""transformers computes norms and frequencies in fp32."""


@pytest.mark.parametrize("variant", ["gpt2", "neox", "llama3", "qwen3"])
def test_gradients_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    """In fp64, with labels that do not count; names and places by the family's table."""
    source = open_source(save_hf_model(tmp_path / "hf", variant))
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(source.config.vocab_size, (2, TEXT + 1), generator=generator)
    counted = torch.rand((2, TEXT), generator=generator) < 0.7
    tokens, labels = text[:, :-1], text[:, 1:]

    theirs = tiny_hf_model(variant).double()
    logits = theirs(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[counted], labels[counted])
    loss.backward()
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    # Saved under another name than it has in the model, in one of the classes.
    assert source.family.head is not None
    for head in source.family.head.output:
        expected[head] = theirs.get_output_embeddings().weight

    config = RunConfig(
        model=replace(source.config, attention_dropout=0.0, hidden_dropout=0.0),
        device="cpu",
        precision=PrecisionConfig(dtype="fp64"),
        data=DataConfig(synthetic=True, seq_length=TEXT),
    )
    ctx = ParallelContext.single()
    model = StagedModel(TASKS[source.family.name](config), config, ctx, torch.float64)
    load_into(model.data_parallel.parameters, source)
    batch = Batch(tokens, labels, counted, first_sample=0)
    weight = torch.tensor(1.0, dtype=torch.float64) / counted.sum()
    sums = model.train([batch], {"lm": weight}, 0, 0)
    model.data_parallel.finish()
    found = gather_regions(model.data_parallel, ctx)

    assert_close(sums["loss/lm"] * weight, loss.detach(), TOLERANCE, "loss")
    assert found.keys() == source.plan.native_shapes.keys()
    for name, copies in source.plan.by_native.items():
        for copy in copies:
            gradient = expected[copy.hf].grad
            assert gradient is not None
            theirs_here = copy.oriented(gradient[copy.hf_box.slices])
            assert_close(found[name][copy.native_box.slices], theirs_here, TOLERANCE, copy.hf)
