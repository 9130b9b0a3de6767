"""The worst case is worse than chance, stays in its radius, leaves marks and model alone."""

import pytest
import torch

from safelight.training.embedding import distance, read, remember
from safelight.training.worst import Vocabulary, _norm, pushed, worst_case

PROMPTS = ["a red sword", "an old steel sword in a hand"]


@pytest.fixture(params=["sd1", "sdxl", "sd3", "flux"])
def model(request):
    return request.getfixturevalue(f"tiny_{request.param}")


def setting(model):
    tau = remember(model, [*PROMPTS, "a cat"], list(model.text_encoders))
    goal = tau(["a cat"] * len(PROMPTS))

    def far(now):
        each = [distance(now[name], goal[name], "euclidean", "flatten") for name in now]
        return torch.stack(each).mean(0)

    return tau.tokens_of(PROMPTS), far


def attacked(model, tokens, far, slots, *, rng, **settings):
    words, n = Vocabulary.of(model, list(tokens)), len(next(iter(tokens.values()))[0])
    front = words.random(n, slots, rng) if slots else None
    return worst_case(model, tokens, far, rng=rng, words=words, front=front, **settings)


def found(model, steps, radius=0.5, seed=0, slots=0):
    tokens, far = setting(model)
    rng = torch.Generator().manual_seed(seed)
    tokens, delta = attacked(model, tokens, far, slots, radius=radius, steps=steps, rng=rng)
    with torch.no_grad(), pushed(model, delta):
        return delta, far(read(model, tokens))


def test_the_search_comes_nearer_to_its_goal_than_chance(model):
    _, chance = found(model, steps=0)
    _, worst = found(model, steps=3)
    assert (worst < chance).all()


def test_pushes_stay_within_the_radius_and_off_the_marks(model):
    delta, _ = found(model, steps=3, radius=0.25)
    tokens, _ = setting(model)
    for name, push in delta.items():
        ids, mask = tokens[name]
        sizes = push.norm(dim=-1) / _norm(model, name)
        assert sizes.max() <= 0.25 + 1e-5 and sizes.max() > 0.1
        marks = torch.tensor(model.tokenizers[name].all_special_ids)
        assert sizes[torch.isin(ids, marks) | (mask == 0)].max() == 0


def test_the_model_is_left_as_it_was(model):
    before, hashes = model.encode(PROMPTS).states, model.hashes()
    found(model, steps=2)
    assert torch.equal(model.encode(PROMPTS).states, before) and model.hashes() == hashes


def test_the_same_seed_finds_the_same(model):
    (a, _), (b, _), (c, _) = (found(model, steps=1, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_words_in_front_come_nearer_than_random_ones(model):
    chance = torch.stack([found(model, steps=0, radius=0, seed=s, slots=3)[1] for s in range(6)])
    worst = torch.stack([found(model, steps=12, radius=0, seed=s, slots=3)[1] for s in range(6)])
    assert worst.mean() < chance.mean()


def test_words_in_front_leave_marks_and_prompt_alone(model):
    tokens, far = setting(model)
    rng = torch.Generator().manual_seed(0)
    made, delta = attacked(model, tokens, far, 2, radius=0.2, steps=1, rng=rng)
    for name, (ids, mask) in made.items():
        old, own = tokens[name]
        first = len(model.tokenizers[name]("").input_ids) - 1
        marks = torch.tensor(model.tokenizers[name].all_special_ids)
        assert ids.shape == old.shape
        assert torch.equal(ids[:, :first], old[:, :first])
        assert not torch.isin(ids[:, first : first + 2], marks).any()
        assert ids.max() < model.token_table(name).weight.shape[0]
        for row in range(len(ids)):
            n = int(own[row].sum())
            assert int(mask[row].sum()) == min(n + 2, ids.shape[1])
            if n + 2 <= ids.shape[1]:
                assert torch.equal(ids[row, first + 2 : n + 2], old[row, first:n])
            last = int(mask[row].sum()) - 1
            assert ids[row, last] == old[row, n - 1]  # the end mark is still the end
        push = delta[name].norm(dim=-1)
        assert push[:, first : first + 2].max() == 0 and push.max() > 0


def test_a_prompt_that_no_longer_fits_keeps_its_end_mark(model):
    name = next(iter(model.text_encoders))
    long = " ".join(["sword"] * 200)
    tokens = {name: model.tokenize(name, [long])}

    def far(now):
        return next(iter(now.values())).states.square().sum((1, 2))

    rng = torch.Generator().manual_seed(0)
    made, delta = attacked(model, tokens, far, 3, radius=0.2, steps=1, rng=rng)
    assert made[name][0][0, -1] == tokens[name][0][0, -1] and made[name][1].all()
    assert delta[name][0, -1].norm() == 0
