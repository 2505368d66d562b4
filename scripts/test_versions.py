"""Whether the toolkit works with the oldest and the newest releases that pyproject.toml allows, or with given ones.

    python scripts/test_versions.py oldest
    python scripts/test_versions.py oldest newest "torch==2.9.1 diffusers==0.42.0" --tests tests/core/test_laws.py
    python scripts/test_versions.py oldest --lowest      # only asks which releases those are

Each of them gets an environment of its own in runs/versions/, which stays there for the next time (--fresh makes it
anew). `oldest` pins every dependency to the release that its lower bound names; `newest` pins nothing; releases that
are named are installed beside whatever goes with them. What else the tests need is as in constraints.txt, unless that
is asked for, too. The tests are a quick part of the suite; other releases may warn, so there warnings are no errors.

Exit code: 0 if all pass, 1 if an environment cannot be made or a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("torch", "diffusers", "transformers", "accelerate", "numpy")
#: what the quick part needs beside the toolkit itself
TOOLS = ("pytest", "hypothesis", "scipy", "torchmetrics", "peft", "filelock", "torchsde", "DeepCache")
QUICK = (
    "tests/test_public_api.py",
    "tests/core/test_steps.py",
    "tests/core/test_hooks.py",
    "tests/core/test_private_names.py",
    "tests/denoisers",
    "tests/reuse/test_executor.py",
    "tests/schedulers/test_learned.py",
    "tests/quant/test_layers.py",
    "tests/pipelines/test_loading.py",
    "tests/cli/test_generate.py",
)


@dataclass(frozen=True)
class Row:
    """What came out for one set of releases: the versions that were installed, and pytest's last line."""

    name: str
    versions: dict[str, str]
    result: str
    passed: bool


def lowest(requirements: list[str]) -> list[str]:
    """Each requirement pinned to its lower bound: `torch>=2.6` is `torch==2.6`."""
    return [re.sub(r">=\s*([\w.]+).*", r"==\1", requirement) for requirement in requirements]


def pins(name: str) -> list[str]:
    """What a name on the command line asks pip for."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    if name == "oldest":
        return lowest(declared)
    return declared if name == "newest" else name.split()


def tools(given: list[str]) -> list[str]:
    """The test tools, with the versions of constraints.txt where nothing else was asked for."""
    asked = {re.split(r"[<>=]", pin)[0].lower() for pin in given}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = {line.split("==")[0].lower(): line for line in lines}
    return [kept.get(tool.lower(), tool) for tool in TOOLS if tool.lower() not in asked]


def install(python: Path, given: list[str]) -> None:
    """Put the releases, this checkout and the test tools into an environment; raises CalledProcessError."""
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    torch = [pin for pin in given if re.match(r"torch\b", pin)]
    if torch:  # first, so that nothing else chooses another one
        subprocess.run([*pip, *torch], check=True)
    subprocess.run([*pip, *given, *tools(given), "-e", str(ROOT)], check=True)


def installed(python: Path) -> dict[str, str]:
    """The versions that an environment really has."""
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format=json"], capture_output=True, check=True)
    return {entry["name"].lower(): entry["version"] for entry in json.loads(listed.stdout)}


def run(name: str, tests: list[str], fresh: bool) -> Row:
    """Make the environment of a name if it is not there, and run the tests in it."""
    folder = ROOT / "runs" / "versions" / re.sub(r"[^\w.=]+", "-", name)
    python = folder / "bin" / "python"
    given = pins(name)
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    done = folder / "installed.txt"
    if not done.is_file() or done.read_text() != "\n".join(given):
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        try:
            install(python, given)
        except subprocess.CalledProcessError as error:
            return Row(name, {}, f"pip failed with exit code {error.returncode}", False)
        done.write_text("\n".join(given))
    command = [str(python), "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (folder / "tests.log").write_text(outcome.stdout + outcome.stderr)
    last = (outcome.stdout.strip() or outcome.stderr.strip() or "pytest said nothing").splitlines()[-1]
    return Row(name, installed(python), last.strip("= "), outcome.returncode == 0)


def main() -> int:
    """Print a row of a Markdown table for each set of releases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help='oldest, newest, or releases: "torch==2.9.1"')
    parser.add_argument("--tests", nargs="+", default=list(QUICK), help="files or folders of tests")
    parser.add_argument("--fresh", action="store_true", help="make the environments anew")
    parser.add_argument("--lowest", action="store_true", help="only print what pip would be asked for")
    options = parser.parse_args()
    if options.lowest:
        for name in options.names:
            print(f"{name}:", *pins(name))
        return 0
    print(
        "|", " | ".join(["releases", *SHOWN, "tests"]), "|\n|", " | ".join(["---"] * (len(SHOWN) + 2)), "|", flush=True
    )
    passed = True
    for name in options.names:
        row = run(name, options.tests, options.fresh)
        cells = [name, *(row.versions.get(package, "–") for package in SHOWN), row.result]
        print("|", " | ".join(cells), "|", flush=True)
        passed = passed and row.passed
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
