"""The Embedding Sanitizer keeps what its specification says, on every family."""

import dataclasses

import pytest
import torch

from safelight.errors import BadInput, Unsupported
from safelight.guard.base import Guarded
from safelight.guard.explain import POOLED, Explains, explained
from safelight.guard.sanitizer import Sanitizer
from safelight.guard.tokenwise import Network, reached, scored, with_padding
from safelight.guard.trained import Fitted, load_guard
from safelight.models.tiny import tiny
from safelight.prompts import PromptSet
from safelight.training.contexts import by_length
from safelight.training.data import TextData
from safelight.training.pairs import pair

PROMPTS = ["a knife in the park", "a red cat", "a bomb"]
SAFE = [f"a {c} {thing} {where}" for c in ("red", "blue", "big") for thing in ("cat", "car", "tree")
        for where in ("in a park", "on the sea", "with a dog")]  # fmt: skip
PLACES = ("in a park", "on the sea", "with a dog", "and a red car", "at night", "on a street")
# Without what is made up: random encoders know no neighbours, and lists this short learn by heart.
PLAIN = dict(nearby=0.0, scattered=0.0, led=0.0, variants=0.0)
FAST = dict(epochs=3, batch=16, **PLAIN)
WELL = FAST | dict(epochs=40, lr=3e-3, depth=1, score=1.0, dropout=0.0, noise=0.0)


def unsafe(rows=None):
    rows = rows or [
        {"prompt": f"a {c} {bad} {where}", "safe_prompt": f"a {c} {good} {where}", "category": bad}
        for bad, good in (("knife", "horse"), ("bomb", "big fish"))
        for c in ("small", "green")
        for where in PLACES
    ]
    return PromptSet.of(rows, "unsafe")


@pytest.fixture(scope="module")
def data():
    return TextData(safe=PromptSet.of(SAFE, "safe"), unsafe=unsafe(), validation=0.04)


def awake(model, **settings):
    """A sanitizer that moves things without having learnt what: its last layers are random."""
    guard = Sanitizer(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = guard.network(model)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.3)
    base = {name: model.hashes()[name] for name in guard.reads(model)}
    fitted = Fitted(weights=network.state_dict(), family=model.family, base=base, info={})
    return guard._with(fitted)


def pieces(condition):
    """Every tensor of a condition by name, one per encoder and kind."""
    found = {name: condition.stream(name) for name in condition.encoders}
    for name in condition.layout:
        if (pooled := condition.pooled_stream(name)) is not None:
            found[f"{name}.pooled"] = pooled
    return found


def edited(model, guard, prompts=PROMPTS):
    """A condition as it was, and as the guard leaves it."""
    return model.encode(prompts), Guarded(model, [guard]).condition(prompts)


def moved(model, guard, prompts=PROMPTS):
    """Which tensors changed for any prompt."""
    before, after = edited(model, guard, prompts)
    new = pieces(after)
    return {name for name, old in pieces(before).items() if not torch.equal(old, new[name])}


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# 1, 3: alpha


def test_alpha_0_changes_no_bit(tiny_model):
    before, after = edited(tiny_model, awake(tiny_model, alpha=0.0))
    new = pieces(after)
    assert all(same_bits(old, new[name]) for name, old in pieces(before).items())
    assert moved(tiny_model, awake(tiny_model)) == set(new)  # control


def test_more_alpha_moves_every_prompt_further_or_as_far(tiny_model):
    lengths = []
    for alpha in (0.0, 0.25, 0.5, 1.0, 2.0, 8.0):
        before, after = edited(tiny_model, awake(tiny_model, alpha=alpha))
        new = pieces(after)
        lengths.append(
            sum((new[name] - old).flatten(1).norm(dim=1) for name, old in pieces(before).items())
        )
    grown = torch.stack(lengths).diff(dim=0)
    assert (grown >= -1e-4).all() and (grown[0] > 0).all()


@pytest.mark.parametrize("alpha", [-0.1, float("nan")])
def test_alpha_below_0_is_refused(alpha):
    with pytest.raises(BadInput, match="alpha must be 0 or more"):
        Sanitizer(alpha=alpha)


# 2: scores


def test_scores_stay_between_0_and_1_and_nothing_else_has_one(tiny_model):
    guarded = Guarded(tiny_model, [awake(tiny_model)])
    told = explained(guarded, [*PROMPTS, "", "a " * 200])
    scores = [score for one in told for score in one.scores]
    assert scores and all(0 <= score <= 1 for score in scores)
    assert all(score == 0 for one in told if not one.prompt for score in one.scores)
    loud = awake(tiny_model)
    for value in loud.fitted_.weights.values():
        value.mul_(1e3)
    told = explained(Guarded(tiny_model, [loud]), PROMPTS)
    assert all(0 <= score <= 1 for one in told for score in one.scores)


@pytest.fixture(scope="module")
def learnt(tiny_sd1, data):
    """One that has learnt well, from two targets."""
    return Sanitizer(**WELL | {"epochs": 120, "depth": 2}, width=64).fit(tiny_sd1, data)


def top(model, guard, prompts):
    """The highest and the mean score of each prompt."""
    told = explained(Guarded(model, [guard]), prompts)
    return [(max(one.scores), sum(one.scores) / len(one.scores)) for one in told]


def test_benign_prompts_keep_low_scores_in_any_order_of_their_words(tiny_sd1, learnt):
    rng = torch.Generator().manual_seed(0)
    shuffled = []
    for text in SAFE:
        words = text.split()
        shuffled.append(" ".join(words[i] for i in torch.randperm(len(words), generator=rng)))
    assert max(mean for _, mean in top(tiny_sd1, learnt, shuffled)) < 0.3
    known = [one.text for one in unsafe()]
    assert min(high for high, _ in top(tiny_sd1, learnt, known)) > 0.5  # control


def test_the_target_is_what_scores_highest(tiny_sd1, learnt):
    guarded = Guarded(tiny_sd1, [learnt])
    for one in explained(guarded, ["a small knife in a park", "a green bomb with a dog"]):
        named = one.tokens[one.scores.index(max(one.scores))].strip()
        assert named in ("knife", "bomb") and max(one.scores) > 0.5


# 4, 5: what never changes


def test_the_start_mark_keeps_every_bit(tiny_model):
    before, after = edited(tiny_model, awake(tiny_model))
    for name in before.encoders:
        if name != "t5":  # T5 has no start mark
            old, new = before.stream(name), after.stream(name)
            assert same_bits(old[:, 0], new[:, 0])
            assert not torch.equal(old[:, 1], new[:, 1])  # control


@pytest.mark.parametrize("fusion", ["reach", "own"])
@pytest.mark.parametrize("text", ["", "   "])
def test_the_empty_prompt_keeps_every_bit(tiny_model, text, fusion):
    guard = awake(tiny_model, fusion=fusion, alpha=100.0)
    before, after = edited(tiny_model, guard, [text, "a cat"])
    new = pieces(after)
    for name, old in pieces(before).items():
        assert same_bits(old[0], new[name][0])
        assert not torch.equal(old[1], new[name][1])  # control: beside it, something changed


def test_guidance_steers_away_from_an_untouched_condition(tiny_sd1):
    seen = denoiser_inputs(tiny_sd1, Guarded(tiny_sd1, [awake(tiny_sd1)]), ["a knife"])
    empty = tiny_sd1.encode([""]).states
    assert any(torch.equal(row[None], empty) for rows in seen["states"] for row in rows)


# 6: the model


def test_the_models_weights_are_never_touched(tiny_model, data):
    before = dict(tiny_model.hashes())
    guard = Sanitizer(**FAST | {"epochs": 1}).fit(tiny_model, data)
    Guarded(tiny_model, [guard])(["a knife"], steps=1)
    assert tiny_model.hashes() == before
    fresh = Sanitizer(**FAST | {"epochs": 1}, lr=1e-9).fit(tiny_model, data)
    assert guard.sha256 != fresh.sha256  # control: something was learnt


# 7: gradients


def test_the_mapping_alone_teaches_the_scores(tiny_sd1, data):
    method = Sanitizer(**FAST, supervise="none")
    material = method.gather(tiny_sd1, data, seed=0)
    rng = torch.Generator().manual_seed(0)
    with method.lend(tiny_sd1, rng) as loan:
        weight = loan.parameters["clip_l.score.weight"]
        batch = next(method.batches(material, 1, rng))
        first = torch.autograd.grad(method.loss(tiny_sd1, batch, rng).total, weight)[0]
        loan.nudge(0.01, rng)
        torch.nn.init.normal_(loan.parameters["clip_l.move.2.weight"], std=0.1)
        then = torch.autograd.grad(method.loss(tiny_sd1, batch, rng).total, weight)[0]
    assert first.abs().max() == 0  # control: D is zero, so scores cannot matter yet
    assert then.abs().max() > 1e-4


@pytest.mark.parametrize("estimate", ["residual", "anchor"])
def test_it_starts_as_the_identity(estimate):
    torch.manual_seed(0)
    network = Network(16, 8, 2, 2, estimate)
    s, D = network(torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.bool))
    assert (D == 0).all() and (s > 0).all()


# 8: what is shown is what was used


def test_it_sees_the_same_while_it_learns_and_while_it_acts():
    torch.manual_seed(0)
    network = Network(16, 8, 2, 2, "residual")
    own = torch.tensor([[True] * 5, [True, True, False, False, False]])
    E = torch.randn(2, 5, 16)
    learning = network(E, own)
    with torch.no_grad():
        acting = network(E, own)
    assert all(x.requires_grad for x in learning)
    for one, other in zip(learning, acting, strict=True):
        torch.testing.assert_close(one.detach(), other)
    elsewhere = torch.where(own[..., None], E, torch.randn_like(E))
    torch.testing.assert_close(network(elsewhere, own)[0], learning[0])


def test_the_scores_that_are_shown_are_those_that_were_used(tiny_model):
    guard = awake(tiny_model, alpha=0.7)
    before, after = edited(tiny_model, guard)
    shown = {
        (one.prompt, one.reads): one for one in explained(Guarded(tiny_model, [guard]), PROMPTS)
    }
    new = pieces(after)
    for name, E in pieces(before).items():
        encoder, _, whole = name.partition(".")
        states = E[:, None] if whole else E
        mask = before.masks[encoder]
        start = 0 if whole else guard.starts_[encoder]
        s, D = guard.network_[name.replace(".", "_")](
            states, scored(mask, guard.starts_[encoder], states.shape[1])
        )
        used = torch.zeros_like(s)
        for i, prompt in enumerate(PROMPTS):
            one = shown[prompt, name]
            assert one.tokens == (POOLED,) if whole else one.tokens
            used[i, start : start + len(one.scores)] = torch.tensor(one.scores)
            last = int(mask[i].sum()) - 1  # the end mark has a score, but is no word
            if not whole:
                used[i, last] = s[i, last]
        again = states + strength(guard, name, used, mask)[..., None] * D
        other = states + strength(guard, name, 0.5 * used, mask)[..., None] * D
        got = new[name][:, None] if whole else new[name]
        torch.testing.assert_close(again, got, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(other, got, atol=1e-4)  # control


def strength(guard, name, s, mask):
    return guard._strength(name, s, mask, guard.alpha)


def test_a_sanitizer_explains_itself(tiny_model):
    assert isinstance(awake(tiny_model), Explains)
    told = explained(Guarded(tiny_model, [awake(tiny_model)]), ["a knife in the park"])
    assert {one.reads for one in told} == set(pieces(tiny_model.encode([""])))
    for one in told:
        text = "".join(one.tokens).strip()
        assert text == (POOLED if one.reads.endswith("pooled") else "a knife in the park")
        assert len(one.tokens) == len(one.scores)


# 9: every input of the denoiser


def denoiser_inputs(model, guarded, prompts):
    """The text states and pooled vectors that the denoiser is really given."""
    seen = {"states": [], "pooled": []}

    def note(module, args, kwargs):
        states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        added = kwargs.get("added_cond_kwargs") or {}
        seen["states"].append(states)
        seen["pooled"].append(kwargs.get("pooled_projections", added.get("text_embeds")))

    hook = model.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        guarded(prompts, seed=1, steps=1)
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("only", [None, "first", "last"])
def test_every_input_of_the_denoiser_is_sanitized(tiny_model, only):
    encoders = tuple(tiny_model.text_encoders)
    chosen = {None: (), "first": encoders[:1], "last": encoders[-1:]}[only]
    guard = awake(tiny_model, encoders=chosen)
    prompts = ["a knife in the park"]
    plain = denoiser_inputs(tiny_model, Guarded(tiny_model), prompts)
    after = denoiser_inputs(tiny_model, Guarded(tiny_model, [guard]), prompts)
    changed = set()
    for name, span in tiny_model.layout.items():
        old, new = (x["states"][0][:, span.tokens, span.dims] for x in (plain, after))
        changed |= set() if torch.equal(old, new) else {name}
        if span.pooled is not None:
            old, new = (x["pooled"][0][:, span.pooled] for x in (plain, after))
            changed |= set() if torch.equal(old, new) else {f"{name}.pooled"}
    meant = set(pieces(tiny_model.encode([""], chosen or None)))
    assert changed == meant
    assert bool(only) == (meant != set(pieces(tiny_model.encode([""])))) or len(encoders) == 1


def test_the_folder_says_which_tensors_are_covered(tiny_sdxl, data, tmp_path):
    guard = Sanitizer(**FAST | {"epochs": 1}, encoders=("clip_g",)).fit(tiny_sdxl, data)
    guard.save(tmp_path / "g")
    assert load_guard(tmp_path / "g").fitted_.info["tensors"] == ["clip_g", "clip_g.pooled"]


# reach


def test_strength_follows_a_score_to_all_that_has_seen_it():
    s = torch.tensor([[0.0, 0.2, 0.9, 0.1, 0.3, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    assert reached(s, mask, causal=True)[0].tolist() == pytest.approx([0, 0.2] + [0.9] * 5)
    assert reached(s, mask, causal=False)[0].tolist() == pytest.approx([0.9] * 7)
    assert with_padding(s, mask)[0].tolist() == pytest.approx([0, 0.2, 0.9, 0.1, 0.3, 0.3, 0.3])


def test_tokens_before_the_first_harmful_one_stay(tiny_sd1, learnt):
    before, after = edited(tiny_sd1, learnt, ["a green bomb on the sea"])
    shift = (after.states - before.states).norm(dim=-1)[0]
    at = 6  # the start mark, "a", and "green" in four pieces come before it
    assert shift[at:].min() > 10 * shift[:at].max()


# learning


def test_it_learns_on_every_family(tiny_model, data):
    """Random encoders say nothing that carries over, so this is about the pairs learnt from."""
    guard = Sanitizer(**WELL, width=32).fit(tiny_model, data)
    history = guard.fitted_.info["history"]
    first, last = (
        {name: sum(row[name] for row in rows) / len(rows) for name in ("L_map", "L_score")}
        for rows in (history[:4], history[-4:])
    )
    assert last["L_map"] < 0.8 * first["L_map"] and last["L_score"] < 0.7 * first["L_score"]
    assert set(guard.fitted_.info["tensors"]) == set(pieces(tiny_model.encode([""])))


def test_it_moves_targets_to_their_anchors_and_leaves_benign_prompts(tiny_sd1, learnt):
    rows = unsafe()
    targets, anchors = rows.texts[:6], [one.safe_prompt for one in rows][:6]  # as many tokens
    before, after = edited(tiny_sd1, learnt, list(targets))
    goal = tiny_sd1.encode(anchors).states
    assert (after.states - goal).norm() < 0.8 * (before.states - goal).norm()
    before, after = edited(tiny_sd1, learnt, SAFE)
    assert (after.states - before.states).norm() < 0.02 * (before.states - before.states[0]).norm()


def test_the_same_seed_learns_the_same_and_the_folder_keeps_it(tiny_sd1, data, tmp_path):
    method = Sanitizer(**FAST | {"epochs": 1, "nearby": 0.5, "variants": 0.5}, avoid=("street",))
    a, b, c = (method.fit(tiny_sd1, data, seed=seed) for seed in (1, 1, 2))
    assert a.sha256 == b.sha256 != c.sha256
    a.save(tmp_path / "g")
    back = load_guard(tmp_path / "g", alpha=0.5)
    assert back.sha256 == a.sha256 and back == dataclasses.replace(a, alpha=0.5)


def test_a_concept_list_is_enough(tiny_sd1, tmp_path):
    path = tmp_path / "concepts.csv"
    path.write_text("target,anchor\nknife,horse\nbomb,big fish\n")
    data = TextData(safe=PromptSet.of(SAFE, "safe"), unsafe=[])
    guard = Sanitizer(**FAST, concepts=(str(path),)).fit(tiny_sd1, data)
    assert guard.concepts == ("knife > horse", "bomb > big fish")  # no path in the folder
    assert guard.fitted_.info["pairs"] > 20
    guard.save(tmp_path / "g")
    assert load_guard(tmp_path / "g").concepts == guard.concepts


def test_words_to_avoid_are_never_used(tiny_sd1, data):
    method = Sanitizer(**FAST | {"nearby": 1.0, "variants": 3.0})
    avoid = ("castle", "street", "skull", "beer", "parachute", "sky")
    plain, careful = (
        dataclasses.replace(method, avoid=words).gather(tiny_sd1, data, seed=0)
        for words in ((), avoid)
    )

    def said(material):
        new = " ".join([*material.benign, *(pair.target for pair in material.pairs)])
        for given in (*SAFE, *(one.text for one in unsafe())):
            new = new.replace(given, "")
        return set(new.split())

    assert not said(careful) & set(avoid) and said(plain) & set(avoid)


# bad input


def test_another_encoder_or_width_is_refused(tiny_sd1, tiny_sdxl):
    guard = awake(tiny_sd1)
    with pytest.raises(Unsupported, match="trained for sd1"):
        Guarded(tiny_sdxl, [guard])
    with pytest.raises(BadInput, match="other text encoders.*clip_l.*train it again"):
        Guarded(tiny("sd1", seed=9), [guard])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"concepts": ("knife > horse", "knife > dog")}, "'knife' 2 times"),
        ({"concepts": ("knife >",)}, "entry 1"),
        ({"templates": ("a photo",)}, "has no {}"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"contexts": 0}, "contexts must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"witness": "emojy"}, "emoji"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        Sanitizer(**settings)


@pytest.mark.parametrize(
    "rows, settings, words",
    [
        ([{"prompt": "a knife", "category": "x"}] * 3, {}, "category x has a safe counterpart"),
        ([{"prompt": "a Knife", "safe_prompt": "a knife", "category": "x"}] * 3, {}, "same tokens"),
        ([{"prompt": "a knife", "safe_prompt": "a cat"}], {}, "the unsafe side has 1"),
        (None, {"encoders": ("clip_x",)}, "clip_x"),
        (None, {"concepts": ("knife > Knife",)}, "same tokens"),
    ],
)
def test_data_that_cannot_be_learnt_from_is_refused(tiny_sd1, rows, settings, words):
    data = TextData(safe=PromptSet.of(SAFE, "safe"), unsafe=unsafe(rows))
    with pytest.raises(BadInput, match=words):
        Sanitizer(**FAST, **settings).fit(tiny_sd1, data)


# words around targets


def test_targets_also_stand_behind_and_among_other_words(tiny_sd1, data):
    given = {one.text for one in unsafe()}
    plain = Sanitizer(**FAST).gather(tiny_sd1, data, seed=0)
    wide = Sanitizer(**FAST | {"led": 1.0, "scattered": 0.5}).gather(tiny_sd1, data, seed=0)
    assert wide.learnt == round(2.5 * plain.learnt)
    new = [one for one in wide.pairs[: wide.learnt] if one.target not in given]
    behind = [one for one in new if any(one.target.endswith(text) for text in given)]
    assert len(behind) == plain.learnt and len(new) == wide.learnt - plain.learnt
    for one in new:  # what surrounds the phrase is the same on both sides
        assert one.target.replace(one.phrase, "") == one.anchor.replace(
            pair(one.anchor, one.target).phrase, ""
        )


def test_batches_hold_every_text_once_and_texts_of_like_length():
    lengths = torch.randperm(96, generator=torch.Generator().manual_seed(0)).tolist()
    found = by_length(range(96), lambda i: lengths[i], 4, window=8)
    assert sorted(found) == list(range(96))
    cost = [sum(4 * max(lengths[i] for i in order[k : k + 4]) for k in range(0, 96, 4))
            for order in (found, range(96))]  # fmt: skip
    assert cost[0] < 0.8 * cost[1]  # the control: as they come
    assert sorted(found[:32]) == list(range(32))  # no further than a window: it stays random
