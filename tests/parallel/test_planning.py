"""Planning: what a share of a model is recorded to do, and the simulation, against results known by other means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bare
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel.flops import count_flops
from diffusion_accel.model_files.names import find_model
from diffusion_accel.parallel import PatchParallel
from diffusion_accel.parallel.group import World
from diffusion_accel.parallel.planner.architectures import ARCHITECTURES, make_models, make_subject
from diffusion_accel.parallel.planner.operations import Event, Operation, Sent, Waited
from diffusion_accel.parallel.planner.recording import Recording, Subject, record, record_busiest
from diffusion_accel.parallel.planner.simulate import LINKS, DeviceProfile, Link, predict, simulate

UNIT = DeviceProfile(flops16=1.0, flops32=1.0, memory=1.0, launch=0.0)


def compute(seconds: float) -> Operation:
    return Operation("layer", seconds, 0, 4, None)


def flops(events: list[Event]) -> float:
    return sum(event.flops for event in events if isinstance(event, Operation))


def float_inputs(rows: int, height: int, width: int) -> dict[str, Any]:
    return {k: v.float() if v.is_floating_point() else v for k, v in bare.inputs(rows, height, width).items()}


def on_meta(model: Any, named: dict[str, Any]) -> Subject:
    return Subject(model.to("meta"), {k: v.to("meta") for k, v in named.items()})


def test_one_process_does_what_is_counted() -> None:
    model, named = zoo.unet(), float_inputs(2, 24, 10)
    with torch.no_grad(), count_flops() as count:
        model(**named)
    (step,) = record(Subject(model, named), PatchParallel(), World(0, 1)).steps
    assert flops(step) == count.total > 0
    assert not any(isinstance(event, (Sent, Waited)) for event in step)


def test_the_meta_device_does_the_same() -> None:
    settings = PatchParallel(mode="partial", comm_checkpoint=7)
    model, named = zoo.unet(), float_inputs(2, 24, 10)
    real = record(Subject(model, named), settings, World(1, 3))
    made = record(on_meta(model, named), settings, World(1, 3))

    def plain(recording: Recording) -> list[Any]:
        return [
            [(e.layer, e.flops, e.bytes) if isinstance(e, Operation) else e for e in step] for step in recording.steps
        ]

    assert plain(real) == plain(made) and real.traffic == made.traffic and real.buffer_bytes == made.buffer_bytes
    assert all(e.seconds is None for step in made.steps for e in step if isinstance(e, Operation))
    assert all(e.seconds is not None for step in real.steps for e in step if isinstance(e, Operation))


def test_the_parts_are_the_whole() -> None:
    """All parts together multiply as much as one process, and a little more: what hangs on no position, and halos."""
    subject = make_subject("sd15", "", 384, 128, decode=False)
    whole, devices, sync = flops(record(subject, PatchParallel(), World(0, 1)).steps[0]), 3, PatchParallel(mode="sync")
    parts = [flops(record(subject, sync, World(part, devices)).steps[0]) for part in range(devices)]
    assert whole < sum(parts) < 1.06 * whole and max(parts) < 1.5 * whole / devices


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cfg_parallel", [False, True])
def test_the_largest_part_is_recorded(cfg_parallel: bool) -> None:
    """32 rows in units of 4 on five devices: 4, 8, 4, 8, 8."""
    devices = 5 * (1 + cfg_parallel)
    subject = on_meta(
        zoo.unet(
            down_block_types=("DownBlock2D",) * 3,
            up_block_types=("UpBlock2D",) * 3,
            block_out_channels=(8,) * 3,
            norm_num_groups=4,
        ),
        float_inputs(2, 32, 8),
    )
    settings = PatchParallel(mode="sync", cfg_parallel=cfg_parallel)
    every = [flops(record(subject, settings, World(part, devices)).steps[0]) for part in range(5)]  # of one branch
    busiest = [flops(one.steps[0]) for one in record_busiest(subject, settings, devices)]
    assert max(busiest) == max(every) > 1.5 * min(every)


def test_the_exact_steps_of_naive_are_exact() -> None:
    subject = on_meta(zoo.unet(), float_inputs(2, 24, 10))
    exact, _, later = record(subject, PatchParallel(mode="naive", warmup=0), World(0, 2)).steps
    same = record(subject, PatchParallel(mode="sync"), World(0, 2)).steps[0]
    assert exact == same and len([e for e in later if isinstance(e, Sent)]) == 1


def test_published_architectures_have_their_size() -> None:
    """859.5 and 2567.5 million parameters, as the published models have."""
    for name, millions in (("sd15", 859.5), ("sdxl", 2567.5)):
        unet, _, _ = make_models(name, "", torch.float16, "meta")
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert set(ARCHITECTURES) == {"sd15", "sdxl"}


def test_simulation_by_hand() -> None:
    link = Link(bandwidth=10.0, latency=1.0)
    # sent while 5 s of work run: there after 20 / 10 + 1 = 3 s, so nobody waits; then one that is waited for at once
    steps = [[Sent(1, 20, 10), compute(5), Waited(1)], [Sent(2, 10, 30), Waited(2), compute(1)]]
    first, second = simulate(steps, UNIT, link)
    assert (first.seconds, first.computing, first.waiting, first.travelling, first.sent) == (5, 5, 0, 3, 20)
    assert (second.seconds, second.computing, second.waiting, second.travelling, second.sent) == (5, 1, 4, 4, 10)
    # two messages share the link: the second is there at 2 + 2 + 1
    (both,) = simulate([[Sent(1, 20, 0), Sent(2, 20, 0), Waited(2), Waited(1)]], UNIT, link)
    assert (both.seconds, both.waiting) == (5, 5)
    # without overlap the transfer takes the processor's own time
    (alone,) = simulate([[Sent(1, 20, 0), compute(5), Waited(1)]], UNIT, Link(10.0, 1.0, overlaps=False))
    assert alone.seconds == 2 + 5
    # the slower of arithmetic and memory, and never less than a launch
    machine = DeviceProfile(flops16=4.0, flops32=2.0, memory=8.0, launch=0.5)
    found = [machine.seconds(Operation("", 8, bytes_, size, None)) for bytes_, size in ((0, 4), (0, 2), (64, 2))]
    assert found == [4, 2, 8] and machine.seconds(Operation("", 0, 1, 4, None)) == 0.5
    assert machine.seconds(Operation("", 8, 64, 4, 0.25)) == 0.25


def test_a_image_is_its_steps() -> None:
    exact, later = [Sent(1, 10, 10), Waited(1), compute(2)], [compute(2)]
    recording = Recording([exact, later, later], [compute(7)], {("halo", "layer"): 10}, 3)
    found = predict([recording], 2, UNIT, Link(10.0, 0.0), steps=10, warmup=4)
    assert (found.exact.seconds, found.image) == (3, 4 * 3 + 6 * 2 + 7)
    assert found.stale is not None and found.stale.seconds == 2 and found.layers == {"layer": (2.0, 10)}
    short = predict([recording], 2, UNIT, Link(10.0, 0.0), steps=3, warmup=4)
    assert short.image == 3 * 3 + 7 and short.stale is None and short.hidden == 0


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    subject = on_meta(zoo.unet(), float_inputs(2, 64, 32))
    return record_busiest(subject, PatchParallel(comm_checkpoint=7), 4)


@pytest.mark.slow
@given(st.floats(1e6, 1e12), st.floats(0, 1e-2), st.floats(1, 100))
def test_a_better_link_is_never_slower(
    recordings: list[Recording], bandwidth: float, latency: float, factor: float
) -> None:
    machine = DeviceProfile(1e12, 5e11, 1e11, 5e-6)
    slow = predict(recordings, 4, machine, Link(bandwidth, latency), 20, 5)
    fast = predict(recordings, 4, machine, Link(bandwidth * factor, latency / factor), 20, 5)
    assert fast.image <= slow.image * (1 + 1e-9)
    assert 0 <= (slow.hidden or 0) <= 1
    assert slow.exact.seconds == pytest.approx(slow.exact.computing + slow.exact.waiting)


@pytest.mark.slow
def test_modes_differ_as_they_should() -> None:
    """On a slow link displaced beats sync; partial sends less than displaced, naive least."""
    subject = on_meta(zoo.unet(), float_inputs(2, 64, 32))
    found = {}
    for mode in ("sync", "displaced", "partial", "naive"):
        made = record(subject, PatchParallel(mode=mode, comm_checkpoint=7), World(1, 4))
        found[mode] = predict([made], 4, DeviceProfile(1e9, 1e9, 1e11, 5e-6), LINKS["ethernet-10g"], 20, 5)
    last = {mode: one.stale or one.exact for mode, one in found.items()}
    assert last["displaced"].waiting < last["sync"].waiting
    assert last["naive"].sent < last["partial"].sent < last["displaced"].sent == last["sync"].sent


@pytest.mark.slow
def test_partial_sends_less_on_the_embedded_model() -> None:
    """At least 60 % less than displaced, on four devices with its default p."""
    subject = make_subject("sticker", find_model("sticker").location, 256, 256, decode=False)
    sent = {
        mode: sum(
            sum(record(subject, PatchParallel(mode=mode), World(rank, 4)).traffic.values())
            for rank in (0, 1)  # two and three are their mirror images
        )
        for mode in ("displaced", "partial")
    }
    assert sent["partial"] <= 0.4 * sent["displaced"], sent


# ---------------------------------------------------------------------- the command
def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    from diffusion_accel.cli import main as cli

    with pytest.raises(SystemExit) as stopped:
        cli.main(["estimate", *arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    usual = ("--model", "sticker", "--width", "128", "--height", "256", "--steps", "20")
    code, out, err = call(capsys, *usual, "--devices", "1,2", "--json")
    assert code == 0 and not err
    one, two = json.loads(out)
    assert one["devices"] == 1 and one["speedup"] == 1 and one["exact_step_bytes"] == 0
    assert two["exact_step_bytes"] > 0 and two["layers"]["denoiser.conv_out"]["bytes"] > 0
    code, out, err = call(capsys, *usual, "--devices", "2", "--patch-parallel", "mode=sync", "--link", "25:20")
    assert code == 0 and "mode sync" in out and not err
    code, out, err = call(
        capsys, *usual[:4], "--height", "128", "--devices", "1,2", "--machine", "here", "--link", "1:9"
    )
    assert code == 0 and "VAE" in out and not err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--devices", "0,2"], "1 to 64"),
        (["--devices", "two"], "1 to 64"),
        (["--machine", "toaster"], "a100"),
        (["--link", "string"], "25:20"),
        (["--link", "-1:5"], "25:20"),
        (["--steps", "0"], "at least 1"),
        (["--dtype", "int3"], "float16"),
        (["--width", "100"], "multiples of 8"),
        (["--patch-parallel", "mode=fast"], "sync, displaced"),
        (["--patch-parallel", "cfg_parallel=true", "--devices", "3"], "even number"),
        (["--devices", "64", "--width", "64", "--height", "64"], "too small for 64 processes"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in arguments else ["--model", "sticker"]
    code, out, err = call(capsys, *model, *arguments)
    assert code == 2 and not out and says in err and len(err.splitlines()) == 1, err


def test_models_that_cannot_be_planned_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0"}
    parts = {"transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | parts))
    found = [call(capsys, "--model", name) for name in (str(tmp_path), "nobody/nothing")]
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "UNet2DConditionModel"]}))
    found.append(call(capsys, "--model", str(tmp_path)))
    wanted = [(2, "has none"), (1, "nobody/nothing cannot be read"), (1, f"{tmp_path} cannot be read")]
    for (code, out, err), (exit_code, says) in zip(found, wanted, strict=True):
        assert code == exit_code and not out and says in err and len(err.splitlines()) == 1, err
