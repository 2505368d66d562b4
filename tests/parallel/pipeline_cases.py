"""Cases: whole pipelines, with features, adapters and processors."""

from __future__ import annotations

import bare
import torch
import torch.distributed as dist
import zoo
from case_tools import close, double, left_behind, once, parallel
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor2_0

from diffusion_accel import EncoderReuse, Reuse, accelerate
from diffusion_accel.errors import FeatureConflictError
from diffusion_accel.parallel.agreement import DisagreementError
from diffusion_accel.quant.kernels import make_runtime
from diffusion_accel.quant.layers import Buckets
from diffusion_accel.quant.ptq.trainable_layer import TrainableLayer
from diffusion_accel.quant.spec import LayerSpec


def displaced_pipeline(rank: int, size: int) -> None:
    """Every mode draws the same image on all processes and at a second call, near to but not that of one process."""
    pipe, call = zoo.sdxl()
    call |= {"height": 48, "width": 16}
    plain, errors = once(lambda: zoo.run(pipe, call, steps=4)), []
    for settings in (
        {"mode": "displaced", "warmup": 2},
        {"mode": "partial", "warmup": 2},
        {"mode": "naive", "warmup": 0},
    ):
        accelerate(pipe, parallel(**settings, comm_checkpoint=5))
        first = zoo.run(pipe, call, steps=4)
        assert torch.equal(zoo.run(pipe, call, steps=4), first)
        error = float((first - plain).abs().max())
        assert error > 0
        errors.append(error)
        copies = [torch.empty_like(first) for _ in range(size)]
        dist.all_gather(copies, first)
        assert all(torch.equal(c, first) for c in copies)
        counters = pipe.acceleration.report().counters["patch_parallel"]
        warm = settings["warmup"]
        assert (counters["exact_steps"], counters["stale_steps"]) == (warm, 4 - warm), counters
    assert errors[0] < errors[2], errors
    accelerate(pipe, parallel(mode="displaced", warmup=4))
    close(zoo.run(pipe, call, steps=4), plain)
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
        plain = once(lambda pipe=pipe, call=call: zoo.run(pipe, call, steps=4))
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
                close(zoo.run(pipe, call, steps=4), plain, 1e-9)
        accelerate(pipe, parallel(mode="displaced", warmup=1))
        first = zoo.run(pipe, call, steps=4)
        assert torch.equal(zoo.run(pipe, call, steps=4), first) and not torch.equal(first, plain)
    pipe, call = zoo.sd()
    alternating = Reuse(plan="full", guidance="reuse:2")  # batches of 2 and of 1 in turn, each with its own old values
    accelerate(pipe, alternating, parallel(mode="displaced", warmup=2))
    zoo.run(pipe, {**call, "height": 32, "width": 24}, steps=5)
    assert pipe.acceleration.report().counters["patch_parallel"]["buffer_bytes"] > 0
    sent = {}
    for key_steps in (4, 2):  # what is skipped is not sent
        pipe, call = zoo.sd()
        accelerate(pipe, EncoderReuse(schedule=f"uniform:{4 // key_steps}", batch_decoder=False), parallel())
        zoo.run(pipe, {**call, "height": 32, "width": 24}, steps=4)
        sent[key_steps] = pipe.acceleration.report().details["patch_parallel"]
    for layer, size in sent[2].items():
        skipped = layer.startswith(("denoiser.down_blocks", "denoiser.mid_block"))
        assert size * (2 if skipped else 1) == sent[4][layer], layer
    assert any(layer.startswith("denoiser.mid_block") for layer in sent[2])


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
        plain = once(lambda pipe=pipe, call=call: zoo.run(pipe, call, steps=2))
        accelerate(pipe, parallel())
        close(zoo.run(pipe, call, steps=2), plain, 1e-9)


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
    """diffusers' context parallelism, switched on for a call; where there are fewer heads than processes (two heads),
    hooks of our own share the tokens."""
    pipe, call = zoo.flux()
    pipe.vae.register_to_config(shift_factor=0.0)
    plain, decoded = zoo.run(pipe, call, 3), zoo.run(pipe, {**call, "output_type": "pt"}, 3)
    before = set(vars(pipe.transformer))
    accelerate(pipe, parallel())
    for _ in range(2):
        close(zoo.run(pipe, call, 3), plain)
        counters = pipe.acceleration.report().counters["patch_parallel"]
        assert counters["exact_steps"] == 3 and (counters["attention_bytes"] > 0) == (size > 2), counters
        assert not left_behind(pipe) and pipe.transformer._parallel_config is None
        assert set(vars(pipe.transformer)) <= before | {"_parallel_config"}
    close(zoo.run(pipe, {**call, "output_type": "pt"}, 3), decoded)
    layers = pipe.acceleration.report().details["patch_parallel"]
    assert any(layer.startswith("vae.decoder") for layer in layers)
    try:
        zoo.run(pipe, call, 3, seed=rank)
    except DisagreementError as error:
        assert "the latents" in str(error), error
    else:
        raise AssertionError("different noise went unnoticed")
    pipe.acceleration.remove()
    assert torch.equal(zoo.run(pipe, call, 3), plain)


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
