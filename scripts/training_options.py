"""The command-line options that the training programs share."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffusion_accel import interrupts
from diffusion_accel.errors import AccelerationError, ConfigurationError
from diffusion_accel.io import first_line, printable
from diffusion_accel.routing import Recipe, TaskRouting
from diffusion_accel.training.files import RunExistsError, UsageError
from diffusion_accel.training.settings import OPTIMIZERS, Outcome, Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffusion_accel.training.denoising import Process


def number(low: float, kind: type = int) -> Callable[[str], Any]:
    """An argparse type: a number that is not below `low`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


# ------------------------------------------------------------------------------------------- the loop
def add_loop_options(group: argparse._ActionsContainer) -> None:
    """Options of the training loop that do not depend on what is trained."""
    group.add_argument("--minutes", type=number(0, float), help="stop after so long; does not change the schedule")
    group.add_argument("--resume", action="store_true", help="go on from the saved state, if there is one")
    group.add_argument("--save-every", type=number(0, float), help="seconds between saved states (default: 240)")
    group.add_argument("--log-every", type=number(0), help="steps between log lines (default: 50)")
    group.add_argument("--eval-every", type=number(0), help="steps between evaluations, 0 for none but the last")
    group.add_argument("--grid-every", type=number(0), help="steps between preview images, 0 for none")
    group.add_argument("--accumulation", type=number(1), default=1, help="micro-batches per step (default: 1)")
    group.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")


def add_rate_options(group: argparse._ActionsContainer, tuned: dict[str, Any]) -> None:
    """Batch, learning rate and averaging, with `tuned` as the defaults."""
    group.add_argument("--batch", type=number(1), help=f"samples per step (default: {tuned['batch']})")
    text = "adamw, or muon for the matrices inside of blocks and AdamW for the rest (default: adamw)"
    group.add_argument("--optimizer", choices=OPTIMIZERS, help=text)
    group.add_argument("--lr", type=number(0, float), help=f"peak learning rate (default: {tuned['lr']})")
    group.add_argument("--cooldown", type=number(0, float), help="share of the budget with a falling rate")
    group.add_argument("--ema", type=number(0, float), help="decay of the averaged weights (default: 0.998)")


def settings_from(tuned: dict[str, Any], options: argparse.Namespace, steps: int | None = None) -> Settings:
    """The tuned settings of the loop, with what the command line changes."""
    values = dict(tuned)
    for name in (field.name for field in dataclasses.fields(Settings)):
        given = steps if name == "steps" else getattr(options, name, None)
        if given is not None:
            values[name] = given
    return Settings(**values)


# ------------------------------------------------------------------------------------------- what is minimised
def add_objective_options(group: argparse._ActionsContainer, immiscible: str = "none") -> None:
    """The training accelerators, each a switch of its own."""
    text = f"which noise an image gets: none, knn:k (the nearest of k) or assign (default: {immiscible}); "
    text += "scale=S (1 to 100) enlarges images beside noise, alone or behind a comma"
    group.add_argument("--immiscible", default=immiscible, metavar="none|knn:k|assign[,scale=S]", help=text)
    text = "route the channels by noise level; without a value beta=0.8,alpha=4"
    group.add_argument("--task-routing", nargs="?", const="", metavar="KEY=VALUE,…", help=text)
    group.add_argument("--task-clusters", type=number(1), metavar="K", help="train K groups of timesteps as tasks")
    text = "how timesteps are grouped (default: snr)"
    group.add_argument("--clustering", choices=("timestep", "snr", "gradient"), default="snr", help=text)
    text = "task affinities for --clustering gradient, made by --measure-affinity"
    group.add_argument("--affinity", type=Path, metavar="FILE", help=text)
    text = "how the groups' losses become one update (default: none, their mean)"
    group.add_argument("--task-loss", choices=("none", "uw", "pcgrad", "nash"), default="none", help=text)
    text = "weight the loss by min(SNR, GAMMA); the paper's value is 5"
    group.add_argument("--min-snr", type=float, metavar="GAMMA", help=text)


def routing_from(options: argparse.Namespace, process: Process) -> Recipe | None:
    """The routing that the switch asks for, or None."""
    if options.task_routing is None:
        return None
    return TaskRouting.parse(options.task_routing).recipe(
        Recipe(time="flow" if process.prediction == "flow" else "index")
    )


# ------------------------------------------------------------------------------------------- running
def exit_if_stopped(outcome: Outcome, accelerator: Accelerator) -> None:
    """End the program as a signal asked for, once the state is saved."""
    if outcome.signal is not None:
        if accelerator.is_main_process:
            print(f"stopped at step {outcome.step}, state saved; --resume goes on from there", file=sys.stderr)
        sys.exit(128 + outcome.signal)


def report(stage: str, **values: Any) -> None:
    """One JSON line on stdout."""
    print(json.dumps({"stage": stage} | values), flush=True)


def program(main: Callable[[], int]) -> NoReturn:
    """Run the `main` of a script as a process: signals end it with one line, which of several processes rank 0 says."""

    def say(message: str, _code: int) -> None:
        if os.environ.get("RANK", "0") == "0":
            interrupts.write_line(f"error: {message}")

    interrupts.install(say)
    sys.exit(main())


def guarded(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Run a program and turn its errors into one line and an exit code: 0, 1 (failed), 2 (wrong usage), 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    interrupts.begin()
    try:
        run(options)
    except AccelerationError as error:
        hint = "; pass --resume or --overwrite" if isinstance(error, RunExistsError) else ""
        print(f"error: {printable(error)}{hint}", file=sys.stderr)
        return 2 if isinstance(error, (UsageError, ConfigurationError)) else 1
    except (OSError, ValueError) as error:
        print(f"error: {printable(first_line(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"error: interrupted; {interrupts.explanation()}", file=sys.stderr)
        return interrupts.INTERRUPTED
    return 0
