"""Cases: transformers whose tokens are shared by hooks of our own."""

from __future__ import annotations

from typing import Any

import bare
import diffusers
import torch
import zoo
from case_tools import close, left_behind, once, parallel
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from transformers_zoo import CASES, IMAGE, TEXT

from diffusion_accel import Reuse, accelerate
from diffusion_accel.denoisers import model_family
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.hooks import map_tensors
from diffusion_accel.parallel.context import share, unshare, why_not_shared
from diffusion_accel.parallel.group import join
from diffusion_accel.parallel.token_hooks import TokenAttentionHook, split_tokens

HALF = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])  # a mask of the text


def rotary(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return zoo.rand(*shape, seed=4), zoo.rand(*shape, seed=5)


def places(*sizes: int) -> list[torch.Tensor]:
    """Where each of 2 x 4 x 4 tokens is, by axis."""
    return [axis.flatten()[None] for axis in torch.meshgrid(*map(torch.arange, sizes), indexing="ij")]


# what the calls of the other tests leave out: case, as which one -> its configuration and arguments
MORE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen_masked": ("qwen", {}, {"encoder_hidden_states_mask": HALF}),
    "qwen_edit": ("qwen", {"zero_cond_t": True}, {"img_shapes": [[(1, 2, 4), (1, 2, 4)]] * 2}),
    "chroma_masked": ("chroma", {}, {"attention_mask": torch.cat([HALF, torch.ones(2, 4)], 1).bool()}),
    "hunyuan_video_masked": ("hunyuan_video", {}, {"encoder_attention_mask": HALF}),
    "mochi_masked": ("mochi", {}, {"encoder_attention_mask": HALF.bool()}),
    "lumina2_masked": ("lumina2", {}, {"encoder_attention_mask": HALF.bool()}),
    "cogvideox_rotary": ("cogvideox", {"use_rotary_positional_embeddings": True}, {"image_rotary_emb": rotary(32, 8)}),
    "hunyuan_dit_rotary": ("hunyuan_dit", {}, {"image_rotary_emb": rotary(16, 8)}),
    "allegro_rotary": ("allegro", {}, {"image_rotary_emb": ([rotary(8, 8)] * 3, places(2, 4, 4))}),
    "wan_timesteps": ("wan", {}, {"timestep": torch.arange(64.0).view(2, 32)}),
    "ltx_timesteps": ("ltx", {}, {"timestep": torch.arange(16.0).view(2, 8)}),
}


def cases() -> list[str]:
    """Every transformer that has `tokens`."""
    known = {case: model_family(getattr(diffusers, name)) for case, (name, _, _) in CASES.items()}
    return [*(case for case, family in known.items() if family is not None and family.tokens is not None), *MORE]


def built(case: str) -> tuple[Any, dict[str, Any]]:
    """A transformer in double precision, and the arguments of a call."""
    like, more, other = MORE.get(case, (case, {}, {}))
    name, config, call = CASES[like]
    given = {"hidden_states": IMAGE, "timestep": torch.tensor([500.0, 500.0]), **call, **other}
    model = zoo.seeded(lambda: getattr(diffusers, name)(**{**config, **more}))
    return model.double(), map_tensors(lambda t: t.double() if t.dtype == torch.float32 else t, given)


def tokens_of_every_transformer(rank: int, size: int) -> None:
    """`sync` is one process; and so is `displaced`, also at steps that do not wait, if its input stays the same."""
    for case in cases():
        model, call = built(case)
        plain = once(lambda model=model, call=call: bare.predict(model, **call))
        for mode in ("sync",) if case in MORE else ("sync", "displaced"):
            with bare.shared(model, mode) as run:
                for index in range(3 if mode == "displaced" else 1):
                    run.clock.index = index
                    try:
                        close(bare.predict(model, **call), plain, 1e-9)
                    except BaseException as error:
                        raise AssertionError(f"{case}, {mode}, step {index}") from error
                kinds = {kind for kind, _ in run.communicator.traffic}
                assert kinds == {"attention", "output"} and run.counters["stale_steps"] == 2 * (mode != "sync"), case
        assert torch.equal(once(lambda model=model, call=call: bare.predict(model, **call)), plain)


def displaced_attention_uses_the_step_before(rank: int, size: int) -> None:
    """A joint attention with inputs that change, against its formula: of the others the keys and values are old, of the
    text and of this part they are not; and each of two calls of a step has its own."""
    torch.manual_seed(0)
    joint = {"added_kv_proj_dim": 16, "context_pre_only": False, "out_dim": 16, "processor": JointAttnProcessor2_0()}
    attention = zoo.seeded(lambda: Attention(query_dim=16, heads=2, dim_head=8, bias=True, **joint)).double()
    image, text = torch.randn(4, 2, 2, 11, 16).double(), torch.randn(4, 2, 2, 5, 16).double()  # by step and call
    split = split_tokens(11, size, rank)
    low, high = split.levels[0].slice(rank)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (2, 8)).transpose(1, 2)

    with bare.split(torch.nn.Module(), "displaced") as run, torch.no_grad():
        hooks = bare.HookSet("test.attention")
        hooks.add(attention, TokenAttentionHook(run, "attention", "last"))
        for step in range(4):
            for call in range(2):
                run.clock.index, run.clock.call = step, call
                own, beside = image[step, call][:, low:high], text[step, call]
                with run.running("test", split, tuple(range(size)), exact=step == 0, keeps=True):
                    found, _ = attention(own, encoder_hidden_states=beside)
                mixed = image[max(step - 1, 0), call].clone()
                mixed[:, low:high] = own
                keys = heads(torch.cat([attention.to_k(mixed), attention.add_k_proj(beside)], 1))
                values = heads(torch.cat([attention.to_v(mixed), attention.add_v_proj(beside)], 1))
                weights = (heads(attention.to_q(own)) @ keys.transpose(2, 3) / 8**0.5).softmax(-1)
                close(found, attention.to_out[0]((weights @ values).transpose(1, 2).flatten(2)), 1e-12)
            run.communicator.flush(image.device)
        hooks.remove()


def diffusers_shares_what_it_can(rank: int, size: int) -> None:
    """diffusers' context parallelism on bare models, put on and off again."""
    world = join(torch.device("cpu"), 60.0)
    for case in ("flux", "flux2", "qwen", "qwen_masked", "qwen_edit", "wan", "wan_timesteps"):
        model, call = built(case)
        plain = once(lambda model=model, call=call: bare.predict(model, **call))
        assert why_not_shared(model, size) is None
        try:
            share(model, world)
            close(bare.predict(model, **call), plain, 1e-9)
        finally:
            unshare(model)
        assert torch.equal(once(lambda model=model, call=call: bare.predict(model, **call)), plain), case
    assert "no context-parallel plan" in (why_not_shared(built("ltx")[0], size) or "")


def naive_tokens_see_their_own(rank: int, size: int) -> None:
    """One process with attention within each part; also beside a mask and a text."""
    model, call = built("dit")
    parts = torch.tensor([part for part in range(size) for _ in range(16 * part // size, 16 * (part + 1) // size)])
    with bare.shared(model, "naive", warmup=0) as run:
        found = bare.predict(model, **call)
        assert {kind for kind, _ in run.communicator.traffic} == {"output"}
    masked = bare.masked(model, lambda tokens: parts[:, None] == parts)
    close(found, once(lambda: bare.predict(masked, **call)), 1e-9)
    for case in ("qwen_masked", "chroma_masked", "sd3"):
        model, call = built(case)
        plain = once(lambda model=model, call=call: bare.predict(model, **call))
        with bare.shared(model, "naive", warmup=1) as run:
            close(bare.predict(model, **call), plain, 1e-9)
            run.clock.index = 1
            assert bare.predict(model, **call).isfinite().all()


def tokens_of_pipelines(rank: int, size: int) -> None:
    """`sync`, and `displaced` with as many exact steps as there are, equal one process; again, and never attached."""
    for kind in ("sd3", "z_image", "pixart", "dit", "flux", "wan")[: 6 if size == 2 else 2]:
        pipe, call = getattr(zoo, kind)()
        call["output_type"] = "latent" if kind == "wan" else "pt" if kind != "dit" else "np"
        pipe.vae.register_to_config(shift_factor=0.0)
        if kind == "flux":
            extra = {"negative_prompt_embeds": TEXT[:1], "negative_pooled_prompt_embeds": zoo.rand(1, 8, seed=9)}
            call |= {**extra, "true_cfg_scale": 3.0}
        plain = once(lambda pipe=pipe, call=call: zoo.run(pipe, call, 3))
        for settings in ({"mode": "sync"}, {"mode": "displaced", "warmup": 3}, {"mode": "displaced", "warmup": 1}):
            accelerate(pipe, parallel(**settings))
            first, report = zoo.run(pipe, call, 3), pipe.acceleration.report()
            counters = report.counters["patch_parallel"]
            if settings.get("warmup", 3) == 3:
                close(first, plain)
                assert counters["exact_steps"] == 3 and counters["stale_steps"] == 0, counters
            else:
                assert counters["stale_steps"] == 2 and (first - plain).abs().max() > 0, counters
                assert counters["attention_bytes"] > 0 and counters["buffer_bytes"] > 0
                assert torch.equal(zoo.run(pipe, call, 3), first) and not left_behind(pipe)
        pipe.acceleration.remove()
        assert torch.equal(once(lambda pipe=pipe, call=call: zoo.run(pipe, call, 3)), plain)


def tokens_with_reuse(rank: int, size: int) -> None:
    """Held and shallow steps, and steps without a branch of guidance: the same images as on one process."""
    for kind, feature in (
        ("sd3", Reuse(plan="hold:2")),
        ("sd3", Reuse(plan="shallow:2,1")),
        ("sd3", Reuse(plan="full", guidance="reuse:2")),
        ("cogview4", Reuse(plan="shallow:2,1", guidance="reuse:2")),
    ):
        pipe, call = getattr(zoo, kind)()
        accelerate(pipe, feature)
        plain = once(lambda pipe=pipe, call=call: zoo.run(pipe, call, 4))
        accelerate(pipe, parallel())
        close(zoo.run(pipe, call, 4), plain)
        accelerate(pipe, parallel(mode="displaced", warmup=1))
        assert torch.isfinite(zoo.run(pipe, call, 4)).all()


def tokens_of_branches(rank: int, size: int) -> None:
    """The two halves of the batch on two halves of the processes: with two, only the prediction is sent, and no step is
    inexact."""
    for kind in ("sd3", "z_image", "pixart", "dit")[: 4 if size == 2 else 2]:
        pipe, call = getattr(zoo, kind)()
        plain = once(lambda pipe=pipe, call=call: zoo.run(pipe, call, 3))
        accelerate(pipe, parallel(cfg_parallel=True, mode="displaced" if size == 2 else "sync", warmup=1))
        close(zoo.run(pipe, call, 3), plain)
        layers = pipe.acceleration.report().details["patch_parallel"]
        own = {layer for layer in layers if layer.startswith("transformer.")}
        assert (own == {"transformer.prediction"}) == (size == 2) and "transformer.prediction" in own, own


def counted_token_bytes(rank: int, size: int) -> None:
    """By layer: keys and values of all own tokens to every other process, and the tokens of the last layer."""
    model, call = built("sd3")  # 4 blocks of 16 channels, 16 tokens with 16 numbers at the end, batches of 2
    with bare.shared(model, "displaced") as run:
        for index in range(3):
            run.clock.index = index
            before = run.communicator.traffic.copy()
            bare.predict(model, **call)
            sent = run.communicator.traffic - before
            own = 16 * (rank + 1) // size - 16 * rank // size
            names = {
                ("attention", f"model.transformer_blocks.{i}.attn"): 2 * own * 2 * 16 * 8 * (size - 1) for i in range(4)
            }
            assert sent == {**names, ("output", "model.proj_out"): 2 * own * 16 * 8 * (size - 1)}, (index, sent)


def tokens_that_cannot_be_shared_are_refused(rank: int, size: int) -> None:
    pipe, call = zoo.pixart()
    accelerate(pipe, parallel())
    attention = pipe.transformer.transformer_blocks[0].attn1
    attention.processor = bare.MaskedAttention(lambda n: torch.ones(n, n))
    try:
        zoo.run(pipe, call, 2)
    except ConfigurationError as error:
        assert "not known to work on a part: MaskedAttention" in str(error), error
        assert not left_behind(pipe)
    else:
        raise AssertionError("not refused")
