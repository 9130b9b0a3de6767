"""Merging keeps what SafetyDPO promises of Co-Merge (arXiv:2412.10493), and peft's baselines."""

from dataclasses import replace

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model

from safelight.align.experts import factored, pairs_of, stacked, truncated
from safelight.align.merge import WAYS, CoMerge, Wins, calibration, masked, merge
from safelight.errors import BadInput, NotFound, Unsupported
from safelight.models.export import export, export_lora
from safelight.models.patch import Patch
from safelight.models.tiny import tiny
from safelight.prompts import PromptSet

PROMPTS = [
    PromptSet.of(
        [
            {"prompt": f"a {color} {thing}", "category": category}
            for thing, category in (("knife", "weapons"), ("skull", "gore"))
            for color in ("red", "blue", "big")
        ],
        "unsafe",
    )
]
QUICK = dict(steps=2, per_category=2)
ENDS = ("attn1.to_q.weight", "attn2.to_v.weight", "attn.to_q.weight", "attn.to_out.0.weight")


def names_of(model):
    return [n for n in model.parameters() if n.startswith("denoiser.") and n.endswith(ENDS)]


def expert(model, seed, category="weapons", rank=2, alpha=3.0, size=0.1, names=None):
    """A LoRA of random factors on some attention weights."""
    rng = torch.Generator().manual_seed(seed)
    now = model.parameters()

    def pair(name):
        out, into = now[name].shape
        A = torch.randn(rank, into, generator=rng)
        return A * size, torch.randn(out, rank, generator=rng) * size, alpha

    return Patch(
        low_rank={name: pair(name) for name in names or names_of(model)},
        method="dpo",
        settings={"rank": rank, "alpha": alpha},
        family=model.family,
        base=model.hashes(),
        info={"categories": [category]},
    )


@pytest.fixture
def experts(tiny_sd1):
    return [expert(tiny_sd1, 1), expert(tiny_sd1, 2, "gore"), expert(tiny_sd1, 3, "drugs")]


def change(patch, name):
    A, B, alpha = patch.low_rank[name]
    return alpha / len(A) * B @ A


def changes(patch):
    return {name: change(patch, name) for name in patch.low_rank}


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], **tolerance)


def summed(experts):
    return {n: sum(change(one, n) for one in experts) for n in experts[0].low_rank}


def reparametrised(patch, seed=0):
    """The same change with other factors: A -> R A, B -> B R^-1."""
    rng = torch.Generator().manual_seed(seed)

    def turned(A, B, alpha):
        R = torch.randn(len(A), len(A), generator=rng) + 2 * torch.eye(len(A))
        return R @ A, B @ torch.linalg.inv(R), alpha

    return replace(patch, low_rank={n: turned(*each) for n, each in patch.low_rank.items()})


# Co-Merge


@pytest.mark.parametrize("how", WAYS)
def test_one_expert_comes_out_as_it_went_in(tiny_sd1, how):
    one = expert(tiny_sd1, 1)
    settings = QUICK if how == "co_merge" else {}
    out = merge(tiny_sd1, [one], how, prompts=PROMPTS, **settings)
    assert_same(changes(out), changes(one))
    assert all(len(A) == 2 for A, _, _ in out.low_rank.values())


@pytest.mark.parametrize("granularity", ["neuron", "layer", "factor"])
def test_identical_experts_are_unchanged(tiny_sd1, granularity):
    one = expert(tiny_sd1, 1)
    out = merge(tiny_sd1, [one] * 3, prompts=PROMPTS, granularity=granularity, **QUICK)
    assert_same(changes(out), changes(one))
    assert [each["won"] > 0 for each in out.info["experts"]] == [True, False, False]


def test_every_family_merges_and_every_neuron_is_exactly_one_experts(tiny_model):
    experts = [expert(tiny_model, seed) for seed in (1, 2, 3)]
    before = tiny_model.hashes()
    out = merge(tiny_model, experts, prompts=PROMPTS, **QUICK)
    assert tiny_model.hashes() == before
    for name, D in changes(out).items():
        each = torch.stack([change(one, name) for one in experts])
        distance = (each - D).abs().amax(2)  # expert, neuron
        assert distance.amin(0).max() < 1e-6
        assert (distance < 1e-6).sum(0).eq(1).all()
        winner = distance.argmin(0)
        assert winner.bincount(minlength=3).tolist() == list(out.info["winners"][name])
        h = torch.randn(5, D.shape[1], generator=torch.Generator().manual_seed(0))
        theirs = (h @ each.mT)[winner, :, torch.arange(len(D))].T
        torch.testing.assert_close(h @ D.T, theirs)
    won = [each["won"] for each in out.info["experts"]]
    assert sum(won) == sum(len(D) for D in changes(out).values())
    assert sum(count > 0 for count in won) > 1  # else nothing was merged


def test_wins_per_neuron_sum_to_the_inputs_seen_and_are_those_of_the_base_model(tiny_sd1):
    """Against activations that are kept and counted the slow way."""
    experts = [expert(tiny_sd1, seed) for seed in (1, 2)]
    name = next(n for n in names_of(tiny_sd1) if n.endswith("attn1.to_q.weight"))
    experts = [replace(one, low_rank={name: one.low_rank[name]}) for one in experts]
    texts, seen = ["a red knife", "a big skull"], []
    layer = tiny_sd1.denoiser.get_submodule(name.partition(".")[2].removesuffix(".weight"))
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    away = tiny_sd1.empty(1)
    tiny_sd1.sample(tiny_sd1.encode(texts), negative=away, seed=5, steps=3)
    hook.remove()

    way = CoMerge(steps=3, batch=2)
    tally = way.tallies(tiny_sd1, pairs_of(experts), texts, seed=5)[name]
    h = torch.cat([x[2:].flatten(0, 1) for x in seen])  # rows of the prompts, not of ""
    a = torch.stack([(h @ change(one, name).T).abs() for one in experts])
    assert len(seen) == 3 and tally.neurons.counts.sum(0).eq(len(h)).all()
    assert torch.equal(tally.neurons.counts[1], (a[1] > a[0]).sum(0))
    torch.testing.assert_close(tally.neurons.total, a.sum(1), atol=1e-4, rtol=1e-4)
    with tiny_sd1.patched(expert(tiny_sd1, 9, size=1.0)):  # a patch that is on does not count
        again = way.tallies(tiny_sd1, pairs_of(experts), texts, seed=5)[name]
    assert torch.equal(again.neurons.counts, tally.neurons.counts)


def test_ties_go_to_the_larger_mean_and_then_to_the_lower_index():
    wins = Wins.none(2, 3, torch.device("cpu"))
    wins.add(torch.tensor([[[1.0, 2.0, 0.0]], [[5.0, 1.0, 0.0]]]))  # expert, n, unit
    wins.add(torch.tensor([[[2.0, 1.0, 0.0]], [[1.0, 5.0, 0.0]]]))
    assert wins.counts.tolist() == [[1, 1, 2], [1, 1, 0]]
    assert wins.each().tolist() == [1, 1, 0]
    assert wins.together().tolist() == [0, 0, 0]  # 4 wins to 2


def test_counts_decide_not_magnitudes():
    wins = Wins.none(2, 1, torch.device("cpu"))
    wins.add(torch.tensor([[[1.0], [1.0], [0.0]], [[0.0], [0.0], [99.0]]]))
    assert wins.each().tolist() == [0]


def test_neurons_do_not_depend_on_how_an_expert_is_factored_but_factors_do(tiny_sd1, experts):
    other = [experts[0], reparametrised(experts[1]), experts[2]]

    def merged(which, granularity):
        return changes(merge(tiny_sd1, which, prompts=PROMPTS, granularity=granularity, **QUICK))

    assert_same(changes(other[1]), changes(experts[1]), atol=1e-5, rtol=1e-4)
    for granularity in ("neuron", "layer"):
        first, second = (merged(which, granularity) for which in (experts, other))
        assert_same(first, second, atol=1e-5, rtol=1e-4)
    first, second = (merged(which, "factor") for which in (experts, other))
    assert any((first[n] - second[n]).norm() > 0.1 * first[n].norm() for n in first)


def test_factors_of_different_experts_are_far_from_any_neurons(tiny_sd1, experts, caplog):
    neuron = merge(tiny_sd1, experts, prompts=PROMPTS, **QUICK)
    factor = merge(tiny_sd1, experts, prompts=PROMPTS, granularity="factor", **QUICK)
    assert "rows of A and B of different experts" in caplog.text
    assert all(len(A) == 2 for A, _, _ in factor.low_rank.values())
    far = [(change(factor, n) - change(neuron, n)).norm() / change(neuron, n).norm()
           for n in neuron.low_rank]  # fmt: skip
    assert min(far) > 0.3


def test_winners_by_category_are_those_of_each_categorys_prompts_added_up(tiny_sd1, experts):
    one = [PromptSet("a", tuple(p for p in PROMPTS[0] if p.category == name))
           for name in dict.fromkeys(p.category for p in PROMPTS[0])]  # fmt: skip
    steps: list[tuple[int, int]] = []
    both = merge(tiny_sd1, experts, prompts=PROMPTS, winners="category", seed=3,
                 progress=lambda *at: steps.append(at), **QUICK)  # fmt: skip
    seeds = (3, 3 + len(calibration(one[:1], 99).popitem()[1][: QUICK.get("per_category", 16)]))
    alone = [changes(merge(tiny_sd1, experts, prompts=[own], seed=seed, **QUICK))
             for own, seed in zip(one, seeds, strict=True)]  # fmt: skip
    outvoted = 0
    for name, D in changes(both).items():
        first, second = (each[name] for each in alone)
        same = (first == second).all(1)[:, None]
        torch.testing.assert_close(D, torch.where(same, first, first + second))
        outvoted += int((~same).sum())
    assert outvoted > 0  # else both categories have the same winners everywhere
    published = changes(merge(tiny_sd1, experts, prompts=PROMPTS, seed=3, **QUICK))
    assert any(not torch.allclose(published[n], D) for n, D in changes(both).items())
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    assert len({of for _, of in steps}) == 1


def test_a_factor_has_one_winner_among_all_prompts():
    with pytest.raises(BadInput, match="one winner among all prompts"):
        CoMerge(granularity="factor", winners="category")


def test_a_layer_is_one_experts(tiny_sd1, experts):
    out = merge(tiny_sd1, experts, prompts=PROMPTS, granularity="layer", **QUICK)
    for name, D in changes(out).items():
        assert any(torch.allclose(D, change(one, name), atol=1e-7) for one in experts)
        assert len(out.low_rank[name][0]) == 2


def test_masking_drops_experts_without_a_neuron():
    pairs = [(torch.ones(r, 4) * r, torch.ones(3, r)) for r in (1, 2, 3)]
    A, B = masked(pairs, torch.tensor([0, 2, 0]) == torch.arange(3)[:, None])
    assert len(A) == 4
    assert (B @ A)[:, 0].tolist() == [1, 9, 1]


def test_experts_may_have_different_ranks_and_scales(tiny_sd1):
    experts = [expert(tiny_sd1, 1, rank=1), expert(tiny_sd1, 2, rank=4, alpha=16.0)]
    cat = merge(tiny_sd1, experts, "cat")
    assert_same(changes(cat), summed(experts))
    out = merge(tiny_sd1, experts, prompts=PROMPTS, **QUICK)
    for name, D in changes(out).items():
        each = torch.stack([change(one, name) for one in experts])
        assert (each - D).abs().amax(2).amin(0).max() < 1e-6


def test_truncation_is_exact_at_full_rank_and_the_best_below(tiny_sd1, experts):
    whole = merge(tiny_sd1, experts, prompts=PROMPTS, **QUICK)
    full = merge(tiny_sd1, experts, prompts=PROMPTS, rank=6, **QUICK)
    assert_same(changes(full), changes(whole), atol=1e-6, rtol=1e-5)
    small = merge(tiny_sd1, experts, prompts=PROMPTS, rank=2, **QUICK)
    for name, D in changes(whole).items():
        S = torch.linalg.svdvals(D)
        assert len(small.low_rank[name][0]) == 2
        lost = (change(small, name) - D).norm()
        torch.testing.assert_close(lost, S[2:].norm(), atol=1e-5, rtol=1e-3)


# Baselines


def test_cat_and_sum_are_the_patches_side_by_side(tiny_sd1, experts):
    stacked_, lowest = (merge(tiny_sd1, experts, how) for how in ("cat", "sum"))
    assert_same(changes(stacked_), summed(experts))
    assert_same(changes(lowest), summed(experts), atol=1e-6, rtol=1e-5)
    twice = merge(tiny_sd1, [experts[0]] * 2, "sum", weights=(0.25, 0.75))
    assert twice.info["rank"] == 2  # cat would have 4
    assert_same(changes(twice), changes(experts[0]), atol=1e-6, rtol=1e-5)
    less = merge(tiny_sd1, experts, "cat", weights=(1.0, 0.0, -1.0))
    wanted = {n: change(experts[0], n) - change(experts[2], n) for n in less.low_rank}
    assert_same(changes(less), wanted)


def test_svd_of_full_rank_is_cat_also_where_alpha_is_twice_the_rank(tiny_sd1):
    """peft before 0.21 applied such a scale twice."""
    experts = [expert(tiny_sd1, seed, rank=2, alpha=4.0) for seed in (1, 2)]
    svd, cat = merge(tiny_sd1, experts, "svd", rank=4), merge(tiny_sd1, experts, "cat")
    assert_same(changes(svd), changes(cat), atol=1e-6, rtol=1e-5)
    small = merge(tiny_sd1, experts, "svd")
    assert small.info["rank"] == 2
    name = next(iter(small.low_rank))
    best = factored(change(cat, name), 2)
    torch.testing.assert_close(change(small, name), best[1] @ best[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "how, settings",
    [
        ("cat", {}),
        ("svd", dict(rank=3)),
        ("svd", {}),
        ("ties_svd", dict(density=0.4)),
        ("ties_svd", dict(density=1.0, rank=5)),
        ("dare_ties_svd", dict(density=0.6)),
    ],
)
@pytest.mark.filterwarnings("ignore:The density")
def test_baselines_are_those_of_pefts_add_weighted_adapter(how, settings):
    pairs, weights = random_pairs(), (1.0, 0.5)
    theirs = by_peft(pairs, weights, how, **settings)
    torch.manual_seed(7)
    A, B = WAYS[how](weights=weights, **settings).combined(pairs)
    torch.testing.assert_close(B @ A, theirs, atol=1e-5, rtol=1e-4)


def random_pairs(ranks=(2, 3), alphas=(4.0, 3.0)):
    rng = torch.Generator().manual_seed(0)
    return [
        (torch.randn(r, 6, generator=rng), torch.randn(5, r, generator=rng) * alpha / r)
        for r, alpha in zip(ranks, alphas, strict=True)
    ]


def by_peft(pairs, weights, how, density=None, rank=None):
    """peft's own merge of the same factors, in a network of one layer."""
    net = None
    for e, (A, B) in enumerate(pairs):
        r = len(A)
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"])
        if net is None:
            net = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config, str(e))
        else:
            net.add_adapter(str(e), config)
        layer = net.base_model.model[0]
        layer.lora_A[str(e)].weight.data = A.clone()
        layer.lora_B[str(e)].weight.data = B / 2  # a scale of 2 makes it B again
    names = [str(e) for e in range(len(pairs))]
    torch.manual_seed(7)
    # A new adapter draws its start before DARE draws; drawing only counts from here on.
    before = torch.random.get_rng_state()
    inject = net.base_model.inject_adapter

    def injected(*args, **kwargs):
        inject(*args, **kwargs)
        torch.random.set_rng_state(before)

    net.base_model.inject_adapter = injected
    net.base_model.add_weighted_adapter(
        names, list(weights), "merged", combination_type=how, svd_rank=rank, density=density
    )
    return layer.get_delta_weight("merged").detach()


def test_ties_by_hand():
    """Half of each is kept, the sign is that of the sum, and the mean is over those that agree."""
    first = torch.tensor([[4.0, 1.0], [-3.0, 0.5]])  # keeps 4, -3
    second = torch.tensor([[2.0, 0.1], [5.0, -1.0]])  # keeps 2, 5
    pairs = [(torch.eye(2), D) for D in (first, second)]
    way = WAYS["ties_svd"](density=0.5)
    A, B = way.combined(pairs)
    torch.testing.assert_close(B @ A, torch.tensor([[3.0, 0.0], [5.0, 0.0]]))
    A, B = WAYS["ties_svd"](density=1.0).combined(pairs)  # of which peft alone would warn
    torch.testing.assert_close(B @ A, torch.tensor([[3.0, 0.55], [5.0, -1.0]]))


def test_dare_is_seeded_and_leaves_the_global_generator_alone(tiny_sd1, experts):
    state = torch.random.get_rng_state()
    one, same = (merge(tiny_sd1, experts, "dare_ties_svd", seed=1) for _ in range(2))
    other = merge(tiny_sd1, experts, "dare_ties_svd", seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same(changes(one), changes(same))
    name = names_of(tiny_sd1)[0]
    assert not torch.allclose(change(one, name), change(other, name))


def test_truncated_takes_the_lowest_exact_rank():
    A, B = stacked(random_pairs()[:1] * 3)
    assert len(A) == 6
    small = truncated(A, B)
    assert len(small[0]) == 2
    torch.testing.assert_close(small[1] @ small[0], B @ A)


# An ordinary patch


@pytest.mark.parametrize("how", ["co_merge", "ties_svd"])
def test_diffusers_loads_a_merged_patch(tiny_model, tmp_path, how):
    experts = [expert(tiny_model, 1, rank=1), expert(tiny_model, 2, rank=2, alpha=4.0)]
    settings = QUICK if how == "co_merge" else dict(density=0.5)
    out = merge(tiny_model, experts, how, prompts=PROMPTS, **settings)
    out.save(tmp_path / "patch")
    out = Patch.load(tmp_path / "patch")
    file = export_lora(tiny_model, [out], tmp_path / "merged.safetensors")
    export(tiny_model, [], tmp_path / "plain")
    pipe = getattr(diffusers, tiny_model.pipeline).from_pretrained(tmp_path / "plain")
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    pipe.fuse_lora()
    fused = getattr(pipe, tiny_model.parts["denoiser"])
    with tiny_model.patched(out):
        ours = tiny_model.parameters()
        for name in out.names:
            path = name.removeprefix("denoiser.").removesuffix(".weight")
            theirs = fused.get_submodule(path).base_layer.weight
            torch.testing.assert_close(theirs, ours[name], atol=1e-5, rtol=1e-4)
            assert (theirs - tiny_model.untouched(name)).abs().max() > 1e-3


def test_it_remembers_what_it_was_made_of(tiny_sd1, experts):
    seen = []
    out = merge(tiny_sd1, experts, prompts=PROMPTS, progress=lambda *x: seen.append(x), **QUICK)
    info = out.info
    assert out.settings["how"] == "co_merge" and out.settings["granularity"] == "neuron"
    assert info["categories"] == ["drugs", "gore", "weapons"]
    assert [one["sha256"] for one in info["experts"]] == [one.sha256 for one in experts]
    assert len({one.sha256 for one in experts}) == 3
    assert info["calibration_prompts"] == 4 and info["data"] == {"unsafe": PROMPTS[0].sha256}
    assert info["cost"]["seconds"] >= 0
    assert out.base == tiny_sd1.hashes()
    assert seen[-1] == (8, 8)


def test_each_category_has_its_share_of_the_calibration(tiny_sd1, experts):
    assert list(calibration(PROMPTS, 1).values()) == [["a red knife"], ["a red skull"]]
    assert sum(len(texts) for texts in calibration(PROMPTS, 99).values()) == 6


# Modular use


def test_a_safety_patch_and_a_style_add_up_in_every_linear_layer(tiny_model):
    """W0 + dW_safe + dW_style, with other ranks and targets each (arXiv:2412.00357)."""
    every = names_of(tiny_model)
    safety = merge(tiny_model, [expert(tiny_model, s) for s in (1, 2)], "cat")
    style = expert(tiny_model, 3, rank=3, alpha=6.0, names=every[1:])
    rng = torch.Generator().manual_seed(0)
    inputs = {n: torch.randn(4, tiny_model.parameters()[n].shape[1], generator=rng) for n in every}

    def outputs():
        def layer(name):
            return tiny_model.denoiser.get_submodule(name[9:].removesuffix(".weight"))

        return {n: layer(n)(h) for n, h in inputs.items()}

    plain = outputs()
    with tiny_model.patched(safety):
        one = outputs()
        with tiny_model.patched(style):
            both = outputs()
    with tiny_model.patched(style):
        other = outputs()
        with tiny_model.patched(safety):
            swapped = outputs()
    for n in every:
        alone = (one[n] - plain[n]) + (other[n] - plain[n])
        torch.testing.assert_close(both[n] - plain[n], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(swapped[n], both[n], atol=1e-6, rtol=1e-5)
        assert (one[n] - plain[n]).abs().max() > 1e-2
        assert ((other[n] - plain[n]).abs().max() > 1e-2) == (n in style.low_rank)


# Refusals


def test_experts_of_other_bases_families_or_weights_are_refused(tiny_sd1, tiny_sdxl, experts):
    def refused(error, match, *which, model=tiny_sd1):
        with pytest.raises(error, match=match):
            merge(model, which, "cat")

    first = experts[0]
    elsewhere = expert(tiny("sd1", seed=1), 2, "gore")
    refused(BadInput, r"expert 2 \(gore\) was made for other weights of clip_l", first, elsewhere)
    refused(BadInput, "made for other weights than those of", elsewhere, elsewhere)
    refused(Unsupported, "is for sdxl", first, expert(tiny_sdxl, 1))
    name = names_of(tiny_sd1)[0]
    fewer = expert(tiny_sd1, 2, "gore", names=names_of(tiny_sd1)[1:])
    refused(BadInput, rf"expert 2 \(gore\) does not change {name} \(1 of the", first, fewer)
    refused(BadInput, "nothing to merge")


def test_what_is_no_lora_is_refused(tiny_sd1, experts):
    name = names_of(tiny_sd1)[0]
    whole = replace(experts[1], full={name: tiny_sd1.parameters()[name]}, low_rank={})
    with pytest.raises(BadInput, match=r"2 \(gore\) is not a LoRA: it changes .* as a whole"):
        merge(tiny_sd1, [experts[0], whole], "cat")
    with pytest.raises(BadInput, match="changes nothing"):
        merge(tiny_sd1, [replace(experts[0], low_rank={})], "cat")


def test_experts_of_unknown_base_must_fit(tiny_sd1, experts):
    name = names_of(tiny_sd1)[0]
    A, B, alpha = experts[0].low_rank[name]
    foreign = replace(experts[0], base={}, low_rank={name: (A[:, 1:], B, alpha)})
    shapes = f"{len(B)} x {A.shape[1] - 1}; in tiny-sd1 it is {len(B)} x {A.shape[1]}"
    with pytest.raises(BadInput, match=f"{name} as {shapes}"):
        merge(tiny_sd1, [foreign], "cat")
    unknown = replace(foreign, low_rank={"denoiser.no.weight": (A, B, alpha)})
    with pytest.raises(BadInput, match="it is not there"):
        merge(tiny_sd1, [unknown], "cat")


def test_settings_and_ways_that_cannot_be_are_refused(tiny_sd1, experts):
    mixed = [expert(tiny_sd1, 1, rank=1), experts[1]]
    with pytest.raises(BadInput, match="ranks at .* are 1, 2"):
        merge(tiny_sd1, mixed, prompts=PROMPTS, granularity="factor")
    with pytest.raises(BadInput, match="was given none"):
        merge(tiny_sd1, experts)
    with pytest.raises(BadInput, match="2 weights for 3 experts"):
        merge(tiny_sd1, experts, "cat", weights=(1.0, 2.0))
    with pytest.raises(NotFound, match="Did you mean 'co_merge'"):
        merge(tiny_sd1, experts, "comerge")
    for settings in (dict(rank=0), dict(steps=0), dict(per_category=0)):
        with pytest.raises(BadInput):
            CoMerge(**settings)
    for density in (0.0, 1.5):
        with pytest.raises(BadInput, match="density"):
            WAYS["ties_svd"](density=density)


def test_co_merge_listens_to_linear_layers_only(tiny_sd1):
    name = "denoiser.conv_in.weight"
    W = tiny_sd1.parameters()[name]
    A, B = torch.ones(1, W[0].numel()), torch.ones(len(W), 1)
    conv = replace(expert(tiny_sd1, 1), low_rank={name: (A, B, 1.0)})
    with pytest.raises(Unsupported, match="conv_in"):
        merge(tiny_sd1, [conv, conv], prompts=PROMPTS)
    assert_same(changes(merge(tiny_sd1, [conv, conv], "cat")), {name: 2 * B @ A})
