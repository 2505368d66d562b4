"""The state of a run and files beside it, damaged: one line, nothing loaded; never something else than was saved."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion_accel import ModelLoadError
from diffusion_accel.evaluation.classifier import asset_folder, load_classifier, load_reference
from diffusion_accel.model_files.tensors import file_digest
from diffusion_accel.training.affinity import read_affinity
from diffusion_accel.training.arrays import load_array, load_tensors
from diffusion_accel.training.datasets import load_examples
from diffusion_accel.training.files import TrainingError
from diffusion_accel.training.log import log_lines
from diffusion_accel.training.state import STATE, _digest, load_average, load_state, read_counters, save_state


def trained(seed: int) -> tuple[nn.Module, list[torch.Tensor], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    return model, [p.detach().clone() + seed for p in model.parameters()], optimizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    save_state(folder, *trained(1), {"step": 7, "seconds": 1.5, "loss_sum": 0.25, "loss_count": 1, "seed": 0})
    return folder


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def refused(folder: Path, words: str = "") -> None:
    model, average, optimizer = trained(2)
    before = values(model)
    for load in (
        lambda: load_state(folder, model, average, optimizer),
        lambda: load_average(folder, model, "train"),
    ):
        with pytest.raises(TrainingError, match=words) as caught:
            load()
        assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(x, y) for x, y in zip(values(model), before, strict=True))


def signed(folder: Path, **changes: Any) -> None:
    """Changes of the JSON with a digest that fits, as someone who means it would make them."""
    content = json.loads((folder / STATE).read_text()) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / STATE).write_text(json.dumps(content | {"digest": _digest(content)}))


def tensor_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes of the tensors with digests that fit."""
    tensors = load_file(tensor_file(folder))
    change(tensors)
    save_file(tensors, tensor_file(folder))
    signed(folder, tensors_digest=file_digest(tensor_file(folder)))


def test_what_is_loaded_is_what_was_saved(saved: Path) -> None:
    wanted, averages, _ = trained(1)
    model, average, optimizer = trained(2)
    counters = load_state(saved, model, average, optimizer)
    assert counters["step"] == 7 and counters["loss_sum"] == 0.25
    assert all(torch.equal(x, y) for x, y in zip(values(model), values(wanted), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(average, averages, strict=True))


def test_mutants_are_refused_or_the_same(saved: Path) -> None:
    rng = random.Random(0)
    kept = {file: file.read_bytes() for file in (saved / STATE, tensor_file(saved))}
    counters = read_counters(saved)
    for number in range(150):
        file = rng.choice(list(kept))
        data = bytearray(kept[file])
        place = rng.randrange(len(data))
        if number % 3 == 0:
            del data[place:]
        elif number % 3 == 1:
            data[place] ^= 1 << rng.randrange(8)
        else:
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        file.write_bytes(data)
        try:
            assert read_counters(saved) == counters, "only blanks were changed"
            model, average, optimizer = trained(2)
            load_state(saved, model, average, optimizer)
            assert all(torch.equal(x, y) for x, y in zip(values(model), values(trained(1)[0]), strict=True))
        except TrainingError as error:
            assert len(str(error).splitlines()) == 1
        file.write_bytes(kept[file])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensors": "../x"}, "step and tensors are not what they can be"),
        ({"tensors": "/etc/passwd"}, "step and tensors are not"),
        ({"tensors": ...}, "step and tensors are not"),
        ({"tensors": 5}, "step and tensors are not"),
        ({"tensors": "state-00000099.safetensors"}, "which is no file beside it"),
        ({"tensors_digest": "0" * 64}, "damaged or belongs to another state"),
        ({"step": "7"}, "step and tensors are not"),
        ({"optimizer": [1]}, "does not fit this model"),
    ],
)
def test_a_state_that_names_something_else_is_refused(changes: dict[str, Any], words: str, saved: Path) -> None:
    save_file({"model.x": torch.zeros(1)}, saved.parent / "x")
    signed(saved, **changes)
    model, average, optimizer = trained(2)
    with pytest.raises(TrainingError, match=words):
        load_state(saved, model, average, optimizer)


def test_tensors_that_do_not_fit_are_refused_before_anything_is_loaded(saved: Path, tmp_path: Path) -> None:
    for change, words in (
        (lambda t: t["model.0.weight"].view(-1).__setitem__(0, float("nan")), "no numbers"),
        (lambda t: t.update({"model.0.weight": torch.zeros(4, 3)}), r"has \(4, 3\) for 0.weight, the model \(3, 4\)"),
        (lambda t: t.pop("average.1.bias"), "nothing for 1.bias|does not fit"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "for extra, the model nothing"),
    ):
        folder = tmp_path / "copy"
        shutil.copytree(saved, folder)
        edit(folder, change)
        model, average, optimizer = trained(2)
        before = values(model)
        with pytest.raises(TrainingError, match=words):
            load_state(folder, model, average, optimizer)
        assert all(torch.equal(x, y) for x, y in zip(values(model), before, strict=True))
        shutil.rmtree(folder)


def test_the_file_of_another_state_is_refused(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_state(other, *trained(3), {"step": 7})
    shutil.copy(tensor_file(other), tensor_file(saved))
    refused(saved, "damaged or belongs to another state")
    shutil.copy(other / STATE, saved / STATE)
    tensor_file(saved).unlink()
    (saved / "state-00000007.safetensors").symlink_to(tensor_file(other))
    refused(saved, "which is no file beside it")
    os.unlink(saved / "state-00000007.safetensors")
    os.mkfifo(saved / "state-00000007.safetensors")
    refused(saved, "which is no file beside it")


def test_other_json_is_no_state(saved: Path) -> None:
    for text, words in (("[1]", "it is no table"), ("{}", "has no digest"), ("[" * 5000, "not valid JSON")):
        (saved / STATE).write_text(text)
        refused(saved, words)


# ------------------------------------------------------------------------------------------- files beside it
def test_arrays_tensors_and_logs_that_are_damaged(tmp_path: Path) -> None:
    array = tmp_path / "pictures.npy"
    np.save(array, np.zeros((2, 4, 4, 3), np.uint8))
    assert load_array(array).shape == (2, 4, 4, 3)
    whole = array.read_bytes()
    for data in (whole[:100], whole[:-1], b"", b"\x93NUMPY" + b"\xff" * 100):
        array.write_bytes(data)
        with pytest.raises(TrainingError, match="no whole array"):
            load_array(array)
    np.save(array, np.zeros(3))
    with pytest.raises(TrainingError, match="holds no images"):
        load_array(array)
    save_file({"latents": torch.tensor([1.0, float("inf")])}, tmp_path / "x.safetensors")
    with pytest.raises(TrainingError, match="no numbers"):
        load_tensors(tmp_path / "x.safetensors", "latents")
    with pytest.raises(TrainingError, match="lacks the tensor indices"):
        load_tensors(tmp_path / "x.safetensors", "indices")
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n5\n{"loss": 1}\n{"step": "x"}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert [line["step"] for line in log_lines(log)] == [1, 2], "a run that was killed left half a line"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"file": "a", "split": "train"}', "1 rows and 2 images"),
        ('{"file": "a", "split": "train"}\n[]', "is no table"),
        ('{"file": "a", "split": "train"}\n{"file": 5, "split": "train"}', "row 2: file is missing or not of its kind"),
        ("", "has no rows"),
        (
            '{"file":"a","split":"train","label":"x"}\n{"file":"a","split":"train"}',
            "some rows have a caption or a label",
        ),
    ],
)
def test_rows_that_do_not_belong_to_the_images(rows: str, words: str, tmp_path: Path) -> None:
    np.save(tmp_path / "pictures.npy", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(TrainingError, match=words):
        load_examples(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"affinity": [[1], [1, 2]]}', '{"affinity": [["x"]]}', '{"affinity": [[5]]}', '{"affinity": 1}'],
)
def test_affinities_that_are_none(content: str, tmp_path: Path) -> None:
    file = tmp_path / "affinity.json"
    file.write_text(content)
    with pytest.raises(TrainingError, match="holds no task affinities"):
        read_affinity(file)
    file.write_text('{"affinity": [[1, 0.5], [0.5, 1]]}')
    assert read_affinity(file).shape == (2, 2)


def test_classifiers_and_features_that_are_damaged(tmp_path: Path) -> None:
    def whole() -> Path:
        folder = tmp_path / "features"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(asset_folder(), folder)
        return folder

    load_reference(whole())
    for name, data, load in (
        ("classes.json", b"[1]", load_classifier),
        ("classes.json", b'{"concept": 5, "group": [], "style": []}', load_classifier),
        ("classes.json", b'{"concept": ["a"], "group": ["b"], "style": ["c"]}', load_classifier),
        ("model.safetensors", b"x" * 50, load_classifier),
        ("reference.json", b"[]", load_reference),
        ("reference.json", b'{"concepts": ["a"], "styles": ["b"]}', load_reference),
        ("reference.safetensors", b"", load_reference),
    ):
        folder = whole()
        (folder / name).write_bytes(data)
        with pytest.raises(ModelLoadError) as caught:
            load(folder)
        assert len(str(caught.value).splitlines()) == 1
    folder = whole()
    save_file({"features": torch.full((3, 128), float("nan"))}, folder / "reference.safetensors")
    with pytest.raises(ModelLoadError, match="no numbers"):
        load_reference(folder)
