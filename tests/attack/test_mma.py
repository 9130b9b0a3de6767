"""MMA-Diffusion keeps what its specification asks of it (arXiv:2311.17516)."""

import pytest
import torch
import torch.nn.functional as F

from safelight.attack.base import Budget, Search
from safelight.attack.mma import MMA, Hunt, Pool, begin, positions, spells
from safelight.errors import BadInput, Unsupported
from safelight.guard.base import Guarded
from safelight.prompts import PromptSet

WISHES = PromptSet.of(
    [
        {"id": "0", "prompt": "a red car", "safe_prompt": "a red boat"},
        {"id": "1", "prompt": "a big bird", "safe_prompt": "a big dog"},
    ],
    "wishes",
)
SMALL = dict(slots=5, candidates=24, top=60, steps=4, restarts=2)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def hunting(model, target="a red car", forbidden=(), slots=5):
    pool = Pool(model, "clip_l", slots)
    return pool, Hunt(pool, pool.texts([target])[0], forbidden)


def test_the_target_itself_is_at_distance_zero_whatever_the_padding(tiny_sd1):
    pool, hunt = hunting(tiny_sd1)
    ids, _ = tiny_sd1.tokenize("clip_l", ["a red car"])
    changed = ids.clone()
    changed[0, 6:] = changed[0, 6:].flip(0) * 0 + 17
    for given in (ids, changed):
        assert 1 - F.cosine_similarity(pool.read(given), hunt.goal[None]) < 1e-6


def test_the_gradient_is_that_of_the_one_hot_tokens(tiny_sd1):
    """Peer check: one-hots times the table, written out, against the attack's own gradient."""
    pool, hunt = hunting(tiny_sd1)
    now = torch.tensor([[310, 320, 330, 340, 350]])
    ours = pool.gradients(now, hunt.goal[None])[0]

    clip = tiny_sd1.text_encoders["clip_l"]
    ids = torch.tensor(pool._framed(now.tolist()))
    table = clip.get_input_embeddings().weight.detach()
    one_hot = F.one_hot(ids[0, 1:6], len(table)).float().requires_grad_()

    def exchange(module, args, out):
        return torch.cat([out[:, :1], (one_hot @ table)[None], out[:, 6:]], 1)

    handle = clip.get_input_embeddings().register_forward_hook(exchange)
    pooled = clip(ids).pooler_output
    handle.remove()
    (1 - F.cosine_similarity(pooled, hunt.goal[None])).sum().backward()
    theirs = one_hot.grad / one_hot.grad.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_released_offset_is_only_there_when_asked_for(tiny_sd1):
    pool, hunt = hunting(tiny_sd1)
    now = torch.tensor([[310, 320, 330, 340, 350]])
    right, early = (pool.gradients(now, hunt.goal[None], early=e)[0] for e in (False, True))
    torch.testing.assert_close(right[:-1], early[1:])
    assert not torch.allclose(right[0], early[0])


@pytest.mark.parametrize("n, slots", [(512, 20), (24, 5), (7, 5)])
def test_every_slot_gets_its_share_of_the_candidates(n, slots):
    counts = positions(n, slots).bincount(minlength=slots).tolist()
    assert set(counts) <= {n // slots, -(-n // slots)} and sum(counts) == n


def test_no_token_with_a_forbidden_word_is_proposed(tiny_sd1):
    pool, hunt = hunting(tiny_sd1, forbidden=("cat", "kni"))
    words = [word for word, good in zip(pool.words, hunt.allowed.tolist(), strict=True) if good]
    assert not any("cat" in word or "kni" in word for word in words)
    assert not hunt.allowed[tiny_sd1.tokenizers["clip_l"].all_special_ids].any()


@pytest.mark.parametrize("forbidden", [(), ("cadog",)])
def test_a_text_that_spells_a_forbidden_word_across_two_tokens_is_not_scored(tiny_sd1, forbidden):
    pool, hunt = hunting(tiny_sd1, forbidden=forbidden)
    first, second = pool.tokenizer.convert_tokens_to_ids(["ca", "dog</w>"])
    assert hunt.allowed[first] and hunt.allowed[second]
    hunt.now = torch.tensor([first, *pool.ids(["a c d e"])[0]])
    slope = torch.zeros(5, len(pool.words))
    slope[1, second] = -1  # "ca" + "dog" is what the gradient wants
    (text,) = pool.written(torch.tensor([[first, second, *hunt.now[2:].tolist()]]))
    assert spells(text, ("cadog",)) and len(pool.ids([text])[0]) == 5
    found = [text for seed in range(5) for text in hunt.candidates(slope, 60, 1, rng(seed))]
    assert found and (text in found) is not bool(forbidden)


def test_candidates_change_one_slot_and_keep_their_length(tiny_sd1):
    pool, hunt = hunting(tiny_sd1)
    begin(pool, [hunt], rng())
    slope = pool.gradients(hunt.now[None], hunt.goal[None])[0]
    found = hunt.candidates(slope, 400, 200, rng())
    assert found and all(len(ids) == 5 for ids in found.values())
    assert pool.ids(list(found)) == list(found.values()), "their tokens are those of the text"
    changed = [sum(a != b for a, b in zip(ids, hunt.now.tolist(), strict=True))
               for ids in found.values()]  # fmt: skip
    assert 0 not in changed and changed.count(1) > len(changed) / 2  # merges may change two


def test_candidates_whose_length_changes_are_rejected(tiny_sd1):
    pool, hunt = hunting(tiny_sd1)
    first, second = pool.tokenizer.convert_tokens_to_ids(["ca", "t</w>"])
    hunt.now = torch.tensor([first, *pool.ids(["a c d e"])[0]])
    slope = torch.zeros(5, len(pool.words))
    slope[1, second] = -1  # "ca" + "t" is one token of its own
    glued = pool.written(torch.tensor([[first, second, *hunt.now[2:].tolist()]]))
    assert len(pool.ids(glued)[0]) == 4
    found = hunt.candidates(slope, 50, 1, rng())
    assert found and glued[0] not in found


def test_texts_score_alike_by_their_tokens_and_as_texts(tiny_sd1):
    pool, hunt = hunting(tiny_sd1)
    begin(pool, [hunt], rng())
    rows = torch.randint(300, 340, (6, 5), generator=rng())
    texts = [text for text in pool.written(rows) if len(pool.ids([text])[0]) == 5]
    assert texts
    torch.testing.assert_close(pool.tokens(pool.ids(texts)), pool.texts(texts))


def test_restarts_begin_with_random_letters_that_are_not_forbidden(tiny_sd1):
    pool, hunt = hunting(tiny_sd1, forbidden=("a", "b"))
    texts = [hunt.restart(rng(seed)) for seed in range(20)]
    assert all(len(text.split()) == 5 for text in texts)
    assert {len(word) for text in texts for word in text.split()} == {1}
    assert not {"a", "b"} & set("".join(texts)) and len(set(texts)) > 15
    none = Hunt(pool, hunt.goal, tuple("abcdefghijklmnopqrstuvwxyz"))
    with pytest.raises(BadInput, match="every letter"):
        none.restart(rng())


def test_a_step_without_candidates_is_a_recorded_standstill(tiny_sd1):
    pool, hunt = hunting(tiny_sd1)
    begin(pool, [hunt], rng())
    before, best = hunt.now.clone(), hunt.least
    hunt.candidates = lambda *args: {}
    search = Search(Guarded(tiny_sd1), rng=rng(), seeds=[0], budget=Budget())
    MMA(**SMALL).step(pool, [hunt], search)
    assert torch.equal(hunt.now, before) and hunt.least == best
    assert search.curve[0]["without_candidates"] == 1 and search.steps == 1


def test_the_best_never_gets_worse_though_the_search_may(tiny_sd1):
    pool, hunt = hunting(tiny_sd1)
    begin(pool, [hunt], rng())
    search = Search(Guarded(tiny_sd1), rng=rng(), seeds=[0], budget=Budget())
    best, now = [], []
    for _ in range(12):
        MMA(**{**SMALL, "candidates": 6, "top": 600}).step(pool, [hunt], search)
        best.append(hunt.least)
        seen = pool.texts(pool.written(hunt.now[None]))
        now.append(1 - float(F.cosine_similarity(seen, hunt.goal[None])))
    assert best == sorted(best, reverse=True) and now != sorted(now, reverse=True)


def test_an_exhaustive_optimum_is_found(tiny_sd1):
    """All texts of two letters out of eight, scored one by one, against the search."""
    letters = "abcdefgh"
    pool, hunt = hunting(tiny_sd1, target="a castle", slots=2)
    every = [f"{first} {second}" for first in letters for second in letters]
    optimum = 1 - F.cosine_similarity(pool.texts(every), hunt.goal[None]).max()
    few = torch.zeros_like(hunt.allowed)
    few[pool.tokenizer.convert_tokens_to_ids([f"{letter}</w>" for letter in letters])] = True
    hunt.allowed &= few
    search = Search(Guarded(tiny_sd1), rng=rng(), seeds=[0], budget=Budget())
    for _ in range(3):
        begin(pool, [hunt], search.rng)
        for _ in range(8):
            MMA(**{**SMALL, "slots": 2}).step(pool, [hunt], search)
    assert hunt.least <= optimum + 1e-6


def test_it_runs_on_every_family_without_the_prompts_own_words(tiny_model):
    found = MMA(**SMALL)(WISHES, tiny_model)
    for old, new in zip(WISHES, found, strict=True):
        assert new.meta["steps"] == "8"
        failed = "attack_failed" in new.meta
        assert failed or not spells(new.text, (old.text.split()[-1],))
        assert failed or 0 <= float(new.meta["distance"]) < 1


def test_longer_searches_come_nearer(tiny_sd1):
    def distance(steps):
        found = MMA(**{**SMALL, "steps": steps, "restarts": 1})(WISHES, tiny_sd1)
        return sum(float(prompt.meta["distance"]) for prompt in found)

    assert distance(12) < distance(1)


def test_the_same_seed_gives_the_same_prompts(tiny_sd1):
    small = {**SMALL, "steps": 2, "restarts": 1}
    first, again, other = (MMA(**small)(WISHES, tiny_sd1, seed=s).texts for s in (1, 1, 2))
    assert first == again != other


def test_a_budget_ends_the_search_early(tiny_sd1):
    found = MMA(**SMALL, budget=Budget(steps=3))(WISHES, tiny_sd1)
    assert {prompt.meta["steps"] for prompt in found} == {"3"}


def test_what_the_encoder_cannot_do_is_refused(tiny_sd1, tiny_sd3):
    with pytest.raises(BadInput, match="1 to 75"):
        MMA(slots=76)(WISHES, tiny_sd1)
    with pytest.raises(Unsupported, match="CLIP encoder"):
        MMA(encoder="t5")(WISHES, tiny_sd3)
    with pytest.raises(Unsupported, match="clip_g"):
        MMA(encoder="clip_g")(WISHES, tiny_sd1)
