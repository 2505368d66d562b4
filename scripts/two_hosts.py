#!/usr/bin/env python3
"""One image on two hosts: two network namespaces with a wire of a given speed between them, and torchrun in each.

    sudo python scripts/two_hosts.py --rate 1gbit --delay 1ms "red apple, 3d style" --width 256 --height 256

Draws the image on one process, then on two hosts with every mode of --modes, and prints how far the images are from
the first one (PSNR in dB), how long they took, and what was sent. What is not an option of this script goes to
`diffusion-accel generate`. Needs Linux, iproute2 and the right to make namespaces; exits with 77 and says why without.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NOT_PERMITTED = 77  # what test runners take for "skipped"
GENERATE = ("-m", "diffusion_accel", "generate")


class NotPermittedError(Exception):
    """Namespaces or their wire cannot be made here."""


def ip(*words: str) -> None:
    """Run a command of iproute2. Raises `NotPermittedError` if it is not there or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise NotPermittedError(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        raise NotPermittedError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


def shape(host: str, rate: str, delay: str) -> str:
    """Slow the end of the wire at one host down as far as this kernel can; says what it did."""
    wanted = (["rate", rate] if rate else []) + (["delay", delay] if delay else [])
    if not wanted:
        return "as fast as it goes"
    begin = ["tc", "-n", host, "qdisc", "add", "dev", "wire", "root"]
    try:
        ip(*begin, "netem", *wanted, "limit", "100000")
        return " ".join(wanted)
    except NotPermittedError as error:
        if not rate:
            return f"not shaped ({error})"
    ip(*begin, "tbf", "rate", rate, "burst", "256kb", "latency", "200ms")
    return f"rate {rate}, without delay (this kernel has no netem)"


@contextmanager
def two_hosts(rate: str, delay: str) -> Iterator[list[str]]:
    """Two namespaces with a wire between them, 10.77.0.1 and 10.77.0.2; their names."""
    hosts = [f"accel{os.getpid()}{letter}" for letter in "ab"]
    made = []
    try:
        for host in hosts:
            ip("ip", "netns", "add", host)
            made.append(host)
        ip("ip", "link", "add", "wire", "netns", hosts[0], "type", "veth", "peer", "name", "wire", "netns", hosts[1])
        for number, host in enumerate(hosts, 1):
            ip("ip", "-n", host, "address", "add", f"10.77.0.{number}/24", "dev", "wire")
            ip("ip", "-n", host, "link", "set", "wire", "up")
            ip("ip", "-n", host, "link", "set", "lo", "up")
        print(f"wire: {' and '.join({shape(host, rate, delay) for host in hosts})}", file=sys.stderr)
        yield hosts
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host], check=False)


def on_two_hosts(hosts: list[str], arguments: list[str], timeout: float) -> dict[str, Any]:
    """Run `generate` under torchrun on both; the JSON line of rank 0."""
    processes = []
    for node, host in enumerate(hosts):
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)]
        launcher += ["--master-addr", "10.77.0.1", "--master-port", "29400"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire", "HF_HUB_OFFLINE": "1"}
        command = ["ip", "netns", "exec", host, sys.executable, *launcher, *GENERATE, *arguments]
        pipe = subprocess.PIPE
        started = subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        processes.append(started)
    try:
        ends = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:  # with what its launcher started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for process, (_, errors) in zip(processes, ends, strict=True):
        if process.returncode:
            raise RuntimeError(f"a host ended with {process.returncode}: {errors.strip()[-2000:]}")
    return dict(json.loads(ends[0][0].splitlines()[-1]))


def main(arguments: list[str] | None = None) -> int:
    """Draw and compare; the exit code."""
    import numpy as np
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit", help="of the wire, as tc writes it; empty: as fast as it goes")
    parser.add_argument("--delay", default="1ms", help="in each direction; empty: none")
    parser.add_argument("--modes", nargs="+", default=["sync", "displaced", "partial"])
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one image")
    options, rest = parser.parse_known_args(arguments)
    rest += [] if "--seed" in rest else ["--seed", "1"]
    with tempfile.TemporaryDirectory(prefix="two-hosts-") as folder:
        one = Path(folder) / "one.png"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *GENERATE, *rest, "--json", "-o", str(one)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr.strip(), file=sys.stderr)
            return done.returncode
        plain = np.asarray(Image.open(one), dtype=float)
        line = {"mode": "one process", "seconds": json.loads(done.stdout.splitlines()[-1])["report"]["seconds"]}
        print(json.dumps(line), flush=True)
        try:
            with two_hosts(options.rate, options.delay) as hosts:
                for mode in options.modes:
                    file = Path(folder) / f"{mode}.png"
                    flags = [*rest, "--patch-parallel", f"mode={mode}", "--json", "-o", str(file)]
                    report = on_two_hosts(hosts, flags, options.timeout)["report"]
                    error = ((np.asarray(Image.open(file), dtype=float) - plain) ** 2).mean()
                    counters = report["counters"]["patch_parallel"]
                    line = {"mode": mode, "seconds": report["seconds"], "mse": round(float(error), 6)}
                    line["psnr"] = round(10 * float(np.log10(255**2 / error)), 2) if error else None
                    names = ("ranks", "bytes_sent", "bytes_per_exact_step", "bytes_per_stale_step")
                    print(json.dumps(line | {name: counters[name] for name in names}), flush=True)
        except NotPermittedError as error:
            print(f"two hosts cannot be made here: {error}", file=sys.stderr)
            return NOT_PERMITTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
