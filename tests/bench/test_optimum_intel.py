"""optimum-intel in an environment of its own: here one with a stand-in for it, which draws with plain diffusers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_accel.bench.entries import Entry
from diffusion_accel.bench.older_names import with_older_names
from diffusion_accel.bench.peers import INTERPRETER
from diffusion_accel.bench.runner import Job, Runner
from diffusion_accel.bench.worker import Isolated
from diffusion_accel.model_files.names import EMBEDDED

ENTRY = Entry.parse("optimum-intel:bfloat16")
STAND_IN = """
import os
from diffusers import StableDiffusionPipeline

class OVDiffusionPipeline:
    @staticmethod
    def from_pretrained(folder, export, compile, ov_config):
        assert export and not compile and ov_config["INFERENCE_PRECISION_HINT"] == "bf16", ov_config
        assert os.path.islink(folder + "/unet") and not os.path.islink(folder + "/text_encoder")
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe.reshape = lambda **shape: setattr(pipe, "shape", shape)
        pipe.compile = lambda: None
        return pipe
"""


@pytest.mark.slow
def test_it_runs_by_the_interpreter_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ENTRY.is_peer and "set DIFFUSION_ACCEL_PEER_PYTHON" in str(ENTRY.refusal(4, ""))
    (tmp_path / "optimum" / "intel").mkdir(parents=True)
    (tmp_path / "optimum" / "intel" / "__init__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert ENTRY.refusal(4, "") is None
    options = {"guidance_scale": 3.0, "height": 96, "width": 96, "no_such_argument": 1}
    job = Job("sticker", ("red apple, 3d style", "panda, noto style"), 2, "ddim", seed=5, batch=1, options=options)
    runner = Runner(job)
    there = Isolated(job, ENTRY, runner.pipe)
    try:
        torch.testing.assert_close(there.images(ENTRY), runner.images(Entry("baseline")), rtol=0, atol=1e-4)
        assert there.facts(ENTRY) == {"flops": None, "peak_mib": None} and there.seconds(ENTRY) > 0
    finally:
        there.close()
    monkeypatch.setenv(INTERPRETER, os.fspath(tmp_path / "none"))
    assert "cannot be run" in str(ENTRY.refusal(4, ""))


def test_text_encoders_get_their_older_names(tmp_path: Path) -> None:
    assert with_older_names("org/model", tmp_path) == "org/model"
    folder = EMBEDDED["sticker"].path
    with_older_names(str(folder), tmp_path)
    assert {part.name for part in tmp_path.iterdir()} == {part.name for part in folder.iterdir()}
    new, old = (load_file(place / "text_encoder" / "model.safetensors") for place in (folder, tmp_path))
    assert {f"text_model.{name}" for name in new} == {*old}
    assert all(torch.equal(old[f"text_model.{name}"], value) for name, value in new.items())
    again = tmp_path / "again"
    again.mkdir()
    with_older_names(str(tmp_path), again)
    assert (again / "text_encoder").is_symlink()
