"""Guards that learn: a copy learns, the folder keeps it, other models are refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from safelight import names
from safelight.errors import BadInput, NotFound, Unsupported, WorkFailed
from safelight.flow import Card, Prompt
from safelight.guard.base import Guarded
from safelight.guard.trained import TrainedGuard, load_guard
from safelight.prompts import PromptSet
from safelight.training.data import TextData, texts
from safelight.training.descent import Loss


@dataclass(frozen=True, kw_only=True)
class Shift(TrainedGuard):
    """Learns one vector that is added to every token state, times a strength."""

    card = Card(title="Shift", source="tests")

    epochs: int = 2
    lr: float | None = 0.1
    patience: int = 0
    strength: float = 1.0
    words: tuple[str, ...] = ("a", "b")

    def network(self, model):
        return nn.Linear(1, model.encode([""]).states.shape[-1])

    def gather(self, model, data, *, seed, watch=None):
        split = data.split(seed)
        with torch.no_grad():
            return [model.encode(texts(part)) for part in (split.unsafe, split.safe)]

    def steps(self, material):
        return 3

    def batches(self, material, epoch, rng):
        return iter([material] * 3)

    def loss(self, model, batch, rng):
        unsafe, safe = batch
        apart = (self.moved(unsafe.states).mean(0) - safe.states.mean(0)).square().mean()
        return Loss(apart, {"apart": apart.item()})

    @torch.no_grad()
    def check(self, model, material):
        return {"objective": self.loss(model, material, None).total.item()}

    def moved(self, states):
        return states + self.strength * self.network_(states.new_ones(1, 1))

    def edit_condition(self, condition):
        return condition.edit(states=lambda _, states: self.moved(states))


@pytest.fixture
def data():
    def side(name, words):
        rows = [Prompt(id=f"{name}{i}", text=f"a {word}") for i, word in enumerate(words)]
        return PromptSet(name=name, prompts=tuple(rows))

    return TextData(safe=side("safe", ["cat", "dog", "car"]), unsafe=side("un", ["a", "b", "c"]))


@pytest.fixture
def table(monkeypatch):
    own = {**dict(names.table("guard")), "test_trained": f"{__name__}:Shift"}
    real = names.table
    monkeypatch.setattr(names, "table", lambda kind: own if kind == "guard" else real(kind))
    monkeypatch.setattr("safelight.guard.trained.find", lambda kind, name: Shift)


def test_a_copy_learns_and_the_original_and_the_model_stay(tiny_sd1, data):
    before, guard = tiny_sd1.hashes(), Shift()
    learnt = guard.fit(tiny_sd1, data)
    curve = learnt.fitted_.info["pareto"]
    assert curve[-1]["objective"] < curve[0]["objective"]
    assert guard.fitted_ is None and tiny_sd1.hashes() == before
    with pytest.raises(BadInput, match="must learn first"):
        Guarded(tiny_sd1, [guard])


def test_the_same_seed_learns_the_same(tiny_sd1, data):
    a, b, c = (Shift().fit(tiny_sd1, data, seed=seed) for seed in (1, 1, 2))
    assert a.sha256 == b.sha256 != c.sha256


def test_a_folder_gives_the_same_guard_back(tiny_sd1, data, tmp_path, table):
    learnt = Shift(words=("x",)).fit(tiny_sd1, data)
    learnt.save(tmp_path / "g")
    back = load_guard(tmp_path / "g")
    assert back == learnt and back.sha256 == learnt.sha256 and back.words == ("x",)
    states = [Guarded(tiny_sd1, [one]).condition(["a cat"]).states for one in (learnt, back)]
    plain = tiny_sd1.encode(["a cat"]).states
    assert torch.equal(*states) and not torch.equal(states[0], plain)
    off = Guarded(tiny_sd1, [load_guard(tmp_path / "g", strength=0.0)])
    assert torch.equal(off.condition(["a cat"]).states, plain)


def test_another_model_is_refused(tiny_sd1, tiny_sdxl, data):
    learnt = Shift().fit(tiny_sd1, data)
    with pytest.raises(Unsupported, match="sd1"):
        Guarded(tiny_sdxl, [learnt])
    with (
        tiny_sd1.using({}),
        pytest.raises(BadInput, match="other text encoders"),
    ):
        fitted = learnt.fitted_
        other = Shift()._with(type(fitted)(
            weights=fitted.weights, family="sd1", base={"clip_l": "0" * 64}, info={}
        ))  # fmt: skip
        Guarded(tiny_sd1, [other])


def test_damaged_and_foreign_folders_are_refused(tiny_sd1, data, tmp_path, table):
    Shift().fit(tiny_sd1, data).save(tmp_path / "g")
    with pytest.raises(BadInput, match="Did you mean 'strength'"):
        load_guard(tmp_path / "g", strenght=1)
    (tmp_path / "g" / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(WorkFailed, match="damaged"):
        load_guard(tmp_path / "g")
    with pytest.raises(NotFound, match="no guard"):
        load_guard(tmp_path)


def test_what_has_learnt_nothing_is_not_saved(tmp_path):
    with pytest.raises(BadInput, match="learnt nothing"):
        Shift().save(tmp_path / "g")
    assert not list(tmp_path.iterdir())
