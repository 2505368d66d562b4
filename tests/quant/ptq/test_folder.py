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
from diffusion_accel.quant.ptq.folder import held
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
