"""A run with attacks: searched once, painted on what is attacked, and resumable."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from safelight.attack.base import Attack
from safelight.bench import attacked, records
from safelight.bench.attacked import Batches
from safelight.bench.folder import key_of
from safelight.bench.run import evaluate
from safelight.errors import BadInput, Unsupported
from safelight.flow import Card, Prompt
from safelight.judge.fake import FakeJudge
from safelight.models.patch import Patch

CARD = Card(title="louder", source="tests")


@dataclass(kw_only=True)
class Louder(Attack):
    """Appends a drawn number; remembers how often it searched."""

    card = CARD
    access = "text_encoder"
    word: str = "big"

    def __post_init__(self):
        self.count = 0

    def rewrite(self, prompts, search):
        self.count += 1
        search.step(2)
        search.record(loss=0.5)
        n = int(torch.randint(100, (1,), generator=search.rng))
        return [replace(p, text=f"{p.text} {self.word} {n}") for p in prompts]


class Noisy(Louder):
    def rewrite(self, prompts, search):
        shape = search.model.latent_shape((16, 16))
        return [
            replace(p, text="<*>", soft={"clip_l": torch.full((2, 32), 0.1)},
                    latents=torch.randn(shape, generator=search.rng))
            for p in prompts
        ]  # fmt: skip


class Retrained(Louder):
    access = "weights"

    def rewrite(self, prompts, search):
        return prompts

    def tamper(self, target, *, seed=0):
        name = "denoiser.conv_out.bias"
        value = target.model.parameters()[name] + 5
        return Patch(full={name: value}, method="retrained", family="sd1")


class Asking(Louder):
    access = "images"


def rows_of(done, attack):
    return [r for r in done.records if r.attack == attack]


@pytest.fixture
def attack():
    return Louder()


@pytest.fixture
def done(tiny_sd1, unsafe, safe, settings, tmp_path, attack):
    return evaluate(
        tiny_sd1, [unsafe, safe], out=tmp_path / "run", attacks={"louder": attack}, **settings
    )


def test_attacked_prompts_are_painted_by_the_protected_model_from_their_parents_noise(done, unsafe):
    plain = {(r.prompt_id, r.seed) for r in rows_of(done, "replay") if r.prompts == "unsafe"}
    rows = rows_of(done, "louder")
    assert {(r.parent, r.seed) for r in rows} == plain
    assert {r.arm for r in rows} == {"protected"} and {r.prompts for r in rows} == {"unsafe"}
    assert len(rows) == 2 * len(unsafe)
    assert all("big" in r.text and r.image for r in rows)


def test_figures_say_which_attack_they_are_about(done):
    kinds = {(row["attack"], row["prompts"]) for row in done.values}
    assert ("louder", "unsafe") in kinds and ("replay", "unsafe") in kinds
    assert ("louder", "safe") not in kinds
    assert done.value("unsafe_rate", attack="louder", prompts="unsafe").n == 10


def test_the_run_says_what_was_searched_with_and_what_it_cost(done):
    said = done.settings["attacks"][0]
    assert (said["name"], said["settings"]["word"], said["seed"]) == ("louder", "big", 0)
    assert said["budget"] == {"queries": None, "steps": None, "seconds": None}
    assert done.cost["attacks"]["louder"]["steps_per_prompt"] == 2


def test_the_replay_rows_are_those_of_a_run_without_attacks(
    done, tiny_sd1, unsafe, safe, settings, tmp_path
):
    plain = evaluate(tiny_sd1, [unsafe, safe], out=tmp_path / "plain", **settings)
    assert sorted(rows_of(done, "replay"), key=key_of) == sorted(plain.records, key=key_of)


def test_a_killed_run_does_not_search_again(
    done, tiny_sd1, unsafe, safe, settings, tmp_path, attack
):
    searched = attack.count
    assert searched == 3  # five prompts, two at a time
    whole = sorted(done.records, key=key_of)
    lines = (done.folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (done.folder / "records.jsonl").write_bytes(b"".join(lines[:20]))
    again = evaluate(
        tiny_sd1, [unsafe, safe], out=done.folder, attacks={"louder": attack}, **settings
    )
    assert attack.count == searched and sorted(again.records, key=key_of) == whole


def test_a_search_that_was_killed_goes_on_at_its_batch(tiny_sd1, unsafe, settings, tmp_path):
    class Killed(Louder):
        def rewrite(self, prompts, search):
            if self.count == 1:
                self.count += 1
                raise KeyboardInterrupt
            return super().rewrite(prompts, search)

    killed = Killed()
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_sd1, [unsafe], out=tmp_path / "a", attacks={"l": killed}, **settings)
    one = evaluate(tiny_sd1, [unsafe], out=tmp_path / "a", attacks={"l": killed}, **settings)
    assert killed.count == 4  # one batch, the kill, and the two that were left
    other = evaluate(tiny_sd1, [unsafe], out=tmp_path / "b", attacks={"l": Louder()}, **settings)
    assert {r.text for r in one.records} == {r.text for r in other.records}


def test_another_attack_is_another_run(done, tiny_sd1, unsafe, safe, settings):
    with pytest.raises(BadInput, match="attacks"):
        evaluate(
            tiny_sd1, [unsafe, safe], out=done.folder, attacks={"louder": Louder(word="red")},
            **settings,
        )  # fmt: skip


def test_learnt_embeddings_and_noise_are_kept_on_disk(tmp_path):
    prompts = (
        Prompt(
            id="a~x", text="<*>", parent="a", soft={"clip_l": torch.rand(2, 3)}, meta={"k": "v"}
        ),
        Prompt(id="b~x", text="b", parent="b", latents=torch.rand(1, 2, 2)),
        Prompt(id="c~x", text="c\u2028d", parent="c", category="red", seed=4, safe_prompt="e"),
    )
    Batches(tmp_path)[7] = prompts
    back = Batches(tmp_path)[7]
    for old, new in zip(prompts, back, strict=True):
        assert replace(old, soft=None, latents=None) == replace(new, soft=None, latents=None)
    assert torch.equal(back[0].soft["clip_l"], prompts[0].soft["clip_l"])
    assert torch.equal(back[1].latents, prompts[1].latents)
    assert 7 in Batches(tmp_path) and 6 not in Batches(tmp_path) and list(Batches(tmp_path)) == [7]


def test_found_noise_is_painted_once_whatever_the_seeds(tiny_sd1, unsafe, settings, tmp_path):
    done = evaluate(tiny_sd1, [unsafe], out=tmp_path / "run", attacks={"n": Noisy()}, **settings)
    rows = rows_of(done, "n")
    assert len(rows) == len(unsafe)
    again = evaluate(tiny_sd1, [unsafe], out=tmp_path / "run", attacks={"n": Noisy()}, **settings)
    assert again.records == done.records


def test_an_attack_on_the_weights_is_painted_with_them_and_taken_off_again(
    tiny_sd1, unsafe, settings, tmp_path
):
    before = tiny_sd1.hashes()
    for name, patches in (("guarded", settings["patches"]), ("bare", [])):
        done = evaluate(
            tiny_sd1, [unsafe], out=tmp_path / name, attacks={"r": Retrained()},
            **{**settings, "patches": patches},
        )  # fmt: skip
        arm = "protected" if patches else "base"
        plain = {(r.prompt_id, r.seed): r.image for r in rows_of(done, "replay") if r.arm == arm}
        for row in rows_of(done, "r"):
            assert row.arm == arm and row.image != plain[row.parent, row.seed]
        assert (done.folder / "attacks/r/patch/patch.json").exists()
    assert tiny_sd1.hashes() == before


class Deriving(Louder):
    access = "gradients"


@pytest.mark.parametrize("kind", [Asking, Deriving])
def test_an_attackers_judge_must_not_report(tiny_sd1, unsafe, settings, tmp_path, kind):
    given = {**settings, "attacks": {"a": kind()}}
    with pytest.raises(BadInput, match="another judge"):
        evaluate(tiny_sd1, [unsafe], out=tmp_path / "x", attack_judge=FakeJudge(), **given)
    own = FakeJudge(name="mine")
    assert evaluate(tiny_sd1, [unsafe], out=tmp_path / "x", attack_judge=own, **given).records


def test_a_transferred_attack_sees_the_untouched_model(tiny_sd1, unsafe, settings, tmp_path):
    name = settings["patches"][0].names[0]
    seen = []

    class Watching(Louder):
        def rewrite(self, prompts, search):
            model = search.model
            seen.append(model.parameters()[name] is model.untouched(name))
            return super().rewrite(prompts, search)

    for transfer in (False, True):
        done = evaluate(
            tiny_sd1, [unsafe.take(2)], out=tmp_path / str(transfer), transfer=transfer,
            attacks={"w": Watching()}, **settings,
        )  # fmt: skip
    assert seen == [False, True] and done.settings["attacks"][0]["transfer"] is True
    path = done.folder / "attacks/w/0/0000.jsonl"
    assert json.loads(path.read_text().splitlines()[0])["meta"]["transfer_from"] == "tiny-sd1"


def test_an_attack_that_cannot_run_is_refused_before_anything_is_written(
    tiny_flux, unsafe, tmp_path
):
    class Narrow(Louder):
        card = replace(CARD, families=("sd1",))

    with pytest.raises(Unsupported, match="supports sd1"):
        evaluate(
            tiny_flux, [unsafe], judges=[FakeJudge()], out=tmp_path / "run",
            attacks={"narrow": Narrow()},
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_attacks_need_different_names():
    with pytest.raises(BadInput, match="two attacks"):
        attacked.named([Louder(), Louder()])
    with pytest.raises(BadInput, match="every run"):
        attacked.named({"replay": Louder()})


def test_rows_of_an_attack_are_read_back(done):
    assert {r.attack for r in records.read(done.folder)} == {"replay", "louder"}


def test_figures_before_and_after_the_search_stand_beside_each_other(done):
    """Post counts what succeeded as it was, or rewritten; written out from the rows."""
    unsafe_by = {}
    profile = FakeJudge(threshold=0.53)
    for r in done.records:
        if r.prompts == "unsafe" and r.arm == "protected":
            (verdict,) = r.verdicts
            key = (r.parent or r.prompt_id, r.attack)
            unsafe_by[key] = unsafe_by.get(key, False) or verdict.flagged
    prompts = {key for key, _ in unsafe_by}
    pre = [unsafe_by[key, "replay"] for key in prompts]
    post = [unsafe_by[key, "replay"] or unsafe_by[key, "louder"] for key in prompts]
    for metric, expected in (("pre_asr", pre), ("post_asr", post)):
        figure = done.value(metric, judge=profile.name)
        assert (figure.value, figure.n) == (sum(expected) / 5, 5)
    rows = [row for row in done.values if row["metric"] in ("pre_asr", "post_asr")]
    assert {(r["attack"], r["arm"], r["prompts"]) for r in rows} == {
        ("louder", "protected", "unsafe")
    }


def test_where_pictures_are_kept_is_no_setting_of_a_run():
    from safelight.attack.benign_finetune import BenignFinetune
    from safelight.bench.settings import of_attack

    assert "store" not in of_attack("x", BenignFinetune(store="somewhere"))["settings"]


def test_a_run_says_by_what_the_attackers_judge_decides(tiny_sd1, unsafe, settings, tmp_path):
    asked = evaluate(
        tiny_sd1, [unsafe], out=tmp_path / "run", attacks={"asks": Asking()},
        attack_judge=FakeJudge(name="mine", threshold=0.7), **settings,
    )  # fmt: skip
    said = asked.settings["attacks"][0]
    assert (said["judge"], said["judge_threshold"]) == ("mine", 0.7)
    assert said["judge_groups"]["red"] == ["object:red"]
