"""The text probe reads the untouched encoders, keeps its calibrated promise and fails closed."""

import dataclasses

import pytest
import torch
from filters import LONG, SAFE, data, shaken, soft, unsafe

from safelight.errors import BadInput
from safelight.flow import Prompt
from safelight.guard.base import Guarded, refuses
from safelight.guard.recogniser import calibrate, plain, read_vector, roc_area
from safelight.guard.text_probe import TextProbe
from safelight.guard.trained import load_guard
from safelight.prompts import PromptSet
from safelight.training.data import TextData

FAST = dict(epochs=25, lr=1e-2, fpr=0.1, patience=0, dropout=0.0, variants=0)


@pytest.fixture(scope="module")
def learnt(tiny_sd1):
    return TextProbe(**FAST).fit(tiny_sd1, data())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_unsafe_prompts_are_refused_and_safe_ones_painted(tiny_model, kind):
    before = tiny_model.hashes()
    guard = TextProbe(**FAST, kind=kind, which="mean", threshold=0.5).fit(tiny_model, data())
    target = Guarded(tiny_model, [guard])

    def refused(texts):
        return [refuses(opinions) for opinions in target.admit(texts)]

    assert sum(refused(SAFE)) < 0.4 * len(SAFE)
    for part in data().unsafe:
        assert sum(refused(part.texts)) > 0.6 * len(part)
        why = [opinions[0].why for opinions in target.admit(part.texts)]
        assert why.count(part.name) > 0.6 * len(part)
    assert tiny_model.hashes() == before
    nothing = target([part.texts[0]], steps=1)[0]
    assert nothing.image is None


def test_scores_are_probabilities_with_one_per_category(tiny_sd1, learnt):
    learnt.prepare(tiny_sd1)
    verdict = learnt.screen_prompts(["a bomb in the park"])[0]
    assert 0 <= verdict.score <= 1 and set(verdict.scores) == {"weapons", "death"}
    assert verdict.score == pytest.approx(sum(verdict.scores.values()))


def test_a_patch_does_not_change_what_it_sees(tiny_sd1, learnt):
    learnt.prepare(tiny_sd1)
    texts = ["a bomb in the park", "a dog on the street"]
    bare = learnt.scores(plain(texts))
    with tiny_sd1.using(shaken(tiny_sd1)):
        assert torch.equal(learnt.scores(plain(texts)), bare)
        seen = tiny_sd1.encode(texts)  # the control: the patched encoder says something else
        x = read_vector(tiny_sd1, seen, "clip_l", "eos")
    assert not torch.allclose(learnt.judged(learnt.network_, x), bare)


def test_the_end_mark_is_found_where_a_prompt_was_cut(tiny_model):
    for encoder in tiny_model.text_encoders:
        seen = tiny_model.encode([LONG, "a cat"])
        if encoder not in seen.encoders:
            continue
        ends = tiny_model.tokenizers[encoder].eos_token_id
        ids, _ = tiny_model.tokenize(encoder, [LONG, "a cat"])
        first = (ids == ends).int().argmax(1)
        assert first[0] == tiny_model.tokens[encoder] - 1 > first[1]
        expected = seen.stream(encoder)[torch.arange(2), first]
        assert torch.equal(read_vector(tiny_model, seen, encoder, "eos"), expected)


def test_the_mean_is_over_the_content_alone(tiny_model):
    seen = tiny_model.encode(["a cat", ""])
    encoder = seen.encoders[0]
    states, start = seen.stream(encoder), 0 if encoder == "t5" else 1
    found = read_vector(tiny_model, seen, encoder, "mean")
    torch.testing.assert_close(found[0], states[0, start : start + 2].mean(0))
    torch.testing.assert_close(found[1], states[1, start])  # nothing but the end mark


def test_pooled_is_the_pooled_vector_where_there_is_one(tiny_sdxl):
    seen = tiny_sdxl.encode(["a cat"])
    assert torch.equal(read_vector(tiny_sdxl, seen, "clip_g", "pooled"), seen.pooled)
    assert torch.equal(
        read_vector(tiny_sdxl, seen, "clip_l", "pooled"),
        read_vector(tiny_sdxl, seen, "clip_l", "eos"),
    )


def test_one_encoder_only_can_be_read_and_only_it_is_bound(tiny_sd3):
    guard = TextProbe(**FAST, encoders=("clip_l",)).fit(tiny_sd3, data())
    assert set(guard.fitted_.base) == {"clip_l"}
    every = TextProbe(**FAST).fit(tiny_sd3, data())
    assert set(every.fitted_.base) == {"clip_l", "clip_g", "t5"}
    with pytest.raises(BadInput, match="text encoder"):
        TextProbe(**FAST, encoders=("clip",)).fit(tiny_sd3, data())


def test_learnt_embeddings_are_refused_or_read_but_never_overlooked(tiny_sd1, learnt):
    words = [
        Prompt(id="0", text="a dog <*> in the park", soft=soft(tiny_sd1, "bomb")),
        Prompt(id="1", text="a <*> in the park", soft=soft(tiny_sd1, "dog")),
        Prompt(id="2", text="a dog in the park"),
    ]
    closed = Guarded(tiny_sd1, [learnt]).show(words, [0, 1, 2], steps=1)
    assert [o.refused for o in closed] == [True, True, False]
    assert closed[1].verdicts[0].flagged is None
    reads = dataclasses.replace(learnt, learnt="read", threshold=0.5)._with(learnt.fitted_)
    opened = Guarded(tiny_sd1, [reads]).show(words, [0, 1, 2], steps=1)
    assert [o.refused for o in opened] == [True, False, False]
    # The control: a filter that reads the visible words alone lets it through.
    assert not Guarded(tiny_sd1, [learnt])(["a dog in the park"], steps=1)[0].refused


def test_embeddings_for_an_encoder_that_is_not_read_are_refused(tiny_sdxl):
    guard = TextProbe(**FAST, encoders=("clip_l",), learnt="read").fit(tiny_sdxl, data())
    guard.prepare(tiny_sdxl)
    given = {"clip_g": soft(tiny_sdxl, "bomb")["clip_g"]}
    verdict = guard.screen_learnt(["a <*> in the park"], [given])[0]
    assert verdict.flagged is None and "clip_g" in verdict.why


def test_the_threshold_keeps_its_share_on_new_prompts_in_the_mean():
    """Split conformal: whatever the distribution, a fresh score exceeds it with k / (n + 1)."""
    rng = torch.Generator().manual_seed(0)
    shares, naive = [], []
    for _ in range(400):
        held, fresh = (torch.randn(n, generator=rng).exp() for n in (50, 1000))
        limit = calibrate(held.tolist(), 0.05).value
        shares.append((fresh > limit).float().mean().item())
        naive.append((fresh > held.quantile(0.99)).float().mean().item())
    mean = sum(shares) / len(shares)
    assert 0.03 < mean <= 0.05
    assert sum(naive) / len(naive) < 0.03  # the control: another threshold, another share


def test_the_interval_of_the_false_positives_is_the_exact_one():
    found = calibrate([i / 199 for i in range(199)], 0.01)
    assert (found.n, found.above, found.expected) == (199, 2, 0.01)
    rng = torch.Generator().manual_seed(0)
    uniform = torch.rand(4000, 199, generator=rng).sort(1, descending=True).values
    share = 1 - uniform[:, 1]  # of new scores above the second highest
    assert (share < found.low).float().mean() == pytest.approx(0.025, abs=0.01)
    assert (share > found.high).float().mean() == pytest.approx(0.025, abs=0.01)


def test_the_threshold_comes_from_prompts_that_were_not_trained_on(tiny_sd1, learnt):
    stored = learnt.fitted_.info
    assert stored["threshold"]["n"] == 12 and stored["threshold"]["fpr"] == 0.1
    counterparts = {p.safe_prompt for part in data().unsafe for p in part}
    assert stored["split"]["learn"] <= 60 + 48 + len(counterparts) - 12 - 12


def test_the_area_under_the_roc_curve_counts_pairs():
    assert roc_area([0.9, 0.8], [0.1, 0.8]) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert roc_area([1.0], [0.0]) == 1 and roc_area([0.0], [1.0]) == 0


def test_the_folder_gives_the_same_threshold_back_and_another_can_be_named(
    tiny_sd1, learnt, tmp_path
):
    learnt.save(tmp_path / "probe")
    back = load_guard(tmp_path / "probe")
    texts = [*SAFE[:5], "a bomb in the park"]
    one, two = (
        [o.verdicts for o in Guarded(tiny_sd1, [guard])(texts, steps=1)] for guard in (learnt, back)
    )
    assert one == two and back.limit == learnt.limit
    strict = load_guard(tmp_path / "probe", threshold=0.0)
    assert all(o.refused for o in Guarded(tiny_sd1, [strict])(texts, steps=1))


def test_too_few_safe_prompts_for_a_threshold_are_refused_before_training(tiny_sd1, tmp_path):
    with pytest.raises(BadInput, match="needs at least 99 safe prompts"):
        TextProbe(fpr=0.01).fit(tiny_sd1, data())
    assert not list(tmp_path.iterdir())


def test_one_class_and_contradictory_data_are_refused(tiny_sd1):
    safe = PromptSet.of(SAFE, "safe")
    with pytest.raises(BadInput, match="the unsafe side has 0 prompt"):
        TextProbe(**FAST).fit(tiny_sd1, TextData(safe=safe, unsafe=[]))
    with pytest.raises(BadInput, match="on the safe and on the unsafe side"):
        TextProbe(**FAST).fit(tiny_sd1, TextData(safe=safe, unsafe=[unsafe("death"), safe]))
