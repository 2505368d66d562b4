"""Patch parallelism on real processes that talk through gloo; what they do is in `cases.py`.

The cases of all numbers of processes run on one group of processes, once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import forks
import pair_cases
import pairs
import pytest
import world
from filelock import FileLock

EVERY_SIZE = """
    sync_any_size sync_sd sync_sdxl sync_controlnet displaced_constant_input_is_sync
    displaced_layers_use_the_step_before
""".split()
WITH_AND_WITHOUT_A_MIDDLE = """
    naive_is_every_part_by_itself counted_bytes a_dry_run_counts_the_same_bytes group_norm_is_chans_formula
    sync_other_convolutions impossible_requests_are_refused transformers_share_their_sequence tokens_of_pipelines
    displaced_attention_uses_the_step_before counted_token_bytes naive_tokens_see_their_own
""".split()
PLAN = {
    4: ["partial_sends_less", "cfg_split_is_batched_guidance", "tokens_of_branches"],
    3: [
        "sync_sd_batch",
        "sync_sd_without_guidance",
        "other_attention_processors",
        "displaced_pipeline",
        "partial_is_masked_attention",
        "sync_svd",
        "tokens_of_every_transformer",
    ],
    2: """
        sync_float32_sd sync_float32_sdxl sync_float32_svd sync_float32_controlnet sync_float32_sd_batch
        sync_sd_odd_size sync_img2img sync_inpaint sync_upscale sync_deepfloyd_if sync_controlnets
        sync_controlnet_guess_mode sync_t2i_adapter sync_ip_adapter sync_unet2d sync_unet3d sync_animatediff
        sync_svd partial_with_whole_neighbours_is_displaced partial_in_columns
        cfg_split_is_batched_guidance
        images_are_decoded_and_encoded_in_parts video_is_decoded_in_parts reuse_keeps_its_parts lora_and_slicing
        quantized_layers noise_without_a_generator tokens_that_cannot_be_shared_are_refused tokens_with_reuse
        tokens_of_branches diffusers_shares_what_it_can
        different_arguments_are_named an_exception_leaves_nothing stack_controlnet pair_flux_task_routing
    """.split(),
}
PLAN = {
    size: EVERY_SIZE[: 2 if size == 4 else None] + (WITH_AND_WITHOUT_A_MIDDLE if size < 4 else []) + names
    for size, names in PLAN.items()
}
PLAN = {5: ["sync_any_size", "sync_sd"], **PLAN}  # the largest first: all wait


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], list[str]]:
    """Of one run of the cases that are tested, also where several workers share them: one of them starts it, the others
    wait for it."""
    tested = {tuple(item.callspec.params.values()) for item in request.session.items if _on_processes(item)}
    plan = {size: [name for name in names if (size, name) in tested] for size, names in PLAN.items()}
    plan = {size: names for size, names in plan.items() if names}
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "world"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            world.run(folder, max(plan), plan)
    return world.read(folder, plan)


def _on_processes(item: Any) -> bool:
    return getattr(item, "function", None) is test_on_processes


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("size", "case"), [(size, name) for size, names in PLAN.items() for name in names])
def test_on_processes(size: int, case: str, outcomes: dict[tuple[int, str], list[str]]) -> None:
    for rank, error in enumerate(outcomes[size, case]):
        assert not error, f"rank {rank} of {size}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", pairs.KINDS)
def test_beside_everything_else(kind: str, tmp_path: Path) -> None:
    plan = {2: [case for case in pair_cases.PAIR_CASES if f"_{kind}_" in f"{case}_" and case not in PLAN[2]]}
    world.run(tmp_path, 2, plan)
    for case, errors in world.read(tmp_path, plan).items():
        assert not any(errors), (case, errors)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "how", "mode"),
    [("sd", "killed", "sync"), ("sd", "killed", "displaced"), ("sd", "hangs", "sync"), ("flux", "killed", "sync")],
)
def test_a_lost_process_ends_the_others(kind: str, how: str, mode: str, tmp_path: Path) -> None:
    settings = {"PATCH_KIND": kind, "PATCH_LOST": how, "PATCH_MODE": mode}
    first, last = world.start(tmp_path, 2, {2: ["a_lost_process"]}, **settings)
    try:
        first.join(timeout=120)  # its own limit is 5 s for a message; the rest is starting Python on a busy machine
        outcome = (tmp_path / "0.jsonl").read_text()
        assert '"error": ""' in outcome, outcome
        if how == "killed":
            last.join(timeout=30)
            assert last.exitcode == -signal.SIGKILL
    finally:
        for process in (first, last):
            process.kill()
            process.join()
    assert not [f for f in os.listdir("/dev/shm") if f.startswith("torch_") and _mine(f, first.pid, last.pid)]


def _mine(name: str, *pids: int | None) -> bool:
    return any(f"_{pid}_" in name for pid in pids)


def test_geometry_by_brute_force() -> None:
    """Every row belongs to one part at every resolution, and every part gets exactly the rows its outputs need."""
    from diffusion_accel.parallel.geometry import Window, plan_halo, plan_split

    for size in (8, 12, 13, 37, 64):
        for parts in (1, 2, 3, 4, 5):
            split = plan_split(size, 7, parts, 0, halvings=2)
            if split is None:
                assert -(-size // 4) < parts and parts > -(-7 // 4)
                continue
            for level in split.levels:
                assert level.bounds[0] == 0 and level.bounds[-1] == level.size
                assert all(level.rows(part) > 0 for part in range(parts))
                for window in (Window(3, 1, 1, 1, 1), Window(3, 2, 1, 1, 1), Window(5, 1, 2, 4, 4)):
                    ends = window.output(level)
                    halos = [plan_halo(window, level, parts, part) for part in range(parts)]
                    for part, halo in enumerate(halos):
                        needed = {
                            out * window.stride - window.before + k * window.dilation
                            for out in range(ends[part], ends[part + 1])
                            for k in range(window.kernel)
                        }
                        have = {*range(*halo.own)}
                        for other, rows in halo.receives.items():
                            assert halos[other].sends[part] == rows and not have & {*range(*rows)}
                            have |= {*range(*rows)}
                        assert {row for row in needed if 0 <= row < level.size} <= have
                        if needed:
                            assert halo.above == max(0, -min(needed))


def test_the_old_name_of_a_field_is_still_read() -> None:
    from diffusion_accel.errors import ConfigurationError
    from diffusion_accel.parallel import PatchParallel

    new = PatchParallel(mode="partial", neighbour_fraction=0.5)
    assert new == PatchParallel(mode="partial", p=0.5) == PatchParallel.from_dict({"mode": "partial", "p": 0.5})
    assert new.p == 0.5 and new.to_dict()["neighbour_fraction"] == 0.5 and "p" not in new.to_dict()
    with pytest.raises(ConfigurationError, match="old name of neighbour_fraction"):
        PatchParallel(p=0.5, neighbour_fraction=0.4)
    with pytest.raises(ConfigurationError, match="neighbour_fraction must be between 0 and 1"):
        PatchParallel(p=1.5)


def test_settings_are_checked() -> None:
    from diffusion_accel.errors import ConfigurationError
    from diffusion_accel.parallel import PatchParallel

    assert PatchParallel.parse("3,mode=partial,p=0.5") == PatchParallel(ranks=3, mode="partial", p=0.5)
    assert PatchParallel.parse("mode=naive,warmup=0") == PatchParallel(mode="naive", warmup=0)
    for text, says in {
        "mode=fast": "sync, displaced",
        "p=1.5": "0 to 1",
        "warmup=0": "at least 1",
        "group_norm=none": "corrected",
        "-1": "0: as many as were launched",
        "timeout=0": "above 0",
        "comm_checkpoint=0": "between 1 and 9999",
        "two": "whole number",
    }.items():
        with pytest.raises(ConfigurationError, match=says):
            PatchParallel.parse(text)


def test_transformers_that_cannot_be_shared_are_refused() -> None:
    import diffusers
    from diffusers.models.attention_dispatch import attention_backend
    from transformers_zoo import CASES

    from diffusion_accel.errors import ConfigurationError
    from diffusion_accel.parallel import PatchParallel
    from diffusion_accel.parallel.token_hooks import split_tokens

    class Bare(diffusers.DiffusionPipeline):  # type: ignore[misc]
        def __init__(self, transformer: object) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

    def said(case: str, mode: str, **changes: object) -> str | None:
        name, config, _ = CASES[case]
        model = getattr(diffusers, name)(**{**config, **changes})
        if mode == "flex":
            model.set_attention_backend(mode)
        return PatchParallel(mode="displaced" if mode == "flex" else mode).supports(Bare(model))

    for mode in ("sync", "displaced", "naive"):
        assert said("sd3", mode) is None and said("flux", mode) is None and said("ltx", mode) is None
    assert "whose tokens are known" in (said("sana", "sync") or "")
    replaced = said("hunyuan_video", "sync", image_condition_type="token_replace") or ""
    assert "blocks that are not known to this toolkit: HunyuanVideoTokenReplace" in replaced
    assert "mode=partial is for U-Nets, and FluxTransformer2DModel" in (said("flux", "partial") or "")
    with attention_backend():  # a model that is told one changes that of all models
        assert "attention backend flex of FluxTransformer2DModel" in (said("flux", "flex") or "")
    with pytest.raises(ConfigurationError, match="2 tokens are too few for 3 processes"):
        split_tokens(2, 3, 0)


def test_pipelines_that_look_at_the_whole_image_are_refused() -> None:
    import zoo
    from diffusers import StableDiffusionSAGPipeline
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from diffusion_accel.parallel import PatchParallel

    base: DiffusionPipeline = zoo.sd()[0]
    guided = object.__new__(StableDiffusionSAGPipeline)
    DiffusionPipeline.__init__(guided)
    guided.register_modules(unet=base.unet)
    assert "attention maps" in (PatchParallel(mode="sync").supports(guided) or "")


def test_importing_the_feature_is_cheap() -> None:
    import subprocess

    code = "import sys; from diffusion_accel.parallel import PatchParallel as P; P(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------- beginning
def meet(folder: Path, timeout: float, *processes: dict[str, str]) -> list[str]:
    """How processes with these environments ended that join at one port: "joined N", or an error."""
    files = [folder / f"joined-{number}" for number in range(len(processes))]
    started = [
        forks.start(world.join, int(own.pop("RANK")), file, timeout, own)
        for own, file in zip(processes, files, strict=True)
    ]
    try:
        for process in started:
            process.join(120)
        logs = "".join(file.with_suffix(".log").read_text() for file in files)
        assert not logs and all(process.exitcode == 0 for process in started), logs
        return [file.read_text() for file in files]
    finally:
        for process in started:
            process.kill()


def test_the_processes_of_a_job_meet_or_say_why_not(tmp_path: Path) -> None:
    """One line each, and nothing else on the terminal; what hangs in C is given up, too."""
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, and never answers
        port = {"MASTER_PORT": str(mute.getsockname()[1]), "WORLD_SIZE": "2"}
        first, second = meet(tmp_path, 1.0, {"RANK": "0"} | port, {"RANK": "1"} | port)
    assert f"MASTER_PORT={port['MASTER_PORT']}," in first and "cannot be opened (Address already in use)" in first
    assert f"no answer from 127.0.0.1:{port['MASTER_PORT']} within 1 s" in second
    with socket.create_server(("127.0.0.1", 0)) as other:
        port["MASTER_PORT"] = str(other.getsockname()[1])  # free from here on
    assert meet(tmp_path, 60.0, {"RANK": "0"} | port, {"RANK": "1"} | port) == ["joined 2"] * 2
    (alone,) = meet(tmp_path, 0.5, {"RANK": "0"} | port)
    assert "1 did not come" in alone and "(RANK 1)" in alone
    (nobody,) = meet(tmp_path, 0.5, {"RANK": "1"} | port)
    assert f"cannot be reached at 127.0.0.1:{port['MASTER_PORT']} within 0.5 s (Connection refused)" in nobody
    (lost,) = meet(tmp_path, 0.5, {"RANK": "1", "MASTER_ADDR": "nowhere.invalid"} | port)
    assert "cannot be reached at nowhere.invalid" in lost
    several = meet(tmp_path, 5.0, *({**port, "RANK": r, "WORLD_SIZE": size} for r, size in (("0", "2"), ("1", "3"))))
    assert all("was told WORLD_SIZE=" in text and "3" in text and "2" in text for text in several), several
    port["WORLD_SIZE"] = "3"
    twice = meet(tmp_path, 2.0, *({"RANK": rank, **port} for rank in "011"))
    assert sum("two processes with RANK=1" in text for text in twice) == 1, twice
    assert sum("(RANK 2)" in text for text in twice) == 2, twice


def test_nobody_leaves_before_all_have_joined(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = {"MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "3", "HESITATE": ""}
    assert meet(tmp_path, 30.0, *({"RANK": rank, **port} for rank in "012")) == ["joined 3"] * 3


def test_a_process_that_met_a_job_which_ends_meets_its_own(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    other = forks.start(world.vanish, port)
    second = forks.start(world.join, 1, tmp_path / "1", 60.0, settings)
    other.join(60)
    assert other.exitcode == 0
    assert meet(tmp_path, 60.0, {"RANK": "0"} | settings) == ["joined 2"]
    second.join(60)
    assert (tmp_path / "1").read_text() == "joined 2" and not (tmp_path / "1.log").read_text()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        ({"RANK": "1"}, "RANK=1 is set in the environment, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment, but RANK is not"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a whole number, 0 to"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number, 1 to"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "got '0'"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be"),
        ({"RANK": "7", "WORLD_SIZE": "2"}, "RANK=7 must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "cuda"}, "LOCAL_RANK must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE=1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "1 to 65535, got 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "1 to 65535"),
    ],
)
def test_what_a_launcher_may_say(
    environment: dict[str, str], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from diffusion_accel.errors import ConfigurationError
    from diffusion_accel.parallel.group import World, join

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if says is None:
        assert join(torch.device("cpu"), 1.0) == World(0, 1)
        return
    with pytest.raises(ConfigurationError) as refused:
        join(torch.device("cpu"), 1.0)
    assert says in str(refused.value) and len(str(refused.value)) < 300
