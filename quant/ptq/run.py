"""From a pipeline to a quantized one, in stages that can be interrupted at any point and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from diffusion_accel._version import __version__
from diffusion_accel.denoisers import (
    KEYS_VALUES,
    QUERIES,
    TIME_LAYERS,
    closed_inside,
    concatenated_inputs,
    denoiser_names,
    edge_layers,
    find_denoiser,
    getattr_path,
    quantization_preset,
)
from diffusion_accel.diffusers_compat import drop_config_entry, set_config_entry
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.finite import finite
from diffusion_accel.hooks import forward_parameters
from diffusion_accel.io import replacing
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.quant.layers import QuantizedLayer, quantized_layers
from diffusion_accel.quant.loader import LowBitConfig, LowBitQuantizer
from diffusion_accel.quant.model import candidates, install, quantized_table, set_runtime, tables, uninstall
from diffusion_accel.quant.spec import LayerSpec, ModelSpec

from .budget import plan_probe, plan_prompts, plan_work, progress_of
from .calibration import CalibrationSet, Rows, record
from .finetune import (
    PRESETS,
    Tuner,
    batches,
    matching,
    relative_error,
    stage_one_epochs,
)
from .folder import agree, held, load, read, write
from .ranges import observe
from .reconstruct import capture, reconstruct, units
from .sensitivity import CHOICES, PROBE_BITS, allocate, rounding_errors, sensitivity
from .settings import QuantizeSettings
from .trainable_layer import Draft, Drafts, drafts_in, rounding

Progress = Callable[[str, float, float], None]  # what is being done, share of it all, seconds left
_SAVE_EVERY = 30.0  # seconds of finetuning that an interruption may cost
_ZERO_MARGIN = 8  # one bit more for each zero point of 4 bits


def quantize(
    sampler: Sampler,
    settings: QuantizeSettings,
    work: Path,
    minutes: float | None = None,
    progress: Progress | None = None,
) -> Quantization:
    """Quantize the denoiser of `sampler.pipe`; the pipeline then has the quantized one.

    Stages: record the calibration set; measure which layers suffer; choose bits (with a budget); find the grids of
    the weights and learn their rounding; find the grids of the inputs; finetune the layers of the time embedding;
    finetune the layers that matter most.

    Args:
        sampler: the pipeline with prompts, steps and guidance; the calibration set is its own sampling trajectories.
        settings: how.
        work: a folder for what lies between; a second call with the same settings goes on from there.
        minutes: how long it may take about; iterations of rounding and finetuning are cut down to fit.
        progress: told what is being done.

    Raises:
        ConfigurationError: the folder belongs to other settings, or the budget of bits cannot be kept.
        UnsupportedPipelineError: there is nothing to quantize.
    """
    run = Quantization(sampler, settings, work, progress or (lambda what, share, left: None))
    run.run(minutes)
    return run


class Quantization:
    """One run of `quantize`, and what came out.

    Attributes:
        model: the quantized denoiser.
        spec: how it is quantized.
        losses: by stage, what the log has: loss with rounding to nearest and learnt by block, and so on.
        seconds: by stage.
    """

    model: Any
    spec: ModelSpec

    def __init__(self, sampler: Sampler, settings: QuantizeSettings, work: Path, progress: Progress) -> None:
        self.sampler, self.settings, self.work, self.progress = sampler, settings, work, progress
        denoiser = find_denoiser(sampler.pipe)
        if getattr(denoiser, "is_quantized", False):
            raise UnsupportedPipelineError(f"the {type(denoiser).__name__} is quantized already")
        if any(hasattr(m, "base_layer") for m in (denoiser.modules() if denoiser is not None else ())):
            raise UnsupportedPipelineError(
                f"the {type(denoiser).__name__} has adapters (LoRA): fuse them (fuse_lora, then unload_lora_weights) "
                "or take them off before it is quantized; LoRAs work beside the quantized model"
            )
        if denoiser is None or not candidates(denoiser):
            what = type(sampler.pipe).__name__
            raise UnsupportedPipelineError(f"{what} has no unet or transformer with layers that can be quantized")
        if len(names := denoiser_names(sampler.pipe)) > 1:
            raise UnsupportedPipelineError(
                f"{type(sampler.pipe).__name__} has {len(names)} denoisers ({', '.join(names)}), and one is quantized "
                "at a time; load it with a quantizer that takes both (quantize torchao:int8wo)"
            )
        if closed := closed_inside(sampler.pipe):
            raise UnsupportedPipelineError(f"{type(sampler.pipe).__name__} cannot be quantized: {closed}")
        if "timestep" not in forward_parameters(denoiser):
            raise UnsupportedPipelineError(f"{type(denoiser).__name__} takes no timestep")
        self.denoiser: Any = denoiser
        self.losses: dict[str, list[Any]] = {}
        self.seconds: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.plan: dict[str, Any] = {}
        self._way_back = ExitStack()

    # ------------------------------------------------------------------ the whole
    def run(self, minutes: float | None) -> None:
        """All stages, from where an earlier run stopped. Whatever stops it, the denoiser is then as it was."""
        training = [(m, m.training) for m in self.denoiser.modules()]
        self._way_back.callback(_set_training, training)
        self.denoiser.eval()
        try:
            with held(self.work):
                self._run(minutes)
        except BaseException:
            self.restore()
            raise

    def _run(self, minutes: float | None) -> None:
        self.began, self.minutes = time.monotonic(), minutes
        self._check()
        agree(self.work, self._asked(minutes))
        with self._stage("calibration"):
            self._cut_prompts()
            self._record()
        with self._stage("sensitivity"):
            found = self._sensitivities()
        specs = self._specs(found)
        self._quantize_tables()
        self.drafts = Drafts(self.denoiser, specs, self.calibration.timesteps, self.settings.search)
        self._way_back.callback(self.drafts.restore)
        self._decide()
        self._note_error("nearest, weights only", True, False)
        if self.plan["iterations"]:
            with self._stage("rounding"):
                self._round()
            self._note_error("learnt rounding, weights only", True, False)
        peaks: dict[str, torch.Tensor] = {}
        if self.settings.activation_bits:
            with self._stage("ranges"):
                peaks = self._ranges()
            self._note_error("quantized", True, True)
        if self.settings.finetune is not None and self.plan["epochs"] + max(self.plan["time_epochs"]) > 0:
            with self._stage("finetuning"):
                self._finetune()
            self._note_error("finetuned", True, True)
        self._assemble(peaks)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)

    def _check(self) -> None:
        """What can be refused before anything is done."""
        count, kept = len(self.sampler.prompts), self._kept_for_validation()
        if count < kept + 1:
            raise ConfigurationError(f"{count} prompts are too few: {kept} of them are kept for validation")
        wrong = next((n for n, p in self.denoiser.named_parameters() if not finite(p)), None)
        if wrong is not None:
            raise ConfigurationError(
                f"{wrong} of the {type(self.denoiser).__name__} has values that are no finite numbers"
            )
        if self.settings.bits_budget is not None:  # an allocation of the fewest bits says whether there are enough
            self._allocate(dict.fromkeys(candidates(self.denoiser), 1.0), (min(CHOICES), PROBE_BITS))

    def _kept_for_validation(self) -> int:
        return self.settings.validation or max(1, len(self.sampler.prompts) // 8)

    def _asked(self, minutes: float | None) -> dict[str, Any]:
        """All that must be the same for a run to go on: what it is asked for, and the model."""
        s = self.sampler
        scheduler = getattr(s.pipe.scheduler, "config", {})
        return {
            **self.settings.to_dict(),
            "budget minutes": minutes,
            "prompts": list(s.prompts),
            "steps": s.steps,
            "seed of the images": s.seed,
            "batch": s.batch,
            "options": {k: v if isinstance(v, (int, float, str, type(None))) else str(v) for k, v in s.options.items()},
            "scheduler": type(s.pipe.scheduler).__name__,
            "settings of the scheduler": {k: str(v) for k, v in scheduler.items() if not k.startswith("_")},
            "pipeline": type(s.pipe).__name__.removeprefix("Accelerated"),
            "model": type(self.denoiser).__name__,
            "type of numbers": str(next(self.denoiser.parameters()).dtype),
            "weights": _hash(s.pipe),
            "version": __version__,
        }

    def _log(self, stage: str, **values: Any) -> None:
        self.losses.setdefault(stage, []).append(values)
        with (self.work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **values}) + "\n")

    def _note_error(self, what: str, weights: bool, inputs: bool) -> None:
        rounding(self.drafts, weights, inputs)
        count = len(self.heldout.timesteps)
        each = self.plan["error_rows"]
        rows = (self.heldout.sample(b, each, self.settings.seed) for b in range(count))
        self.validation[what] = relative_error(self.denoiser, rows)
        self._log("validation", what=what, error=round(self.validation[what], 6))

    # ------------------------------------------------------------------ calibration
    def _record(self) -> None:
        s, prompts = self.sampler, self.sampler.prompts
        kept = self._kept_for_validation()
        parts = {"calibration": s.part(0, len(prompts) - kept), "validation": s.part(len(prompts) - kept, len(prompts))}
        for name, part in parts.items():
            folder = self.work / name
            if not (folder / "index.json").is_file():

                def tell(done: int, total: int, name: str = name) -> None:
                    self.progress(f"{name}: {done} of {total} prompts", 0.0, float("nan"))

                with torch.no_grad():  # what a pipeline keeps of it must be good for training as well
                    record(part, self.settings.bucket_count, folder, tell)
        self.calibration = CalibrationSet(self.work / "calibration")
        self.heldout = CalibrationSet(self.work / "validation")

    def _cut_prompts(self) -> None:
        """Take as many of the prompts as the time for drawing the calibration set allows; decided once, and written
        down for a run that goes on."""
        file, count = self.work / "prompts.json", len(self.sampler.prompts)
        if file.is_file():
            count = int(read(file)["prompts"])
        elif self.minutes is not None:
            self.progress("how long an image takes", 0.0, float("nan"))
            began = time.monotonic()
            with torch.no_grad():
                self.sampler.call(0, 1)
            count = plan_prompts(count, time.monotonic() - began, 60 * self.minutes)
            write(file, {"prompts": count})
        if count < len(self.sampler.prompts):
            self.progress(f"calibration on {count} of {len(self.sampler.prompts)} prompts", 0.0, float("nan"))
            self.sampler = self.sampler.part(0, count)

    def _probe_rows(self, layers: int) -> list[Rows]:
        """Rows on which sensitivities are measured; how many is written down, so that a resumed run repeats it."""
        file = self.work / "probe.json"
        if not file.is_file():
            write(file, plan_probe(self.denoiser, self.heldout, layers, self._left()))
        probe, count = read(file), len(self.heldout.timesteps)
        numbers = range(0, count, max(1, count // 5))
        numbers = numbers[:: -(-len(numbers) // probe["timesteps"])]
        return [self.heldout.sample(b, probe["rows"], self.settings.seed) for b in numbers]

    def _left(self) -> float | None:
        """Seconds of the budget that are left; None without one."""
        return None if self.minutes is None else self.minutes * 60 - (time.monotonic() - self.began)

    # ------------------------------------------------------------------ bits
    def _sensitivities(self) -> dict[str, float]:
        wanted = self.settings.bits_budget is not None or self.settings.finetune is not None
        if not wanted:
            return {}
        file = self.work / "sensitivity.json"
        known = read(file) if file.is_file() else {}
        layers = candidates(self.denoiser)
        if len(known) == len(layers):
            return known
        specs = {name: LayerSpec(weight_bits=PROBE_BITS) for name in layers}
        drafts = Drafts(self.denoiser, specs, ())
        found = dict(known)
        saved = time.monotonic()
        try:
            rows = self._probe_rows(len(layers))
            for name in [n for n in drafts if n not in known]:
                found[name] = sensitivity(self.denoiser, drafts[name], rows)
                self.progress(f"sensitivity: {len(found)} of {len(layers)} layers", 0.0, float("nan"))
                if time.monotonic() - saved > _SAVE_EVERY:
                    write(file, found)
                    saved = time.monotonic()
        finally:
            drafts.restore()
        write(file, found)
        return found

    def _specs(self, needs: dict[str, float]) -> dict[str, LayerSpec]:
        s, layers = self.settings, candidates(self.denoiser)
        edges = edge_layers(self.denoiser)
        split = concatenated_inputs(self.denoiser) if s.split else {}
        bits = {name: s.edge_bits if name in edges else s.weight_bits for name in layers}
        if s.bits_budget is not None:
            bits = self._allocate(needs, CHOICES)
        queries = matching(layers, (QUERIES, KEYS_VALUES)) if s.activation_bits and s.attention_bits else []
        specs = {}
        for name in layers:
            inputs = s.activation_bits if name not in edges else max(s.edge_bits, s.activation_bits or 0)
            by_channel = s.by_channel and name not in edges
            specs[name] = LayerSpec(
                weight_bits=bits[name],
                activation_bits=inputs if s.activation_bits else None,
                per_channel=by_channel,
                compact_grids=by_channel and s.activation_bits is not None,
                zero_margin=_ZERO_MARGIN if by_channel and s.activation_bits else 0,
                split=split.get(name, 0),
                output_bits=s.attention_bits if name in queries else None,
                sensitivity=float(f"{needs[name]:.4g}") if name in needs else None,
            )
        return specs

    def _allocate(self, needs: dict[str, float], choices: tuple[int, ...]) -> dict[str, int]:
        """Bits of each layer within the budget, by how much they are needed."""
        s, layers = self.settings, candidates(self.denoiser)
        assert s.bits_budget is not None
        errors = {}
        for name, layer in layers.items():
            table = rounding_errors(_weight(layer), choices) if len(choices) > 2 else dict.fromkeys(choices, 1.0)
            errors[name] = {b: needs[name] * e / max(table[PROBE_BITS], 1e-30) for b, e in table.items()}
        fixed = {n: s.edge_bits for n in edge_layers(self.denoiser) if n in layers}
        return allocate(errors, {n: _weight(layer).numel() for n, layer in layers.items()}, s.bits_budget, fixed)

    def _quantize_tables(self) -> None:
        """Embedding tables are rounded to nearest before anything else, so that all errors are with them."""
        self._plain_tables = tables(self.denoiser)
        self._way_back.callback(_put, self.denoiser, self._plain_tables)
        self._tables = {name: quantized_table(table) for name, table in self._plain_tables.items()}
        _put(self.denoiser, self._tables)

    def _decide(self) -> None:
        """How much every stage does; written down, so that a resumed run repeats it."""
        file = self.work / "plan.json"
        if file.is_file():
            self.plan = read(file)
            return
        self.plan = plan_work(self.settings, self.denoiser, self.drafts, self.calibration, self._left())
        write(file, self.plan)

    # ------------------------------------------------------------------ weights
    def _round(self) -> None:
        r = self.settings.rounding
        assert r is not None
        settings = dataclasses.replace(r, iterations=self.plan["iterations"], rate=self.plan["rate"])
        buckets = len(self.calibration.timesteps)
        each = max(1, self.plan["rounding_rows"] // buckets)
        parts = units(self.denoiser, self.calibration.sample(0, 1, 0))
        rows: list[Rows] | None = None
        done: dict[str, Draft] = {}

        def switch(full: bool) -> None:
            rounding(self.drafts, False, False)
            if not full:
                rounding(done, True, False)

        for number, (name, unit) in enumerate(parts.items()):
            mine = {name: unit} if isinstance(unit, Draft) else {f"{name}.{k}": d for k, d in drafts_in(unit).items()}
            file = self.work / f"rounding-{number:04d}.safetensors"
            if file.is_file():
                stored = load(file)
                for key, draft in mine.items():
                    draft.up = stored[key].bool()
            else:
                share, left = progress_of(self.plan, "rounding", number / len(parts))
                self.progress(f"rounding: {name}", share, left)
                if rows is None:
                    rows = [self.calibration.sample(b, each, self.settings.seed + 1) for b in range(buckets)]
                data = capture(self.denoiser, unit, rows, switch)
                rounding(self.drafts, False, False)
                before, after = reconstruct(unit, data, settings, self.settings.seed + number)
                with replacing(file) as temporary:
                    save_file({key: draft.up.to(torch.uint8) for key, draft in mine.items()}, temporary)
                self._log("rounding", block=name, nearest=round(before, 6), learnt=round(after, 6))
            done |= mine

    # ------------------------------------------------------------------ inputs
    def _ranges(self) -> dict[str, torch.Tensor]:
        count = len(self.calibration.timesteps)
        softmax = self._attentions()
        peaks = {name: torch.zeros(count) for name in softmax}
        rounding(self.drafts, True, False)
        for number in range(count):
            file = self.work / f"ranges-{number:04d}.safetensors"
            if file.is_file():
                stored = load(file)
                for name, draft in self.drafts.items():
                    for key in _grids(draft):
                        getattr(draft, key).data[number] = stored[f"{name}.{key}"]
                for name in softmax:
                    peaks[name][number] = stored[f"{name}.peak"]
                continue
            self.progress(
                f"ranges: timestep {number + 1} of {count}", *progress_of(self.plan, "ranges", number / count)
            )
            watch = dataclasses.replace(self.settings.observation, rows=self.plan["range_rows"])
            found = observe(self.denoiser, self.drafts, self.calibration, watch, [number], softmax, lambda n: None)
            tensors = {
                f"{n}.{k}": getattr(d, k).data[number].clone() for n, d in self.drafts.items() for k in _grids(d)
            }
            for name, peak in found.items():
                peaks[name][number] = peak[number]
                tensors[f"{name}.peak"] = peak[number].clone()
            with replacing(file) as temporary:
                save_file(tensors, temporary)
        return peaks

    def _attentions(self) -> dict[str, int]:
        from diffusion_accel.quant.attention import quantizable_attention

        bits = self.settings.softmax_bits
        if bits is None or not self.settings.activation_bits:
            return {}
        return {n: bits for n, m in self.denoiser.named_modules() if quantizable_attention(m)}

    # ------------------------------------------------------------------ finetuning
    def chosen_layers(self) -> list[str]:
        """The layers whose weights stage 2 finetunes."""
        s, names = self.settings, list(self.drafts)
        if s.layers == "all":
            return names
        found = set()
        if s.layers != "measured":
            preset = quantization_preset(self.denoiser) if s.layers == "preset" else s.layers
            found.update(matching(names, PRESETS[preset]))
        by_need = sorted(names, key=lambda n: -(self.drafts[n].spec.sensitivity or 0.0))
        found.update(by_need[: round(s.sensitive * len(names))])
        return [n for n in names if n in found]

    def _finetune(self) -> None:
        f, count = self.settings.finetune, len(self.calibration.timesteps)
        assert f is not None
        times = matching(self.drafts, (TIME_LAYERS,))
        chosen = self.chosen_layers()
        others = [n for n in self.drafts if n not in times]
        file = self.work / "finetune.safetensors"
        stage, at, moments = self._restore(file, {*times, *chosen})
        saved = time.monotonic()
        epochs = [self._time_epochs(i) for i in range(count)]
        if stage == 1:
            for number in range(at, count):
                self.progress(
                    f"time embedding: timestep {number + 1} of {count}", *progress_of(self.plan, "finetuning", 0.0)
                )
                tuner = Tuner(self.denoiser, self.drafts, times, times, f.rate, f.scale_rate, f.layer_loss, f.moments)
                tuner.visit(number)
                losses = []
                for epoch in range(epochs[number]):
                    for rows in batches(self.calibration, number, f.time_rows, f.batch, epoch):
                        losses.append(tuner.step(rows))
                tuner.close()
                if losses:
                    self._log("time embedding", timestep=self.calibration.timesteps[number], **_ends(losses))
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save(file, 1, number + 1, None)
                    saved = time.monotonic()
            stage, at, moments = 2, 0, None
            self._save(file, stage, at, None)
        tuner = Tuner(self.denoiser, self.drafts, chosen, others, f.rate, f.scale_rate, f.layer_loss, f.moments)
        if moments:
            tuner.restore(moments)
        total = self.plan["epochs"] * count
        losses = []
        for place in range(at, total):
            epoch, turn = divmod(place, count)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed + epoch)).tolist()
            what = f"finetuning: epoch {epoch + 1} of {self.plan['epochs']}"
            self.progress(what, *progress_of(self.plan, "finetuning", place / total))
            tuner.visit(order[turn])
            tuner.pace(0.5 * (1 + math.cos(math.pi * place / total)))
            for rows in batches(self.calibration, order[turn], f.rows, f.batch, place):
                losses.append(tuner.step(rows))
            if turn == count - 1:
                self._log("finetuning", epoch=epoch + 1, loss=sum(losses) / len(losses))
                losses = []
            if time.monotonic() - saved > _SAVE_EVERY:
                self._save(file, 2, place + 1, tuner)
                saved = time.monotonic()
        tuner.close()
        self._save(file, 2, total, None)

    def _time_epochs(self, number: int) -> int:
        f = self.settings.finetune
        assert f is not None
        asked = dataclasses.replace(f, time_epochs=tuple(self.plan["time_epochs"]))
        return stage_one_epochs(asked, number, self.calibration.timesteps[number])

    def _save(self, file: Path, stage: int, at: int, tuner: Tuner | None) -> None:
        tensors = {"position": torch.tensor([stage, at])}
        for name, draft in self.drafts.items():
            for key in (*_grids(draft), "weight", "bias"):
                value = getattr(draft, key, None)
                if value is not None and (key not in ("weight", "bias") or getattr(value, "own", False)):
                    tensors[f"{name}.{key}"] = value.detach().contiguous()
        if tuner is not None:
            tensors |= {f"moments/{key}": value for key, value in tuner.state().items()}
        with replacing(file) as temporary:
            save_file(tensors, temporary)

    def _restore(self, file: Path, learning: set[str]) -> tuple[int, int, dict[str, torch.Tensor] | None]:
        if not file.is_file():
            return 1, 0, None
        stored = load(file)
        stage, at = stored.pop("position").tolist()
        moments = {k.removeprefix("moments/"): stored.pop(k) for k in list(stored) if k.startswith("moments/")}
        for name in learning:
            if f"{name}.weight" in stored:
                self.drafts[name].own()
        for key, value in stored.items():
            name, _, what = key.rpartition(".")
            with torch.no_grad():
                getattr(self.drafts[name], what).copy_(value)
        return stage, at, moments or None

    # ------------------------------------------------------------------ result
    def _assemble(self, peaks: dict[str, torch.Tensor]) -> None:
        s = self.settings
        recipe = {
            "bits": s.name,
            "rounding": "nearest" if not self.plan["iterations"] else "adaround",
            "iterations": self.plan["iterations"],
            "finetune": "none" if "finetuned" not in self.validation else "quest",
            "time_epochs": self.plan["time_epochs"],
            "epochs": self.plan["epochs"],
            "layers": s.layers,
            "sensitive": s.sensitive,
            "prompts": len(self.sampler.prompts),
            "steps": self.sampler.steps,
            "scheduler": type(self.sampler.pipe.scheduler).__name__,
            "error": {k: float(f"{v:.4g}") for k, v in self.validation.items()},
            "versions": {"diffusion-accel": __version__, "torch": torch.__version__},
        }
        timesteps = self.calibration.timesteps if s.activation_bits else ()
        made = {name: draft.finished(self.drafts.buckets) for name, draft in self.drafts.items()}
        made |= self._tables
        softmax = dict.fromkeys(peaks, s.softmax_bits) if s.softmax_bits else None
        spec = ModelSpec({n: m.spec for n, m in made.items()}, timesteps, softmax, recipe)
        self.drafts.restore()
        self.drafts.clear()
        _put(self.denoiser, self._plain_tables)
        self._way_back.callback(_forget, self.denoiser)
        buckets = install(self.denoiser, spec)
        for name, layer in made.items():
            layer.buckets = buckets
            self.denoiser.set_submodule(name, layer)
        for name, peak in peaks.items():
            assert s.softmax_bits is not None
            scale = (peak / ((1 << s.softmax_bits) - 1)).clamp(min=1e-8)
            getattr_path(self.denoiser, name).softmax_scale.copy_(scale[:, None])
        self.spec = spec
        config = LowBitConfig(spec, self.denoiser)
        self.denoiser.hf_quantizer = LowBitQuantizer(config)
        self.denoiser.is_quantized = True
        self.denoiser.quantization_method = config.quant_method
        set_config_entry(self.denoiser.config, "quantization_config", config)
        set_runtime(self.denoiser, "simulated")
        self.denoiser.eval()
        self.model = self.denoiser

    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by name."""
        return quantized_layers(self.model)

    def restore(self) -> None:
        """Give the pipeline its full-precision denoiser back, as it was to the bit. Safe to call twice."""
        self._way_back.close()


# ---------------------------------------------------------------------- helpers
@torch.no_grad()
def _hash(pipe: Any) -> str:
    """SHA-256 over all weights of a pipeline, with the strength of adapters."""
    found = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if not isinstance(part, nn.Module):
            continue
        for key, tensor in sorted(part.state_dict().items()):
            found.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if tensor.device.type != "meta" and type(tensor) in (torch.Tensor, nn.Parameter):
                found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        scales = [sorted(m.scaling.items()) for m in part.modules() if isinstance(getattr(m, "scaling", None), dict)]
        found.update(repr(scales).encode())
    return found.hexdigest()


def _put(model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    for name, part in parts.items():
        model.set_submodule(name, part)


def _set_training(modules: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modules:
        module.training = training


def _forget(model: Any) -> None:
    """Take off a model what makes it a quantized one for diffusers."""
    uninstall(model)
    for key in ("hf_quantizer", "quantization_method", "is_quantized", "low_bit_runtime"):
        model.__dict__.pop(key, None)
    drop_config_entry(model.config, "quantization_config")


def _weight(layer: nn.Module) -> torch.Tensor:
    return layer.weight  # type: ignore[return-value]


def _grids(draft: Draft) -> list[str]:
    """The names of a draft's grids of activations."""
    return [f"{n}_{k}" for n in ("input", "output") if hasattr(draft, f"{n}_scale") for k in ("scale", "zero_point")]


def _ends(losses: list[float]) -> dict[str, float]:
    return {"first": losses[0], "last": losses[-1]}


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
