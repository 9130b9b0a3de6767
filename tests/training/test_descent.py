"""The shared loop: averages, limits, pieces; an interrupted run ends as an undisturbed one."""

import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from safelight.errors import BadInput, Unsupported, WorkFailed
from safelight.training.checkpoint import Checkpoint
from safelight.training.descent import Descent, Loss, Meter
from safelight.training.weights import Learnt, Loan

MODEL = SimpleNamespace(device=torch.device("cpu"), hashes=lambda: {"part": "0"})
GOAL = torch.tensor([1.0, -2.0, 3.0])


@dataclass(frozen=True)
class Held(Loan):
    def learnt(self):
        return Learnt({name: value for name, value in self.snapshot().items()}, {})

    def nudge(self, size, rng):
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Noisy(Descent):
    """Draws while the loss is computed, as most methods do."""

    epochs: int | None = 4
    batch: int = 4
    lr: float | None = 0.3
    patience: int = 0
    momentum: bool = False
    bad: int = 0

    def gather(self, model, data, *, seed, watch=None):
        return data

    @contextmanager
    def lend(self, model, rng):
        yield Held({"w": nn.Parameter(torch.randn(3, generator=rng))})

    def start(self, loan, rng):
        object.__setattr__(self, "w", loan.parameters["w"])

    def optimiser(self, parameters, lr):
        if self.momentum:
            return torch.optim.SGD(parameters, lr=lr / 10, momentum=0.9)
        return super().optimiser(parameters, lr)

    def steps(self, material):
        return 3

    def batches(self, material, epoch, rng):
        for _ in range(3):
            yield torch.randn(self.batch, 3, generator=rng)

    def loss(self, model, batch, rng):
        noise = torch.randn(batch.shape, generator=rng)
        return self.found(batch + noise)

    def found(self, x):
        total = (self.w - GOAL + 0.3 * x).square().sum(1).mean() * (float("nan") if self.bad else 1)
        return Loss(total, {"L": total.item()})

    @torch.no_grad()
    def check(self, model, material):
        return {"objective": (self.w - GOAL).square().sum().item()}


@dataclass(frozen=True, kw_only=True)
class Apart(Noisy):
    """Draws everything with its batches."""

    def loss(self, model, batch, rng):
        return self.found(batch)

    def pieces(self, batch, n):
        return [(len(part) / len(batch), part) for part in batch.tensor_split(n)]


def run(method, **descent):
    found = method.descend(MODEL, None, seed=5, **descent)
    return found.learnt.full["w"], found.info


class Stop(Exception):
    pass


def until(step):
    def watch(tick):
        if tick.step == step:
            raise Stop

    return watch


def noted(steps):
    return lambda tick: steps.append(tick.step)


VARIANTS = {
    "plain": {},
    "momentum": dict(momentum=True),
    "average": dict(ema=0.8, clip=1.0, warmup=2),
    "patience": dict(patience=1, tolerance=0.9, epochs=6),
}


@pytest.mark.parametrize("kind", [Noisy, Apart])
@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_at_any_step_it_ends_as_an_undisturbed_run(kind, variant, tmp_path):
    method = kind(**VARIANTS[variant])
    w, info = run(method)
    steps = len(info["history"])
    assert steps >= 6
    for step in range(1, steps + 1):
        keep = Checkpoint(tmp_path / f"{step}", every=0.0)
        with pytest.raises(Stop):
            run(method, checkpoint=keep, watch=until(step))
        seen: list[int] = []
        again, told = run(method, checkpoint=keep, watch=noted(seen))
        assert torch.equal(again, w)
        for key in ("history", "pareto", "stopped"):
            assert told[key] == info[key]
        # in the middle of an epoch where the method allows it, else at its beginning
        assert seen[0] == (step if kind is Apart else (step - 1) // 3 * 3 + 1)


def test_interrupted_again_and_again_it_still_ends_the_same(tmp_path):
    w, info = run(Apart())
    keep, times = Checkpoint(tmp_path / "c", every=0.0), 0
    for step in (2, 3, 7, 8, 12):
        with pytest.raises(Stop):
            run(Apart(), checkpoint=keep, watch=until(step))
        times += 1
    again, told = run(Apart(), checkpoint=keep)
    assert times == 5 and torch.equal(again, w) and told["history"] == info["history"]


def test_a_checkpoint_is_written_no_more_often_than_asked(tmp_path):
    keep = Checkpoint(tmp_path / "c", every=3600.0)
    run(Apart(), checkpoint=keep)
    assert not keep.path.exists()
    keep = Checkpoint(tmp_path / "c", every=0.0)
    run(Apart(), checkpoint=keep)
    assert keep.path.is_file() and list(tmp_path.iterdir()) == [keep.path]
    keep.remove()
    keep.remove()
    assert not keep.path.exists()


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(seed=6), "seed"),
        (dict(method=Apart(lr=0.2)), "settings"),
        (dict(model=SimpleNamespace(device=MODEL.device, hashes=lambda: {"part": "1"})), "base"),
    ],
)
def test_another_runs_checkpoint_is_named_and_not_used(change, named, tmp_path, caplog):
    keep = Checkpoint(tmp_path / "c", every=0.0)
    run(Apart(), checkpoint=keep)
    given = {"method": Apart(), "model": MODEL, "seed": 5} | change
    method, model, seed = given["method"], given["model"], given["seed"]
    with caplog.at_level(logging.WARNING):
        one = method.descend(model, None, seed=seed, checkpoint=keep).learnt.full["w"]
    assert f"another run (different: {named})" in caplog.text
    assert torch.equal(one, method.descend(model, None, seed=seed).learnt.full["w"])


def test_a_file_that_is_no_checkpoint_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "c"
    path.write_text("my notes")
    with pytest.raises(BadInput, match="no training checkpoint.*delete it"):
        run(Apart(), checkpoint=Checkpoint(path))
    assert path.read_text() == "my notes"


def test_a_checkpoint_is_safetensors_with_json_and_the_seconds_add_up(tmp_path):
    from safetensors import safe_open

    keep = Checkpoint(tmp_path / "c", every=0.0)
    meter = Meter(MODEL.device)
    meter.began -= 1000
    with pytest.raises(Stop):
        run(Apart(), checkpoint=keep, watch=until(8), meter=meter)
    with safe_open(keep.path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["epoch"] == 3 and facts["done"] == 1 and len(facts["history"]) == 7
    assert 2000 > run(Apart(), checkpoint=keep)[1]["cost"]["seconds"] > 1000


@pytest.mark.parametrize("n", [2, 3, 4])
def test_pieces_add_up_to_the_whole_batch(n):
    w, info = run(Apart())
    cut, told = run(Apart(accumulate=n))
    torch.testing.assert_close(cut, w)
    assert told["history"][-1]["L"] == pytest.approx(info["history"][-1]["L"], rel=1e-5)


def test_a_method_that_needs_its_batch_whole_says_so():
    with pytest.raises(Unsupported, match="needs every batch whole.*accumulate=1"):
        run(Noisy(accumulate=2))


def test_the_average_is_what_is_checked_and_kept():
    """Against the same average worked out by hand from the weights of every step."""
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(Apart):
        def loss(self, model, batch, rng):
            seen.append(self.w.detach().clone())
            return super().loss(model, batch, rng)

    settings = dict(ema=0.9, anneal=False)
    w, info = run(Watched(**settings))
    bare, _ = run(Watched(anneal=False))
    average = seen[0]
    for i, value in enumerate([*seen[1:12], bare]):  # the last step's weights are the bare run's
        n = i + 1
        average = average.lerp(value, 1 - min(0.9, n / (n + 9)))
    torch.testing.assert_close(w, average)
    assert not torch.allclose(w, bare)
    assert info["pareto"][-1]["objective"] == pytest.approx((w - GOAL).square().sum().item())


def test_a_gradient_is_cut_to_its_largest_norm():
    """With plain SGD a step is as long as the rate times that norm."""
    settings = dict(momentum=True, epochs=1, anneal=False, lr=1.0)
    start = torch.randn(3, generator=torch.Generator().manual_seed(5))
    one = next(iter(run(Apart(**settings, clip=0.5), until=1)))
    assert (one - start).norm() <= 0.1 * 0.5 * (1 + 1.9 + 2.71) + 1e-5
    far = next(iter(run(Apart(**settings), until=1)))
    assert (far - start).norm() > 1


def test_a_loss_that_is_no_number_stops_it():
    with pytest.raises(WorkFailed, match="the loss is nan at step 1"):
        run(Apart(bad=1))
