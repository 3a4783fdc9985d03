"""Hugging Face's model in two training loops: the one that its users run, and one as fast as the
parts of the model allow.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.contestants.registry import BETAS, CLIP, EPSILON, LEARNING_RATE, WEIGHT_DECAY
from benchmarks.contestants.weights import conversion_of, initial_weights
from benchmarks.train_step import random_tokens
from benchmarks.workloads import Workload
from converters.plan import make_plan
from core.config.transformer import TransformerConfig

_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""In order of preference: what torch itself chooses on an H100 or H200. It is said here because one
`sdpa_kernel(..., set_priority=True)` elsewhere in the process leaves it with an order in which
cuDNN comes last (torch sets its own at the first call, which may be inside such a context).
"""


class HuggingFace:
    """The loop that its users run: fp32 parameters under autocast to bf16, torch's attention,
    gradients added up by autograd, fused AdamW. Its Trainer does the same with `bf16=True`.
    """

    def __init__(
        self,
        work: Workload,
        config: TransformerConfig,
        device: torch.device,
        *,
        compiled: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build from this project's initial weights.

        Args:
            work: shapes.
            config: architecture.
            device: where to run.
            compiled: pass the model through torch.compile.
            dtype: of the parameters.
        """
        self._work, self._vocabulary, self._device = work, config.vocab_size, device
        self._number = 0
        self.model = build_model(work.preset, config, device, dtype)
        if compiled:
            self._compile(config)
        self._trained = self._parameters_to_train()
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self._trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in self._trained if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPSILON,
            fused=True,
        )

    def step(self) -> Tensor:
        """Run the next step; returns its mean loss."""
        total = torch.zeros((), device=self._device)
        with sdpa_kernel(_ATTENTION, set_priority=True):
            for i in range(self._work.microbatches):
                loss = self._forward(*self._microbatch(i)).loss
                loss.backward()
                total += loss.detach()
        nn.utils.clip_grad_norm_(self._trained, CLIP)
        self._optimizer.step()
        self._after_update()
        self._number += 1
        return total

    def token_losses(self) -> Tensor:
        """Losses of the first microbatch."""
        inputs, labels = self._microbatch(0)
        with sdpa_kernel(_ATTENTION, set_priority=True):
            logits = self._forward(inputs, labels).logits.detach()
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="none"
        )
        return losses.view_as(labels)

    def _compile(self, config: TransformerConfig) -> None:
        self.model.compile()

    def _parameters_to_train(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return list(self.model.parameters())

    def _after_update(self) -> None:
        self._optimizer.zero_grad()

    def _forward(self, inputs: Tensor, labels: Tensor) -> Any:
        with torch.autocast(self._device.type, torch.bfloat16):
            return self._model(inputs, labels)

    def _model(self, inputs: Tensor, labels: Tensor) -> Any:
        return self.model(
            input_ids=inputs,
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=self._work.tokens,
            use_cache=False,
        )

    def _microbatch(self, number: int) -> tuple[Tensor, Tensor]:
        shape = (self._work.micro_batch_size, self._work.seq_length + 1)
        place = (self._number, number, 0)
        tokens = random_tokens(shape, self._vocabulary, self._device, *place)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class TunedHuggingFace(HuggingFace):
    """As fast as the parts of its model allow: bf16 parameters with fp32 masters beside them,
    layers and loss compiled one by one, gradients added to fp32 sums as soon as they are there, so
    that no bf16 sum is kept over microbatches.
    """

    def __init__(self, work: Workload, config: TransformerConfig, device: torch.device) -> None:
        """Build from this project's initial weights; arguments as of `HuggingFace`."""
        super().__init__(work, config, device, compiled=True, dtype=torch.bfloat16)

    def _compile(self, config: TransformerConfig) -> None:
        for layer in _layers(self.model, config.num_layers):
            layer.compile()
        self.model.loss_function = torch.compile(self.model.loss_function)

    def _parameters_to_train(self) -> list[nn.Parameter]:
        self._parameters = list(self.model.parameters())
        masters = [nn.Parameter(p.detach().float()) for p in self._parameters]
        self._gradients = [torch.zeros_like(master) for master in masters]
        for parameter, master, total in zip(
            self._parameters, masters, self._gradients, strict=True
        ):
            master.grad = total
            parameter.register_post_accumulate_grad_hook(_adder(total))
        return masters

    def _after_update(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, tuple(self._trained))
            torch._foreach_zero_(self._gradients)

    def _forward(self, inputs: Tensor, labels: Tensor) -> Any:
        return self._model(inputs, labels)


def build_model(
    preset: str, config: TransformerConfig, device: torch.device, dtype: torch.dtype
) -> Any:
    """The model of transformers for an architecture, with this project's initial weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = conversion_of(preset)
    entries = family.to_hf(config, family.architectures[0])
    hf_config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="sdpa")
    weights = initial_weights(family, config, device)
    parameters = dict(model.named_parameters())
    plan = make_plan(family, config, parameters)
    if set(parameters) != set(plan.by_hf):
        raise ValueError(
            f"parameters of {type(model).__name__} and of the table of {family.name} differ: "
            f"{sorted(set(parameters) ^ set(plan.by_hf))}"
        )
    with torch.no_grad():
        for name, copies in plan.by_hf.items():
            for copy in copies:
                part = weights[copy.native][copy.native_box.slices]
                parameters[name][copy.hf_box.slices].copy_(copy.oriented(part))
    return model.train()


def _layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The layers of a model of transformers, wherever its class has them."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    (layers,) = [one for one in lists if len(one) == count]
    return layers


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's gradient into an fp32 sum."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add
