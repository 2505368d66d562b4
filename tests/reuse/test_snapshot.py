"""What was decoded ahead does not outlive a change of what it was decoded from."""

from __future__ import annotations

from typing import Any

import pytest
import reuse_tools
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from reuse_tools import close
from zoo import ZOO, rand, run, sd

from diffusion_accel import EncoderReuse, accelerate
from diffusion_accel.registry import feature_class


def counters(pipe: Any) -> dict[str, float]:
    return reuse_tools.counters(pipe, "encoder_reuse")


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


@pytest.mark.sampled(3)
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
