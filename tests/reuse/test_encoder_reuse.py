"""Encoder reuse: exact identities, counted work, and an independent loop as the oracle."""

from __future__ import annotations

import contextlib
from typing import Any

import encoder_oracle as oracle
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import ZOO, Built, ddim, rand, run, sd, sdxl, text, unet

from diffusion_accel import AccelerationError, CallStateError, EncoderReuse, accelerate
from diffusion_accel.hooks import tensors_in
from diffusion_accel.registry import feature_class
from diffusion_accel.reuse.schedule import key_steps

VIDEO_AND_IMAGE = pytest.mark.parametrize("kind", ZOO)


def counters(pipe: Any) -> dict[str, float]:
    return pipe.acceleration.report().counters["encoder_reuse"]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool(((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)).item())


class Count(ModelHook):
    """Counts the rows that a module really computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.rows = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = tensors_in((args, kwargs))[0]
        self.calls, self.rows = self.calls + 1, self.rows + tensor.shape[0]
        return args, kwargs


@contextlib.contextmanager
def counting(module: torch.nn.Module) -> Any:
    hook = Count()
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "count")
    yield hook
    module._diffusers_hook.remove_hook("count")


@VIDEO_AND_IMAGE
def test_sequential_and_batched_decoders_agree(kind: str) -> None:
    pipe, call = ZOO[kind]()
    results = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule="uniform:3", batch_decoder=batched))
        results.append(run(pipe, call, steps=7))
    assert close(*results, tolerance=3e-5), (results[0] - results[1]).abs().max()
    assert counters(pipe)["decoder_runs"] < counters(pipe)["decoder_steps"]


@VIDEO_AND_IMAGE
@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
def test_work_is_really_skipped(kind: str, batched: bool) -> None:
    pipe, call = ZOO[kind]()
    with counting(pipe.unet.down_blocks[0].resnets[0]) as plain:
        run(pipe, call, steps=6)
    accelerate(pipe, EncoderReuse(schedule=(0, 2), batch_decoder=batched))
    with counting(pipe.unet.down_blocks[0].resnets[0]) as encoder, counting(pipe.unet.conv_out) as decoder:
        run(pipe, call, steps=6)
    report = pipe.acceleration.report()
    keys = len(key_steps((0, 2), report.steps))
    assert encoder.calls == counters(pipe)["encoder_runs"] == keys
    assert encoder.rows * report.steps == plain.rows * keys
    assert decoder.rows * 1 == plain.rows, "the decoder computes every step once"
    assert counters(pipe)["decoder_steps"] == report.steps
    assert counters(pipe)["full_steps"] + counters(pipe)["reused_steps"] == report.steps
    assert counters(pipe)["peak_cache_bytes"] > 0


@pytest.mark.parametrize("build", [sd, sdxl], ids=["sd", "sdxl"])
@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
@pytest.mark.parametrize("keys", [(0,), (0, 1, 2, 5), (0, 4), tuple(range(8))], ids=str)
def test_it_equals_a_loop_that_calls_the_blocks_by_hand(build: Any, batched: bool, keys: tuple[int, ...]) -> None:
    pipe, call = build()
    latents = rand(1, 4, 8, 8, seed=9)
    accelerate(pipe, EncoderReuse(schedule=keys, batch_decoder=batched))
    got = run(pipe, {**call, "height": 16, "width": 16}, steps=8, latents=latents.clone())
    embeds = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    added = None
    if build is sdxl:
        pooled = torch.cat([call["negative_pooled_prompt_embeds"], call["pooled_prompt_embeds"]])
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    want = oracle.sample(pipe.unet, scheduler, latents, embeds, call["guidance_scale"], 8, set(keys), added)
    assert close(got, want)


@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
def test_prior_noise_against_its_own_reference(batched: bool) -> None:
    pipe, call = sd()
    latents = rand(1, 4, 8, 8, seed=9)
    embeds = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])

    def ours(alpha: float, keys: tuple[int, ...] = (0, 3)) -> torch.Tensor:
        accelerate(pipe, EncoderReuse(schedule=keys, batch_decoder=batched, prior_noise=alpha))
        return run(pipe, {**call, "height": 16, "width": 16}, steps=8, latents=latents.clone())

    def theirs(alpha: float, before: bool) -> torch.Tensor:
        args = (pipe.unet, ddim(), latents, embeds, 5.0, 8, {0, 3})
        return oracle.sample(*args, alpha=alpha, noise_before_unet=before)

    assert close(ours(0.05), theirs(0.05, before=not batched))
    assert counters(pipe)["noise_injections"] == 4  # timesteps 501 … 1 of 8 leading steps: the last four below 500
    assert torch.equal(ours(0.0), ours(0.0)) and close(ours(0.0), theirs(0.0, True))
    assert not close(ours(0.05), ours(0.0), tolerance=1e-3)


def test_prior_noise_timings_differ_only_at_key_steps() -> None:
    """With no key step below tau the two timings are the same; with one they differ by design."""
    pipe, call = sd()
    results = {}
    above, below = (0, 3), (0, 4, 5, 6, 7)
    for keys in (above, below):
        for batched in (False, True):
            accelerate(pipe, EncoderReuse(schedule=keys, batch_decoder=batched, prior_noise=0.1))
            results[keys, batched] = run(pipe, call, steps=8)
    rounding = (results[above, False] - results[above, True]).abs().max()
    assert close(results[above, False], results[above, True])
    assert (results[below, False] - results[below, True]).abs().max() > 10 * rounding


def test_prior_noise_is_refused_where_latents_are_scaled_by_sigma() -> None:
    pipe, call = sdxl()
    base = run(pipe, call)
    with pytest.raises(AccelerationError, match="EulerDiscreteScheduler"):
        accelerate(pipe, EncoderReuse(prior_noise=0.003))
    assert torch.equal(run(pipe, call), base)


def test_prior_noise_at_the_first_step_of_an_image() -> None:
    """An image with a low strength begins below tau: noise is added before the U-Net sees the first latents, too."""
    pipe, call = ZOO["img2img"]()
    alpha, firsts = 0.05, []
    accelerate(pipe, EncoderReuse(schedule="all", batch_decoder=False, prior_noise=alpha))
    got = run(pipe, call, steps=8, strength=0.4)
    assert counters(pipe)["noise_injections"] == pipe.acceleration.report().steps == 3
    pipe.acceleration.remove()
    prepare = pipe.prepare_latents

    def noisier(*args: Any, **kwargs: Any) -> torch.Tensor:
        firsts.append(prepare(*args, **kwargs))
        return firsts[0] + alpha * firsts[0]

    def inject(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] + alpha * firsts[0] if i < 2 else values["latents"]}

    pipe.prepare_latents = noisier
    assert close(got, run(pipe, call, steps=8, strength=0.4, callback_on_step_end=inject))


def test_a_non_key_prediction_does_not_see_the_latents() -> None:
    """Latents changed by a callback before a non-key step must not change that step's prediction."""
    pipe, call = sd()
    predictions: list[torch.Tensor] = []

    class Record(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            predictions.append(output[0].clone())
            return output

    def disturb(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] + (10.0 if index == 3 else 0.0)}  # seen by step 4

    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(Record(), "record")
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule=(0, 2, 6), batch_decoder=batched))
        # the recording hook is inside ours, so it sees what the U-Net computes
        predictions.clear()
        plain = run(pipe, call, steps=8)
        before = list(predictions)
        predictions.clear()
        disturbed = run(pipe, call, steps=8, callback_on_step_end=disturb)
        assert not torch.equal(plain, disturbed), "the disturbance must reach the result"
        if batched:
            continue
        assert all(torch.equal(a, b) for a, b in zip(before[:6], predictions[:6], strict=True))
        assert not torch.equal(before[6], predictions[6]), "the key step sees it"
    pipe.unet._diffusers_hook.remove_hook("record")


@pytest.mark.parametrize("kind", ["controlnet", "controlnets", "controlnet_guess_mode"])
def test_controlnets_run_at_key_steps_only(kind: str) -> None:
    pipe, call = ZOO[kind]()
    accelerate(pipe, EncoderReuse(schedule=(0, 2, 5)))
    nets = pipe.controlnet.nets if hasattr(pipe.controlnet, "nets") else [pipe.controlnet]
    with contextlib.ExitStack() as stack:
        hooks = [stack.enter_context(counting(net.controlnet_cond_embedding)) for net in nets]
        run(pipe, call, steps=8)
    assert [h.calls for h in hooks] == [3] * len(nets)
    assert counters(pipe)["controlnet_runs"] == 3 and counters(pipe)["controlnet_skipped"] == 5


@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter", "ip_adapter"])
def test_conditioning_still_acts(kind: str) -> None:
    pipe, call = ZOO[kind]()
    accelerate(pipe, EncoderReuse(schedule="uniform:3"))
    first = run(pipe, call)
    key = "ip_adapter_image_embeds" if kind == "ip_adapter" else "image"
    other = [-t for t in call[key]] if isinstance(call[key], list) else -call[key]
    assert not torch.equal(run(pipe, {**call, key: other}), first)


def test_t2i_residuals_enter_the_cached_features_once() -> None:
    """diffusers adds adapter features in place; reused features must not collect them again at every step."""
    pipe, call = ZOO["t2i_adapter"]()
    accelerate(pipe, EncoderReuse(schedule=(0,), batch_decoder=False))
    sequential = run(pipe, call, steps=9)
    accelerate(pipe, EncoderReuse(schedule=(0,), batch_decoder=True))
    assert close(run(pipe, call, steps=9), sequential)
    assert sequential.isfinite().all()


def test_freeu_scales_reused_features_once() -> None:
    pipe, call = sd()
    pipe.unet.up_blocks[0].resolution_idx, pipe.unet.up_blocks[1].resolution_idx = 0, 1
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    base = run(pipe, call)
    accelerate(pipe, EncoderReuse.neutral())
    assert torch.equal(run(pipe, call), base)
    results = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule=(0, 1), batch_decoder=batched))
        results.append(run(pipe, call))
    assert close(*results)
    keep = {"schedule": (0, 1), "batch_decoder": False}
    embeds = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    latents = rand(1, 4, 8, 8, seed=9)
    accelerate(pipe, EncoderReuse(**keep))
    got = run(pipe, call, steps=4, latents=latents.clone())

    def decode_copies(unet: Any, h: torch.Tensor, *rest: Any) -> torch.Tensor:
        return original(unet, h.clone(), *rest)

    original, oracle.decode = oracle.decode, decode_copies
    try:
        want = oracle.sample(pipe.unet, ddim(), latents, embeds, 5.0, 4, {0, 1})
    finally:
        oracle.decode = original
    assert close(got, want)


def test_callbacks_and_previews_see_true_intermediate_latents() -> None:
    pipe, call = sd()
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for batched in seen:
        accelerate(pipe, EncoderReuse(schedule=(0, 4), batch_decoder=batched))

        def note(pipe: Any, i: int, t: Any, values: dict[str, Any], into: list = seen[batched]) -> dict[str, Any]:
            into.append(values["latents"].clone())
            return values

        final = run(pipe, call, steps=8, callback_on_step_end=note)
        assert torch.equal(seen[batched][-1], final)
    assert len(seen[True]) == 8
    assert all(close(a, b) for a, b in zip(seen[True], seen[False], strict=True))
    assert len({tuple(x.flatten()[:4].tolist()) for x in seen[True]}) == 8


def test_a_prompt_changed_during_the_call_is_used_at_once() -> None:
    """A callback may change the embeddings; predictions decoded ahead with the old ones must be thrown away."""
    pipe, call = sd()
    other = torch.cat([rand(1, 6, 16, seed=7), rand(1, 6, 16, seed=8)])

    def change(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": other} if i == 3 else values

    results = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule=(0, 2), batch_decoder=batched))
        wanted = ["latents", "prompt_embeds"]
        results.append(run(pipe, call, steps=8, callback_on_step_end=change, callback_on_step_end_tensor_inputs=wanted))
    assert close(*results)
    assert not close(results[0], run(pipe, call, steps=8), tolerance=1e-4)


def _adapter_off(pipe: Any, values: dict[str, Any]) -> None:
    pipe.set_ip_adapter_scale(0.0)


def _text_in_place(pipe: Any, values: dict[str, Any]) -> None:
    values["prompt_embeds"].mul_(-1.0)


def _weights_in_place(pipe: Any, values: dict[str, Any]) -> None:
    pipe.unet.conv_out.weight.data.mul_(1.5)  # which raises no version


def _other_weights(pipe: Any, values: dict[str, Any]) -> None:
    layer = pipe.unet.up_blocks[1].resnets[0].conv2
    layer.weight = torch.nn.Parameter(-layer.weight.detach())


def _lora_scale(pipe: Any, values: dict[str, Any]) -> None:
    pipe.unet.set_adapters("donor", 4.0)


def _freeu(pipe: Any, values: dict[str, Any]) -> None:
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def _processors(pipe: Any, values: dict[str, Any]) -> None:
    class Half(AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 20 * super().__call__(*args, **kwargs)

    pipe.unet.set_attn_processor(Half())


def _attribute(pipe: Any, values: dict[str, Any]) -> None:
    for module in pipe.unet.up_blocks.modules():
        if hasattr(module, "to_q"):
            module.rescale_output_factor = 0.05


def _hook(pipe: Any, values: dict[str, Any]) -> None:
    pipe.unet.up_blocks[0].register_forward_hook(lambda module, given, output: -output)


def _hook_removed(pipe: Any, values: dict[str, Any]) -> None:
    pipe.unet.up_blocks[0].resnets[0]._forward_pre_hooks.clear()


@pytest.mark.parametrize(
    "change",
    [
        _adapter_off, _text_in_place, _weights_in_place, _other_weights, _lora_scale, _freeu, _processors,
        _attribute, _hook, _hook_removed,
    ],
    ids=lambda f: f.__name__.strip("_"),
)  # fmt: skip
def test_what_was_decoded_ahead_does_not_outlive_a_change(change: Any) -> None:
    """Whatever a callback changes of what the U-Net reads acts at the next step, as it does without batches."""
    results = {}
    for batched in (False, True, None):
        pipe, call = ZOO["ip_adapter"]() if change is _adapter_off else sd()
        for i, block in enumerate(pipe.unet.up_blocks):
            block.resolution_idx = i
        if change is _hook_removed:
            pipe.unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda module, given: (-given[0], *given[1:]))
        if change is _lora_scale:
            from peft import LoraConfig

            torch.manual_seed(0)
            names = ["to_q", "to_v", "conv1"]
            pipe.unet.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False), "donor")

        def act(pipe: Any, i: int, t: Any, values: dict[str, Any], act: bool = batched is not None) -> dict[str, Any]:
            if i == 3 and act:
                change(pipe, values)
            return values

        accelerate(pipe, EncoderReuse(schedule=(0, 2), batch_decoder=batched is not False))
        seen = {"callback_on_step_end": act, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        results[batched] = run(pipe, {**call, "prompt_embeds": call["prompt_embeds"].clone()}, steps=8, **seen)
    assert counters(pipe)["decoder_runs"] < counters(pipe)["decoder_steps"], "nothing changed: all in one batch"
    assert close(results[True], results[False], tolerance=3e-5)
    assert not close(results[None], results[False], tolerance=1e-3)


def test_what_was_decoded_ahead_does_not_outlive_another_feature() -> None:
    from transparency_weights import tiny_weights

    results = {}
    for batched in (False, True):
        for until in (0.5, 1.0):
            pipe, call = sd()
            transparent = feature_class("transparent")(weights=tiny_weights(), until=until)
            accelerate(pipe, transparent, EncoderReuse(schedule=(0, 2), batch_decoder=batched))
            results[batched, until] = run(pipe, call, steps=8)
    assert close(results[True, 0.5], results[False, 0.5]) and close(results[True, 1.0], results[False, 1.0])
    assert not close(results[False, 0.5], results[False, 1.0], tolerance=3e-4)


def test_guidance_switched_off_during_the_call() -> None:
    """The batch shrinks from two rows to one: the kept features do not fit and the encoder must run again."""
    pipe, call = sd()

    def stop_guidance(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == 3:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": values["prompt_embeds"].chunk(2)[-1]}
        return values

    results = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule=(0, 2), batch_decoder=batched))
        extra = {
            "callback_on_step_end": stop_guidance,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        }
        results.append(run(pipe, call, steps=8, **extra))
        assert counters(pipe)["encoder_runs"] == 3
    assert close(*results)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cap_kib=st.integers(1, 64), interval=st.integers(2, 8))
def test_the_group_cap_limits_memory_and_changes_nothing(cap_kib: int, interval: int) -> None:
    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule=f"uniform:{interval}", batch_decoder=False))
    want = run(pipe, call, steps=9)
    feature = EncoderReuse(schedule=f"uniform:{interval}")
    object.__setattr__(feature, "max_group_mb", cap_kib / 1024)  # finer than the option, to exercise the split
    accelerate(pipe, feature)
    with counting(pipe.unet.conv_out) as out:
        got = run(pipe, call, steps=9)
    assert close(got, want)
    per_step = counters(pipe)["peak_cache_bytes"]
    largest = max(1, cap_kib * 1024 // per_step)
    assert out.rows == 18 and out.calls >= 9 / largest


SCHEDULERS = sorted(ddim().compatibles, key=lambda c: c.__name__)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda c: c.__name__)
def test_every_compatible_scheduler(scheduler: Any) -> None:
    if scheduler.__name__ == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="DPMSolverSDEScheduler itself needs torchsde")
    pipe, call = sd()

    def eight_steps() -> torch.Tensor:
        # a new object each time: DPMSolverSDEScheduler carries its noise over from call to call
        seed = {"noise_sampler_seed": 0} if scheduler.__name__ == "DPMSolverSDEScheduler" else {}
        pipe.scheduler = scheduler.from_config(ddim().config, **seed)
        return run(pipe, call, steps=8)

    base = eight_steps()
    accelerate(pipe, EncoderReuse.neutral())
    assert torch.equal(eight_steps(), base)
    results = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule="uniform:4", batch_decoder=batched))
        results.append(eight_steps())
        assert counters(pipe)["encoder_runs"] == len(key_steps("uniform:4", pipe.acceleration.report().steps))
    assert close(*results)
    assert pipe.acceleration.report().steps == len(pipe.scheduler.timesteps)


def test_img2img_counts_from_its_own_first_step() -> None:
    pipe, call = ZOO["img2img"]()
    accelerate(pipe, EncoderReuse(schedule=(0, 2)))
    run(pipe, call, steps=10, strength=0.5)
    assert pipe.acceleration.report().steps == 5
    assert counters(pipe)["encoder_runs"] == 2


def test_sdxl_stopped_early_knows_its_length() -> None:
    pipe, call = sdxl()
    accelerate(pipe, EncoderReuse(schedule=(0, 3), batch_decoder=True))
    run(pipe, call, steps=10, denoising_end=0.5)
    report = pipe.acceleration.report()
    assert report.steps == counters(pipe)["decoder_steps"] < 10


def test_free_init_passes_over_the_timesteps_again() -> None:
    pipe, call = ZOO["animatediff"]()
    pipe.enable_free_init(num_iters=2)
    base = run(pipe, call, steps=4)
    accelerate(pipe, EncoderReuse.neutral())
    assert torch.equal(run(pipe, call, steps=4), base)
    accelerate(pipe, EncoderReuse(schedule=(0, 2)))
    run(pipe, call, steps=4)
    assert counters(pipe)["encoder_runs"] == 4, "two key steps in each of the two passes"


def test_cross_frame_attention_is_never_stacked() -> None:
    from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
        CrossFrameAttnProcessor2_0,
    )

    pipe, call = sd()
    pipe.unet.set_attn_processor(CrossFrameAttnProcessor2_0(batch_size=2))
    accelerate(pipe, EncoderReuse(schedule=(0, 2)))
    run(pipe, call)
    assert counters(pipe)["decoder_runs"] == counters(pipe)["decoder_steps"] == 6


def test_perturbed_attention_guidance() -> None:
    from diffusers import StableDiffusionPAGPipeline

    plain, call = sd()
    pipe = StableDiffusionPAGPipeline(**plain.components, requires_safety_checker=False, pag_applied_layers=["mid"])
    call = {**call, "pag_scale": 2.0}
    base = run(pipe, call)
    accelerate(pipe, EncoderReuse.neutral())
    assert torch.equal(run(pipe, call), base)
    results = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule=(0, 2), batch_decoder=batched))
        results.append(run(pipe, call))
    assert close(*results)


def test_two_pipelines_that_share_a_unet() -> None:
    from diffusers import StableDiffusionPipeline

    pipe, call = sd()
    other = StableDiffusionPipeline(**{**pipe.components, "scheduler": ddim()}, requires_safety_checker=False)
    base = run(other, call)
    accelerate(pipe, EncoderReuse())
    assert torch.equal(run(other, call), base), "a plain pipeline beside an accelerated one"
    accelerate(other, EncoderReuse())

    def nested(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(CallStateError, match="has not ended"):
            run(other, call)
        return values

    first = run(pipe, call)
    assert torch.equal(run(pipe, call, callback_on_step_end=nested), first)
    assert torch.equal(run(other, call), first)


def test_a_thread_that_borrows_the_unet_is_refused() -> None:
    import threading

    pipe, call = sd()
    accelerate(pipe, EncoderReuse())
    errors: list[BaseException] = []

    def borrow() -> None:
        try:
            pipe.unet(torch.zeros(1, 4, 8, 8), 3, encoder_hidden_states=text()["prompt_embeds"])
        except CallStateError as error:
            errors.append(error)

    def in_thread(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            thread = threading.Thread(target=borrow)
            thread.start()
            thread.join()
        return values

    first = run(pipe, call)
    assert torch.equal(run(pipe, call, callback_on_step_end=in_thread), first)
    assert len(errors) == 1
    borrow()
    assert len(errors) == 1, "outside a call the U-Net is plain"


def test_memory_is_freed_after_the_call() -> None:
    import gc
    import weakref

    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule="uniform:3"))
    kept: list[weakref.ref] = []

    class Watch(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            kept.append(weakref.ref(output))
            return output

    HookRegistry.check_if_exists_or_initialize(pipe.unet.conv_in).register_hook(Watch(), "watch")
    run(pipe, call)
    gc.collect()
    assert kept and all(ref() is None for ref in kept)


def test_a_key_step_beyond_the_run_is_refused_before_the_unet_runs() -> None:
    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule=(0, 30)))
    with counting(pipe.unet.conv_in) as conv, pytest.raises(AccelerationError, match="beyond this run of 6 steps"):
        run(pipe, call)
    assert conv.calls == 0


def test_a_unet_replaced_by_something_else_is_refused_at_the_call() -> None:
    pipe, call = sd()
    accelerate(pipe, EncoderReuse())
    first = run(pipe, call)
    pipe.unet = unet()
    assert torch.equal(run(pipe, call), first), "another U-Net with equal weights just works"
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(AccelerationError, match="compile_repeated_blocks"):
        run(pipe, call)


def test_regional_compilation_marks_are_respected() -> None:
    """`compile_repeated_blocks` compiles the transformer blocks inside the stages, which no hook touches."""
    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule="uniform:3"))
    want = run(pipe, call)
    pipe.unet.compile_repeated_blocks(backend="eager")
    assert close(run(pipe, call), want)


@pytest.fixture(scope="module")
def sd_pipe() -> Built:
    return sd()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(keys=st.sets(st.integers(1, 7)), batched=st.booleans())
def test_counts_for_any_key_steps(sd_pipe: Built, keys: set[int], batched: bool) -> None:
    pipe, call = sd_pipe
    schedule = tuple(sorted({0} | keys))
    accelerate(pipe, EncoderReuse(schedule=schedule, batch_decoder=batched))
    run(pipe, call, steps=8)
    c = counters(pipe)
    assert c["encoder_runs"] == c["full_steps"] == len(schedule)
    assert c["decoder_steps"] == 8 and c["reused_steps"] == 8 - len(schedule)
    assert c["decoder_runs"] == 8 if not batched else len(schedule) <= c["decoder_runs"] <= len(schedule) + 1
