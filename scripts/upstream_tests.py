"""Whether diffusers' own tests of its pipelines pass when the pipelines are accelerated.

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers runs/diffusers
    pip install parameterized requests-mock           # what those tests need beside the toolkit's own
    python scripts/upstream_tests.py --tests runs/diffusers/tests
    python scripts/upstream_tests.py --tests runs/diffusers/tests --kinds sd flux --settings plain neutral
    python scripts/upstream_tests.py --json runs/upstream.json --show            # the tables again

The tests run plainly first; then those that passed run again for each other setting, with every pipeline accelerated
when it is made (scripts/upstream_plugin.py): `neutral` (every feature that a pipeline can have, in its neutral
setting), `encoder` (the same of encoder reuse, which cannot be beside reuse: U-Nets only) and `real` (reuse with
hold:2). What a call returned is compared bit by bit with the plain call as well. The hub is not asked: tiny tokenizers
are stood in for (scripts/upstream_hub.py), tests that need more of it fail plainly.

Results are kept in the JSON file, test by test: what is there is not run again, so it can be stopped and go on.

Exit code: 0 if all that passes plainly passes with neutral settings and returns the same bits, but for what `NO_FAULT`
explains; 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("diffusers", "torch", "transformers", "numpy")
SETTINGS = ("plain", "neutral", "encoder", "real")
NEUTRAL = ("neutral", "encoder")
#: kind -> its files in tests/pipelines, as patterns
KINDS: dict[str, tuple[str, ...]] = {
    "ddpm": ("ddpm/*",),
    "dit": ("dit/*",),
    "sd": ("stable_diffusion/test_stable_diffusion.py",),
    "img2img": ("stable_diffusion/test_stable_diffusion_img2img.py",),
    "inpaint": ("stable_diffusion/test_stable_diffusion_inpaint.py",),
    "sdxl": tuple(f"stable_diffusion_xl/test_stable_diffusion_xl{task}.py" for task in ("", "_img2img", "_inpaint")),
    "controlnet": ("controlnet/*", "controlnet_flux/*", "controlnet_sd3/*"),
    "pag": ("pag/*",),
    "animatediff": ("animatediff/*",),
    "svd": ("stable_video_diffusion/*",),
    "kandinsky": ("kandinsky/*", "kandinsky2_2/*"),
    "pixart": ("pixart_alpha/*", "pixart_sigma/*"),
    "sana": ("sana/*",),
    "flux": ("flux/*",),
    "sd3": ("stable_diffusion_3/*",),
    "wan": ("wan/*",),
    "qwen-image": ("qwenimage/*",),
    "ltx": ("ltx/*",),
    "cogvideox": ("cogvideo/*",),
}
#: tests that fail with a neutral setting without a fault of it -> why
NO_FAULT = {
    "test_faster_cache_state": "asks every module with hooks for FasterCache's, also those that task routing hooks",
}
HUB = re.compile(r"huggingface\.co|offline mode|OfflineMode|LocalEntryNotFound|ConnectionError|Cannot find .* cached")
UNETS = ("ddpm", "sd", "img2img", "inpaint", "sdxl", "controlnet", "pag", "animatediff", "svd", "kandinsky")
FINISHED = (0, 1, 5)  # exit codes of pytest: all passed, some failed, nothing to run
Results = dict[str, dict[str, dict[str, Any]]]  # kind -> setting -> test -> what came of it


# ---------------------------------------------------------------------- running
def files_of(kind: str, tests: Path) -> list[str]:
    """The test files of a kind, as pytest is to be given them in the folder above `tests`; the simplest pipeline, which
    has the shortest name, is first."""
    found = {path for pattern in KINDS[kind] for path in (tests / "pipelines").glob(pattern)}
    ordered = sorted(found, key=lambda path: (len(path.name), path))
    return [f"{tests.name}/{path.relative_to(tests)}" for path in ordered if path.name.startswith("test_")]


class Store:
    """The results in a JSON file, and the folder beside it where the tests run.

    Args:
        place: the file.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.work = place, place.parent.resolve() / f"{place.stem}-work"
        kept: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        self.versions: dict[str, str] = kept.get("versions") or {package: version(package) for package in PACKAGES}
        self.done: list[str] = kept.get("done", [])  # "file setting"
        self.results: Results = kept.get("results", {})

    def fold(self, setting: str, kinds: dict[str, str]) -> None:
        """Take in what a run with a setting has left, also one that was stopped; `kinds`: file -> kind."""
        lines = self.work / f"{setting}.jsonl"
        for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else ():
            record = json.loads(line)
            test = record.pop("test")
            self.results.setdefault(kinds[test.split("::")[0]], {}).setdefault(setting, {})[test] = record
        self.write()
        lines.unlink(missing_ok=True)

    def write(self) -> None:
        """Write the file."""
        kept = {"versions": self.versions, "done": self.done, "results": self.results}
        self.place.write_text(json.dumps(kept, indent=1), encoding="utf-8")

    def leave_out(self, kinds: list[str], setting: str) -> set[str]:
        """Names of tests that need not run: they did, or did not pass plainly."""
        found = {name for kind in kinds for name in self.results.get(kind, {}).get(setting, {})}
        if setting != "plain":
            plain = [self.results.get(kind, {}).get("plain", {}) for kind in kinds]
            found |= {name for tests in plain for name, test in tests.items() if test["outcome"] != "passed"}
        return found


def run(tests: Path, work: Path, setting: str, timeout: float, files: list[str], leave_out: set[str]) -> int:
    """Run pytest on files and return its exit code.

    Args:
        tests: the folder of tests.
        work: a folder for the stand-ins of the hub and what a run leaves: SETTING.jsonl and SETTING.log.
        setting: a name of `SETTINGS`.
        timeout: seconds that a test may take.
        files: what pytest is given.
        leave_out: names of tests that are not to run.
    """
    hub, names, empty = work / "hub", work / "leave-out.txt", work / "pytest.ini"
    if not hub.is_dir():
        from upstream_hub import make_hub  # imports transformers, which takes seconds

        make_hub(hub)
    empty.write_text("[pytest]\n", encoding="utf-8")
    names.write_text("\n".join(sorted(leave_out)), encoding="utf-8")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RUN_")},
        "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "OMP_NUM_THREADS": "1",
        "DIFFUSION_ACCEL_AUTO": "off", "DIFFUSION_ACCEL_GRAPHS": "off", "UPSTREAM_SETTING": setting,
        "UPSTREAM_RESULTS": str(work / f"{setting}.jsonl"), "UPSTREAM_TIMEOUT": str(timeout),
        "UPSTREAM_LEAVE_OUT": str(names), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "upstream_plugin", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += ["-W", "ignore", "--continue-on-collection-errors", "-c", str(empty), "--rootdir", str(tests.parent)]
    return start([*command, *files], tests.parent, environment, work / f"{setting}.log")


def start(command: list[str], folder: Path, environment: dict[str, str], log: Path) -> int:
    """Run a command in a folder, with its output behind what is in the log, and return its exit code."""
    with log.open("a", encoding="utf-8") as file:
        return subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=file, check=False).returncode


def measure(store: Store, tests: Path, chosen: dict[str, list[str]], settings: list[str], timeout: float) -> None:
    """Run what is not in the store yet, one setting after the other; `chosen`: kind -> files."""
    store.work.mkdir(parents=True, exist_ok=True)
    of = {file: kind for kind in KINDS for file in files_of(kind, tests)}
    for setting in settings:
        store.fold(setting, of)
        fit = [file for kind in chosen if setting != "encoder" or kind in UNETS for file in chosen[kind]]
        files = [file for file in fit if f"{file} {setting}" not in store.done]
        if unknown := [file for file in files if setting != "plain" and f"{file} plain" not in store.done]:
            sys.exit(f"{', '.join(unknown)} did not run plainly: add plain to --settings")
        if not files:
            continue
        code = run(tests, store.work, setting, timeout, files, store.leave_out([*chosen], setting))
        store.fold(setting, of)
        if code not in FINISHED:
            sys.exit(f"pytest ended with exit code {code}: see {store.work / f'{setting}.log'}; start again to go on")
        store.done += [f"{file} {setting}" for file in files]
        store.write()


# ---------------------------------------------------------------------- what came of it
def why(test: dict[str, Any]) -> str:
    """What kind of an end a test came to."""
    if test["outcome"] != "failed":
        return str(test["outcome"])
    if "TimeoutError: the test took longer" in test["message"]:
        return "too long"
    return "hub" if HUB.search(test["message"]) else "failed"


def other_bits(plain: dict[str, Any], test: dict[str, Any]) -> int:
    """How many of the calls of a test returned other bits than plain ones."""
    return sum(a != b for a, b in zip(plain["digests"], test["digests"], strict=False))


def row(kind: str, of: dict[str, dict[str, Any]]) -> list[str]:
    """A row of the table for a kind."""
    plain = of["plain"]
    ends = Counter(map(why, plain.values()))
    files = len({name.split("::")[0] for name in plain})
    cells = [
        kind,
        str(files),
        str(ends["passed"]),
        *(str(ends[end]) for end in ("failed", "hub", "too long", "skipped")),
    ]
    for setting in SETTINGS[1:]:
        tests = of.get(setting)
        if tests is None:
            cells += ["–", "–"]
            continue
        calls = sum(test["accelerated_calls"] for test in tests.values())
        same = calls - sum(other_bits(plain[name], test) for name, test in tests.items())
        passed = sum(test["outcome"] == "passed" for test in tests.values())
        cells += [f"{passed} of {len(tests)}", f"{same} of {calls}"]
    return cells


def table(results: Results) -> Iterator[str]:
    """The results as a Markdown table."""
    heads = ["kind", "files", "plain", "fail", "hub", "too long", "skipped"]
    for setting in SETTINGS[1:]:
        heads += [setting, "same bits"]
    yield f"| {' | '.join(heads)} |"
    yield f"| --- |{' ---: |' * (len(heads) - 1)}"
    for kind in [kind for kind in KINDS if "plain" in results.get(kind, {})]:
        yield f"| {' | '.join(row(kind, results[kind]))} |"


def no_fault(name: str) -> str | None:
    """Why a failure of a test with a neutral setting is no fault; None if it is."""
    return NO_FAULT.get(name.split("::")[-1].partition("[")[0])


def differences(results: Results) -> Iterator[tuple[str, str, str]]:
    """Each test that passes plainly and differs with a setting: the setting, its name, and how."""
    for of in results.values():
        for setting in SETTINGS[1:]:
            for name, test in of.get(setting, {}).items():
                if test["outcome"] != "passed":
                    last = [line for line in test["message"].splitlines() if line.startswith("E ")]
                    yield setting, name, last[-1][1:].strip() if last else test["outcome"]
                elif setting in NEUTRAL and (count := other_bits(of["plain"][name], test)):
                    yield setting, name, f"{count} of {len(test['digests'])} calls return other bits"


def main() -> int:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, metavar="FOLDER", help="tests/ of a checkout of diffusers")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=" ".join(KINDS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what to run")
    parser.add_argument("--most", type=int, metavar="N", help="at most so many files of a kind, the simplest first")
    parser.add_argument("--json", type=Path, default=Path("runs/upstream.json"), help="the file with the results")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a test may take (default: 60)")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    if options.most is not None and options.most < 1:
        parser.error(f"--most: at least 1 file of a kind, got {options.most}")
    store = Store(options.json)
    if not options.show:
        if options.tests is None or not (options.tests / "pipelines").is_dir():
            parser.error(f"--tests: no tests/ folder of diffusers (with pipelines/ in it): {options.tests}")
        installed = {package: version(package) for package in PACKAGES}
        if store.versions != installed:
            parser.error(f"--json: {options.json} has results of other versions ({store.versions}); give another file")
        tests = options.tests.resolve()
        chosen = {kind: files_of(kind, tests)[: options.most] for kind in options.kinds}
        measure(store, tests, chosen, options.settings, options.timeout)
    print(*(f"{package} {number}" for package, number in store.versions.items()), sep=", ")
    print(*table(store.results), sep="\n")
    found = list(differences(store.results))
    for setting, name, how in found:
        reason = no_fault(name) if setting in NEUTRAL else None
        print(f"{setting}: {name}: {how}" + (f" (no fault: it {reason})" if reason else ""))
    return int(any(setting in NEUTRAL and not no_fault(name) for setting, name, _ in found))


if __name__ == "__main__":
    sys.exit(main())
