"""Models that are asked for a class instead of a prompt: every command takes their names and numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from command import call
from PIL import Image

from diffusion_accel import accelerate
from diffusion_accel.conditioning import CLASS, NOTHING, PROMPT, call_arguments, class_ids, condition_of, usual_texts
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.pipelines.loading import load_pipeline

NAMES = {0: "red apple, apple", 1: "Banana", 2: "7", 3: "cat", 4: "dog face"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DiTPipeline

    from diffusion_accel.conditioning import keep_class_names

    plain, _ = zoo.dit()
    pipe = DiTPipeline(plain.transformer, plain.vae, plain.scheduler, id2label=NAMES)
    keep_class_names(pipe)
    place = tmp_path_factory.mktemp("dit") / "model"
    pipe.save_pretrained(place)
    return place


def test_what_pipelines_are_called_with() -> None:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    assert condition_of(zoo.sd()[0]) == PROMPT and condition_of(zoo.unet2d()[0]) == NOTHING
    shape = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8, "block_out_channels": (8, 16)}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    for classes in (None, 5):
        unet = zoo.seeded(lambda n=classes: UNet2DModel(num_class_embeds=n, **shape, **blocks))
        pipe = ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler())
        assert condition_of(pipe) == (CLASS if classes else NOTHING)
        given = call_arguments(pipe, usual_texts(pipe, 3))
        assert given == ({"class_labels": [0, 2, 4], "batch_size": 3} if classes else {"batch_size": 3})
        pipe.set_progress_bar_config(disable=True)
        assert pipe(**given, output_type="np").images.shape == (3, 8, 8, 3)


def test_names_and_numbers_of_classes(folder: Path) -> None:
    pipe = load_pipeline(str(folder))
    assert class_ids(pipe, ["apple", "RED APPLE", " banana", "3", "7"]) == [0, 0, 1, 3, 2]  # a name before a number
    for wrong, said in (("bananna", "did you mean 'Banana'"), ("5", "the classes are"), ("-1", "the classes are")):
        with pytest.raises(ConfigurationError, match=said):
            class_ids(pipe, [wrong])
    assert usual_texts(pipe, 5) == ["apple", "Banana", "7", "cat", "dog face"]
    assert len(usual_texts(pipe, 12)) == 12
    without, _ = zoo.dit()
    assert class_ids(without, ["999"]) == [999]
    with pytest.raises(ConfigurationError, match="numbers only, 0 to 999"):
        class_ids(without, ["apple"])
    with pytest.raises(ConfigurationError, match="takes prompts"):
        usual_texts(zoo.sd()[0], 2)


def test_the_names_survive_saving(folder: Path, tmp_path: Path) -> None:
    load_pipeline(str(folder)).save_pretrained(tmp_path / "again")
    assert load_pipeline(str(tmp_path / "again")).labels == load_pipeline(str(folder)).labels != {}


def test_generate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", folder, "--steps", "2", "--seed", "4", "-q"]
    for name, words in (("a", ["apple"]), ("b", ["--class", "0"]), ("c", ["--class", "cat"])):
        code, _, err = call(capsys, "generate", *words, *common, "-o", tmp_path / f"{name}.png", "--count", "2")
        assert code == 0, err
    images = {n: np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("a-1", "a-2", "b-1", "b-2", "c-1")}
    assert (images["a-1"] == images["b-1"]).all() and (images["a-2"] == images["b-2"]).all()
    assert (images["a-1"] != images["c-1"]).any() and (images["a-1"] != images["a-2"]).any()
    pipe = accelerate(load_pipeline(str(folder)))
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(s) for s in (4, 5)]
    plain = pipe(class_labels=[0, 0], num_inference_steps=2, generator=generators).images
    assert (np.asarray(plain[1]) == images["a-2"]).all()
    report = pipe.acceleration.report()
    assert report.steps is None and str(report).startswith("done in "), "no number of steps that nobody counted"
    for words, said in (
        (["pear", *common], "no class 'pear'"),
        (["cat", "--class", "dog", *common], "did you mean 'dog face'"),
        (["--class", "cat", "--steps", "2"], "takes a prompt"),
        (["cat", "--negative-prompt", "x", *common], "does not take --negative-prompt"),
        (["cat", "--width", "64", "--height", "64", *common], "does not take --width, --height"),
    ):
        code, _, err = call(capsys, "generate", *words, "-o", tmp_path / "no.png")
        assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "no.png").exists()


@pytest.mark.slow
def test_every_other_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, low = tmp_path / "plan.json", tmp_path / "low"
    common = ["--model", folder, "--steps", "4"]
    code, _, err = call(capsys, "tune", *common, "--min-psnr", "5", "--count", "6", "--budget", "2", "-o", plan, "-q")
    assert code == 0, err
    code, _, err = call(capsys, "generate", "cat", *common, "--reuse", plan, "-q", "-o", tmp_path / "fast.png")
    assert code == 0, err
    code, out, err = call(capsys, "bench", "reuse:hold:2", *common, "--count", "2", "--rounds", "1", "-q")
    assert code == 0 and "| reuse hold:2 |" in out, err + out
    method = ["--bits", "w8a8", "--rounding", "nearest", "--finetune", "none", "--buckets", "2"]
    code, _, err = call(capsys, "quantize", *common, *method, "--count", "4", "--report", "2", "-q", "-o", low)
    assert code == 0, err
    assert json.loads((low / "model_index.json").read_text())["id2label"]["1"] == "Banana"
    code, _, err = call(
        capsys, "generate", "--class", "Banana", "--model", low, "--steps", "2", "-o", tmp_path / "q.png"
    )
    assert code == 0, err


def test_evaluate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name in ("apple", "cat", "pear"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    given: list[Any] = ["evaluate", "--model", folder, "--steps", "1", "--count", "4", "-q", "--json"]
    code, out, err = call(capsys, *given, "--data", tmp_path / "data")
    assert code == 0, err
    assert json.loads(out)["train"]["n"] == 4
    (tmp_path / "data" / "apple").rename(tmp_path / "data" / "plum")
    (tmp_path / "data" / "cat").rename(tmp_path / "data" / "grape")
    code, out, err = call(capsys, *given, "--data", tmp_path / "data")
    assert code == 2 and "none of the 6 classes" in err


def test_a_pipeline_without_either_is_refused_before_it_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    code, _, err = call(capsys, "generate", "cat", "--model", tmp_path, "-o", tmp_path / "no.png")
    assert code == 1 and "neither a prompt nor a class" in err and err.count("\n") == 1
