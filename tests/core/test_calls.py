"""What a call changes on objects is put back as it was: whoever put it there, whatever raises, however often."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from laws import APART, Stop, default, kind_for, stop_at, traces
from zoo import flux, run, sd

from diffusion_accel import EncoderReuse, Reuse, accelerate, hooks, switchboard
from diffusion_accel.changes import Changes
from diffusion_accel.feature import Attachment, Feature
from diffusion_accel.hooks import HookSet
from diffusion_accel.registry import all_features
from diffusion_accel.steps import StepClock

KINDS = [pytest.param(kind_for(f), f, id=f.name) for f in all_features()] + [
    pytest.param(flux, Reuse, id="diffusers-cache")
]
each_kind = pytest.mark.parametrize(("build", "feature"), KINDS)


def put_on(owner: Any, name: str) -> tuple[Any, str, Any, list[int]]:
    """A wrapper as a user would put it on one object: (owner, name, the wrapper, how often it was called)."""
    original, calls = getattr(owner, name), [0]

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)
    return owner, name, wrapper, calls


def set_for(build: Any, feature: Any) -> Any:
    return Reuse(plan="first-block") if build is flux else default(feature)


@pytest.mark.sampled(3)
@each_kind
def test_what_the_user_put_on_an_instance_stays(build: Callable[[], Any], feature: Any) -> None:
    pipe, call = build()
    call = {**call, "output_type": "np"} if build is not flux else call
    reference, _ = build()
    accelerate(reference, set_for(build, feature))
    expected = run(reference, call, 4)
    denoiser = pipe.unet if build is not flux else pipe.transformer
    block = denoiser.down_blocks[0] if build is not flux else denoiser.transformer_blocks[0]
    owned = [(pipe.scheduler, "step"), (pipe.scheduler, "set_timesteps"), (denoiser, "forward"), (block, "forward")]
    if build is not flux:
        owned += [(pipe.vae, "decode"), (pipe.vae.decoder, "forward"), (denoiser.conv_in, "forward")]
    put = [put_on(owner, name) for owner, name in owned]
    accelerate(pipe, set_for(build, feature))
    assert torch.equal(run(pipe, call, 4), expected)
    with pytest.raises(Stop):
        run(pipe, call, 4, callback_on_step_end=stop_at(1, Stop))
    for owner, name, wrapper, calls in put:
        assert vars(owner)[name] is wrapper, f"{name} of {type(owner).__name__} was thrown away"
        assert calls[0], f"{name} of {type(owner).__name__} was passed by"


# ---------------------------------------------------------------------- exceptions in the middle
class Boom(Exception):
    pass


@dataclass(frozen=True, kw_only=True)
class Part(Feature):
    """A feature with a hook and a changed attribute that raises somewhere."""

    name: ClassVar[str] = "part"
    summary: ClassVar[str] = "test"
    paper: ClassVar[str] = "test"

    where: str = "nowhere"
    error: str = "Boom"

    def supports(self, pipeline: Any) -> str | None:
        return None

    def attach(self, pipeline: Any) -> Attachment:
        return PartAttachment(self, pipeline)


class Second(Part):
    name: ClassVar[str] = "second"
    order: ClassVar[int] = 200


class PartAttachment(Attachment):
    ended = 0

    def _reach(self, where: str) -> None:
        feature: Any = self.feature
        if where == feature.where:
            raise {"Boom": Boom, "KeyboardInterrupt": KeyboardInterrupt}[feature.error]

    def before_call(self, clock: Any) -> None:
        HookSet.within(self.changes, f"diffusion_accel.{self.feature.name}").add(
            self.pipeline.unet.conv_in, ModelHook()
        )
        self.changes.set(self.pipeline.vae, "decode", self.pipeline.vae.decode)
        self._reach("before_call")

    def after_call(self) -> None:
        self.ended += 1
        self._reach("after_call")
        super().after_call()

    def process_input(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self._reach("process_input")
        return arguments


@pytest.fixture(scope="module")
def shared() -> tuple[Any, Any, Any]:
    pipe, call = sd()
    return pipe, call, run(pipe, call, 2)


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("part", [Part, Second])
@pytest.mark.parametrize("where", ["process_input", "before_call", "after_call"])
def test_a_feature_that_raises_leaves_nothing(
    where: str, part: Any, interrupted: bool, error: Any, shared: tuple[Any, Any, Any]
) -> None:
    pipe, call, base = shared
    accelerate(pipe, Part(), Second())
    accelerate(pipe, part(where=where, error=error.__name__))
    with pytest.raises((error, KeyboardInterrupt) if interrupted else error):
        run(pipe, call, 2, **({"callback_on_step_end": stop_at(0, KeyboardInterrupt)} if interrupted else {}))
    assert not traces(pipe) and "decode" not in vars(pipe.vae) and not switchboard._busy
    ended = {name: a.ended for name, a in pipe.acceleration._attachments.items()}  # type: ignore[attr-defined]
    if where == "after_call":
        assert all(ended.values()), "after_call of the others runs"
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, call, 2), base)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("twice", [False, True], ids=["", "twice"])
def test_every_after_call_raises_in_turn(twice: bool, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever one of them raises, also while the call itself was ended: no hook stays, the models are free, and the
    first error is what the caller sees."""
    pipe, call = sd()
    others = [default(f) for f in all_features() if f is not EncoderReuse and f.name not in APART]
    accelerate(pipe, Part(), Second(), *others)
    expected = run(pipe, call, 3)
    attachments = pipe.acceleration._attachments
    assert len(attachments) == len(others) + 2
    for attachment in attachments.values():
        body, tidying = error("body"), error("tidying")

        def stopped(*args: Any, body: BaseException = body) -> Any:
            raise body

        def fail(tidying: BaseException = tidying) -> None:
            raise tidying

        with monkeypatch.context() as patch, pytest.raises(error) as caught:
            patch.setattr(attachment, "after_call", fail)
            run(pipe, call, 3, **({"callback_on_step_end": stopped} if twice else {}))
        assert caught.value is (body if twice else tidying)
        assert not traces(pipe) and not switchboard._busy and "decode" not in vars(pipe.vae)
    assert torch.equal(run(pipe, call, 3), expected)


@pytest.mark.parametrize("where", ["start", "stop"])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_a_clock_that_raises_leaves_nothing(where: str, error: Any, monkeypatch: Any) -> None:
    pipe, call = sd()
    accelerate(pipe, Part(), Second())

    def fail(self: Any, *args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(StepClock, where, fail)
        with pytest.raises(error):
            run(pipe, call, 2)
    assert not traces(pipe) and not switchboard._busy
    run(pipe, call, 2)


def test_undoing_goes_on_whatever_raises(caplog: Any) -> None:
    """Steps that are interrupted, by whatever is raised, are begun again; what fails every time is passed by, and the
    first error is raised."""
    done: list[str] = []

    def step(name: str, *errors: type[BaseException]) -> Callable[[], None]:
        left = list(errors)

        def undo() -> None:
            if left:
                raise left.pop(0)(name)
            done.append(name)

        return undo

    owner = types.SimpleNamespace(kept=1)
    changes = Changes()
    changes.set(owner, "kept", 2)
    changes.set(owner, "new", 3)
    changes.add(step("a"))
    changes.add(step("b", KeyboardInterrupt, KeyboardInterrupt))
    changes.add(step("c", Boom, Boom))
    changes.add(step("e", *(Boom,) * 9))
    with pytest.raises(Boom, match="e"):
        changes.undo()
    assert done == ["c", "b", "a"] and vars(owner) == {"kept": 1}
    changes.undo()
    with caplog.at_level(logging.WARNING), pytest.raises(Stop), Changes() as changes:
        changes.add(step("d", Boom))
        raise Stop  # what ended the call counts, the other is told
    assert "Boom('d')" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, Boom])
def test_hooks_are_removed_whatever_line_is_interrupted(error: type[BaseException]) -> None:
    """By Ctrl-C, or by what the handler of another signal raises."""
    import sys

    codes = {hooks.unchain.__code__, hooks.drop_registry.__code__, hooks.tidy.__code__, hooks.HookSet.remove.__code__}
    codes |= {HookRegistry.remove_hook.__code__, Changes._run.__code__}

    def interrupted_at(line: int) -> bool:
        module = torch.nn.Linear(2, 2)
        changes, seen = Changes(), [0]
        for name in ("one", "two"):
            HookSet.within(changes, name).add(module, ModelHook())

        def trace(frame: Any, event: str, _: Any) -> Any:
            if frame.f_code not in codes:
                return None

            def inside(frame: Any, event: str, _: Any) -> Any:
                if event == "line":
                    seen[0] += 1
                    if seen[0] == line:
                        raise error
                return inside

            return inside

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            changes.undo()
        except error:
            pass
        finally:
            sys.settrace(before)
        assert not {"_diffusers_hook", "forward"} & set(vars(module)), line
        assert module(torch.ones(2)).shape == (2,)
        return seen[0] >= line

    line = 1
    while interrupted_at(line):
        line += 1
    assert line > 50


def test_an_interrupt_between_two_steps_costs_nothing() -> None:
    """Ctrl-C arrives anywhere in the code that undoes, not only inside of a step."""
    import sys

    def interrupted_at(line: int) -> bool:
        done: list[int] = []
        changes = Changes()
        for i in range(3):
            changes.add(functools.partial(done.append, i))
        seen = [0]

        def trace(frame: Any, event: str, _: Any) -> Any:
            if frame.f_code is not Changes._run.__code__:
                return None

            def inside(frame: Any, event: str, _: Any) -> Any:
                if event == "line":
                    seen[0] += 1
                    if seen[0] == line:
                        raise KeyboardInterrupt
                return inside

            return inside

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            changes.undo()
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        assert {*done} == {0, 1, 2}, f"interrupted at line event {line}: {done}"
        return interrupted

    lines = 1
    while interrupted_at(lines):
        lines += 1
    assert lines > 10
