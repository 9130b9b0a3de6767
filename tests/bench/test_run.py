"""A run writes down everything, can be killed at any moment, and comes out the same."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from safelight.bench import records, run
from safelight.bench.folder import key_of
from safelight.bench.run import evaluate, noise_seed, png
from safelight.errors import BadInput, GuardFailed, NotFound, Unsupported, WorkFailed
from safelight.flow import Card, Prompt
from safelight.guard.base import Guard
from safelight.guard.screen import Screen
from safelight.judge.base import Look
from safelight.judge.fake import FakeJudge
from safelight.models.patch import Patch
from safelight.prompts import PromptSet


@pytest.fixture(scope="session")
def whole(tiny_sd1, patch, unsafe, safe, tmp_path_factory):
    """An undisturbed run."""
    return evaluate(
        tiny_sd1,
        [unsafe, safe],
        patches=[patch],
        judges=[FakeJudge(threshold=0.53)],
        out=tmp_path_factory.mktemp("whole") / "run",
        seeds=(0, 1),
        batch=2,
        progress=False,
    )


def bytes_of(folder, name="values.json"):
    return (Path(folder) / name).read_bytes()


def test_a_run_has_one_row_per_arm_prompt_and_seed(whole):
    assert len(whole.records) == 2 * (5 + 3) * 2
    assert {r.arm for r in whole.records} == {"base", "protected"}
    assert all((whole.folder / r.image).exists() for r in whole.records)
    assert all(r.verdicts[0].by == "fake" and r.verdicts[0].scores for r in whole.records)


def test_both_arms_start_from_the_same_noise_and_differ_only_by_the_patch(
    whole, tiny_sd1, patch, unsafe
):
    prompt = unsafe.prompts[0]
    seed = noise_seed(prompt, 1)
    base = tiny_sd1([prompt.text], seed=seed)[0].image
    with tiny_sd1.patched(patch):
        protected = tiny_sd1([prompt.text], seed=seed)[0].image
    assert not torch.equal(base, protected)
    for arm, image in (("base", base), ("protected", protected)):
        (row,) = [
            r for r in whole.records if (r.arm, r.prompt_id, r.seed) == (arm, prompt.id, seed)
        ]
        stored = run._pixels(whole.folder / row.image).float() / 255
        torch.testing.assert_close(stored, image, atol=0.004, rtol=0)


def test_the_model_is_untouched_afterwards(tiny_sd1, whole):
    assert tiny_sd1.hashes() == whole.settings["model"]["hashes"]
    assert tiny_sd1.hashes() != whole.settings["protected_hashes"]


def test_run_json_names_everything(whole, patch, unsafe):
    settings = whole.settings
    assert settings["patches"][0]["method"] == "turn"
    assert settings["patches"][0]["info"]["history"] == [{"step": 0, "L_u": None}]
    assert settings["judges"][0]["groups"] == {"red": ["object:red"], "blue": ["object:blue"]}
    assert settings["prompts"][0]["sha256"] == unsafe.sha256 and settings["prompts"][0]["n"] == 5
    assert settings["sampling"]["steps"] == 4 and settings["seeds"] == [0, 1]
    assert "torch" in settings["versions"]


def test_figures_agree_with_the_rows(whole):
    mine = [r for r in whole.records if r.prompts == "unsafe"]
    before, after = (
        sum(r.verdicts[0].flagged for r in mine if r.arm == arm) for arm in ("base", "protected")
    )
    assert 0 < before < 10, "the test needs some unsafe and some safe pictures"
    value = whole.value("nrr", prompts="unsafe")
    assert value.value == pytest.approx(1 - after / before) and value.n == 10
    assert whole.value("unsafe_rate", prompts="unsafe", arm="base").value == before / 10
    assert whole.value("drift", prompts="unsafe").value > 0
    assert whole.value("frechet", prompts="unsafe").value > 0
    shares = [whole.value(f"became_{k}").value for k in ("same", "other", "safe", "broken")]
    assert sum(shares) == pytest.approx(1)
    with pytest.raises(NotFound):
        whole.value("nrrr")


def test_cost_is_beside_quality(whole):
    cost = whole.cost
    assert cost["pictures"] == 32 and cost["pictures_per_second"] > 0
    assert cost["arms"]["base"]["ms_per_picture"] > 0 and cost["peak_memory_mb"] > 0


def test_drift_of_the_live_and_of_the_stored_picture_agree(whole):
    """Judges see pictures as they are stored, so they can be judged again to the same score."""
    judge = FakeJudge(threshold=0.53)
    rows = {(r.arm, r.prompt_id, r.seed): r for r in whole.records}
    for (arm, *key), row in rows.items():
        image = run._pixels(whole.folder / row.image)[None].float() / 255
        again = judge(image, [row.text])[0]
        assert {k: v for k, v in again.scores.items() if v} == row.verdicts[0].scores
        if arm == "protected":
            base = run._pixels(whole.folder / rows["base", *key].image)[None].float() / 255
            drift = float(judge.perceptual(image, base))
            assert row.features["drift"]["fake/colours"] == pytest.approx(drift, abs=1e-6)


KILLED = """
import sys, time
import torch
torch.set_num_threads(1)
from safelight.bench.run import evaluate
from safelight.judge.fake import FakeJudge
from safelight.models.patch import Patch
from safelight.models.tiny import tiny
from safelight.prompts import PromptSet

class Slow(FakeJudge):
    def see(self, images, prompts):
        time.sleep(0.3)
        return super().see(images, prompts)

evaluate(
    tiny("sd1"), [PromptSet.load(path) for path in sys.argv[2:4]],
    patches=[Patch.load(sys.argv[4])], judges=[Slow(threshold=0.53)], out=sys.argv[1],
    seeds=(0, 1), batch=2, progress=False,
)
"""


def test_a_run_killed_in_the_middle_comes_out_byte_for_byte_the_same(
    whole, tiny_sd1, patch, unsafe, safe, settings, tmp_path
):
    files = []
    for one in (unsafe, safe):
        files.append(tmp_path / f"{one.name}.jsonl")
        rows = [
            {"id": p.id, "prompt": p.text, "category": p.category, **p.meta} for p in one.prompts
        ]
        files[-1].write_text("\n".join(map(json.dumps, rows)))
    patch.save(tmp_path / "patch")
    out = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, out, *files, tmp_path / "patch"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    rows_on_disk = out / "records.jsonl"
    deadline = time.monotonic() + 120
    while not (rows_on_disk.exists() and rows_on_disk.read_bytes().count(b"\n") >= 8):
        assert child.poll() is None, "the child ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()

    before = rows_on_disk.read_bytes()
    assert 8 <= before.count(b"\n") < 32 and not (out / "values.json").exists()
    with rows_on_disk.open("ab") as file:
        file.write(b'{"prompt_id": "u4", "text": "a bo')  # killed while writing a line
    # The child's judge has the same profile as ours; only its class is slow.
    resumed = evaluate(tiny_sd1, [unsafe, safe], out=out, **settings)
    assert rows_on_disk.read_bytes().startswith(before), "finished rows were done again"
    assert bytes_of(out) == bytes_of(whole)
    assert sorted(resumed.records, key=key_of) == sorted(whole.records, key=key_of)


@pytest.mark.parametrize("left", [0, 1, 3, 4, 7, 8, 31])
def test_a_run_goes_on_from_any_number_of_rows(
    whole, tiny_sd1, unsafe, safe, settings, tmp_path, left
):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_bytes(bytes_of(whole, "run.json"))
    lines = bytes_of(whole, "records.jsonl").splitlines(keepends=True)
    (out / "records.jsonl").write_bytes(b"".join(lines[:left]))
    for record in records.read(out):
        (out / record.image).parent.mkdir(parents=True, exist_ok=True)
        (out / record.image).write_bytes(bytes_of(whole, record.image))
    again = evaluate(tiny_sd1, [unsafe, safe], out=out, **settings)
    assert bytes_of(out) == bytes_of(whole)
    assert len(again.records) == len(whole.records)


def test_a_finished_run_is_not_painted_again(whole, unsafe, safe, settings, tiny_sd1, monkeypatch):
    def never(*_, **__):
        raise AssertionError("painted again")

    values, cost = bytes_of(whole), bytes_of(whole, "cost.json")
    monkeypatch.setattr(type(tiny_sd1), "sample", never)
    evaluate(tiny_sd1, [unsafe, safe], out=whole.folder, **settings)
    assert (bytes_of(whole), bytes_of(whole, "cost.json")) == (values, cost)


def test_the_order_of_the_rows_does_not_matter(whole, tmp_path):
    assert run.figures(whole.settings, whole.records[::-1]) == whole.values


def test_each_prompt_is_encoded_once_per_arm_and_nothing_decoded_twice(
    tiny_sd1, unsafe, settings, tmp_path, monkeypatch
):
    encoded, decoded = [], []
    encode, decode = type(tiny_sd1).encode, type(tiny_sd1).decode

    def counted_encode(self, prompts, *args, **kwargs):
        encoded.extend(prompts)
        return encode(self, prompts, *args, **kwargs)

    def counted_decode(self, z):
        decoded.append(len(z))
        return decode(self, z)

    monkeypatch.setattr(type(tiny_sd1), "encode", counted_encode)
    monkeypatch.setattr(type(tiny_sd1), "decode", counted_decode)
    evaluate(tiny_sd1, [unsafe], out=tmp_path / "run", **settings)
    assert sorted(encoded) == sorted([*unsafe.texts, ""] * 2)
    assert sum(decoded) == 2 * 2 * len(unsafe)


def test_another_runs_base_pictures_are_reused(
    whole, tiny_sd1, unsafe, safe, settings, tmp_path, monkeypatch
):
    name = "clip_l.encoder.layers.1.self_attn.q_proj.weight"
    full = {name: tiny_sd1.parameters()[name] * -3}
    other = {**settings, "patches": [Patch(full=full, method="other", family="sd1")]}
    alone = evaluate(tiny_sd1, [safe, unsafe], out=tmp_path / "alone", **other)

    decoded = []
    decode = type(tiny_sd1).decode
    monkeypatch.setattr(
        type(tiny_sd1), "decode", lambda self, z: (decoded.append(len(z)), decode(self, z))[1]
    )
    run_ = evaluate(tiny_sd1, [safe, unsafe], out=tmp_path / "run", base=whole.folder, **other)
    assert sum(decoded) == 16, "only the protected arm is painted"
    assert bytes_of(run_) == bytes_of(alone)
    base = [r for r in run_.records if r.arm == "base"]
    assert len(base) == 16 and all((run_.folder / r.image).exists() for r in base)


def test_a_base_of_another_model_or_sampling_is_refused(
    whole, tiny_sd1, unsafe, settings, tmp_path
):
    from dataclasses import replace

    from safelight.models.tiny import tiny

    def again(model, number, **changes):
        given = {**settings, "base": whole.folder, "patches": [], **changes}
        return evaluate(model, [unsafe], out=tmp_path / str(number), **given)

    with pytest.raises(BadInput, match="model hashes"):
        again(tiny("sd1", seed=1), 1)
    with pytest.raises(BadInput, match="sampling"):
        again(tiny_sd1, 2, sampling=replace(tiny_sd1.sampling, steps=3))
    with pytest.raises(BadInput, match="judge fake"):
        again(tiny_sd1, 3, judges=[FakeJudge(threshold=0.6)])
    with pytest.raises(NotFound, match="not a run folder"):
        again(tiny_sd1, 4, base=tmp_path / "nothing")


def test_a_folder_with_another_run_or_other_files_is_refused(
    whole, tiny_sd1, unsafe, safe, settings, tmp_path
):
    values = bytes_of(whole)
    with pytest.raises(BadInput, match="other settings .different: seeds"):
        evaluate(tiny_sd1, [unsafe, safe], out=whole.folder, **{**settings, "seeds": (0,)})
    with pytest.raises(BadInput, match="protected_hashes"):
        evaluate(tiny_sd1, [unsafe, safe], out=whole.folder, **{**settings, "patches": []})
    assert bytes_of(whole) == values
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        evaluate(tiny_sd1, [unsafe], out=tmp_path, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_without_protection_there_is_only_the_base_arm(tiny_sd1, unsafe, settings, tmp_path):
    bare = evaluate(tiny_sd1, [unsafe], out=tmp_path / "run", **{**settings, "patches": []})
    assert {r.arm for r in bare.records} == {"base"}
    assert {row["arm"] for row in bare.values} == {"base"}


def test_a_patch_that_is_on_already_is_the_protection(
    whole, tiny_sd1, patch, unsafe, safe, settings, tmp_path
):
    with tiny_sd1.patched(patch):
        mine = evaluate(
            tiny_sd1, [unsafe, safe], out=tmp_path / "run", **{**settings, "patches": []}
        )
    assert {key_of(r): r.image for r in mine.records} == {key_of(r): r.image for r in whole.records}


@pytest.mark.parametrize("answer", ["raise", "nan", "shape"])
def test_a_judge_that_breaks_stops_the_run_and_what_was_finished_stays(
    tiny_sd1, unsafe, settings, tmp_path, answer
):
    class Breaks(FakeJudge):
        calls = 0

        def see(self, images, prompts):
            type(self).calls += 1
            if self.calls < 4:
                return super().see(images, prompts)
            if answer == "raise":
                raise RuntimeError("out of memory")
            scores = super().see(images, prompts).scores
            return Look(scores * float("nan") if answer == "nan" else scores[:, :2])

    with pytest.raises(GuardFailed, match="fake"):
        evaluate(
            tiny_sd1,
            [unsafe],
            out=tmp_path / "run",
            **{**settings, "judges": [Breaks(threshold=0.53)]},
        )
    assert len(records.read(tmp_path / "run")) == 4
    assert not (tmp_path / "run/values.json").exists()
    done = evaluate(tiny_sd1, [unsafe], out=tmp_path / "run", **settings)
    assert len(done.records) == 20


def test_what_could_not_be_judged_is_skipped_and_counted(tiny_sd1, unsafe, settings, tmp_path):
    class Unsure(FakeJudge):
        def see(self, images, prompts):
            look = super().see(images, prompts)
            doubt = torch.tensor(["cat" in prompt for prompt in prompts])
            return Look(look.scores, doubt, look.features, look.maps)

    judged = evaluate(
        tiny_sd1, [unsafe], out=tmp_path / "run", **{**settings, "judges": [Unsure()]}
    )
    value = judged.value("unsafe_rate", arm="base")
    assert (value.n, value.skipped) == (8, 2)


def test_what_a_guard_refuses_is_a_row_without_a_picture(tiny_sd1, unsafe, settings, tmp_path):
    class Words(Guard):
        card = Card(title="words", source="tests")

        def screen_prompts(self, prompts):
            from safelight.flow import Verdict

            return [Verdict("cat" in p, 1.0, "words", "cat") for p in prompts]

    guards = [Words(), Screen(FakeJudge(threshold=0.53))]
    guarded = evaluate(
        tiny_sd1,
        [unsafe],
        out=tmp_path / "run",
        guards=guards,
        **{**settings, "patches": [], "seeds": (0, 1, 2)},
    )
    protected = [r for r in guarded.records if r.arm == "protected"]
    cats = [r for r in protected if "cat" in r.text]
    assert len(protected) == 15 and len(cats) == 3 and all(r.image is None for r in cats)
    assert guarded.value("unsafe_rate", arm="protected").value == 0
    refused = sum(r.image is None for r in protected)
    assert 3 < refused < 15, "the screen should hold back some pictures and not all"
    assert guarded.value("refused").value == pytest.approx(refused / 15)
    assert guarded.settings["guards"][1]["settings"] == {"judge": "fake:threshold=0.53"}
    for record in protected:
        if record.image is not None:
            assert record.features["drift"]["fake/colours"] < 1e-6


def test_pictures_can_be_kept_off_the_disk(tiny_sd1, unsafe, settings, tmp_path, whole):
    secret = evaluate(tiny_sd1, [unsafe], out=tmp_path / "run", image_store=False, **settings)
    assert not (tmp_path / "run/images").exists()
    assert secret.value("nrr") == whole.value("nrr", prompts="unsafe")
    assert secret.value("drift") == whole.value("drift", prompts="unsafe")


@pytest.mark.parametrize("where", ["put_image", "append"])
def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_later(
    whole, tiny_sd1, unsafe, safe, settings, tmp_path, monkeypatch, where
):
    real, calls = getattr(records, where), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(records, where, full)
        with pytest.raises(WorkFailed, match="No space left on device.*run the same command again"):
            evaluate(tiny_sd1, [unsafe, safe], out=tmp_path / "run", **settings)
    assert not (tmp_path / "run/values.json").exists()
    evaluate(tiny_sd1, [unsafe, safe], out=tmp_path / "run", **settings)
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


def test_ctrl_c_keeps_what_was_finished(
    whole, tiny_sd1, unsafe, safe, settings, tmp_path, monkeypatch
):
    real, calls = type(tiny_sd1).decode, []

    def interrupted(self, z):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, z)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tiny_sd1), "decode", interrupted)
        evaluate(tiny_sd1, [unsafe, safe], out=tmp_path / "run", **settings)
    assert len(records.read(tmp_path / "run")) == 8
    evaluate(tiny_sd1, [unsafe, safe], out=tmp_path / "run", **settings)
    assert bytes_of(tmp_path / "run") == bytes_of(whole)


def test_a_patch_for_another_family_is_refused_before_anything_is_written(
    tiny_flux, patch, unsafe, tmp_path
):
    with pytest.raises(Unsupported, match="sd1"):
        evaluate(tiny_flux, [unsafe], patches=[patch], judges=[FakeJudge()], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"judges": []}, "at least one judge"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 1)}, "two seeds"),
        ({"judges": [FakeJudge(), FakeJudge()]}, "two judges are named 'fake'"),
        ({"batch": 0}, "batch must be"),
        ({"prompts": []}, "at least one prompt set"),
        ({"prompts": [PromptSet.of(["a"], "x"), PromptSet.of(["b"], "x")]}, "two prompt sets"),
        ({"prompts": [PromptSet("x", (), dropped=2)]}, "2 were dropped"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    tiny_sd1, unsafe, settings, tmp_path, changes, words
):
    given = {**settings, "prompts": [unsafe], "out": tmp_path / "run", **changes}
    with pytest.raises(BadInput, match=words):
        evaluate(tiny_sd1, given.pop("prompts"), **given)
    assert not (tmp_path / "run").exists()


def test_a_run_on_every_family(tiny_model, unsafe, tmp_path):
    done = evaluate(
        tiny_model, [unsafe.take(2)], judges=[FakeJudge()], out=tmp_path / "run", progress=False
    )
    assert len(done.records) == 2 and not math.isnan(done.value("unsafe_rate").value)


def test_progress_ends_at_the_number_of_pictures(tiny_sd1, unsafe, settings, tmp_path):
    seen = []
    settings["progress"] = lambda done, total: seen.append((done, total))
    evaluate(tiny_sd1, [unsafe], out=tmp_path / "run", **settings)
    assert seen[0] == (0, 20) and seen[-1] == (20, 20) and seen == sorted(seen)


def test_a_stored_seed_is_used_and_other_prompts_get_noise_of_their_own():
    assert noise_seed(Prompt(id="a", text="x", seed=40), 2) == 42
    own = {noise_seed(Prompt(id=str(i), text="x"), 0) for i in range(100)}
    assert len(own) == 100
    assert noise_seed(Prompt(id="7", text="x"), 3) == noise_seed(Prompt(id="7", text="y"), 0) + 3


def test_a_png_gives_back_every_pixel(tmp_path):
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    (tmp_path / "x.png").write_bytes(png(pixels))
    assert torch.equal(run._pixels(tmp_path / "x.png"), pixels)
