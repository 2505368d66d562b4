"""Counted FLOPs against counts by hand."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F

from diffusion_accel.flops import count_flops, uncounted


def test_linear_convolution_and_attention_by_hand() -> None:
    with count_flops() as linear:
        F.linear(torch.ones(5, 7), torch.ones(11, 7))
    assert linear.total == 2 * 5 * 7 * 11
    with count_flops() as convolution:
        F.conv2d(torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3), padding=1)
    assert convolution.total == 2 * 2 * 64 * 4 * 3 * 9
    batch, heads, tokens, other, width = 2, 3, 10, 6, 8
    with count_flops() as attention, torch.no_grad():
        F.scaled_dot_product_attention(
            torch.ones(batch, heads, tokens, width),
            torch.ones(batch, heads, other, width),
            torch.ones(batch, heads, other, width),
        )
    assert attention.total == 2 * (2 * batch * heads * tokens * other * width)


def test_the_skipped_encoder_is_not_counted() -> None:
    from zoo import run, sd

    from diffusion_accel import EncoderReuse, accelerate

    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule=(0, 3), batch_decoder=False))
    pipe.acceleration.count_flops = True
    run(pipe, call, steps=6)
    reused = pipe.acceleration.report().flops
    pipe.acceleration.disable()
    run(pipe, call, steps=6)
    full = pipe.acceleration.report().flops
    assert reused is not None and full is not None
    with count_flops() as one:
        pipe.unet(torch.zeros(2, 4, 8, 8), 3, encoder_hidden_states=torch.zeros(2, 6, 16))
    assert abs(full / 6 - one.total) < 0.01 * one.total
    assert 0.5 < reused / full < 0.95
    assert "GFLOP" in str(pipe.acceleration.report())


def test_counts_of_other_threads_are_left_alone() -> None:
    """What one thread leaves out of its count is a part of another's."""
    counted, left_out = threading.Event(), threading.Event()
    totals: list[float] = []

    def other() -> None:
        with count_flops() as mine:
            F.linear(torch.ones(5, 7), torch.ones(11, 7))
            counted.set()
            left_out.wait(30)
        totals.append(mine.total)

    thread = threading.Thread(target=other)
    with count_flops() as count, uncounted():
        thread.start()
        counted.wait(30)
        F.linear(torch.ones(2, 3), torch.ones(4, 3))
    left_out.set()
    thread.join()
    assert (count.total, totals) == (0, [2 * 5 * 7 * 11])
