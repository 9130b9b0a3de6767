"""The loop behind every stage of the Emoji World: it resumes, widens and shares its work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[2] / "worlds" / "emoji"


@pytest.fixture(scope="module")
def training():
    sys.path.insert(0, str(FOLDER))
    try:
        import training

        yield training
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("training", None)


def net(inside=2):
    torch.manual_seed(0)
    return nn.Linear(inside, 3)


def loss_of(module, i):
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(i))
    return (module(x) - 1).square().mean()


def run(training, folder, stop_at=None):
    module = net()
    loop = training.Loop(folder, {"net": module}, steps=20, lr=0.1, warmup=2, save_every=0)

    def step(i):
        if i == stop_at:
            raise KeyboardInterrupt
        return loss_of(module, i)

    loop.run(step)
    return module.weight.detach()


def test_a_resumed_training_goes_on_as_if_nothing_had_happened(training, tmp_path):
    undisturbed = run(training, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(training, tmp_path / "parts", stop_at=11)
    assert not (tmp_path / "parts" / "done").exists()
    assert torch.equal(run(training, tmp_path / "parts"), undisturbed)
    assert (tmp_path / "parts" / "done").exists()


def test_a_wider_network_begins_from_a_narrower_one(training, tmp_path):
    run(training, tmp_path)
    wide, fresh = net(inside=4), net(inside=4)
    training.warm_start(wide, tmp_path, "net")
    narrow = net()
    training.warm_start(narrow, tmp_path, "net")
    assert torch.equal(wide.weight[:, :2], narrow.weight)
    assert torch.equal(wide.weight[:, 2:], fresh.weight[:, 2:])
    assert not torch.equal(narrow.weight, net().weight)


SHARED = """
import json, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from test_training import loss_of, net
from training import Loop, place

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
module = net()
seen = []

def step(i):
    seen.append(i)
    return loss_of(module, i)

Loop(Path(sys.argv[1]), {"net": module}, steps=16, lr=0.1, warmup=2).run(step)
rank, ranks = place()
out = {"rank": rank, "ranks": ranks, "seen": seen, "weight": module.weight.tolist()}
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(out))
dist.destroy_process_group()
"""


def test_processes_share_the_steps_and_meet_at_the_same_weights(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    path = f"{FOLDER}:{Path(__file__).parent}"
    subprocess.run(
        [*command, "2", str(script), str(tmp_path)],
        check=True,
        capture_output=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert sorted(first["seen"] + second["seen"]) == list(range(32))
    assert first["weight"] == second["weight"]
