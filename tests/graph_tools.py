"""What tests of compiled models share: ways to change a model, and that every call equals the module's own."""

from __future__ import annotations

from typing import Any

import torch
from zoo import rand, unet

from diffusion_accel import Compiled
from diffusion_accel.compiled.engine import Engine, Graph, Target
from diffusion_accel.compiled.graphs import COUNTERS, Graphs


def of(pipe: Any) -> dict[str, float]:
    return pipe.acceleration.report().counters["compiled"]


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 1e-4) -> None:
    assert a.shape == b.shape and float((a.double() - b.double()).norm() / b.double().norm()) <= bound


def lora(model: Any) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


CHANGES = {
    "nothing": lambda unet: None,
    "in place": lambda unet: unet.conv_in.weight.data.mul_(1.5),
    "counted": lambda unet: torch.no_grad()(unet.conv_out.weight.mul_)(0.5),
    "another": lambda unet: setattr(unet.conv_in, "bias", torch.nn.Parameter(rand(16, seed=7))),
    "state": lambda unet: unet.load_state_dict({k: v * 1.01 for k, v in unet.state_dict().items()}),
    "lora": lora,
    "scale": lambda unet: [setattr(m, "scaling", {"default": 3.0}) for m in unet.modules() if hasattr(m, "scaling")],
    "fused": lambda unet: [m.merge() for m in unet.modules() if hasattr(m, "merge")],
    "no lora": lambda unet: getattr(unet, "peft_config", None) and unet.delete_adapters("default"),
    "freeu": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "sliced": lambda unet: unet.set_attention_slice(1),
}


def agrees_after_changes(feature: Compiled, steps: list[Any], bound: float) -> None:
    """Every call equals the module's own, whatever was changed before it."""
    module, found = unet(), Graphs(feature)
    had_lora = False
    for number, (change, (batch, size), dtype) in enumerate(steps):
        if change == "lora":
            change, had_lora = ("nothing" if had_lora else change), True
        had_lora &= change != "no lora"
        CHANGES[change](module)
        module.to(dtype)
        x = rand(batch, 4, size, size, seed=number).to(dtype)
        arguments = (x, torch.tensor(100 * number + 5), rand(batch, 6, 16, seed=number + 50).to(dtype))
        counters = dict.fromkeys(COUNTERS, 0.0)
        with torch.no_grad():
            found.fresh = True
            expected = module(*arguments).sample
            for _ in range(2):
                given = found.run(module, module.forward, arguments, {}, counters)
                assert type(given).__name__ == "UNet2DConditionOutput" and given.sample.dtype == dtype
                close(given.sample, expected, bound if dtype != torch.bfloat16 else 0.05)
        assert counters["graph_calls"] == (0 if dtype == torch.float64 else 2)


FROZEN_CALLS: list[str] = []


class Frozen:
    """A trace with copies of the weights: what every engine that keeps weights is, on any machine."""

    def __init__(self, flat: Any, tensors: list[torch.Tensor]) -> None:
        FROZEN_CALLS.append(type(flat.module).__name__)
        flat.eval()
        self.trace = torch.jit.freeze(torch.jit.trace(flat, tuple(tensors), strict=False, check_trace=False))

    def __call__(self, module: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self.trace(*[t.float() if t.dtype.itemsize == 2 else t for t in tensors]))


def frozen(flat: Any, tensors: list[torch.Tensor], target: Target) -> Graph:
    return Frozen(flat, [t.float() if t.dtype.itemsize == 2 else t for t in tensors])


FROZEN = Engine("frozen", frozen, machines=("cpu",), keeps_weights=True)


class CountingBackend:
    """A backend of torch.compile that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward
