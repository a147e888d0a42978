"""Tensor attention against the explicit definition: all n^2 products, a float64 softmax over them."""

import dataclasses

import pytest
import torch

from kvfloor import Spec, parse, resolve
from kvfloor.methods.variants import TensorAttention
from kvfloor.methods.variants import tensor as module
from kvfloor.methods.variants.tensor import products
from tests.support import Stream, fed, seeded

ROWS, G, N, D, DV = 3, 2, 11, 6, 4


def stream(rows=ROWS, g=G, n=N, d=D, dv=DV, seed=0, dtype=torch.float64) -> Stream:
    """q (rows, g, n, d), k (rows, n, 2d), v (rows, n, 2dv)."""
    draw = seeded(seed)
    return draw(rows, g, n, d, dtype=dtype), draw(rows, n, 2 * d, dtype=dtype), draw(rows, n, 2 * dv, dtype=dtype)


def spec_of(rows=ROWS, d=D, dv=DV, dtype=torch.float64, **other):
    return Spec(rows=rows, d=d, dv=dv, dtype=dtype, **other)


def definition(q, k, v, scale=1.0, softcap=None):
    """One query q (d,) over the tokens k (n, 2d), v (n, 2dv): mean (dv,) and log of the softmax mass."""
    k1, k2 = k.double().chunk(2, -1)
    v1, v2 = v.double().chunk(2, -1)
    keys = torch.stack([a * b for a in k1 for b in k2])
    values = torch.stack([a * b for a in v1 for b in v2])
    scores = scale * keys @ q.double()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores, 0) @ values, torch.logsumexp(scores, 0)


def require_definition(part, q, k, v, atol=1e-10, **law):
    """part (rows, m) answers q (rows, m, d) over each row's tokens, lists of (n_r, 2d) and (n_r, 2dv)."""
    for row in range(len(q)):
        for m in range(q.shape[1]):
            mean, log_mass = definition(q[row, m], k[row], v[row], **law)
            assert torch.allclose(part.mean[row, m].double(), mean, atol=atol)
            assert torch.allclose(part.log_mass[row, m].double(), log_mass, atol=atol)


# ---- the law --------------------------------------------------------------------------------------------------------


def test_products_are_the_khatri_rao_product_first_index_major():
    x1, x2 = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    wide = products(x1, x2)
    assert wide.shape == (2, 16, 3)
    for j1 in range(4):
        for j2 in range(4):
            assert torch.equal(wide[:, 4 * j1 + j2], x1[:, j1] * x2[:, j2])


@pytest.mark.parametrize("law", [{}, {"scale": 0.3}, {"scale": 0.5, "softcap": 2.0}, {"scale": -0.4}])
def test_read_is_the_definition(law):
    q, k, v = stream()
    state = TensorAttention().open(spec_of(**law))
    state.append(k, v)
    require_definition(state.read(q[:, 0]), q[:, 0], k, v, **law)


def test_step_lets_every_token_see_all_pairs_up_to_itself():
    q, k, v = stream()
    state = TensorAttention().open(spec_of())
    out = state.step(q, k, v)
    assert out.shape == (ROWS, G, N, DV)
    for row in range(ROWS):
        for g in range(G):
            for i in range(N):
                mean, _ = definition(q[row, g, i], k[row, : i + 1], v[row, : i + 1])
                assert torch.allclose(out[row, g, i], mean, atol=1e-10)


def test_the_order_of_the_two_keys_and_of_the_two_values_is_kept():
    """Swapping first and second of both changes nothing, of one of them everything."""
    q, k, v = stream()
    swap_k, swap_v = torch.cat(k.chunk(2, -1)[::-1], -1), torch.cat(v.chunk(2, -1)[::-1], -1)

    def told(k, v):
        state = TensorAttention().open(spec_of())
        state.append(k, v)
        return state.read(q[:, 0]).mean

    assert torch.allclose(told(k, v), told(swap_k, swap_v), atol=1e-12)
    assert not torch.allclose(told(k, v), told(k, swap_v), atol=1e-2)


def test_with_ones_as_second_keys_and_values_it_is_standard_attention():
    q, k, v = stream()
    k[..., D:], v[..., DV:] = 1.0, 1.0
    spec = spec_of()
    tensor, standard = TensorAttention().open(spec), parse("exact").open(spec)
    tensor.append(k, v)
    standard.append(k[..., :D].contiguous(), v[..., :DV].contiguous())
    told, truth = tensor.read(q[:, 0]), standard.read(q[:, 0])
    assert torch.allclose(told.mean, truth.mean, atol=1e-12)
    # n second tokens share every first token's key: n times the mass, the same mean
    assert torch.allclose(told.log_mass, truth.log_mass + torch.log(torch.tensor(float(N))), atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 40, 10**6])
def test_blocks_of_pairs_change_nothing(monkeypatch, at_once):
    q, k, v = stream()
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", at_once)
    state = TensorAttention().open(spec_of())
    state.append(k, v)
    require_definition(state.read(q.flatten(1, 2)), q.flatten(1, 2), k, v)


def test_large_scores_neither_overflow_nor_lose_the_largest_pair():
    q, k, v = stream(n=5)
    state = TensorAttention().open(spec_of())
    state.append(k, v)
    part = state.read(1e4 * q[:, 0])
    assert torch.isfinite(part.mean).all()
    require_definition(part, 1e4 * q[:, 0], k, v, atol=1e-6)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_lower_precision_stays_near_the_definition_on_the_same_rounded_tokens(dtype, atol):
    q, k, v = (0.5 * x for x in stream(dtype=dtype))
    state = TensorAttention().open(spec_of(dtype=dtype))
    state.append(k, v)
    require_definition(state.read(q[:, 0]), q[:, 0], k, v, atol=atol)
    assert state.attend(q).dtype == dtype


# ---- streams --------------------------------------------------------------------------------------------------------


def test_rows_of_different_length_read_their_own_pairs_only():
    q, k, v = stream()
    present = torch.ones(ROWS, N, dtype=torch.bool)
    present[1, ::2], present[2] = False, False
    k[~present], v[~present] = torch.nan, torch.nan  # a pad may hold anything
    state = TensorAttention().open(spec_of())
    state.append(k, v, present)
    assert state.seen.tolist() == state.held.tolist() == [11, 5, 0]
    part = state.read(q[:, 0])
    require_definition(type(part)(part.mean[:2], part.log_mass[:2]), q[:2, 0], [k[0], k[1, 1::2]], [v[0], v[1, 1::2]])
    assert not part.mean[2].any() and (part.log_mass[2] == -torch.inf).all()


def test_attend_flattens_the_group_and_read_is_pure():
    q, k, v = stream()
    state = TensorAttention().open(spec_of())
    state.append(k, v)
    before = state.to_bytes()
    assert torch.allclose(state.attend(q), state.read(q.flatten(1, 2)).mean.view(ROWS, G, N, DV))
    assert state.to_bytes() == before


@pytest.mark.parametrize("text", ["tensor", "tensor(store=sinks(count=2,block=3))@5"])
def test_any_cut_of_a_stream_gives_the_same_answers_and_keeps_the_same_tokens(text):
    whole, cut = (parse(text).open(spec_of()) for _ in range(2))
    assert torch.allclose(fed(cut, stream(), 1, 5), whole.step(*stream()), atol=1e-12)
    assert cut.to_bytes() == whole.to_bytes()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("tensor(store=window(block=1))@5", [6, 7, 8, 9, 10]),
        ("tensor(store=sinks(count=2,block=1))@5", [0, 1, 8, 9, 10]),
        ("tensor(store=h2o(recent=2,sinks=1,block=1))@5", None),
    ],
)
def test_an_evicting_store_leaves_the_pairs_of_the_kept_tokens(text, kept):
    q, k, v = stream()
    state = parse(text).open(spec_of())
    state.append(k, v)
    assert state.held.tolist() == [5] * ROWS
    if kept is None:  # an unseen query: the store is never shown one, so no score tells the tokens apart
        kept = state.store.slots.view().position[0].sort().values.tolist()
    require_definition(state.read(q[:, 0]), q[:, 0], k[:, kept], v[:, kept])


def test_budgets_per_row_are_kept_and_travel_with_their_rows():
    method = parse("tensor(store=window(block=1))@4:6:2")
    q, k, v = stream()
    state = method.open(spec_of())
    state.append(k, v)
    assert state.held.tolist() == [4, 6, 2]
    state.select_rows(torch.tensor([2, 0]))
    assert state.held.tolist() == [2, 4]
    assert str(state.method) == "tensor(store=window(block=1))@2:4"
    twin = state.method.from_bytes(state.to_bytes())
    assert torch.equal(twin.read(q[:2, 0]).mean, state.read(q[:2, 0]).mean)
    with pytest.raises(ValueError, match="3 budgets were given for 2 rows"):
        method.open(spec_of(rows=2))


# ---- the contract ---------------------------------------------------------------------------------------------------

TEXTS = [
    "tensor",
    "tensor(store=window)@16",
    "tensor(store=sinks)@16",
    "tensor(store=sinks(count=2))@16",
    "tensor(store=h2o(score=mean,recent=3))@64",
    "tensor(store=window(block=1,prefill=dense))@16",
    "tensor(store=window)@4:6:2",
    "tensor(store=random)@25%",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_round_trip(text):
    method = parse(text)
    assert str(method) == text
    assert parse(str(method)) == method
    assert hash(method) == hash(parse(text))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("tensor(exact)", "tensor"),
        ("tensor(store=exact)", "tensor"),
        ("tensor(store=sinks(4))@16", "tensor(store=sinks)@16"),
        ("tensor(store=sinks(4)@16)", "tensor(store=sinks)@16"),
        ("tensor(store=window@16)", "tensor(store=window)@16"),
        ("tensor(window)@16", "tensor(store=window)@16"),
        ("tensor(store='window')@16", "tensor(store=window)@16"),
    ],
)
def test_other_ways_to_write_it(text, same):
    assert parse(text) == parse(same)
    assert parse(text) == TensorAttention(parse(text).kept)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "store",
    [
        "quant(bits=8)",
        "subgen_sketch(delta=0.5,t=4,s=8)",
        "window+value_sum@16",
        "exact|top_k(k=4)",
        "window|top_k(k=4)@16",
        "tensor",
    ],
)
def test_a_store_that_does_not_keep_whole_tokens_or_does_not_read_them_all_is_refused(store):
    with pytest.raises(ValueError, match=r"tensor: the store must keep whole tokens and read them all .*got"):
        TensorAttention(store)


def test_other_refusals_by_name():
    with pytest.raises(ValueError, match=r"unknown .* 'windw'"):
        parse("tensor(store=windw)@16")
    with pytest.raises(ValueError, match="'@16' cannot bound it"):
        parse("tensor@16")
    with pytest.raises(ValueError, match="tensor does not take budget; it takes store"):
        parse("tensor(budget=16)")
    with pytest.raises(ValueError, match="too small for sinks"):
        parse("tensor(store=sinks(8))@8")
    with pytest.raises(ValueError, match="has no budget"):
        parse("tensor(store=window)").open(spec_of())


def test_bytes_are_2n_keys_and_values_and_never_the_n_squared_products():
    n, d, dv = 512, 16, 8
    spec = Spec(rows=1, d=d, dv=dv)
    noise = torch.Generator().manual_seed(0)
    state = TensorAttention().open(spec)
    state.append(torch.randn(1, n, 2 * d, generator=noise), torch.randn(1, n, 2 * dv, generator=noise))
    assert n * 2 * (d + dv) * 4 < state.nbytes < 2 * (n * 2 * (d + dv) * 4 + n * 8) < n * n * 4
    assert state.bytes_read == state.nbytes
    bounded = parse("tensor(store=window)@16").open(spec)
    sizes = []
    for _ in range(5):
        bounded.append(torch.randn(1, 40, 2 * d, generator=noise), torch.randn(1, 40, 2 * dv, generator=noise))
        sizes.append(bounded.nbytes)
    assert len(set(sizes)) == 1


def test_traits_capacity_and_budget_are_those_of_the_store():
    exact, bounded = TensorAttention(), parse("tensor(store=window(block=4))@16")
    assert (exact.traits.reference, exact.traits.normalised, exact.traits.value_linear) == ("tensor", False, False)
    assert (exact.traits.constant_memory, bounded.traits.constant_memory) == (False, True)
    assert (exact.capacity(100), bounded.capacity(100)) == (None, 19)
    assert (exact.with_budget(8), bounded.with_budget(8)) == (None, parse("tensor(store=window(block=4))@8"))
    shared = resolve(parse("tensor(store=window)@25%"), spec_of(), length=64)
    assert str(shared) == "tensor(store=window)@16"
    assert dataclasses.replace(bounded, store="exact") == exact


# ---- mutants: one wrong line each, which the definition rejects -----------------------------------------------------


def told_by(monkeypatch, **patched):
    for name, wrong in patched.items():
        monkeypatch.setattr(module.TensorState, name, wrong)
    q, k, v = stream()
    state = TensorAttention().open(spec_of())
    state.append(k, v)
    with pytest.raises(AssertionError):
        require_definition(state.read(q[:, 0]), q[:, 0], k, v)


def test_a_mutant_that_pairs_a_token_with_itself_only_is_rejected(monkeypatch):
    def diagonal(self, q):
        view = self.store.slots.view()
        (k1, k2), (v1, v2) = view.k.chunk(2, -1), view.v.chunk(2, -1)
        return module.Partial.over(q, k1 * k2, v1 * v2, self.spec)

    told_by(monkeypatch, _read=diagonal)


def test_a_mutant_that_weighs_first_tokens_alike_is_rejected(monkeypatch):
    turned = module._turned

    def flat(q, one, two, spec):
        parts = [turned(q, one.part(slice(i, i + 1)), two, spec) for i in range(one.k.shape[1])]
        return module.Partial(torch.stack([p.mean for p in parts]).mean(0), turned(q, one, two, spec).log_mass)

    monkeypatch.setattr(module, "_turned", flat)
    told_by(monkeypatch)


def test_a_mutant_that_reads_the_empty_places_of_shorter_rows_is_rejected(monkeypatch):
    pairs = module.over_pairs
    alike = lambda points: module.Points(points.k, points.v)  # noqa: E731
    monkeypatch.setattr(module, "over_pairs", lambda q, one, two, spec: pairs(q, alike(one), alike(two), spec))
    with pytest.raises(AssertionError):
        test_rows_of_different_length_read_their_own_pairs_only()


def weighted_points(dtype=torch.float32):
    """Queries and the points of two sides, of which some represent several tokens and some none."""
    draw = seeded(7)
    sides = []
    for s in (23, 31):
        weight = draw(ROWS, s).masked_fill(draw(ROWS, s) > 1.0, -torch.inf)
        sides.append(module.Points(draw(ROWS, s, D, dtype=dtype), draw(ROWS, s, DV, dtype=dtype), weight))
    return draw(ROWS, G, D, dtype=dtype), *sides


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("at_once", [2**22, 1000])
def test_log_masses_are_those_of_the_attention(monkeypatch, dtype, softcap, at_once):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", at_once)
    (q, one, two), spec = weighted_points(dtype), spec_of(softcap=softcap, dtype=dtype)
    exact = (x.double() for x in (one.k, two.k))
    pairs = torch.einsum("rml,ril,rjl->rmij", q.double(), *exact)
    pairs = pairs if softcap is None else softcap * torch.tanh(pairs / softcap)
    pairs = pairs + one.log_weight[:, None, :, None] + two.log_weight[:, None, None, :]
    found = module.log_masses_over_pairs(q, one, two, spec)
    assert found.dtype == spec.compute_dtype
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), pairs.flatten(2).logsumexp(-1), rtol=0, atol=atol)


def test_a_mutant_without_the_weights_of_first_points_is_rejected(monkeypatch):
    monkeypatch.setattr(module, "_by_point", lambda second, q, one: second.view(*q.shape[:2], one.k.shape[1]))
    with pytest.raises(AssertionError):
        test_log_masses_are_those_of_the_attention(monkeypatch, torch.float64, None, 1000)
