"""What each process of a world does; `test_patch_parallel.py` runs these functions. A case gets (rank, size)."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import bare
import torch
import torch.distributed as dist
import zoo
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor2_0

from diffusion_accel import EncoderReuse, Reuse, accelerate
from diffusion_accel.errors import ConfigurationError, FeatureConflictError
from diffusion_accel.hooks import map_tensors
from diffusion_accel.parallel import PatchParallel
from diffusion_accel.parallel.agreement import DisagreementError
from diffusion_accel.parallel.geometry import Level, Split, Window
from diffusion_accel.parallel.group import PeerError, World
from diffusion_accel.parallel.planner.operations import Sent
from diffusion_accel.parallel.planner.recording import Subject, record
from diffusion_accel.quant.kernels import make_runtime
from diffusion_accel.quant.layers import Buckets
from diffusion_accel.quant.ptq.trainable_layer import TrainableLayer
from diffusion_accel.quant.spec import LayerSpec

STEPS = 4


def parallel(**changes: Any) -> PatchParallel:
    return PatchParallel(**{"mode": "sync", "timeout": 60.0, **changes})


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to a relative error, in the norm of the largest value."""
    error = float((a.detach() - b.detach()).abs().max() / b.abs().max().clamp(min=1))
    assert error <= tolerance, f"differs by {error:.2e}, allowed {tolerance:.0e}"


def once(make: Callable[[], Any]) -> Any:
    """What rank 0 computes by itself, at every rank: the others need not do the same."""
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def double(pipe: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same in double precision, in which two orders of a sum differ by 1e-14 and a wrong row does not."""
    wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, call)
    return pipe.to(torch.float64), wide


def exact(kind: str, wide: bool, feature: dict[str, Any] | None = None, **changes: Any) -> Any:
    """`sync` against one process, for a pipeline of the zoo."""
    pipe, call = double(*zoo.ZOO[kind]()) if wide else zoo.ZOO[kind]()
    tolerance = 1e-9 if wide else 1e-5
    plain = once(lambda: zoo.run(pipe, call, steps=STEPS, **changes))
    accelerate(pipe, parallel(**feature or {}))
    close(zoo.run(pipe, call, steps=STEPS, **changes), plain, tolerance)
    counters = pipe.acceleration.report().counters["patch_parallel"]
    assert counters["bytes_sent"] > 0 and counters["stale_steps"] == 0, counters
    return pipe


def zoo_case(kind: str, wide: bool) -> Any:
    def case(rank: int, size: int) -> None:
        taken = inspect.signature(type(zoo.ZOO[kind]()[0]).__call__).parameters
        shaped = "height" in taken and kind not in ("deepfloyd_if", "inpaint", "t2i_adapter")
        exact(kind, wide, **{"height": 32, "width": 24} if shaped else {})

    return case


SUPPORTED = [kind for kind in zoo.ZOO if kind != "unet2d_skip"]
for _kind in SUPPORTED:
    globals()[f"sync_{_kind}"] = zoo_case(_kind, wide=True)
for _kind in ("sd", "sdxl", "svd", "controlnet", "sd_batch"):
    globals()[f"sync_float32_{_kind}"] = zoo_case(_kind, wide=False)


# ---------------------------------------------------------------------- bare models, in double precision
SIZES = [(1, 16, 8), (2, 24, 16), (3, 20, 12), (1, 13, 9), (2, 9, 14), (1, 4, 32)]
DEEP_SIZES = [(1, 37, 24), (2, 40, 16), (1, 8, 43)]


def sync_any_size(rank: int, size: int) -> None:
    """Odd heights, uneven splits, columns where rows are too few; sizes and batches change between calls."""
    for model, sizes in ((bare.unet(), SIZES), (bare.deep_unet(), DEEP_SIZES)):
        with bare.split(model, "sync"):
            together = [bare.predict(model, **bare.inputs(*shape)) for shape in sizes]
        plain = once(lambda model=model, sizes=sizes: [bare.predict(model, **bare.inputs(*shape)) for shape in sizes])
        for expected, found in zip(plain, together, strict=True):
            close(found, expected, 1e-9)


def sync_other_convolutions(rank: int, size: int) -> None:
    """Kernels, strides, dilations and paddings that no U-Net of the zoo has, by themselves."""
    x = zoo.rand(2, 3, 24, 10).double()
    for kernel, stride, dilation, padding in [
        (5, 1, 1, 2),
        (3, 1, 3, 3),
        (4, 2, 1, 1),
        (1, 2, 1, 0),
        (7, 2, 2, 6),
        (3, 3, 1, 0),
    ]:
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, kernel, stride, padding, dilation).double()
        whole = conv(x)
        for dim in (-2, -1):
            x_, whole_ = (x, whole) if dim == -2 else (x.transpose(2, 3), whole.transpose(2, 3))
            layer = conv if dim == -2 else transposed(conv)
            bounds = tuple(24 * r // size for r in range(size + 1))
            level = Level(24, 10, bounds)
            split = Split(dim, size, rank, (level,))
            with bare.split(layer, "sync") as run, run.running("test", split, tuple(range(size)), True):
                own = layer(x_.narrow(dim, bounds[rank], bounds[rank + 1] - bounds[rank]))
            ends = Window(kernel, stride, dilation, padding, padding).output(level)
            close(own, whole_.narrow(dim, ends[rank], ends[rank + 1] - ends[rank]), 1e-12)


def transposed(conv: Any) -> Any:
    other = copy.deepcopy(conv)
    other.weight = torch.nn.Parameter(conv.weight.detach().transpose(2, 3).contiguous())
    return other


def group_norm_is_chans_formula(rank: int, size: int) -> None:
    """In single precision, with a mean that is large beside the spread: sums of squares alone would lose it."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 25, 6) + 300 * torch.randn(1, 8, 1, 1)
    norm = torch.nn.GroupNorm(8, 8)
    bounds = tuple(25 * r // size for r in range(size + 1))
    split = Split(-2, size, rank, (Level(25, 6, bounds),))
    with bare.split(norm, "sync") as run, run.running("test", split, tuple(range(size)), True):
        own = norm(x[:, :, bounds[rank] : bounds[rank + 1]])
    wide = torch.nn.GroupNorm(8, 8).double()(x.double())[:, :, bounds[rank] : bounds[rank + 1]]
    close(own.double(), wide, 2e-4)
    torch.manual_seed(1)
    y = torch.randn(2, 8, 25, 6)
    with bare.split(norm, "sync") as run, run.running("test", split, tuple(range(size)), True):
        own = norm(y[:, :, bounds[rank] : bounds[rank + 1]])
    close(own, norm(y)[:, :, bounds[rank] : bounds[rank + 1]], 1e-6)


# ---------------------------------------------------------------------- steps that do not wait
def constant(
    mode: str, steps: int, reference: torch.Tensor, differs: bool = False, tolerance: float = 1e-9, **changes: Any
) -> None:
    """The same input at every step: what was old is fresh again, so the outcome is known exactly."""
    model, named = bare.unet(), bare.inputs(2, 24, 10)
    with bare.split(model, mode, **changes) as run:
        for index in range(steps):
            run.clock.index = index
            found = bare.predict(model, **named)
    if differs:
        assert (found - reference).abs().max() > 1e-6
    else:
        close(found, reference, tolerance)


def displaced_constant_input_is_sync(rank: int, size: int) -> None:
    whole = once(lambda: bare.predict(bare.unet(), **bare.inputs(2, 24, 10)))
    for group_norm in ("corrected", "stale", "sync"):
        for steps in (2, 3):
            constant("displaced", steps, whole, group_norm=group_norm)
    constant("displaced", 2, whole, group_norm="local", differs=True)


def bounds_of(size: int, tokens: int) -> list[int]:
    height = {240: 24, 60: 12}[tokens]
    units = [12 * r // size for r in range(size + 1)]
    return [u * 2 * height // 24 * (tokens // height) for u in units]


def allowed(size: int, p: float) -> Any:
    """PCPP's rule: the own part, and the nearest share p of both neighbours."""

    def mask(tokens: int) -> torch.Tensor:
        bounds = bounds_of(size, tokens)
        found = torch.zeros(tokens, tokens, dtype=torch.bool)
        for r in range(size):
            low, high = bounds[r], bounds[r + 1]
            above = round(p * (low - bounds[r - 1])) if r else 0
            below = round(p * (bounds[r + 2] - high)) if r + 1 < size else 0
            found[low:high, low - above : high + below] = True
        return found

    return mask


def partial_is_masked_attention(rank: int, size: int) -> None:
    """With a constant input the steps converge to one process whose attention is masked: p = 0 local, p = 1 whole."""
    whole = once(lambda: bare.predict(bare.unet(), **bare.inputs(2, 24, 10)))
    for p in (0.0, 0.3, 1.0):
        masked = bare.masked(bare.unet(), allowed(size, p))
        reference = once(lambda masked=masked: bare.predict(masked, **bare.inputs(2, 24, 10)))
        assert float((reference - whole).abs().max()) > 1e-9, "the mask does something"
        constant("partial", 24, reference, fraction=p, tolerance=1e-6)


def partial_with_whole_neighbours_is_displaced(rank: int, size: int) -> None:
    """p = 1 with two processes, for inputs that change; in rows and in columns."""
    for height, width in ((24, 10), (2, 24)):
        outcomes = []
        for mode in ("displaced", "partial"):
            model = bare.unet()
            with bare.split(model, mode, fraction=1.0) as run:
                for index in range(4):
                    run.clock.index = index
                    found = bare.predict(model, **bare.inputs(2, height, width, seed=index))
            outcomes.append(found)
        close(*outcomes, 1e-12)


def partial_in_columns(rank: int, size: int) -> None:
    """An image and its transpose, with transposed weights: columns of one are rows of the other."""
    outcomes = []
    for turned in (False, True):
        model = bare.unet()
        named = bare.inputs(1, 24, 4)
        if turned:
            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.weight.data = module.weight.data.transpose(2, 3).contiguous()
        with bare.split(model, "partial", fraction=0.5) as run:
            for index in range(3):
                run.clock.index = index
                sample = zoo.rand(1, 4, 24, 2, seed=index).double()
                named["sample"] = sample.transpose(2, 3) if turned else sample
                found = bare.predict(model, **named)
        outcomes.append(found.transpose(2, 3) if turned else found)
    close(*outcomes, 1e-9)


def displaced_layers_use_the_step_before(rank: int, size: int) -> None:
    """One convolution and one group normalisation, with inputs that change, against their formulas."""
    torch.manual_seed(0)
    steps = [torch.randn(2, 8, 24, 6, dtype=torch.float64) for _ in range(4)]
    bounds = tuple(24 * r // size for r in range(size + 1))
    low, high = bounds[rank], bounds[rank + 1]
    level = Level(24, 6, bounds)
    split, peers = Split(-2, size, rank, (level,)), tuple(range(size))

    def outputs(layer: Any, **changes: Any) -> list[torch.Tensor]:
        found = []
        with bare.split(layer, "displaced", **changes) as run:
            for index, x in enumerate(steps):
                with torch.no_grad(), run.running("test", split, peers, exact=index == 0, keeps=True):
                    found.append(layer(x[:, :, low:high]))
                run.communicator.flush(x.device)
        return found

    conv = torch.nn.Conv2d(8, 5, 3, padding=1).double()
    for index, found in enumerate(outputs(conv)):
        mixed = steps[max(index - 1, 0)].clone()
        mixed[:, :, low:high] = steps[index][:, :, low:high]
        close(found, conv(mixed)[:, :, low:high], 1e-12)
    norm = torch.nn.GroupNorm(4, 8).double()
    for kind in ("corrected", "stale"):
        for index, found in enumerate(outputs(norm, group_norm=kind)):
            now, old = steps[index].view(2, 4, 2, 24, 6), steps[max(index - 1, 0)].view(2, 4, 2, 24, 6)
            sums = {"mean": lambda x: x.mean((2, 3, 4)), "square": lambda x: (x * x).mean((2, 3, 4))}
            if kind == "corrected":
                values = {k: f(old) + f(now[..., low:high, :]) - f(old[..., low:high, :]) for k, f in sums.items()}
            else:
                mixed = old.clone()
                mixed[..., low:high, :] = now[..., low:high, :]
                values = {k: f(mixed) for k, f in sums.items()}
            variance = values["square"] - values["mean"] ** 2
            own = now[..., low:high, :].var((2, 3, 4), correction=0)
            variance = torch.where(variance < 0, own, variance) if index else variance
            normed = (now - values["mean"].view(2, 4, 1, 1, 1)) / (variance + norm.eps).sqrt().view(2, 4, 1, 1, 1)
            close(found, normed.view(2, 8, 24, 6)[:, :, low:high], 1e-9)


def naive_is_every_part_by_itself(rank: int, size: int) -> None:
    model, named = bare.unet(), bare.inputs(2, 24, 10)
    with bare.split(model, "naive", warmup=0) as run:
        found = bare.predict(model, **named)
        kinds = {kind for kind, _ in run.communicator.traffic}
    assert kinds == {"output"}, kinds
    entered = model.conv_in(named["sample"])
    bounds = [12 * r // size * 2 for r in range(size + 1)]
    parts = []
    for low, high in itertools.pairwise(bounds):
        handle = model.conv_in.register_forward_hook(lambda m, a, o, rows=(low, high): entered[:, :, slice(*rows)])
        parts.append(bare.predict(model, **{**named, "sample": named["sample"][:, :, low:high]}))
        handle.remove()
    close(found, torch.cat(parts, 2), 1e-9)


def partial_sends_less(rank: int, size: int) -> None:
    """At its default p on four processes at least 60 % less than displaced; what is counted is what is sent."""
    sent = {}
    for mode in ("displaced", "partial"):
        model = bare.unet()
        with bare.split(model, mode) as run:
            totals = []
            for index in range(3):
                run.clock.index = index
                bare.predict(model, **bare.inputs(1, 64, 64, seed=index))
                totals.append(sum(run.communicator.traffic.values()))
            assert totals[2] - totals[1] == totals[1] - totals[0], totals
            sent[mode] = totals[2] - totals[1]
    total = torch.tensor([sent["displaced"], sent["partial"]])
    dist.all_reduce(total)
    assert total[1] <= 0.4 * total[0], total


def counted_bytes(rank: int, size: int) -> None:
    """One attention layer: keys and values of all own tokens to every other process, in four bytes each."""
    model = zoo.unet()
    with bare.split(model, "sync") as run:
        bare.predict(model, **{k: v.float() if v.is_floating_point() else v for k, v in bare.inputs(2, 24, 8).items()})
        traffic = run.communicator.traffic
    rows = ((12 * (rank + 1)) // size - 12 * rank // size) * 2
    tokens = rows // 2 * 4  # at half the size
    assert traffic[
        "attention", "model.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    ] == 2 * tokens * 32 * 4 * (size - 1)
    assert traffic["output", "prediction"] == 2 * 4 * rows * 8 * 4 * (size - 1)
    neighbours = (rank > 0) + (rank < size - 1)
    assert traffic["halo", "model.conv_out"] == neighbours * 2 * 16 * 8 * 4
    assert ("halo", "model.conv_in") not in traffic


def a_dry_run_counts_the_same_bytes(rank: int, size: int) -> None:
    """Planning runs one process's share by itself: what it counts is what that process sends in company."""
    for cfg in (False, True)[: 2 - size % 2]:
        for mode in ("sync", "displaced", "partial", "naive"):
            model, named = bare.unet(), bare.inputs(2, 28, 10)
            with bare.split(model, mode, cfg=cfg, warmup=int(mode != "naive")) as run:
                for index in range(1 if mode == "sync" else 3):
                    run.clock.index, before = index, run.communicator.traffic.copy()
                    bare.predict(model, **named)
                last = run.communicator.traffic - before
            settings = parallel(mode=mode, cfg_parallel=cfg, comm_checkpoint=7, **bare.warm(mode))
            dry = record(Subject(model, named), settings, World(rank, size))
            found = {(kind, layer.removeprefix("denoiser.")): n for (kind, layer), n in dry.traffic.items()}
            assert found == {(kind, layer.removeprefix("model.")): n for (kind, layer), n in last.items()}
            sent = sum(event.sent for event in dry.steps[-1] if isinstance(event, Sent))
            assert sum(last.values()) <= sent <= sum(last.values()) + 16 * len(last), "buffers are aligned"


def cfg_split_is_batched_guidance(rank: int, size: int) -> None:
    """The two halves of the batch on two halves of the processes, alone and with patches, and its fallback."""
    for kind in ("sd", "sdxl", "controlnet", "svd", "ip_adapter", "t2i_adapter")[: 6 if size == 2 else 1]:
        exact(kind, True, {"cfg_parallel": True})
    pipe = exact("sd_without_guidance", True, {"cfg_parallel": True})
    assert pipe.acceleration.report().counters["patch_parallel"]["halo_bytes"] > 0
    model, named = bare.unet(), bare.inputs(2, 24, 10)
    with bare.split(model, "displaced", cfg=True) as run:
        for index in range(3):
            run.clock.index = index
            found = bare.predict(model, **named)
        close(found, bare.predict_plain(named), 1e-9)
        kinds = {kind for kind, _ in run.communicator.traffic}
    assert kinds == ({"output"} if size == 2 else {"output", "halo", "norm", "attention"}), kinds


# ---------------------------------------------------------------------- whole pipelines
def displaced_pipeline(rank: int, size: int) -> None:
    """Every mode draws the same image on all processes and at a second call, near to but not that of one process."""
    pipe, call = zoo.sdxl()
    call |= {"height": 48, "width": 16}
    plain, errors = once(lambda: zoo.run(pipe, call, steps=6)), []
    for settings in (
        {"mode": "displaced", "warmup": 2},
        {"mode": "partial", "warmup": 2},
        {"mode": "naive", "warmup": 0},
    ):
        accelerate(pipe, parallel(**settings, comm_checkpoint=5))
        first = zoo.run(pipe, call, steps=6)
        assert torch.equal(zoo.run(pipe, call, steps=6), first)
        error = float((first - plain).abs().max())
        assert error > 0
        errors.append(error)
        copies = [torch.empty_like(first) for _ in range(size)]
        dist.all_gather(copies, first)
        assert all(torch.equal(c, first) for c in copies)
        counters = pipe.acceleration.report().counters["patch_parallel"]
        warm = settings["warmup"]
        assert (counters["exact_steps"], counters["stale_steps"]) == (warm, 6 - warm), counters
    assert errors[0] < errors[2], errors
    accelerate(pipe, parallel(mode="displaced", warmup=6))
    close(zoo.run(pipe, call, steps=6), plain)
    report = pipe.acceleration.report()
    layers, total = report.details["patch_parallel"], report.counters["patch_parallel"]["bytes_sent"]
    assert sum(layers.values()) == total and layers["denoiser.conv_out"] > 0 and "denoiser.conv_in" not in layers


def images_are_decoded_and_encoded_in_parts(rank: int, size: int) -> None:
    for kind in ("sd", "img2img"):
        pipe, call = double(*zoo.ZOO[kind]())
        call |= {"output_type": "pt"} | ({"height": 32, "width": 24} if kind == "sd" else {})
        plain = once(lambda pipe=pipe, call=call: zoo.run(pipe, call, steps=3))
        accelerate(pipe, parallel(mode="sync"))
        close(zoo.run(pipe, call, steps=3), plain, 1e-9)
        layers = pipe.acceleration.report().details["patch_parallel"]
        assert "vae.decoder.conv_out" in layers and "vae.decoder" in layers
        assert ("vae.encoder" in layers) == (kind == "img2img")
        accelerate(pipe, parallel(mode="sync", vae=False))
        close(zoo.run(pipe, call, steps=3), plain, 1e-9)
        layers = pipe.acceleration.report().details["patch_parallel"]
        assert not any(layer.startswith("vae") for layer in layers)


def video_is_decoded_in_parts(rank: int, size: int) -> None:
    pipe, call = double(*zoo.svd())
    call |= {"output_type": "pt", "height": 32}
    plain = once(lambda: zoo.run(pipe, call, steps=2))
    accelerate(pipe, parallel())
    close(zoo.run(pipe, call, steps=2), plain, 1e-9)


def reuse_keeps_its_parts(rank: int, size: int) -> None:
    """Encoder reuse and plans with held and shallow steps: the same images as on one process."""
    features = (
        EncoderReuse(schedule="uniform:2"),
        EncoderReuse(schedule="uniform:3", batch_decoder=False),
        Reuse(plan="hold:2"),
        Reuse(plan="deepcache:2"),
        Reuse(plan="full", guidance="reuse:2"),
    )
    for feature in features:
        pipe, call = double(*zoo.sd())
        call |= {"height": 32, "width": 24}
        accelerate(pipe, feature)
        plain = once(lambda pipe=pipe, call=call: zoo.run(pipe, call, steps=6))
        for cfg in (False, True)[: 2 - size % 2]:
            if cfg and "guidance" in str(feature):
                try:
                    accelerate(pipe, parallel(cfg_parallel=cfg))
                except FeatureConflictError as error:
                    assert "leave out a branch" in str(error)
                else:
                    raise AssertionError("not refused")
            else:
                accelerate(pipe, parallel(cfg_parallel=cfg))
                close(zoo.run(pipe, call, steps=6), plain, 1e-9)
        accelerate(pipe, parallel(mode="displaced", warmup=2))
        first = zoo.run(pipe, call, steps=6)
        assert torch.equal(zoo.run(pipe, call, steps=6), first) and not torch.equal(first, plain)
    pipe, call = zoo.sd()
    alternating = Reuse(plan="full", guidance="reuse:2")  # batches of 2 and of 1 in turn, each with its own old values
    accelerate(pipe, alternating, parallel(mode="displaced", warmup=2))
    zoo.run(pipe, {**call, "height": 32, "width": 24}, steps=8)
    assert pipe.acceleration.report().counters["patch_parallel"]["buffer_bytes"] > 0
    sent = {}
    for key_steps in (6, 3):  # what is skipped is not sent
        pipe, call = zoo.sd()
        accelerate(pipe, EncoderReuse(schedule=f"uniform:{6 // key_steps}", batch_decoder=False), parallel())
        zoo.run(pipe, {**call, "height": 32, "width": 24}, steps=6)
        sent[key_steps] = pipe.acceleration.report().details["patch_parallel"]
    for layer, size in sent[3].items():
        skipped = layer.startswith(("denoiser.down_blocks", "denoiser.mid_block"))
        assert size * (2 if skipped else 1) == sent[6][layer], layer
    assert any(layer.startswith("denoiser.mid_block") for layer in sent[3])


def other_attention_processors(rank: int, size: int) -> None:
    """A processor that is not known runs on the whole image: one that depends on the order of positions."""
    for height, width in ((24, 10), (2, 24)):
        model, named = bare.unet(), bare.inputs(1, height, width)
        for attention in bare.spatial_attentions(model).values():
            attention.processor = Ordered()
        plain = bare.predict(model, **named)
        with bare.split(model, "sync"):
            close(bare.predict(model, **named), plain, 1e-9)
    pipe, call = double(*zoo.sd())  # a decoder's attention has a group normalisation of its own
    for attention in bare.spatial_attentions(pipe.vae).values():
        attention.processor = Residual()
    call |= {"output_type": "pt", "height": 32, "width": 24}
    plain = zoo.run(pipe, call, steps=1)
    accelerate(pipe, parallel())
    close(zoo.run(pipe, call, steps=1), plain, 1e-9)


class Residual(AttnProcessor2_0):
    """A processor that this toolkit does not know."""


class Ordered(bare.MaskedAttention):
    def __init__(self) -> None:
        super().__init__(lambda tokens: torch.ones(tokens, tokens, dtype=torch.bool).tril())


def lora_and_slicing(rank: int, size: int) -> None:
    from peft import LoraConfig

    for sliced in (False, True):
        pipe, call = double(*zoo.sd())
        pipe.unet.add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "to_k", "conv1", "conv2", "conv_in"], init_lora_weights=False)
        )
        pipe.unet.double()
        if sliced:
            pipe.enable_attention_slicing(1)
        call |= {"height": 32, "width": 24}
        plain = once(lambda pipe=pipe, call=call: zoo.run(pipe, call, steps=3))
        accelerate(pipe, parallel())
        close(zoo.run(pipe, call, steps=3), plain, 1e-9)


def quantized_layers(rank: int, size: int) -> None:
    """Simulated 4-bit weights and 8-bit inputs, with oneDNN's integers and by the window: convolutions of their own."""
    for runtime in ("simulated", "integer"):
        model = zoo.unet().float()
        buckets = Buckets((900.0, 100.0))
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) and "blocks" in name:
                draft = TrainableLayer(layer, LayerSpec(weight_bits=4, activation_bits=8), buckets)
                draft.input_scale.data.fill_(12 / 255)
                draft.input_zero_point.fill_(100)
                made = draft.finished(buckets)
                made.runtime = make_runtime(runtime, made)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, made)
        named = {k: v.float() if v.is_floating_point() else v for k, v in bare.inputs(2, 24, 10).items()}
        plain = bare.predict(model, **named)
        with bare.split(model, "sync"):
            found = bare.predict(model, **named)
        # rounding turns 1e-7 into a step of a grid here and there
        assert float((found - plain).abs().mean() / plain.abs().mean()) < 0.01
        assert float(((found - plain).abs() < 1e-4).float().mean()) > 0.2 or runtime == "integer"


def transformers_share_their_sequence(rank: int, size: int) -> None:
    """diffusers' context parallelism, switched on for a call; heads that are too few are refused, and so are models
    without a plan."""
    pipe, call = zoo.flux()
    pipe.vae.register_to_config(shift_factor=0.0)
    plain, decoded = zoo.run(pipe, call), zoo.run(pipe, {**call, "output_type": "pt"})
    before = set(vars(pipe.transformer))
    accelerate(pipe, parallel())
    if size > 2:  # two heads
        try:
            zoo.run(pipe, call)
        except ConfigurationError as error:
            assert f"2 attention heads of FluxTransformer2DModel cannot be shared by {size}" in str(error), error
        else:
            raise AssertionError("not refused")
    else:
        for _ in range(2):
            close(zoo.run(pipe, call), plain)
            assert pipe.acceleration.report().counters["patch_parallel"]["exact_steps"] == 6
            assert not left_behind(pipe) and pipe.transformer._parallel_config is None
            assert set(vars(pipe.transformer)) <= before | {"_parallel_config"}
        close(zoo.run(pipe, {**call, "output_type": "pt"}), decoded)
        layers = pipe.acceleration.report().details["patch_parallel"]
        assert any(layer.startswith("vae.decoder") for layer in layers)
        try:
            zoo.run(pipe, call, seed=rank)
        except DisagreementError as error:
            assert "the latents" in str(error), error
        else:
            raise AssertionError("different noise went unnoticed")
    pipe.acceleration.remove()
    assert torch.equal(zoo.run(pipe, call), plain)


def noise_without_a_generator(rank: int, size: int) -> None:
    """Is that of rank 0 everywhere, also where a scheduler draws at every step."""
    pipe, call = double(*zoo.sd())
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    plain = [pipe(num_inference_steps=3, **call).images for _ in range(2)]
    accelerate(pipe, parallel())
    torch.manual_seed(rank)
    for expected in plain:
        close(torch.as_tensor(pipe(num_inference_steps=3, **call).images), torch.as_tensor(expected), 1e-9)
    assert not torch.equal(torch.as_tensor(plain[0]), torch.as_tensor(plain[1]))


# ---------------------------------------------------------------------- what goes wrong
def different_arguments_are_named(rank: int, size: int) -> None:
    pipe, call = zoo.sd()
    other = rank == size - 1
    accelerate(pipe, parallel())

    def refused(what: str, change: dict[str, Any], steps: int = 3, seed: int = 0) -> None:
        try:
            zoo.run(pipe, call, steps=steps, seed=seed, **change)
        except DisagreementError as error:
            assert what in str(error) and f"rank {size - 1}" in str(error), error
            assert pipe.acceleration.enabled("patch_parallel") and not left_behind(pipe)
        else:
            raise AssertionError(f"{what} went unnoticed")

    refused("the latents", {}, seed=int(other))
    refused("the number of steps", {}, steps=3 + other)
    refused("the size or number of images", {"height": 16 + 8 * other, "width": 16})
    refused("the prompt", {"prompt_embeds": zoo.rand(1, zoo.TOKENS, zoo.DIM, seed=9 + other)})
    refused("the guidance scale", {"guidance_scale": 3.0 + other})
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config, beta_end=0.01 + 0.001 * other)
    refused("the scheduler", {})
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(scheduler.config)
    latents = zoo.rand(1, 4, 8, 8)
    refused("the latents after one step", {"latents": latents}, seed=int(other))
    pipe.scheduler = scheduler
    accelerate(pipe, parallel(mode="displaced", warmup=1 + other))
    refused("the features", {})
    accelerate(pipe, parallel())
    assert torch.isfinite(zoo.run(pipe, call)).all()


def left_behind(pipe: Any) -> list[str]:
    models = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    return [n for model in models for n, m in model.named_modules() if "_diffusers_hook" in m.__dict__]


def an_exception_leaves_nothing(rank: int, size: int) -> None:
    pipe, call = zoo.sd()
    accelerate(pipe, parallel(mode="displaced", warmup=1))
    first = zoo.run(pipe, call)

    def stop(pipe: Any, index: int, timestep: Any, values: Any) -> Any:
        if index == 3:
            raise KeyboardInterrupt
        return values

    try:
        zoo.run(pipe, call, callback_on_step_end=stop)
    except KeyboardInterrupt:
        assert not left_behind(pipe)
    else:
        raise AssertionError("it was not interrupted")
    assert torch.equal(zoo.run(pipe, call), first)


def impossible_requests_are_refused(rank: int, size: int) -> None:
    def refused(says: str, pipe: Any, call: Any, **settings: Any) -> None:
        accelerate(pipe, parallel(**settings))
        try:
            zoo.run(pipe, call)
        except ConfigurationError as error:
            assert says in str(error), error
            assert not left_behind(pipe)
        else:
            raise AssertionError(f"not refused: {says}")

    refused(f"was set to {size + 1} processes", *zoo.sd(), ranks=size + 1)
    pipe, call = zoo.sd()
    if size > 2:
        refused("too small", pipe, {**call, "height": 8, "width": 8})
    pipe, call = zoo.sd()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    refused("FreeU", pipe, call)
    pipe, call = zoo.sd()
    pipe.fuse_qkv_projections(unet=False, vae=True)
    refused("fused", pipe, call)
    if size % 2:
        refused("even number", *zoo.sd(), cfg_parallel=True)


def a_lost_process(rank: int, size: int) -> None:
    """Run by itself: the last rank ends, or hangs, at the second step; the others end in bounded time."""
    how = os.environ["PATCH_LOST"]
    pipe, call = getattr(zoo, os.environ["PATCH_KIND"])()
    accelerate(pipe, parallel(mode=os.environ["PATCH_MODE"], warmup=1, timeout=5.0))

    def lost(pipe: Any, index: int, timestep: Any, values: Any) -> Any:
        if index == 1 and rank == size - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return values

    try:
        zoo.run(pipe, call, callback_on_step_end=lost)
    except PeerError as error:
        assert "does not answer" in str(error) and "\n" not in str(error), error
        assert not left_behind(pipe)
    else:
        raise AssertionError("nobody noticed")
    try:
        zoo.run(pipe, call)
    except PeerError as error:
        assert "start the job again" in str(error)
    else:
        raise AssertionError("a broken job goes on")
