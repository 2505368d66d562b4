"""Other accelerators: what can be set, what is refused, and what diffusers' caches and cache-dit do on transformers."""

from __future__ import annotations

import itertools
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, PyramidAttentionBroadcastConfig
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from zoo import DIM, TOKENS, dit, flux, rand

from diffusion_accel import ConfigurationError
from diffusion_accel.bench import cache_peers
from diffusion_accel.bench.entries import Entry
from diffusion_accel.bench.peers import PEERS, read_settings
from diffusion_accel.bench.runner import Job, Runner
from diffusion_accel.errors import UnsupportedPipelineError

BASE = Entry("baseline")
JOB = Job("tiny", ("3", "5"), 7, batch=2, options={"guidance_scale": 3.0, "height": 16, "width": 16})
NEUTRAL = (
    "first-block:0 taylorseer:1 taylorseer:1,parts=attention taylorseer:1,parts=lite mag:skips=0 sea:0 pab:1 "
    "faster-cache:1,1 dbcache:0"
).split()
SKIPPING = (
    "first-block:0.5 taylorseer:3,2 taylorseer:3,parts=attention taylorseer:3,parts=lite mag:0.5 sea:10 pab:2 "
    "faster-cache:2,2 dbcache:1,warmup=2 dbcache:1,warmup=2,order=1"
).split()


class FluxOfTexts(FluxPipeline):
    """Flux whose texts are numbers that seed their embeddings. A class of its own, for cache-dit changes classes."""

    def encode_prompt(self, prompt: Any, **_: Any) -> Any:
        texts = [prompt] if isinstance(prompt, str) else prompt
        seeds = [int(text or 0) for text in texts]
        embeds = torch.cat([rand(1, TOKENS, DIM, seed=seed) for seed in seeds])
        return embeds, torch.cat([rand(1, 8, seed=seed) for seed in seeds]), torch.zeros(TOKENS, 3)


def of_flux(**changes: Any) -> Runner:
    """True guidance: two calls a step."""
    pipe = flux()[0]
    pipe.vae.register_to_config(shift_factor=0.0)
    pipe.__class__ = types.new_class("FluxOfTexts", (FluxOfTexts,))
    pipe.set_progress_bar_config(disable=True)
    return Runner(replace(JOB, **changes), pipe)


def of_dit(**changes: Any) -> Runner:
    """Guidance as halves of a batch, a pipeline that names no context and a model that takes no cache by itself."""
    pipe = dit()[0]
    pipe.set_progress_bar_config(disable=True)
    return Runner(replace(JOB, **changes), pipe)


def with_peer(build: Any, text: str, **changes: Any) -> tuple[Runner, Entry]:
    entry, runner = Entry.parse(text), build(**changes)
    if entry.kind == "dbcache":
        pytest.importorskip("cache_dit")
    runner.check(entry)
    runner.switch_on(entry)
    return runner, entry


def pairs(texts: list[str], dit: str) -> list[tuple[Any, str]]:
    return [*((of_flux, text) for text in texts), *((of_dit, text) for text in dit.split())]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("taylorseer:0", "interval of taylorseer must be a whole number from 1 to 9999, got '0'"),
        ("taylorseer:3,order=9", "order of taylorseer must be a whole number from 0 to 4, got '9'"),
        ("taylorseer:3,parts=all", "parts of taylorseer must be one of blocks, attention, lite, got 'all'"),
        ("taylorseer:order=1,3", "each once, values without a name first"),
        ("taylorseer:3,interval=2", "each once"),
        ("mag:speed=2", "mag takes threshold=,skips=,retention="),
        ("first-block:0.1,2", r"at most 1 settings \(threshold\)"),
        ("tomesd:1.5", "ratio of tomesd must be a number from 0 to 1, got '1.5'"),
        ("pab:1.5", "a whole number"),
        ("sea:nan", "threshold of sea must be a number"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Entry.parse(text)


def test_settings_are_read_by_place_and_by_name() -> None:
    usual = {name: setting.usual for name, setting in PEERS["taylorseer"].settings.items()}
    assert read_settings("taylorseer", "") == usual
    expected = {**usual, "interval": 3, "order": 2, "parts": "lite"}
    assert read_settings("taylorseer", "3,2,parts=lite") == expected
    assert read_settings("taylorseer", "parts=lite,order=2,interval=3") == expected
    assert read_settings("dbcache", "0.25,skips=-1")["threshold"] == 0.25
    for kind, peer in PEERS.items():
        for name, setting in peer.settings.items():
            assert setting.read(str(setting.usual)) == setting.usual, (kind, name)


@pytest.mark.parametrize(
    ("build", "text", "words"),
    [
        (of_dit, "deepcache:3", "deepcache is for U-Nets, and DiTTransformer2DModel has no"),
        (of_dit, "faster-cache", "the conditional half of its batch comes first"),
    ],
)
def test_what_does_not_fit_is_refused(build: Any, text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        build().check(Entry.parse(text))


@pytest.mark.parametrize("kind", ["first-block", "taylorseer", "mag", "sea", "faster-cache", "dbcache"])
def test_what_is_for_transformers_is_refused_on_a_unet(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    runner = Runner(Job("sticker", ("a",), 2))
    with pytest.raises(ConfigurationError, match=f"the entry {kind} cannot work on .* for transformers, and "):
        runner.check(Entry.parse(kind))


@pytest.mark.parametrize(
    ("text", "words"), [("parts=lite", "a layer called proj_out"), ("parts=attention", "no layers")]
)
def test_taylorseer_that_would_be_put_on_nothing_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        with_peer(of_dit, f"taylorseer:{text}")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Entry.parse("dbcache").refusal(20, "") == "the package cache_dit is not installed (pip install cache-dit)"
    assert Entry.parse("mag").refusal(20, "") is None


@pytest.mark.parametrize(("build", "text"), pairs(NEUTRAL, "taylorseer:1 sea:0"))
def test_neutral_settings_are_plain_diffusers(build: Any, text: str) -> None:
    runner, entry = with_peer(build, text, prompts=("3",))
    assert torch.equal(runner.images(entry), build(prompts=("3",)).images(BASE))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("build", "text"), pairs(SKIPPING, "first-block:0.5 taylorseer:3 sea:10"))
def test_work_is_left_out_and_nothing_stays_from_one_image_to_the_next(build: Any, text: str) -> None:
    runner, entry = with_peer(build, text)
    both, plain = runner.images(entry), build()
    assert both.isfinite().all() and not torch.equal(both, plain.images(BASE))
    assert runner.facts(entry)["flops"] < plain.facts(BASE)["flops"]
    assert torch.equal(runner.images(entry), both), "a second call begins anew"
    if entry.by_image:
        alone, _ = with_peer(build, text, prompts=JOB.prompts[1:], seed=1)
        assert torch.equal(alone.images(entry), both[1:]), "each image is as by itself"


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("first-block:0.5", lambda pipe: FirstBlockCacheConfig(threshold=0.5)),
        (
            "taylorseer:3,2,parts=attention",
            lambda pipe: TaylorSeerCacheConfig(cache_interval=3, max_order=2, taylor_factors_dtype=torch.float32),
        ),
    ],
)
def test_with_contexts_of_the_pipeline_the_images_are_those_of_diffusers_itself(text: str, config: Any) -> None:
    theirs = of_flux(prompts=("3",))
    theirs.pipe.transformer.enable_cache(config(theirs.pipe))
    runner, entry = with_peer(of_flux, text, prompts=("3",))
    assert torch.equal(runner.images(entry), theirs.images(BASE))


def test_a_cache_without_contexts_has_one_for_each_branch() -> None:
    """Where both branches are told the same, guidance changes nothing; alone it is diffusers' own."""
    runner, entry = with_peer(of_flux, "pab:2", prompts=("0",))
    theirs = of_flux(prompts=("0",), options={**JOB.options, "guidance_scale": 1.0})
    pipe = theirs.pipe
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe._current_timestep
        )
    )
    torch.testing.assert_close(runner.images(entry), theirs.images(BASE))


def test_mag_cache_has_the_ratios_of_the_model() -> None:
    """Each is by how much what all blocks add grows from one step to the next, of the conditional branch."""
    runner, _ = with_peer(of_flux, "mag", prompts=("3",))
    given = [
        hook.config.mag_ratios
        for module in runner.pipe.transformer.modules()
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
        if hasattr(hook, "config")
    ]
    plain, inputs, outputs = of_flux(prompts=("3",), seed=cache_peers.CALIBRATION_SEED), [], []
    blocks = plain.pipe.transformer
    blocks.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    blocks.single_transformer_blocks[-1].register_forward_hook(lambda module, args, out: outputs.append(out[1]))
    plain.images(BASE)
    added = [(after - before).norm(dim=-1) for after, before in zip(outputs[::2], inputs[::2], strict=True)]
    expected = [1.0, *(float((b / a).mean()) for a, b in itertools.pairwise(added))]
    assert len(given) == 4 and torch.allclose(given[0], torch.tensor(expected), rtol=1e-4)
    with pytest.raises(ConfigurationError, match="counts steps"):
        with_peer(of_flux, "mag", scheduler="heun")


def test_sea_cache_sees_images() -> None:
    packed = rand(2, 6, 5)  # 3 rows of 2 places
    places = FluxPipeline._prepare_latent_image_ids(1, 3, 2, "cpu", torch.float32)
    rows = cache_peers.latents_of(torch.nn.Identity(), (packed,), {"img_ids": places})
    assert [row.shape for row in rows] == [(5, 1, 3, 2)] * 2
    for place, values in zip(places.long().tolist(), packed[1], strict=True):
        assert torch.equal(rows[1][:, 0, place[1], place[2]], values)
    video = rand(2, 4, 3, 8, 8)
    assert torch.equal(torch.stack(cache_peers.latents_of(torch.nn.Identity(), (), {"hidden_states": video})), video)
    with pytest.raises(UnsupportedPipelineError, match="given tokens"):
        cache_peers.latents_of(torch.nn.Identity(), (packed,), {})


def test_how_a_pipeline_computes_an_image() -> None:
    assert cache_peers.layout_of(of_flux()) == cache_peers.Layout(calls=2, rows=1)
    assert cache_peers.layout_of(of_dit()) == cache_peers.Layout(calls=1, rows=2)
    assert cache_peers.layout_of(of_flux(options={"guidance_scale": 1.0})) == cache_peers.Layout(calls=1, rows=1)
