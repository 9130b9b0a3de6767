"""Ring-A-Bell keeps what its specification asks of it (arXiv:2310.10012)."""

from dataclasses import replace

import pytest
import torch

from safelight.attack.base import Budget, Search
from safelight.attack.ring_a_bell import Genes, RingABell, concept_vector, mated, ranked
from safelight.errors import BadInput
from safelight.guard.base import Guarded
from safelight.models.tiny import tiny
from safelight.prompts import PromptSet

WITH = ["a photo of a bomb", "a red bomb in the park", "a bomb and a dog"]
WITHOUT = ["a photo of a cat", "a red cat in the park", "a cat and a dog"]
WISHES = PromptSet.of(
    [{"id": "0", "prompt": "a photo of a car", "category": "weapons"},
     {"id": "1", "prompt": "a big boat", "category": "weapons"}], "wishes",
)  # fmt: skip
SMALL = dict(length=4, population=12, generations=6)


@pytest.fixture
def pairs(tmp_path):
    rows = [f"{a},{b}" for a, b in zip(WITH, WITHOUT, strict=True)]
    (tmp_path / "pairs.csv").write_text("\n".join(["prompt,safe_prompt", *rows]))
    return str(tmp_path / "pairs.csv")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def search_on(model, n=1, **limits):
    return Search(Guarded(model), rng=rng(), seeds=range(n), budget=Budget(**limits))


def test_the_concept_vector_equals_a_direct_transcription_of_the_formula(tiny_sd1):
    """Peer check: CLIP called as its library documents it, and equation 2 written out."""
    clip, tokenizer = tiny_sd1.text_encoders["clip_l"], tiny_sd1.tokenizers["clip_l"]
    total = torch.zeros(77, 32, dtype=torch.float64)
    for first, second in zip(WITH, WITHOUT, strict=True):
        outputs = []
        for text in (first, second):
            seen = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")
            with torch.no_grad():
                outputs.append(clip(input_ids=seen.input_ids)[0][0].double())
        total += outputs[0] - outputs[1]
    theirs = total / len(WITH)
    with torch.no_grad():
        ours = concept_vector(tiny_sd1, "clip_l", WITH, WITHOUT)
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_concept_vector_has_the_encoders_shape_and_the_sign_of_its_sides(tiny_model):
    encoder = next(n for n, span in tiny_model.layout.items() if span.tokens.stop)
    c = concept_vector(tiny_model, encoder, WITH, WITHOUT)
    assert c.shape == tiny_model.encode([""]).stream(encoder)[0].shape
    swapped = concept_vector(tiny_model, encoder, WITHOUT, WITH)
    torch.testing.assert_close(swapped, -c, atol=1e-6, rtol=1e-5)
    assert concept_vector(tiny_model, encoder, WITH, WITH).abs().max() == 0
    repeated = concept_vector(tiny_model, encoder, WITH * 5, WITHOUT * 5)
    torch.testing.assert_close(repeated, c, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_loss_is_a_sum_over_tokens_and_channels(tiny_sd1):
    genes = Genes(tiny_sd1, "clip_l", 3)
    herd = genes.random(5, rng())
    goal = torch.randn(77, 32, generator=rng(1))
    herds, losses = ranked(genes, [herd], goal[None])
    clip = tiny_sd1.text_encoders["clip_l"]
    for row, loss in zip(herds[0], losses[0], strict=True):
        ids = torch.full((1, 77), genes.tokenizer.eos_token_id)
        ids[0, 0], ids[0, 1:4] = genes.tokenizer.bos_token_id, row
        direct = (clip(ids).last_hidden_state[0] - goal).pow(2).sum()
        torch.testing.assert_close(loss, direct, atol=1e-2, rtol=1e-5)
    assert losses[0].tolist() == sorted(losses[0].tolist())


@torch.no_grad()
def test_what_survived_is_not_scored_again_and_sorts_as_if_it_were(tiny_sd1, monkeypatch):
    genes, goals = Genes(tiny_sd1, "clip_l", 3), torch.randn(2, 77, 32, generator=rng(1))
    first = [genes.random(8, rng(seed)) for seed in (0, 1)]
    second = [torch.cat([herd[:4], herd[:2], genes.random(3, rng(9))]) for herd in first]
    plain = ranked(genes, second, goals)
    scored, read = [], tiny_sd1.read
    monkeypatch.setattr(
        tiny_sd1, "read", lambda name, ids, mask: scored.append(len(ids)) or read(name, ids, mask)
    )
    known = [{}, {}]
    ranked(genes, first, goals, known)
    again = ranked(genes, second, goals, known)
    assert scored == [16, 6]
    for a, b in zip(plain, again, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)
    assert [len(losses) for losses in known] == [7, 7], "only this generation is remembered"


@torch.no_grad()
def test_herds_that_are_scored_together_are_scored_against_their_own_goals(tiny_sd1):
    genes, goals = Genes(tiny_sd1, "clip_l", 3), torch.randn(2, 77, 32, generator=rng(1))
    herds = [genes.random(8, rng(0)), genes.random(8, rng(1))]
    together = ranked(genes, herds, goals)
    for i, herd in enumerate(herds):
        alone = ranked(genes, [herd], goals[i : i + 1])
        assert torch.equal(together[0][i], alone[0][0])
        torch.testing.assert_close(together[1][i], alone[1][0])


@torch.no_grad()
def test_the_search_reaches_a_known_optimum(tiny_sd1):
    attack = RingABell(length=2, population=40, generations=40)
    genes = Genes(tiny_sd1, "clip_l", 2)
    genes.legal = genes.legal[300:312]  # a toy alphabet: 144 texts
    best = genes.legal[torch.tensor([[7, 10]])]
    goal = tiny_sd1.read("clip_l", *genes.tokens(best)).states
    herd = attack.search(genes, goal, search_on(tiny_sd1))[0]
    assert herd[0].tolist() == best[0].tolist()


def test_marks_and_padding_stay_and_tokens_stay_legal(tiny_model):
    encoder = next(n for n, span in tiny_model.layout.items() if span.tokens.stop)
    genes = Genes(tiny_model, encoder, 5)
    herd = genes.random(20, rng())
    for seed in range(30):
        herd = torch.cat([herd[:10], mated(herd[:10], 0.5, rng(seed))])
        herd = genes.mutated(herd, 0.9, rng(seed))
    ids, mask = genes.tokens(herd)
    empty = tiny_model.tokenizers[encoder]("", padding="max_length", max_length=ids.shape[1])
    start = len(tiny_model.tokenizers[encoder]("").input_ids) - 1
    assert (ids[:, :start] == torch.tensor(empty.input_ids[:start])).all()
    assert (ids[:, start + 5] == empty.input_ids[start]).all()
    assert (ids[:, start + 6 :] == tiny_model.tokenizers[encoder].pad_token_id).all()
    assert set(herd.flatten().tolist()) <= set(genes.legal.tolist())
    special = set(tiny_model.tokenizers[encoder].all_special_ids)
    every = set(range(1, len(tiny_model.tokenizers[encoder])))
    assert set(genes.legal.tolist()) == every - special
    assert (mask.sum(1) == start + 6).all()


def test_a_child_is_the_head_of_one_parent_and_the_tail_of_another():
    survivors = torch.arange(40).view(10, 4)
    children = mated(survivors, 1.0, rng())
    assert len(children) == 20
    for child in children.tolist():
        parents = [value // 4 for value in child]
        assert [value % 4 for value in child] == [0, 1, 2, 3]
        assert sum(a != b for a, b in zip(parents, parents[1:], strict=False)) <= 1


@torch.no_grad()
def test_the_population_stays_near_its_size(tiny_sd1):
    attack = RingABell(population=200, length=4)
    genes = Genes(tiny_sd1, "clip_l", 4)
    sizes, herd, dice = [], genes.random(200, rng()), rng()
    for _ in range(20):
        herd = attack._next(genes, herd, dice)
        sizes.append(len(herd))
        herd = herd[torch.randperm(len(herd), generator=dice)]
    assert min(sizes) > 120 and max(sizes) < 300


@pytest.mark.parametrize("elitism", [True, False])
@torch.no_grad()
def test_with_elitism_the_best_never_gets_worse_and_without_it_may(tiny_sd1, elitism):
    attack = RingABell(length=4, population=10, generations=40, mutation=1.0, elitism=elitism)
    genes = Genes(tiny_sd1, "clip_l", 4)
    search = search_on(tiny_sd1)
    attack.search(genes, torch.randn(1, 77, 32, generator=rng(3)), search)
    losses = [row["loss"] for row in search.curve]
    never_worse = all(b <= a for a, b in zip(losses, losses[1:], strict=False))
    assert never_worse is elitism and losses[-1] < losses[0]


def test_it_runs_on_every_family_and_says_what_it_did(tiny_model, pairs):
    found = RingABell(pairs=pairs, **SMALL)(WISHES, tiny_model)
    for prompt in found:
        assert prompt.meta["encoder"] == ("t5" if tiny_model.family == "flux" else "clip_l")
        assert len(prompt.meta["token_ids"].split()) == 4
        assert prompt.meta["same_tokens"] in ("yes", "no")
        assert prompt.meta["steps"] == "6" and prompt.meta["queries"] == "0"
        assert ("transfer_to_encoders" in prompt.meta) == (len(tiny_model.text_encoders) > 1)


def test_what_is_sent_is_the_best_of_the_last_generation_as_text(tiny_sd1, pairs):
    def losses(**settings):
        attack = RingABell(pairs=pairs, **SMALL, **settings)
        return [
            float(prompt.meta["loss"])
            for seed in range(3)
            for prompt in attack(WISHES, tiny_sd1, seed=seed)
        ]

    both = list(zip(losses(), losses(by_text=False), strict=True))
    assert all(a <= b for a, b in both) and any(a < b for a, b in both)


def test_the_same_seed_gives_the_same_prompts(tiny_sd1, pairs):
    attack = RingABell(pairs=pairs, **SMALL)
    first, again, other = (attack(WISHES, tiny_sd1, seed=s).texts for s in (1, 1, 2))
    assert first == again != other


def test_a_budget_ends_the_search_early(tiny_sd1, pairs):
    found = RingABell(pairs=pairs, **SMALL, budget=Budget(steps=2))(WISHES, tiny_sd1)
    assert {prompt.meta["steps"] for prompt in found} == {"2"}


def test_the_goal_is_the_public_encoders_unless_asked_otherwise(pairs):
    model = tiny("sd1")
    name = "clip_l.encoder.layers.0.mlp.fc1.weight"
    other = tiny("sd1", seed=5).parameters()[name]
    goals = {}

    class Watching(RingABell):
        def search(self, genes, goal, search):
            goals[self.goal, model.untouched(name) is model.parameters()[name]] = goal
            return super().search(genes, goal, search)

    for goal in ("public", "defended"):
        Watching(pairs=pairs, goal=goal, **SMALL)(WISHES, model)
        with model.using({name: other}):
            Watching(pairs=pairs, goal=goal, **SMALL)(WISHES, model)
    assert torch.equal(goals["public", True], goals["public", False])
    assert not torch.equal(goals["public", False], goals["defended", False])


def test_pairs_come_from_the_category_or_are_asked_for(tiny_sd1):
    first, second = RingABell(most=7)._pairs("weapons")
    assert len(first) == len(second) == 7 and "sunflower" in second[0]
    unknown = PromptSet("x", tuple(replace(p, category="unheard") for p in WISHES))
    with pytest.raises(BadInput, match="pairs=FILE"):
        RingABell(**SMALL)(unknown, tiny_sd1)


@pytest.mark.parametrize(
    "settings, words", [({"length": 76}, "1 to 75"), ({"encoder": "t5"}, "t5")]
)
def test_what_the_encoder_cannot_read_is_refused(tiny_sd1, pairs, settings, words):
    with pytest.raises(BadInput, match=words):
        RingABell(pairs=pairs, **{**SMALL, **settings})(WISHES, tiny_sd1)
