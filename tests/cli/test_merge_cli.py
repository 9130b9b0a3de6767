"""`safelight merge`: patch folders and LoRA files in, one patch folder and a table out."""

import json

import pytest
import torch
from typer.testing import CliRunner

from safelight.align.merge import WAYS
from safelight.cli import app
from safelight.cli.merge import HOW
from safelight.models.export import export_lora
from safelight.models.patch import Patch
from safelight.models.tiny import tiny

QUICK = ["--set", "steps=1", "--set", "per_category=2"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})


def expert(model, seed, category, ends="attn1.to_q.weight"):
    rng = torch.Generator().manual_seed(seed)
    weights = {
        name: (
            torch.randn(2, W.shape[1], generator=rng),
            torch.randn(len(W), 2, generator=rng),
            2.0,
        )
        for name, W in model.parameters().items()
        if name.startswith("denoiser.") and name.endswith(ends)
    }
    return Patch(
        low_rank=weights,
        method="dpo",
        family=model.family,
        base=model.hashes(),
        info={"categories": [category] if category else []},
    )


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Two experts, a LoRA file of a third, and captions."""
    path, model = tmp_path_factory.mktemp("merge"), tiny("sd1")
    for i, category in enumerate(("weapons", "gore", "witchcraft", "")):
        expert(model, i, category).save(path / (category or "unnamed"))
    export_lora(model, [expert(model, 9, "")], path / "style.safetensors")
    expert(model, 0, "gore", "attn2.to_q.weight").save(path / "elsewhere")
    (path / "unsafe.csv").write_text("prompt,category\na knife,weapons\na skull,gore\n")
    return path


def test_the_table_says_how_many_neurons_each_expert_won(room, tmp_path):
    words = [room / "weapons", room / "gore", "--prompts", room / "unsafe.csv", *QUICK]
    done = run("merge", "tiny-sd1", *words, "-o", tmp_path / "m")
    assert done.exit_code == 0, done.output
    patch = Patch.load(tmp_path / "m")
    for one in patch.info["experts"]:
        assert f"{one['won']:,}" in done.stdout and one["categories"][0] in done.stdout
    assert "next: safelight evaluate" in done.stderr
    again = run("merge", "tiny-sd1", *words, "-o", tmp_path / "m")
    assert again.exit_code == 2 and "--force" in again.stderr
    assert run("merge", "tiny-sd1", *words, "-o", tmp_path / "m", "--force").exit_code == 0


def test_captions_are_those_of_the_experts_categories_by_default(room, tmp_path, monkeypatch):
    asked = []

    def unsafe(values):
        from safelight.prompts import PromptSet

        asked.extend(values)
        return [PromptSet.load(room / "unsafe.csv")]

    monkeypatch.setattr("safelight.cli.sets.categories", lambda: ["gore", "hate", "weapons"])
    monkeypatch.setattr("safelight.cli.sets.unsafe", unsafe)
    both = [room / "weapons", room / "gore"]
    done = run("merge", "tiny-sd1", *both, *QUICK, "-o", tmp_path / "m", "--json")
    assert done.exit_code == 0, done.output
    assert asked == ["gore", "weapons"]
    assert json.loads(done.stdout)["calibration_prompts"] == 2


def test_a_lora_file_becomes_a_patch_folder(room, tmp_path):
    words = [room / "style.safetensors", "--how", "cat", "-o", tmp_path / "style"]
    done = run("merge", "tiny-sd1", *words)
    assert done.exit_code == 0, done.output
    patch, made = Patch.load(tmp_path / "style"), expert(tiny("sd1"), 9, "")
    for name, (down, up, alpha) in patch.low_rank.items():
        A, B, _ = made.low_rank[name]
        torch.testing.assert_close(alpha / len(down) * up @ down, B @ A)
    mixed = [room / "gore", room / "style.safetensors", "--how", "ties_svd"]
    assert run("merge", "tiny-sd1", *mixed, "-o", tmp_path / "m").exit_code == 0


@pytest.mark.parametrize(
    "words, says",
    [
        (["weapons", "nowhere", "--how", "cat"], "no patch folder"),
        (["weapons", "gore", "--how", "comerge"], "Did you mean 'co_merge'?"),
        (["weapons", "gore", "--how", "cat", "--set", "density=0.5"], "no setting named"),
        (["weapons", "witchcraft"], "no built-in prompts of witchcraft: name unsafe captions"),
        (["unnamed"], "--prompts SET"),
        (["weapons", "elsewhere", "--how", "cat"], "expert 1 (weapons) does not change"),
    ],
)
def test_wrong_use_is_one_clear_line(room, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(room)
    done = run("merge", "tiny-sd1", *words, "-o", tmp_path / "m")
    assert done.exit_code == 2 and says in " ".join(done.stderr.split()), done.output
    assert not (tmp_path / "m").exists()


def test_help_names_every_way():
    assert sorted(HOW.split(" | ")) == sorted(WAYS)
