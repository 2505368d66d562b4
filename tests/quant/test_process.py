"""The stages of quantizing: what each changes, what each brings, and that an interrupted run ends as an
uninterrupted one."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel.denoisers import TIME_LAYERS
from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.quant.layers import quantized_layers
from diffusion_accel.quant.model import candidates, set_runtime, tables
from diffusion_accel.quant.ptq import stage as stage_of
from diffusion_accel.quant.ptq.bits import allocate
from diffusion_accel.quant.ptq.budget import PROBE_ROWS, plan_prompts, plan_report, shares
from diffusion_accel.quant.ptq.calibration import CalibrationSet, record, relative_error
from diffusion_accel.quant.ptq.finetune import FinetuneSettings, matching
from diffusion_accel.quant.ptq.finetuner import Finetuner, batches
from diffusion_accel.quant.ptq.folder import held
from diffusion_accel.quant.ptq.ranges import RangeSettings, observe
from diffusion_accel.quant.ptq.reconstruct import RoundingSettings, capture, reconstruct, units
from diffusion_accel.quant.ptq.report import QuantizationReport
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings, parse_bits
from diffusion_accel.quant.ptq.trainable_layer import TrainableLayers, set_quantization_state
from diffusion_accel.quant.spec import LayerSpec

WHOLE = QuantizeSettings(
    weight_bits=3,
    buckets=3,
    rounding=RoundingSettings(iterations=60, rows=12, batch=6, rate=5e-3),
    finetune=FinetuneSettings(time_epochs=(4, 2, 3), time_rows=4, epochs=4, rows=8, batch=4, rate=1e-4),
)
SHORT = replace(  # all stages, for what does not hang on how far they come
    WHOLE,
    rounding=replace(WHOLE.rounding, iterations=8),
    finetune=replace(WHOLE.finetune, time_epochs=(1, 1, 1), epochs=2),
)


def sampler(count: int = 8) -> Sampler:
    pipe, _ = zoo.unet2d()
    pipe.set_progress_bar_config(disable=True)
    return Sampler(pipe, ("",) * count, 4, batch=4)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    return record(sampler(), 3, tmp_path_factory.mktemp("calibration"))


def drafted(calibration: CalibrationSet, bits: int = 3) -> tuple[Any, TrainableLayers]:
    model = copy.deepcopy(sampler().pipe.unet)
    names = list(candidates(model))
    return model, TrainableLayers(
        model, {n: LayerSpec(weight_bits=bits, activation_bits=8) for n in names}, calibration.timesteps
    )


# ---------------------------------------------------------------------- calibration
def test_the_calibration_set_is_the_models_own_trajectory(calibration: CalibrationSet) -> None:
    s = sampler()
    assert calibration.timesteps == (750.0, 250.0, 0.0) and calibration.rows == 8
    for number in range(3):
        rows = calibration.bucket(number)
        assert len(rows) == 8 and set(rows.arguments["timestep"].tolist()) == {calibration.timesteps[number]}
        assert torch.allclose(rows.run(s.pipe.unet), rows.output, atol=1e-5)
    assert torch.equal(calibration.sample(1, 4, 7).output, calibration.sample(1, 4, 7).output)


def test_both_branches_of_guidance_are_recorded(tmp_path: Path) -> None:
    from tests.quant.test_checkpoint import Prompted

    pipe, call = zoo.sd()
    found = record(Prompted(pipe, call), 2, tmp_path)
    rows = found.bucket(0)
    assert len(rows) == 2 * 4  # four images, with and without the prompt
    text = rows.arguments["encoder_hidden_states"]
    assert not torch.equal(text[0], text[1]) and torch.equal(text[0], text[2])
    assert torch.allclose(rows.run(pipe.unet), rows.output, atol=1e-5)


# ---------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        *((FinetuneSettings, name, v) for name in ("rate", "scale_rate") for v in (float("nan"), 1e300, 0, True, "1")),
        *((FinetuneSettings, "epochs", v) for v in (-1, 10**30, 1.5)),
        (FinetuneSettings, "time_epochs", (1, 10**30, 1)),
        (FinetuneSettings, "rows", 0),
        (RoundingSettings, "iterations", 10**30),
        (RoundingSettings, "beta", (20.0, float("inf"))),
        (RangeSettings, "momentum", float("nan")),
        (RangeSettings, "percentiles", (99.0, 101.0)),
        (QuantizeSettings, "seed", -1),
    ],
)
def test_numbers_of_settings_have_bounds(cls: Any, name: str, value: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"{name.replace('_', ' ')}.* must be a (whole )?number from .*, got "
    ):
        cls(**{name: value})


# ---------------------------------------------------------------------- layers
def test_a_draft_that_rounds_nothing_is_the_model(calibration: CalibrationSet) -> None:
    model, layers = drafted(calibration)
    plain = sampler().pipe.unet
    rows = calibration.bucket(1)
    assert torch.equal(rows.run(model), rows.run(plain))
    layers.restore()
    assert "forward" not in model.__dict__ and torch.equal(rows.run(model), rows.run(plain))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_learnt_rounding_is_nearer_than_rounding_to_nearest(calibration: CalibrationSet) -> None:
    model, layers = drafted(calibration)
    rows = [calibration.bucket(b) for b in range(3)]
    name, unit = next((n, u) for n, u in units(model, rows[0]).items() if n.endswith("resnets.0"))

    def switch(full: bool) -> None:
        set_quantization_state(layers, weights=False, inputs=False)

    data = capture(model, unit, rows, switch)
    assert len(data.target) == 24
    set_quantization_state(layers, weights=False, inputs=False)
    mine = [d for n, d in layers.items() if n.startswith(name)]
    before = [(d.up.clone(), d.codes().detach().clone()) for d in mine]
    nearest, learnt = reconstruct(unit, data, RoundingSettings(iterations=150, batch=12, rate=1e-2), seed=0)
    assert learnt < 0.8 * nearest
    for layer, (up, codes) in zip(mine, before, strict=True):
        assert layer.logits is None and not torch.equal(layer.up, up)
        assert (layer.codes() - codes).abs().max() <= 1  # up or down, nothing else
        assert layer.codes().min() >= 0 and layer.codes().max() <= 7


def test_units_are_in_the_order_in_which_the_model_runs() -> None:
    from tests.quant.test_checkpoint import Prompted

    pipe, call = zoo.sd()
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = record(Prompted(pipe, call), 1, Path(folder))
        model = pipe.unet
        TrainableLayers(model, {n: LayerSpec(weight_bits=4) for n in candidates(model)}, ())
        names = list(units(model, found.bucket(0)))
    assert names[0].startswith("time_embedding") and names[-1] == "conv_out"
    first = names.index("down_blocks.1.resnets.0")
    assert names.index("down_blocks.1.attentions.0.transformer_blocks.0") > first
    assert not any(".attn1" in n or ".conv1" in n for n in names)  # inside of blocks


# ---------------------------------------------------------------------- finetuning
@pytest.mark.parametrize("stage", ["time", "attention"])
def test_only_what_is_chosen_learns(calibration: CalibrationSet, stage: str) -> None:
    model, layers = drafted(calibration)
    set_quantization_state(layers, weights=True, inputs=False)
    observe(model, layers, calibration, QuantizeSettings().observation, range(3), {})
    times = matching(layers, (TIME_LAYERS,))
    assert times and all("time_emb" in n for n in times)
    chosen = times if stage == "time" else matching(layers, (r".*\.(to_q|to_k|to_v)",))
    scales = times if stage == "time" else [n for n in layers if n not in times]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    finetuner = Finetuner(model, layers, chosen, scales, rate=1e-3, scale_rate=1e-2, layer_loss=True)
    finetuner.visit(1)
    rows = next(iter(batches(calibration, 1, 8, 8, 0)))
    for _ in range(2):  # Adam's first step may leave what has no gradient yet
        finetuner.step(rows)
    finetuner.close()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in changed if n.endswith((".weight", ".bias"))} <= {
        f"{c}.{k}" for c in chosen for k in ("weight", "bias")
    }
    assert {f"{c}.weight" for c in chosen} <= changed
    moved = {n.removesuffix(".input_scale") for n in changed if n.endswith("input_scale")}
    assert moved and moved <= set(scales)
    for name in moved:  # only at the timestep of the rows
        now, was = layers[name].input_scale, before[f"{name}.input_scale"]
        assert torch.equal(now[[0, 2]], was[[0, 2]]) and not torch.equal(now[1], was[1])
    assert all(not p.requires_grad for p in model.parameters())
    assert all(torch.equal(d.layer.weight, before[f"{n}.layer.weight"]) for n, d in layers.items())


def test_finetuning_begins_at_the_error_and_reduces_it(calibration: CalibrationSet) -> None:
    model, layers = drafted(calibration)
    set_quantization_state(layers, weights=True, inputs=False)
    observe(model, layers, calibration, QuantizeSettings().observation, range(3), {})
    finetuner = Finetuner(model, layers, list(layers), list(layers), rate=1e-4, scale_rate=1e-3, layer_loss=False)
    finetuner.visit(2)
    rows = calibration.bucket(2)
    set_quantization_state(layers, weights=True, inputs=True)
    with torch.no_grad():
        expected = float((rows.run(model) - rows.output).square().mean())
    losses = [finetuner.step(rows) for _ in range(30)]
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]


def moved_scales(calibration: CalibrationSet, moments: str, visits: tuple[int, ...]) -> list[torch.Tensor]:
    """Scales of all layers after two steps at each of `visits`, with weights that stay."""
    model, layers = drafted(calibration)
    set_quantization_state(layers, weights=True, inputs=False)
    observe(model, layers, calibration, QuantizeSettings().observation, range(3), {})
    finetuner = Finetuner(model, layers, [], list(layers), 1e-4, 1e-2, False, moments)
    for number in visits:
        finetuner.visit(number)
        for _ in range(2):
            finetuner.step(calibration.bucket(number))
    return [d.input_scale.detach().clone() for d in layers.values()]


def test_every_timestep_has_moments_of_its_own(calibration: CalibrationSet) -> None:
    """The error at a timestep depends on its own scales alone: their order of turns must not matter, unless moments are
    shared."""
    turns, alone = (0, 1, 0, 1), (0, 0, 1, 1)
    kept = moved_scales(calibration, "timestep", turns)
    for mine, other in zip(kept, moved_scales(calibration, "timestep", alone), strict=True):
        assert torch.equal(mine, other)
    shared = moved_scales(calibration, "shared", turns)
    assert any(not torch.equal(a, b) for a, b in zip(kept, shared, strict=True))
    anew = moved_scales(calibration, "visit", turns)
    assert any(not torch.equal(a, b) for a, b in zip(kept, anew, strict=True))


@pytest.mark.parametrize("moments", ["visit", "timestep", "shared"])
def test_a_stage_goes_on_from_its_state(calibration: CalibrationSet, moments: str) -> None:
    def tuned(model: Any, layers: TrainableLayers) -> Finetuner:
        return Finetuner(model, layers, list(layers), list(layers), 1e-3, 1e-2, False, moments)

    def turn(finetuner: Finetuner, number: int) -> None:
        finetuner.visit(number)
        for rows in batches(calibration, number, 8, 4, number):
            finetuner.step(rows)

    model, layers = drafted(calibration)
    set_quantization_state(layers, weights=True, inputs=False)
    observe(model, layers, calibration, QuantizeSettings().observation, range(3), {})
    whole = tuned(model, layers)
    turn(whole, 0)
    turn(whole, 1)
    stopped = copy.deepcopy(model)
    state = {k: v.clone() for k, v in whole.state().items()}
    turn(whole, 0)
    resumed = tuned(stopped, {n: stopped.get_submodule(n) for n in layers})
    resumed.restore(state)
    turn(resumed, 0)
    for (name, one), other in zip(model.named_parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, other), name


# ---------------------------------------------------------------------- bits
def test_allocation_against_brute_force() -> None:
    torch.manual_seed(0)
    choices = (2, 3, 4, 6)
    for _ in range(20):
        need = torch.rand(5).tolist()
        errors = {f"l{i}": {b: need[i] * 4.0**-b for b in choices} for i in range(5)}
        sizes = dict.fromkeys(errors, 100)
        found = allocate(errors, sizes, 3.4)
        assert sum(found.values()) / 5 <= 3.4
        cost = sum(errors[n][b] for n, b in found.items())
        every = (dict(zip(errors, bits, strict=True)) for bits in itertools.product(choices, repeat=5))
        best = min(sum(errors[n][b] for n, b in e.items()) for e in every if sum(e.values()) / 5 <= 3.4)
        assert cost <= best * 1.5  # greedy: at most one step of one layer is lost
    ordered = sorted(range(5), key=lambda i: need[i])
    assert [found[f"l{i}"] for i in ordered] == sorted(found.values())  # more need, more bits


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not enough"):
        allocate({"a": {2: 1.0, 4: 0.1}}, {"a": 10, "first": 10}, 3.0, {"first": 8})


def test_a_budget_of_bits_ends_in_layers_of_several_widths(tmp_path: Path) -> None:
    run = quantize_denoiser(sampler(), replace(WHOLE, bits_budget=3.5, rounding=None, finetune=None), tmp_path)
    layers = run.layers()
    sizes = {n: m.weight_shape.numel() for n, m in layers.items()}
    bits = {n: m.spec.weight_bits for n, m in layers.items()}
    assert sum(bits[n] * sizes[n] for n in bits) / sum(sizes.values()) <= 3.5
    assert len(set(bits.values())) > 2 and bits["conv_in"] == bits["conv_out"] == 8
    assert all(m.spec.sensitivity is not None for m in layers.values())


@pytest.mark.parametrize(
    ("text", "bits"), [("w8a8", (8, 8)), ("W4A4", (4, 4)), ("w4", (4, None)), ("w8a16", (8, None)), ("w3a6", (3, 6))]
)
def test_bits_as_text(text: str, bits: tuple[int, int | None]) -> None:
    assert parse_bits(text) == bits


@pytest.mark.parametrize("text", ["", "8", "w", "w9a8", "w1", "w4a1", "w4a40", "a8w4", "w4 a8"])
def test_bits_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_bits(text)


# ---------------------------------------------------------------------- the whole
def test_every_stage_brings_the_model_nearer(tmp_path: Path) -> None:
    run = quantize_denoiser(sampler(16), WHOLE, tmp_path)
    error = run.validation
    assert error["learnt rounding, weights only"] < error["nearest, weights only"]
    assert error["finetuned"] < error["quantized"]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in log} == {"validation", "rounding", "time embedding", "finetuning"}
    model = run.model
    rows = run.heldout.bucket(0)
    quantized = rows.run(model)
    run.restore()
    assert torch.allclose(rows.run(run.denoiser), rows.output, atol=1e-5)
    assert not quantized_layers(model) and "quantization_config" not in model.config
    assert not torch.allclose(quantized, rows.output, atol=1e-3)


def test_what_is_measured_is_what_the_checkpoint_computes(tmp_path: Path) -> None:
    """Grids by channel are stored with fewer digits than they are learnt with; the last error is with those."""
    for stages in (replace(SHORT, activation_bits=4), replace(SHORT, activation_bits=4, rounding=None, finetune=None)):
        name = "finetuned" if stages.finetune else "quantized"
        run = quantize_denoiser(sampler(), stages, tmp_path / name)
        assert {m.spec.compact_grids for n, m in run.layers().items() if n not in ("conv_in", "conv_out")} == {True}

        def error(model: Any, run: Any = run) -> float:
            count = len(run.heldout.timesteps)
            return relative_error(model, [run.heldout.sample(b, PROBE_ROWS, 0) for b in range(count)])

        assert error(run.model) == run.validation[name]
        run.model.save_pretrained(tmp_path / "saved")
        again = type(run.model).from_pretrained(tmp_path / "saved")
        set_runtime(again, "simulated")
        assert error(again) == run.validation[name]


def test_how_many_buckets() -> None:
    """16 where each channel has a grid, 25 elsewhere; what is asked for is used."""
    for bits, count in ((8, 25), (6, 25), (5, 16), (4, 16), (None, 25)):
        settings = QuantizeSettings(activation_bits=bits)
        assert settings.bucket_count == settings.to_dict()["buckets"] == count
        assert replace(settings, buckets=20).bucket_count == 20
    assert QuantizeSettings(per_channel=True).bucket_count == 16
    assert QuantizeSettings(activation_bits=4, per_channel=False).bucket_count == 25


class Killed(BaseException):
    pass


Whole = dict[int, tuple[dict[str, torch.Tensor], int]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Uninterrupted runs by bits of inputs: tensors of the quantized model, and how often it told what it does."""
    made: Whole = {}
    for bits in (8, 4):
        steps: list[str] = []
        work, settings = tmp_path_factory.mktemp("whole"), replace(SHORT, activation_bits=bits)
        run = quantize_denoiser(sampler(), settings, work, progress=lambda what, *rest, to=steps: to.append(what))  # type: ignore[misc]
        made[bits] = (run.model.state_dict(), len(steps))
    return made


@pytest.mark.parametrize(("seed", "bits"), [(0, 8), (3, 4)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, bits: int
) -> None:
    monkeypatch.setattr(stage_of, "SAVE_EVERY", 0.0)  # so that finetuning is interrupted in its middle, too
    (expected, steps), settings = whole[bits], replace(SHORT, activation_bits=bits)
    for place in torch.randint(1, steps, (3,), generator=torch.Generator().manual_seed(seed)).tolist():
        left = [place]

        def stop(what: str, *rest: float, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        try:
            quantize_denoiser(sampler(), settings, tmp_path, progress=stop)
        except Killed:
            continue
    found = quantize_denoiser(sampler(), settings, tmp_path).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_run_that_is_stopped_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    from tests.quant.test_checkpoint import traces

    s = sampler(4)
    s.pipe.unet.train()
    before, plain = traces(s.pipe.unet), s.pipe.unet.state_dict()
    for where in ("validation", "sensitivity", "rounding", "ranges", "finetuning"):

        def stop(what: str, *rest: float, where: str = where) -> None:
            if what.startswith(where):
                raise Killed

        with pytest.raises(Killed):
            quantize_denoiser(s, SHORT, tmp_path, progress=stop)
        assert traces(s.pipe.unet) == before
        assert all(torch.equal(v, plain[k]) for k, v in s.pipe.unet.state_dict().items())


def test_other_settings_do_not_go_on_from_there(tmp_path: Path) -> None:
    quick = replace(WHOLE, rounding=None, finetune=None)
    quantize_denoiser(sampler(4), quick, tmp_path)
    other_scheduler, other_weights, trained = sampler(4), sampler(4), sampler(4)
    other_scheduler.pipe.scheduler.register_to_config(beta_end=0.03)
    with torch.no_grad():
        other_weights.pipe.unet.conv_in.weight.view(-1)[5] += 1e-3
    trained.pipe.unet.to(torch.bfloat16)
    for s, settings, minutes, says in (
        (sampler(4), replace(quick, weight_bits=4), None, r"weight_bits \(3 then, 4 now\)"),
        (replace(sampler(4), batch=3), quick, None, r"batch \(4 then, 3 now\)"),
        (replace(sampler(4), seed=1), quick, None, r"seed of the images \(0 then, 1 now\)"),
        (replace(sampler(4), prompts=("", "", "", "x")), quick, None, "another model: prompts;"),
        (sampler(4), quick, 5.0, r"budget minutes \(None then, 5.0 now\)"),
        (other_scheduler, quick, None, "settings of the scheduler.beta_end"),
        (other_weights, quick, None, "another model: weights"),
        (trained, quick, None, "type of numbers"),
    ):
        with pytest.raises(ConfigurationError, match=f"holds a run with other settings.*{says}"):
            quantize_denoiser(s, settings, tmp_path, minutes)


def test_rows_are_counted_and_belong_to_their_chunks(tmp_path: Path) -> None:
    """A recording that goes on with another number of images a call takes nothing of the old one for its own."""

    def stop(what: str, share: float = 0.0, left: float | None = None) -> None:
        if what.endswith(": 6 of 8 prompts"):
            raise Killed

    with pytest.raises(Killed):
        record(replace(sampler(), batch=3), 3, tmp_path, stop)
    found = record(sampler(), 3, tmp_path)
    assert found.rows == 8 and [len(found.bucket(b)) for b in range(3)] == found.counts == [8, 8, 8]
    whole = record(sampler(), 3, tmp_path / "whole")
    assert all(torch.equal(found.bucket(b).output, whole.bucket(b).output) for b in range(3))
    (tmp_path / f"b001-{found.chunks[0]}.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="is damaged; forget the run"):
        found.bucket(1)


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    work = tmp_path / "work"
    code = (
        "import sys, pathlib; from diffusion_accel.quant.ptq.folder import held\n"
        "with held(pathlib.Path(sys.argv[1])) as lock: print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=rf"in use by another quantize \(process {other.pid} on .*, since 20"):
            quantize_denoiser(sampler(4), SHORT, work)
        other.kill()
    assert (work / "lock").is_file()  # of a process that is no more
    with held(work), held(work):
        seen: list[str] = []

        def other_thread() -> None:
            try:
                with held(work):
                    seen.append("held")
            except OutputError as error:
                seen.append(str(error))

        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert f"process {os.getpid()}" in seen[0]
    assert not work.exists()  # nothing was done


def test_a_run_that_fails_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    broken = sampler(4)
    broken.pipe.unet.register_forward_pre_hook(lambda *a: 1 / 0)
    not_finite = sampler(4)
    not_finite.pipe.unet.conv_norm_out.bias.data[0] = float("nan")
    for s, settings, error, says in (
        (sampler(1), SHORT, ConfigurationError, "too few"),
        (sampler(4), replace(SHORT, bits_budget=2.0), ConfigurationError, "not enough"),
        (not_finite, SHORT, ConfigurationError, "conv_norm_out.bias of the UNet2DModel has values"),
        (broken, SHORT, ZeroDivisionError, "division"),
    ):
        with pytest.raises(error, match=says):
            quantize_denoiser(s, settings, tmp_path / "work")
        assert not list(tmp_path.iterdir())


def test_softmax_and_attention_grids(tmp_path: Path) -> None:
    from tests.quant.test_checkpoint import TINY, Prompted

    answers: dict[int | None, torch.Tensor] = {}
    for bits in (None, 16, 4):
        pipe, call = zoo.sd()
        settings = replace(TINY, weight_bits=8, activation_bits=16, attention_bits=None, softmax_bits=bits)
        run = quantize_denoiser(Prompted(pipe, call), settings, tmp_path / str(bits))
        set_runtime(pipe, "simulated")
        rows = run.heldout.bucket(0)
        answers[bits] = rows.run(pipe.unet)
        if bits is not None:
            assert len(run.spec.softmax or {}) == sum(n.endswith("to_q") for n in run.layers())
            pipe.unet.save_pretrained(tmp_path / f"saved{bits}")
            again = type(pipe.unet).from_pretrained(tmp_path / f"saved{bits}")
            set_runtime(again, "simulated")
            assert torch.equal(rows.run(again), answers[bits])
    assert (answers[4] - answers[None]).norm() > 20 * (answers[16] - answers[None]).norm()
    assert (answers[4] - answers[None]).norm() < 0.1 * answers[None].norm()


def test_embedding_tables_that_matter_are_quantized_by_row(tmp_path: Path) -> None:
    from tests.quant.test_checkpoint import TINY, Prompted

    pipe, call = zoo.dit()
    model = pipe.transformer
    plain = {n: m.weight.detach().clone() for n, m in model.named_modules() if type(m) is torch.nn.Embedding}
    whole = sum(p.numel() for p in model.parameters())
    assert sum(t.numel() for t in plain.values()) > 0.5 * whole
    run = quantize_denoiser(Prompted(pipe, call), replace(TINY, weight_bits=8), tmp_path / "work")
    layers = run.layers()
    for name, weight in plain.items():
        table = layers[name]
        assert isinstance(table, torch.nn.Embedding) and table.spec.sqnr is not None and table.spec.sqnr > 35
        assert ((table.weight - weight).abs() <= 0.5001 * table.weight_scale.T + 0.2 * weight.abs()).all()
        labels = torch.tensor([[3, 1000], [0, 3]])
        assert torch.equal(table(labels), table.weight[labels].clone()) and table(labels).shape == (2, 2, 16)
    model.save_pretrained(tmp_path / "saved")
    size = (tmp_path / "saved" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.5 * 4 * whole  # of rows of 16 values, with 5 bytes for each grid
    again = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    for one in (model, again):
        set_runtime(one, "simulated")
    rows = run.heldout.bucket(0)
    assert torch.equal(rows.run(model), rows.run(again))
    run.restore()
    assert all(torch.equal(model.get_submodule(n).weight, w) for n, w in plain.items())
    small, _ = zoo.sd()
    small.unet.class_embedding = torch.nn.Embedding(2, 8)
    assert not tables(small.unet)  # less than a hundredth


@given(st.tuples(*[st.floats(0, 1e5)] * 3), st.floats(0, 2e5))
def test_time_is_shared_without_a_rest(wanted: tuple[float, ...], seconds: float) -> None:
    asked = dict(zip(("rounding", "time", "stage two"), wanted, strict=True))
    found = shares(asked, seconds)
    assert all(0 <= share <= 1 for share in found.values())
    used = sum(asked[k] * found[k] for k in asked)
    assert used == pytest.approx(min(seconds, sum(wanted)), rel=1e-9, abs=1e-9)
    assert asked["rounding"] * found["rounding"] >= min(asked["rounding"], 0.5 * seconds) * (1 - 1e-9) - 1e-12


def test_minutes_cut_the_work_down(tmp_path: Path) -> None:
    huge = QuantizeSettings(weight_bits=4, buckets=3)  # the published numbers of steps
    run = quantize_denoiser(sampler(), huge, tmp_path, minutes=0.1)
    assert run.plan["iterations"] < 20_000 and run.plan["epochs"] < 20


def test_a_budget_that_is_over_leaves_the_least_to_measure(tmp_path: Path) -> None:
    """Counted in rows that the model sees, not in seconds."""
    seen: dict[float | None, int] = {}
    for minutes in (None, 1e-4):
        s, settings = sampler(16), replace(WHOLE, rounding=None, finetune=None, bits_budget=4.0)
        rows: list[int] = []

        def note(module: Any, args: Any, kwargs: Any, rows: list[int] = rows) -> None:
            rows.append(len(args[0] if args else kwargs["sample"]))

        s.pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
        run = quantize_denoiser(s, settings, tmp_path / str(minutes), minutes)
        seen[minutes] = sum(rows)
    assert json.loads((tmp_path / "0.0001" / "probe.json").read_text()) == {"rows": 1, "timesteps": 1}
    assert (run.plan["error_rows"], run.plan["range_rows"]) == (1, 4)
    assert len(run.sampler.prompts) == 8 and run.spec.recipe and run.spec.recipe["prompts"] == 8
    drawn = {None: 16 * 4, 1e-4: (8 + 1) * 4}  # images and steps; one image is drawn to see how long it takes
    assert seen[1e-4] - drawn[1e-4] < 0.5 * (seen[None] - drawn[None])


def test_the_calibration_set_keeps_within_a_quarter_of_the_budget() -> None:
    assert plan_prompts(64, 1.0, 60.0) == 15 and plan_prompts(64, 1.0, 6000.0) == 64
    assert plan_prompts(64, 10.0, 60.0) == 8 and plan_prompts(5, 10.0, 60.0) == 5 and plan_prompts(64, 0.0, 1.0) == 64


@pytest.mark.parametrize(("seconds", "expected"), [(None, (16, 5)), (1000.0, (16, 5)), (50.0, (8, 3)), (0.0, (1, 1))])
def test_the_report_keeps_within_what_is_left(seconds: float | None, expected: tuple[int, int]) -> None:
    assert plan_report(16, 1.0, seconds, 60.0) == expected
    assert plan_report(0, 1.0, seconds, 60.0)[0] == 0


def test_a_report_says_what_each_error_is_an_error_of() -> None:
    errors = {"nearest, weights only": 0.00146, "quantized": 0.00373}
    report = QuantizationReport("w4a8", "x", {}, bytes={"checkpoint": 1, "float32": 4}, validation=errors, budget=60.0)
    text = report.text()
    assert "0.00146  weights rounded to nearest, inputs as they are" in text
    assert "0.00373  weights and inputs rounded" in text and "of a budget of 60 s" in text
