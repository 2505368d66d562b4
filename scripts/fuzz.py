"""Breaks files on purpose and reads them: `python scripts/fuzz.py folder --minutes 5`, `python scripts/fuzz.py all`.

Each kind runs in a process of its own, which is ended when a file hangs it where no alarm is heard. A faulty input is
kept under --save; the line that is printed tries it again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
PATIENCE = 60  # seconds without a sign of life, making the good file included
NAMES = (
    *("checkpoint", "plan", "family", "solver", "prompts", "config", "metadata", "transparency", "training", "folder"),
    *("controlnet", "lora"),
)


def child(name: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Fuzz one kind and send what was found; before each mutant, its number."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical", "DIFFUSERS_VERBOSITY": "critical"}
    warnings.simplefilter("ignore")
    os.nice(5)
    import torch
    from fuzz.harness import fuzz
    from fuzz.kinds import KINDS, quiet

    torch.set_num_threads(1)
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(
            name,
            KINDS[name],
            Path(folder) / name,
            seed=options.seed,
            first=options.first,
            count=options.count,
            seconds=options.minutes * 60,
            save=options.save,
            tell=pipe.send,
        )
    pipe.send(found)


def run(name: str, options: argparse.Namespace) -> tuple[int, list[str]]:
    """Fuzz one kind in a process of its own; prints the figures, returns inputs and faults."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(name, options, theirs))
    process.start()
    theirs.close()
    number, found, why = None, None, None
    try:
        while found is None:
            if not ours.poll(PATIENCE * (3 if number is None else 1)):
                why = f"no sign of life for {PATIENCE} s"
                break
            message = ours.recv()
            number, found = (message, None) if isinstance(message, int) else (number, message)
    except EOFError:
        process.join()
        why = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    if found is None:
        fault = f"{name} --seed {options.seed} --first {number} --count 1: {why}"
        print(f"{name:13s} {fault}", flush=True)
        return (number or 0) - options.first, [fault]
    print(f"{name:13s} {found}", flush=True)
    for fault in found.faults:
        print(f"  {fault}", flush=True)
    return found.inputs, found.faults


def main() -> int:
    """The exit code: 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=(*NAMES, "all"))
    parser.add_argument("--minutes", type=float, default=1.0, help="for each kind (default 1)")
    parser.add_argument("--count", type=int, help="this many mutants of each kind instead")
    parser.add_argument("--seed", type=int, default=None, help="of the mutants (default: the time)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutant")
    parser.add_argument("--save", type=Path, default=Path("runs/fuzz"), help="where faulty inputs are kept")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = int(time.time())
    names = NAMES if options.kind == "all" else (options.kind,)
    results = [run(name, options) for name in names]
    faults = [fault for _, some in results for fault in some]
    print(f"seed {options.seed}: {sum(n for n, _ in results)} inputs, {len(faults)} faults")
    if faults:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / f"faults-{options.seed}.json").write_text(json.dumps(faults, indent=1))
        print(f"faulty inputs are in {options.save}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
