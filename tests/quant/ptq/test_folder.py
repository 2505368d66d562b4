"""The folder of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from quantized import SHORT, sampler

from diffusion_accel.errors import OutputError
from diffusion_accel.quant.ptq.export import put
from diffusion_accel.quant.ptq.folder import agree, clear, held
from diffusion_accel.quant.ptq.run import quantize_denoiser


@pytest.mark.slow
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


def test_what_is_of_no_run_is_not_removed(tmp_path: Path) -> None:
    work = tmp_path / "a.work"
    work.mkdir()
    (work / "mine.txt").write_text("mine")
    with held(work):
        for refused in (lambda: agree(work, {"steps": 4}), lambda: clear(work)):
            with pytest.raises(OutputError, match=r"a\.work holds mine\.txt, which is of no run; move it away"):
                refused()
    assert (work / "mine.txt").read_text() == "mine"
    (work / "mine.txt").rename(work / "settings.json")  # of a run, if not a good one
    with held(work):
        clear(work)
        agree(work, {"steps": 4})
    assert not work.exists()


def test_a_link_is_replaced_as_a_file_would_be(tmp_path: Path) -> None:
    target, link, made = (tmp_path / name for name in ("target", "link", "made"))
    for folder in (target, made):
        folder.mkdir()
        (folder / "model_index.json").write_text(folder.name)
    link.symlink_to(target)
    put(made, link, overwrite=True)
    assert not link.is_symlink() and (link / "model_index.json").read_text() == "made"
    assert (target / "model_index.json").read_text() == "target"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]
