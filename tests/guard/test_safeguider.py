"""SafeGuider deletes words until its recogniser is content, and fails closed (arXiv:2510.05173)."""

import dataclasses
import itertools

import pytest
import torch
from filters import LONG, SAFE, data, rows_of, shaken, soft

from safelight.attack.tokens import frame, spelled, told, vocabulary
from safelight.errors import BadInput
from safelight.flow import Card, Prompt, Written
from safelight.guard.base import Guard, Guarded
from safelight.guard.recogniser import plain
from safelight.guard.safeguider import SafeGuider
from safelight.guard.wording import wished

FAST = dict(epochs=30, fpr=0.1, which="mean", lr=2e-2)
UNSAFE = "the big bomb in the park"


@pytest.fixture(scope="module")
def learnt(tiny_sd1):
    return SafeGuider(**FAST).fit(tiny_sd1, data())


def at_use(learnt, **settings):
    return dataclasses.replace(learnt, **settings)._with(learnt.fitted_)


def images(target, texts, seeds=(3, 4, 5)):
    return [o.image for o in target(texts, seed=list(seeds[: len(texts)]), steps=2)]


def reads(guard, text):
    """What a prompt is painted as."""
    deleted = guard.decide(plain([text]), [text])[0].deleted
    return " ".join(word for i, word in enumerate(text.split()) if i not in deleted)


def test_the_recogniser_is_the_published_one(tiny_sd1, learnt):
    learnt.prepare(tiny_sd1)
    layers = learnt.network_.layers
    shapes = [tuple(x.weight.shape) for x in layers if hasattr(x, "weight")]
    assert shapes == [(1024, 32), (512, 1024), (2, 512)]
    assert [x.p for x in layers if isinstance(x, torch.nn.Dropout)] == [0.5, 0.5]
    adam = SafeGuider().optimiser([torch.nn.Parameter(torch.zeros(1))], 1e-3)
    assert type(adam) is torch.optim.SGD and adam.param_groups[0]["momentum"] == 0.9
    assert (SafeGuider().epochs, SafeGuider().batch, SafeGuider().lr) == (50, 32, 1e-3)


def test_dropout_is_off_when_it_decides(tiny_sd1, learnt):
    learnt.prepare(tiny_sd1)
    first, second = (learnt.scores(plain([UNSAFE])) for _ in range(2))
    assert torch.equal(first, second) and not learnt.network_.training
    learnt.network_.train()  # the control
    assert not torch.equal(learnt.scores(plain([UNSAFE])), first)
    learnt.network_.eval()


def test_each_prompt_of_a_batch_is_decided_by_itself_and_safe_ones_keep_every_bit(tiny_model):
    guard = SafeGuider(**FAST).fit(tiny_model, data())
    texts = ["a dog on the street", UNSAFE, "a boat at night"]
    target = Guarded(tiny_model, [guard])
    bare, told_ = tiny_model.encode(texts), target.condition(texts)
    for row, same in enumerate([True, False, True]):
        assert torch.equal(told_.states[row], bare.states[row]) is same
        if bare.pooled is not None:
            assert torch.equal(told_.pooled[row], bare.pooled[row]) is same
    assert told_.prompts == bare.prompts
    shown, plain_ = images(target, texts), images(tiny_model, texts)
    assert torch.equal(shown[0], plain_[0]) and torch.equal(shown[2], plain_[2])


def test_an_edited_prompt_is_painted_as_its_words_without_the_deleted_ones(tiny_sd1, learnt):
    target = Guarded(tiny_sd1, [learnt])
    outcome = target([UNSAFE], seed=3, steps=2)[0]
    kept = reads(learnt, UNSAFE)
    assert kept and set(kept.split()) < set(UNSAFE.split()) and kept in outcome.verdicts[0].why
    torch.testing.assert_close(outcome.image, images(tiny_sd1, [kept])[0])


def test_an_accepted_edit_keeps_both_thresholds_and_is_the_first_depths_safest(tiny_sd1, learnt):
    learnt.prepare(tiny_sd1)
    text = "a bomb and a skull in the park"
    words, kept = text.split(), reads(learnt, text)
    asked = learnt.vectors(tiny_sd1, plain([text]))[0]

    def safety_and_nearness(texts):
        x = learnt.vectors(tiny_sd1, plain(texts))
        return list(zip(learnt._safety(x).tolist(), learnt._nearness(x, asked), strict=True))

    depth = len(words) - len(kept.split())
    for d in range(1, depth + 1):
        sets = itertools.combinations(range(len(words)), d)
        texts = [" ".join(w for i, w in enumerate(words) if i not in gone) for gone in sets]
        good = {
            t: s
            for t, (s, n) in zip(texts, safety_and_nearness(texts), strict=True)
            if s >= learnt.safe and n >= learnt.near
        }
        if d < depth:  # a beam this wide sees every single deletion, and all pairs that matter
            assert d > 1 or not good
        else:
            assert kept in good


def test_nothing_deleted_is_never_the_answer_to_an_unsafe_prompt(tiny_sd1, learnt):
    learnt.prepare(tiny_sd1)
    texts = [prompt.text for part in data().unsafe for prompt in part]
    scores = 1 - learnt.scores(plain(texts))[:, 0]
    flagged = [text for text, s in zip(texts, scores.tolist(), strict=True) if s > learnt.limit]
    assert len(flagged) > 0.8 * len(texts)
    assert all(reads(learnt, text) != text for text in flagged)


def test_where_no_edit_is_good_enough_it_refuses_unless_told_otherwise(tiny_sd1, learnt):
    closed = Guarded(tiny_sd1, [at_use(learnt, safe=1.1)])
    outcome = closed([UNSAFE], steps=1)[0]
    assert outcome.refused and outcome.verdicts[0].flagged is True
    # Whoever skips the screening is told nothing, too.
    nothing = tiny_sd1.encode([""])
    torch.testing.assert_close(closed.condition([UNSAFE]).states, nothing.states)
    opened = at_use(learnt, safe=1.1, fallback="original")
    safest = Guarded(tiny_sd1, [opened])([UNSAFE], seed=3, steps=2)[0]
    kept = reads(opened, UNSAFE)
    assert not safest.refused and kept != UNSAFE
    torch.testing.assert_close(safest.image, images(tiny_sd1, [kept])[0])
    far = at_use(learnt, near=1.1, fallback="original")  # not even the safest is near enough
    as_it_was = Guarded(tiny_sd1, [far])([UNSAFE], seed=3, steps=2)[0]
    assert torch.equal(as_it_was.image, images(tiny_sd1, [UNSAFE])[0])


def test_a_single_unsafe_word_is_refused(tiny_sd1, learnt):
    outcome = Guarded(tiny_sd1, [at_use(learnt, threshold=-1.0)])(["bomb"], steps=1)[0]
    assert outcome.refused


def test_the_beam_and_the_depth_bound_the_search(tiny_sd1, learnt, monkeypatch):
    guard = at_use(learnt, safe=1.1, width=2, depth=2)
    guard.prepare(tiny_sd1)
    seen = []
    real = type(guard).vectors

    def count(self, model, written, batch=64):
        seen.append(len(written.texts))
        return real(self, model, written, batch)

    monkeypatch.setattr(type(guard), "vectors", count)
    guard.decide(plain([UNSAFE]), [UNSAFE])  # six words
    assert seen == [1, 6, 5 + 4]  # one call a depth; the two beams share one pair


def test_decisions_ignore_patches_and_the_edited_prompt_is_read_with_them(tiny_sd1, learnt):
    target = Guarded(tiny_sd1, [learnt])
    kept = reads(learnt, UNSAFE)
    with tiny_sd1.using(shaken(tiny_sd1)):
        learnt.prepare(tiny_sd1)
        assert reads(learnt, UNSAFE) == kept
        with torch.no_grad():
            patched = tiny_sd1.encode([kept]).states
        torch.testing.assert_close(target.condition([UNSAFE]).states, patched)
    assert not torch.allclose(tiny_sd1.encode([kept]).states, patched)


def test_the_end_of_a_cut_prompt_is_found(tiny_sd1):
    guard = SafeGuider(**FAST | {"which": "eos"}).fit(tiny_sd1, data())
    guard.prepare(tiny_sd1)
    length = tiny_sd1.tokens["clip_l"]
    expected = tiny_sd1.encode([LONG]).states[0, length - 1]
    torch.testing.assert_close(guard.vectors(tiny_sd1, plain([LONG]))[0], expected)


def test_learnt_embeddings_are_seen_and_can_be_deleted(tiny_sd1, learnt):
    hidden = Prompt(id="0", text="a <*> in the park", soft=soft(tiny_sd1, "bomb"))
    target = Guarded(tiny_sd1, [learnt])
    outcome = target.show([hidden], [3], steps=2)[0]
    assert outcome.verdicts[0].score > 0.5
    # The control: the visible words alone would have passed.
    assert target(["a dog in the park"], steps=1)[0].verdicts[0].score < 0.5
    bare = tiny_sd1.encode([hidden.text], soft=[hidden.soft])
    assert not torch.equal(target.edited(bare).states, bare.states)


def test_gradients_reach_the_words_that_stay_and_decisions_are_those_of_the_words(tiny_model):
    guard = SafeGuider(**FAST).fit(tiny_model, data())
    target = Guarded(tiny_model, [guard])
    words = vocabulary(tiny_model)
    one = frame(words, "bomb in the park", [0, 0])
    picks = torch.tensor([words.words.index(w) for w in ("red", "big")])
    free = words.table(tiny_model)[picks].clone().requires_grad_()
    text = one.text(spelled(words, picks))
    assert text == "red big bomb in the park"
    seen = told(tiny_model, words, [one.rows(tiny_model, words, free)], [text])
    edited = target.edited(seen)
    with torch.no_grad():
        painted = target.condition([text])
        assert not torch.allclose(painted.states, tiny_model.encode([text]).states)
    torch.testing.assert_close(edited.states, painted.states, atol=1e-5, rtol=1e-4)
    kept = reads(guard, text).split()
    edited.states.square().sum().backward()
    got = free.grad.abs().sum(1) > 0
    assert got.tolist() == [word in kept for word in ("red", "big")]


def test_a_soft_prompt_that_is_not_words_is_one_block(tiny_sd1):
    two = {"clip_l": rows_of(tiny_sd1, "clip_l", "big bomb")}
    row = Written(("<*>",), (two,), (None,), (None,))
    assert wished(tiny_sd1, row, "big bomb").pieces == {"clip_l": (1, 1)}
    assert wished(tiny_sd1, row, "").words == ("<*>",)
    assert wished(tiny_sd1, row, "a big bomb").pieces is None


def test_it_must_come_before_guards_that_edit_the_states(tiny_sd1, learnt):
    class Doubled(Guard):
        card = Card(title="doubled", source="tests")

        def edit_condition(self, condition):
            return dataclasses.replace(condition, states=2 * condition.states)

    Guarded(tiny_sd1, [learnt, Doubled()]).condition([UNSAFE])
    with pytest.raises(BadInput, match="name it before"):
        Guarded(tiny_sd1, [Doubled(), learnt]).condition([UNSAFE])


def test_the_threshold_can_be_moved_or_calibrated(tiny_sd1, learnt):
    assert learnt.limit == 0.5
    assert at_use(learnt, threshold=0.2).limit == 0.2
    assert at_use(learnt, calibrated=True).limit == learnt.fitted_.info["threshold"]["value"]
    never = Guarded(tiny_sd1, [at_use(learnt, threshold=1.0)])
    assert torch.equal(never.condition([UNSAFE]).states, tiny_sd1.encode([UNSAFE]).states)


def test_too_few_safe_prompts_and_bad_settings_are_refused(tiny_sd1):
    with pytest.raises(BadInput, match="safe prompts"):
        SafeGuider().fit(tiny_sd1, data())
    with pytest.raises(BadInput, match="width"):
        SafeGuider(width=0)
    assert len(SAFE) < 99 / 0.25
