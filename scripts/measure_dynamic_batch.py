#!/usr/bin/env python3
"""What one OpenVINO graph for all batch sizes costs: the embedded U-Net with a dynamic and a static batch, in turn.

OMP_NUM_THREADS=1 python scripts/measure_dynamic_batch.py --rounds 500
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import openvino
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffusion_accel.measure.timing import interleaved
from diffusion_accel.model_files.names import EMBEDDED

ROWS, SIDE, TOKENS = 2, 12, 24  # of one image with guidance, 96 pixels


class Prediction(nn.Module):
    """The U-Net as a function of tensors."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Its prediction."""
        return self.unet(sample, timestep, text, return_dict=False)[0]


@torch.no_grad()
def main() -> None:
    """Measure, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    rounds = parser.parse_args().rounds
    unet: Any = UNet2DConditionModel.from_pretrained(EMBEDDED["sticker"].path / "unet")
    channels, width = unet.config.in_channels, unet.config.cross_attention_dim
    tensors = torch.randn(ROWS, channels, SIDE, SIDE), torch.tensor(500.0), torch.randn(ROWS, TOKENS, width)
    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    requests = {}
    for batch in (ROWS, -1):
        graph = openvino.convert_model(Prediction(unet), example_input=tensors)
        graph.reshape({0: [batch, channels, SIDE, SIDE], 1: [], 2: [batch, TOKENS, width]})
        compiled = openvino.Core().compile_model(graph, "CPU", {**hints, "INFERENCE_PRECISION_HINT": "f32"})
        requests[batch] = compiled.create_infer_request()
    given = [tensor.numpy() for tensor in tensors]
    calls = {batch: lambda request=request: request.infer(given) for batch, request in requests.items()}
    seconds = interleaved(calls, rounds)
    ratios = [dynamic / static for dynamic, static in zip(seconds[-1], seconds[ROWS], strict=True)]
    print(f"a dynamic batch takes {statistics.median(ratios):.2f} times the time of a static one ({rounds} rounds)")


if __name__ == "__main__":
    main()
