"""Calls as rows: which ones can share a batch, and that stacking and taking apart is the identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel.serving.calls import Call, NotRowsError, near, run_together


class Model(torch.nn.Module):
    def forward(
        self, sample: Any, timestep: Any, encoder_hidden_states: Any = None, img_ids: Any = None, **others: Any
    ) -> Any:
        return sample, timestep


MODEL = Model()


def call(*args: Any, **kwargs: Any) -> Call:
    return Call.of(MODEL, "forward", args, kwargs)


def rows(count: int, *shape: int) -> torch.Tensor:
    return torch.arange(float(count * (shape[0] if shape else 1))).reshape(count, *shape)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_stacked_and_taken_apart(counts: list[int]) -> None:
    given_ = [(torch.randn(n, 2), torch.tensor(float(i))) for i, n in enumerate(counts)]
    found = run_together(MODEL, [call(x, t) for x, t in given_])
    for (x, t), (sample, timestep) in zip(given_, found, strict=True):
        assert torch.equal(sample, x) and torch.equal(timestep, t.expand(len(x)))


def test_a_row_of_a_batch_has_memory_of_its_own() -> None:
    first, _ = run_together(MODEL, [call(rows(1, 2), 1), call(rows(1, 2), 2)])
    assert first[0].untyped_storage().nbytes() == 8


@pytest.mark.parametrize(
    "timestep", [3, 3.0, torch.tensor(3), torch.tensor([3]), torch.tensor([3.0, 3.0]), torch.tensor(3, dtype=torch.int)]
)
def test_timesteps_of_any_kind_share_a_batch(timestep: Any) -> None:
    one, other = call(rows(2, 2), timestep), call(rows(1, 2), torch.tensor(999.0))
    assert one.key == other.key
    assert torch.cat([times for _, times in run_together(MODEL, [one, other])]).tolist() == [3, 3, 999]


IDS = torch.tensor([[0.0, 1.0]])
SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"encoder_hidden_states": rows(1, 7)}, {"encoder_hidden_states": rows(1, 7) + 1}),
    ({"img_ids": IDS}, {"img_ids": IDS.clone()}),
    ({"added": {"text": rows(1, 3)}}, {"added": {"text": rows(1, 3) + 1}}),
    ({"residuals": (rows(1, 3), rows(1, 4))}, {"residuals": (rows(1, 3), rows(1, 4))}),
    ({"scale": 0.5, "flag": None}, {"scale": 0.5, "flag": None}),
    ({"generator": torch.Generator()}, {"generator": [torch.Generator()]}),
]
OTHER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"encoder_hidden_states": rows(1, 7)}, {"encoder_hidden_states": rows(1, 8)}),
    ({"encoder_hidden_states": rows(1, 7)}, {"encoder_hidden_states": rows(1, 7).double()}),
    ({"encoder_hidden_states": rows(1, 7)}, {}),
    ({"img_ids": IDS}, {"img_ids": IDS + 1}),
    ({"table": rows(5, 2)}, {"table": rows(5, 2) + 1}),
    ({"scale": 0.5}, {"scale": 0.6}),
    ({"flag": 1}, {"flag": True}),
    ({"anything": object()}, {"anything": object()}),
    ({"residuals": (rows(1, 3),)}, {"residuals": [rows(1, 3)]}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_shares_a_batch(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert call(rows(1, 2), 1, **one).key == call(rows(1, 2), 2, **other).key


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_what_does_not(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert call(rows(1, 2), 1, **one).key != call(rows(1, 2), 2, **other).key


def test_other_models_methods_and_gradients_do_not() -> None:
    x = rows(1, 2)
    assert call(x, 1).key != Call.of(Model(), "forward", (x, 1), {}).key
    assert call(x, 1).key != call(x, timestep=1).key
    assert call(x.clone().requires_grad_(), 1).key != call(x.clone().requires_grad_(), 1).key


def test_a_table_that_changes_in_place() -> None:
    ids, before = IDS.clone(), call(rows(1, 2), 1, img_ids=IDS)
    assert call(rows(1, 2), 1, img_ids=ids).key == before.key
    ids.add_(1)
    assert call(rows(1, 2), 1, img_ids=ids).key != before.key


def test_outputs_of_every_kind() -> None:
    def function(x: torch.Tensor) -> Any:
        return DecoderOutput(sample=x), [x, {"a": x, "b": None}], DiagonalGaussianDistribution(torch.cat([x, x], 1))

    calls = [Call.of(MODEL, "forward", (torch.full((1, 2, 1, 1), v),), {}) for v in (1.0, 2.0)]
    for value, (decoded, listed, latents) in zip((1.0, 2.0), run_together(function, calls), strict=True):
        assert {tuple(t.flatten().tolist()) for t in (decoded.sample, listed[0], listed[1]["a"])} == {(value, value)}
        assert latents.mode().flatten().tolist() == [value, value] and listed[1]["b"] is None


@pytest.mark.parametrize("output", [lambda x: x.sum(), lambda x: x[:1], lambda x: (x, object())])
def test_outputs_that_have_no_rows(output: Any) -> None:
    with pytest.raises(NotRowsError):
        run_together(lambda x: output(x), [Call.of(MODEL, "forward", (rows(1, 2),), {})] * 2)


def test_near() -> None:
    x = torch.tensor([1.0, 100.0])
    assert near((x,), (x + 0.009,)) and not near((x,), (x + 0.011,)) and not near((x,), (x, x))
    assert near(x.half(), x.half() + 1) and not near(x.int(), x.int() + 1)
