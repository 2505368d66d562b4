"""`quantize`, `inspect` and `generate --quantize` end to end."""

from __future__ import annotations

import filecmp
import json
import shutil
import time
from pathlib import Path

import forks
import interrupted
import pytest
import torch
import zoo
from command import call
from PIL import Image

from diffusion_accel.cli import main as cli

QUICK = ["--rounding", "nearest", "--finetune", "none", "--count", "4", "--buckets", "2", "--report", "1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "pipe"
    zoo.unet2d()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sticker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with 4-bit weights and 8-bit inputs."""
    folder = tmp_path_factory.mktemp("sticker") / "w4a8"
    with pytest.raises(SystemExit) as exit_:
        cli.main(["quantize", "--bits", "w4a8", *QUICK, "--steps", "4", "-o", str(folder), "--quiet"])
    assert not exit_.value.code
    return folder


@pytest.mark.slow
def test_the_embedded_model(sticker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(p.name for p in sticker.parent.iterdir()) == ["w4a8"]  # nothing is left beside it
    report = json.loads((sticker / "report.json").read_text())
    assert report["name"] == "w4a8" and len(report["psnr"]) == 1 and report["psnr"][0] > 15
    assert set(report["ratio"]) == {"integer", "bfloat16", "dequantize", "simulated", "auto"} and report["peak"] > 2**26
    assert report["bytes"]["checkpoint"] < 0.16 * report["bytes"]["float32"]
    assert "<img" in (sticker / "report.html").read_text() and (sticker / "log.jsonl").is_file()

    code, out, _ = call(capsys, "inspect", sticker, "--json")
    held = json.loads(out)
    assert code == 0 and held["quantized_layers"] == 133 and 4 <= held["average_bits"] < 4.2
    assert held["layers"]["conv_in"]["weight_bits"] == 8 and len(held["timesteps"]) == 2
    assert all(layer["sqnr"] > 5 for layer in held["layers"].values())
    code, out, _ = call(capsys, "inspect", sticker)
    assert code == 0 and "133 quantized layers" in out

    images = {}
    common = ["red apple, 3d style", "--steps", "4", "--seed", "1", "-q"]
    for name, more in {
        "folder": ["-m", sticker, "--guidance-scale", "3", "--width", "96", "--height", "96", "--scheduler", "dpm++"],
        "flag": ["--quantize", sticker],
        "low memory": ["--quantize", sticker, "--low-memory"],
        "integer": ["--quantize", sticker, "--runtime", "integer"],
        "auto": ["--quantize", sticker, "--runtime", "auto"],
        "plain": [],
    }.items():
        runtime = [] if "--runtime" in more or name == "plain" else ["--runtime", "simulated"]
        code, _, err = call(capsys, "generate", *common, *more, *runtime, "-o", tmp_path / f"{name}.png")
        assert code == 0, err
        images[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert images["folder"] == images["flag"] == images["low memory"] != images["plain"]
    code, out, _ = call(capsys, "metadata", tmp_path / "auto.png", "--json")
    ways = json.loads(out)["diffusion_accel"]["quantized"]
    assert ways["runtime"].startswith("auto, ") and sum(ways["layers"].values()) == 133
    assert set(ways["layers"]) <= {"integer", "bfloat16", "dequantize"}  # decided, and written down
    near = torch.frombuffer(bytearray(images["integer"]), dtype=torch.uint8).float()
    assert (near - torch.frombuffer(bytearray(images["flag"]), dtype=torch.uint8)).abs().mean() < 3


def test_the_number_of_buckets_is_told(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [q for q in QUICK if q not in ("--buckets", "2")]
    options = [*quick, "--bits", "w4a4", "--steps", "25", "--report", "0", "-o", tmp_path / "new", "-q"]
    code, out, err = call(capsys, "quantize", "-m", tiny, *options)
    assert code == 0 and ", 16 buckets of timesteps" in out, err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bits", "w9a8"], "--bits: the bits of weights must be 2 to 8, got 9"),
        (["--bits", "int8"], "--bits must look like w8a8"),
        (["--bits-budget", "1"], "--bits-budget must be between 2 and 8"),
        (["--finetune", "lora"], "--finetune must be quest or none"),
        (["--rounding", "up"], "--rounding must be adaround or nearest"),
        (["--layers", "some"], "layers must be one of preset"),
        (["--buckets", "0"], "--buckets must be at least 1, got 0"),
        (["--count", "1"], "--count must be at least 2"),
        (["--iterations", "-1"], "--iterations must be at least 0"),
        (["--rate", "nan"], "--rate must be a number above 0"),
        (["--scale-rate", "1e300"], "--scale-rate must be a number above 0 and at most 1, got 1e+300"),
        (["--budget", "0"], "--budget must be a time above 0"),
        (["--prompts-file", "nowhere.txt"], "--prompts-file nowhere.txt cannot be read"),
        (["--softmax-bits", "1"], "softmax bits must be 2 to 16"),
        (["-m", "stiker"], "did you mean 'sticker'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    code, out, err = call(capsys, "quantize", "-o", tmp_path / "new", *arguments)
    assert code == 2 and not out and says in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_outputs_that_may_not_be_written(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output, more, says in (
        ("notes", [], "exists"),
        ("notes", ["--overwrite"], "is not a pipeline folder"),
        ("file", ["--overwrite"], "is a file"),
    ):
        code, _, err = call(capsys, "quantize", "-m", tiny, "-o", tmp_path / output, *more)
        assert code == 1 and says in err
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        ("nowhere", 2, "no such folder"),
        ("torchao:int9", 2, "torchao has torchao:int8wo"),
        ("quanto:", 2, "quanto has quanto:int8"),
    ],
)
def test_quantize_values_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, code: int, says: str
) -> None:
    found, _, err = call(capsys, "generate", "red apple", "--quantize", value, "-o", tmp_path / "a.png")
    assert found == code and says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("where", ["config", "header", "weights"])
def test_what_is_wrong_in_a_checkpoint_is_one_line(
    sticker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    shutil.copytree(sticker / "unet", tmp_path / "unet")
    config, weights = tmp_path / "unet" / "config.json", tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole = json.loads(config.read_text())
    spec = whole["quantization_config"]
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    changes: dict[str, list[str | bytes]] = {
        "config": [
            "[" * 100_000,
            json.dumps(whole | {"quantization_config": "w4a8"}),
            json.dumps(whole | {"quantization_config": spec | {"layers": {"[/bold]\x1b]0;": {"weight_bits": 4}}}}),
            json.dumps(whole | {"quantization_config": spec | {"timesteps": [1e400, 0]}}),
            json.dumps(whole | {"quantization_config": spec | {"recipe": {"\x1b[2J": 1}}}),
            json.dumps(whole | {"quantization_config": {k: v for k, v in spec.items() if k != "digest"}}),
        ],
        "header": [
            data[:8] + b"[" * length + data[8 + length :],
            data[:8] + data[8 : 8 + length].replace(b'"F32"', b'"F99"', 1) + data[8 + length :],
            data[:8] + data[8 : 8 + length].replace(b'"shape":[1', b'"shape":[9', 1) + data[8 + length :],
        ],
        "weights": [data[:-4], data[:-1] + bytes([data[-1] ^ 1])],
    }
    for change in changes[where]:
        if isinstance(change, str):
            config.write_text(change)
        else:
            weights.write_bytes(change)
        code, out, err = call(capsys, "inspect", tmp_path)
        assert code == 1 and not out and len(err.splitlines()) == 1 and "\x1b" not in err, err


def test_other_refusals(tiny: Path, sticker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, says in (
        (["generate", "red apple", "--quantize", tiny], "holds no checkpoint"),
        (["generate", "red apple", "--runtime", "integer"], "no quantized layers"),
        (["generate", "red apple", "--runtime", "fast"], "--runtime must be one of auto"),
        (["inspect", tiny], "holds no checkpoint"),
        (["inspect", tmp_path / "nowhere"], "no such folder"),
        (["quantize", "-m", sticker, "-o", tmp_path / "twice", "--prompts-file", __file__], "quantized already"),
        (["quantize", "-m", tiny, "-o", tmp_path / "one", "--count", "2", "--scheduler", "nothing"], "scheduler"),
    ):
        code, _, err = call(capsys, *command)
        assert code in (1, 2) and says in err and len(err.splitlines()) == 1, err


def test_without_data(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    code, out, err = call(
        capsys, "quantize", "-m", tiny, "--calibration", "none", "--bits", "w4a8", "-o", made, "--quiet"
    )
    assert code == 0 and "8 MB" not in err and "layers" in out + err, err
    code, out, _ = call(capsys, "inspect", made, "--json")
    layers = json.loads(out)["layers"]
    assert code == 0 and {row["weight_group"] for row in layers.values()} == {64}
    assert {row["grids"] for row in layers.values()} == {" dynamic"}
    again = ["--calibration", "none", "--bits", "w4a4", "--rank", "2", "--input-group", "16", "--overwrite", "-o", made]
    assert call(capsys, "quantize", "-m", tiny, *again, "--quiet")[0] == 0
    layers = json.loads((made / "unet" / "config.json").read_text())["quantization_config"]["layers"]
    assert {layer.get("rank", 0) for layer in layers.values()} == {0, 2}
    assert {layer.get("input_group", 0) for layer in layers.values()} == {0, 16}
    for more, says in (
        (["-o", made], "exists"),
        (["-o", tmp_path / "b", "--min-psnr", "40"], "--min-psnr needs data: leave out --calibration none"),
        (["-o", tmp_path / "b", "--size-ratio", "0.2"], "--size-ratio needs data"),
        (["-o", tmp_path / "b", "--rounding", "nearest"], "--rounding needs data: leave out --calibration none"),
        (["-o", tmp_path / "b", "--inputs", "static"], "--inputs static needs data"),
        (["-o", tmp_path / "b", "--group", "16", "--group", "32"], "--group takes one size"),
        (["-o", tmp_path / "b", "--group", "33"], "group must be one of 0, 16"),
        (["-o", tmp_path / "b", "-m", "some/model"], "a pipeline folder or a single file, got the hub id some/model"),
        (["-o", tmp_path / "b", "--model-config", tiny], "config is for a single file"),
        (["-o", tmp_path / "b", "-m", made], "is quantized already"),
    ):
        code, _, err = call(capsys, "quantize", "-m", tiny, "--calibration", "none", *more)
        assert code in (1, 2) and says in err and len(err.splitlines()) == 1, err
    code, _, err = call(capsys, "quantize", "-m", tiny, "-o", tmp_path / "b", "--model-config", tiny)
    assert code == 2 and "--model-config needs --calibration none" in err
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_single_file_without_data(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny / "unet" / "diffusion_pytorch_model.safetensors"
    common = ["quantize", "--calibration", "none", "--bits", "w4", "--quiet"]
    code, _, err = call(capsys, *common, "-m", file, "--model-config", tiny, "-o", tmp_path / "file")
    assert code == 0, err
    call(capsys, *common, "-m", tiny, "-o", tmp_path / "folder")
    assert filecmp.cmpfiles(tmp_path / "file/unet", tmp_path / "folder/unet", ["config.json", file.name], False)[0] == [
        "config.json",
        file.name,
    ]


WHOLE = "--bits w4a8 --count 6 --buckets 2 --steps 4 --iterations 12 --epochs 2 --time-epochs 4".split()


@pytest.mark.slow
def test_killed_at_any_point_it_goes_on_and_ends_the_same(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at moments that depend on how fast the machine is; the result may not."""
    options = ["quantize", "-m", str(tiny), *WHOLE, "--report", "0", "--quiet", "-o"]

    def killed(name: str, seconds: float) -> bool:
        words = [*options, str(tmp_path / name)]
        process = forks.start(interrupted.command, logs, tmp_path, words, "any_moment")
        work = tmp_path / f"{name}.work"
        while process.is_alive() and not work.is_dir():
            time.sleep(0.05)
        process.join(seconds)
        if process.exitcode is not None:
            assert process.exitcode == 0, (logs / "err").read_text()
            return False
        process.kill()
        process.join()
        return True

    logs = tmp_path / "logs"
    logs.mkdir()

    assert call(capsys, *options, tmp_path / "whole")[0] == 0
    broken = tmp_path / "broken"
    if killed("broken", 2.0):
        finished = ["--overwrite"] if broken.is_dir() else []  # it had given the folder its name
        code, _, err = call(capsys, *options, broken, *finished)
        assert code == 0, err
    assert not list(tmp_path.glob("*.work")) and not list(tmp_path.glob(".*"))
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "whole" / "unet" / name, tmp_path / "broken" / "unet" / name, shallow=False), name
