"""Cases: steps that do not wait, against formulas and counted bytes."""

from __future__ import annotations

import itertools
from typing import Any

import bare
import torch
import torch.distributed as dist
import zoo
from case_tools import close, exact, once, parallel

from diffusion_accel.parallel.geometry import Level, Split
from diffusion_accel.parallel.group import World
from diffusion_accel.parallel.planner.operations import Sent
from diffusion_accel.parallel.planner.recording import Subject, record


def constant(mode: str, steps: int, **changes: Any) -> list[torch.Tensor]:
    """The same input at every step: what was old is fresh again, so the outcome is known exactly."""
    model, named = bare.unet(), bare.inputs(2, 24, 10)
    found = []
    with bare.split(model, mode, **changes) as run:
        for index in range(steps):
            run.clock.index = index
            found.append(bare.predict(model, **named))
    return found


def displaced_constant_input_is_sync(rank: int, size: int) -> None:
    whole = once(lambda: bare.predict(bare.unet(), **bare.inputs(2, 24, 10)))
    for group_norm in ("corrected", "stale", "sync"):
        for found in constant("displaced", 3, group_norm=group_norm)[1:]:
            close(found, whole, 1e-9)
    local = constant("displaced", 2, group_norm="local")[-1]
    assert (local - whole).abs().max() > 1e-6


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
        close(constant("partial", 20, fraction=p)[-1], reference, 1e-6)


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
