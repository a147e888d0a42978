"""SubGen for tensor attention: estimates against all n^2 pairs, moments over thousands of row ids, the stated bound."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.partial import Partial
from kvfloor.floors.sampling import subgen_s, subgen_t
from kvfloor.game.instances.tensor import play
from kvfloor.methods.variants import subgen_tensor as module
from kvfloor.methods.variants.subgen_tensor import SubGenTensorState
from kvfloor.methods.variants.tensor import products
from tests import support
from tests.support import fed

ROWS = 4000
D, DV = 3, 2


opened = partial(support.opened, d=D, dv=DV)


def clustered(n: int, rows: int = 1, seed: int = 0, spread: float = 0.15, size: float = 0.7) -> tuple[Tensor, Tensor]:
    """k (rows, n, 2D) around three centres on each side, v (rows, n, 2DV) with a mean."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    sides = []
    for _ in range(2):
        centre = size * normal(rows, 3, D)
        belongs = torch.randint(3, (rows, n, 1), generator=noise).expand(-1, -1, D)
        sides.append(centre.gather(1, belongs) + spread * normal(rows, n, D) / D**0.5)
    return torch.cat(sides, -1), normal(rows, n, 2 * DV) + 0.5


def queries(m: int, rows: int = 1, seed: int = 9) -> Tensor:
    return torch.randn(rows, m, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    state = parse("tensor").open(Spec(q.shape[0], k.shape[-1] // 2, v.shape[-1] // 2, dtype=torch.float64))
    state.append(k, v)
    return state.read(q)


# ---- what is exact --------------------------------------------------------------------------------------------------


def same(part: Partial, truth: Partial) -> bool:
    return torch.allclose(part.mean, truth.mean, atol=1e-10) and torch.allclose(part.log_mass, truth.log_mass)


def test_tokens_that_wait_are_read_exactly_and_so_is_every_step_among_them() -> None:
    (k, v), q = clustered(11, rows=2), queries(22, rows=2)
    state = opened("subgen_tensor(block=16,t=1,s=1)", rows=2)
    out = state.step(q.view(2, 2, 11, D), k, v)
    assert same(state.read(q), exact(q, k, v))
    for i in range(11):
        assert torch.allclose(out[:, :, i], exact(q.view(2, 2, 11, D)[:, :, i], k[:, : i + 1], v[:, : i + 1]).mean)


def test_with_a_cluster_for_every_key_the_denominator_is_exact_and_the_numerator_is_not() -> None:
    """Pairs are drawn with replacement, so no s keeps every token for sure; its error falls as 1 / sqrt(s)."""
    (k, v), q = clustered(32), queries(3)
    truth, errors = exact(q, k, v), []
    for s in (25, 400):
        state = opened(f"subgen_tensor(delta1=1e-9,delta2=1e-9,t=1,s={s})", rows=64)
        state.append(k.expand(64, -1, -1), v.expand(64, -1, -1))
        part = state.read(q.expand(64, -1, -1))
        torch.testing.assert_close(part.log_mass, truth.log_mass.expand(64, -1), rtol=0, atol=1e-12)
        errors.append(float((part.mean - truth.mean).norm(dim=-1).median()))  # a rare draw of a small value errs most
    assert 3 < errors[0] / errors[1] < 5  # 4 is the square root of 16


def test_one_token_again_and_again_is_answered_exactly() -> None:
    (k, v), q = clustered(1), queries(3)
    k, v = k.expand(1, 48, -1), v.expand(1, 48, -1)
    state = opened("subgen_tensor(t=1,s=1)")
    state.append(k, v)
    assert state.clusters.tolist() == [[1, 1]] and state.held.tolist() == [0]
    assert same(state.read(q), exact(q, k, v))


@pytest.mark.parametrize("n", [48, 55])
def test_with_ones_as_second_keys_and_values_it_is_subgen_bit_for_bit_the_same_samples(n: int) -> None:
    (k, v), q = clustered(n), queries(4)
    k[..., D:], v[..., DV:] = 1.0, 1.0
    tensor, standard = opened("subgen_tensor(delta1=0.3,t=2,s=9)"), parse("subgen_sketch(delta=0.3,t=2,s=9)")
    standard = standard.open(Spec(1, D, DV, dtype=torch.float64))
    tensor.append(k, v)
    standard.append(k[..., :D].contiguous(), v[..., :DV].contiguous())
    told, wanted = tensor.read(q), standard.read(q)
    torch.testing.assert_close(told.log_mass, wanted.log_mass + math.log(n), rtol=0, atol=1e-12)
    torch.testing.assert_close(told.mean, wanted.mean, rtol=1e-11, atol=1e-12)


# ---- the law of the estimates, over thousands of row ids ------------------------------------------------------------


def estimates(text: str, twins: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One stream in ROWS rows: z (ROWS, DV), tau (ROWS,), then e^score (n^2,) and the products of values (n^2, DV).

    Twins: the second keys and values are the first ones.
    """
    k, v = clustered(24, seed=4)
    if twins:
        k, v = (x.chunk(2, -1)[0].repeat(1, 1, 2) for x in (k, v))
    q = 0.8 * queries(1)
    state = opened(text, rows=ROWS)
    state.append(k.expand(ROWS, -1, -1), v.expand(ROWS, -1, -1))
    part = state.read(q.expand(ROWS, -1, -1))
    tau = part.log_mass[:, 0].exp()
    weight = torch.exp(products(*k.chunk(2, -1))[0] @ q[0, 0])
    return part.mean[:, 0] * tau.unsqueeze(1), tau, weight, products(*v.chunk(2, -1))[0]


def deviation(samples: Tensor, wanted: Tensor) -> float:
    """How many standard errors the worst column's mean lies from `wanted`."""
    error = samples.std(0) / math.sqrt(len(samples))
    return float(((samples.mean(0) - wanted).abs() / error.clamp_min(1e-12)).max())


LIMIT = 4.5
SETTINGS = [
    "subgen_tensor(delta1=0.4,delta2=0.6,t=1,s=1,block=8)",
    "subgen_tensor(delta1=0.4,delta2=0.6,t=3,s=4,block=8)",
    "subgen_tensor(delta1=0.4,delta2=0.6,t=2,s=3,block=10)",  # four tokens wait
    "subgen_tensor(delta1=0.01,delta2=3.0,t=2,s=2,block=1)",  # every first key alone, all second keys in one cluster
]


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("text", SETTINGS)
def test_numerator_and_denominator_are_unbiased(text: str, twins: bool) -> None:
    z, tau, weight, value = estimates(text, twins)
    assert deviation(z, weight @ value) < LIMIT
    assert deviation(tau.unsqueeze(1), weight.sum()) < LIMIT


def test_a_mutant_whose_two_sides_draw_alike_is_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PURPOSES", (module._PURPOSES[0],) * 2)
    z, tau, weight, value = estimates("subgen_tensor(delta1=3.0,delta2=3.0,t=1,s=1,block=8)", twins=True)
    assert deviation(z, weight @ value) > 2 * LIMIT
    assert deviation(tau.unsqueeze(1), weight.sum()) > 2 * LIMIT


def test_a_mutant_that_lets_waiting_tokens_meet_one_another_only_is_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(self: SubGenTensorState, q: Tensor, visible: Tensor) -> Partial:
        both = pairs(self, q, torch.zeros_like(visible))
        return both.merge(pairs(opened(str(self.method), rows=ROWS), q, torch.zeros_like(visible)))

    pairs = SubGenTensorState._pairs
    monkeypatch.setattr(SubGenTensorState, "_pairs", apart)
    z, tau, weight, value = estimates(SETTINGS[2])
    assert deviation(z, weight @ value) > 2 * LIMIT and deviation(tau.unsqueeze(1), weight.sum()) > 2 * LIMIT


def squared_bound(weight: Tensor, v: Tensor) -> float:
    """||V1||_F^2 ||V2||_F^2 |e^score|^2, from which the theorem's s follows."""
    v1, v2 = v.chunk(2, -1)
    return float(v1.square().sum() * v2.square().sum() * weight.square().sum())


def test_the_variance_of_one_pair_is_the_exact_formula() -> None:
    """E |z - Ez|^2 = mu1 mu2 sum_ij e^(2 score) |v1_i * v2_j|^2 / (|v1_i|^2 |v2_j|^2) - |Ez|^2 for s = 1."""
    z, _, weight, value = estimates(SETTINGS[0])
    _, v = clustered(24, seed=4)
    one, two = (x[0].square().sum(-1) for x in v.chunk(2, -1))
    share = value.square().sum(-1) / torch.outer(one, two).flatten()
    wanted = one.sum() * two.sum() * (weight.square() * share).sum() - (weight @ value).square().sum()
    assert deviation((z - weight @ value).square().sum(1, keepdim=True), wanted) < LIMIT
    assert float(wanted) < squared_bound(weight, v[0])


@pytest.mark.parametrize("text", SETTINGS[1:])
def test_more_pairs_keep_within_the_theorems_variance(text: str) -> None:
    """All s^2 pairs do no worse than s independent ones, waiting tokens included."""
    z, _, weight, value = estimates(text)
    method = parse(text)
    measured = (z - weight @ value).square().sum(1)
    error = 4 * measured.std() / math.sqrt(ROWS)
    assert float(measured.mean() - error) <= squared_bound(weight, clustered(24, seed=4)[1][0]) / method.s  # type: ignore[attr-defined]


@pytest.mark.parametrize("t", [1, 4])
def test_the_denominators_variance_is_within_the_theorems(t: int) -> None:
    """Var tau <= (R-1)^2 / (4 R t) tau^2 with R = exp(2 |q| (delta1 |k2|_inf + delta2 |k1|_inf))."""
    _, tau, weight, _ = estimates(f"subgen_tensor(delta1=0.4,delta2=0.3,t={t},s=1,block=8)")
    k, _ = clustered(24, seed=4)
    largest = k.abs().max()
    spread = math.exp(2 * float(0.8 * queries(1).norm() * largest) * 0.7)
    relative = (tau / weight.sum() - 1).square()
    assert float(relative.mean()) <= (spread - 1) ** 2 / (4 * spread * t)
    assert float(relative.mean()) > 1e-6  # the samples do differ


# ---- the guarantee --------------------------------------------------------------------------------------------------


def test_the_stated_epsilon_follows_the_constants_of_the_theorem() -> None:
    method = parse("subgen_tensor(delta1=0.02,delta2=0.03,t=4,s=900,radius=2.0,largest=1.5,failure=0.2)")
    stated = method.guarantee(Spec(1, D, DV))
    assert stated is not None and stated.holds and stated.delta == 0.2
    spread = math.exp(2 * 2.0 * 1.5 * 0.05)
    wanted = max(math.sqrt(9 / (900 * 0.1)), math.sqrt(9 * (spread - 1) ** 2 / (4 * spread * 4 * 0.1)))
    assert stated.epsilon == pytest.approx(wanted)
    s = subgen_s(DV, stated.epsilon, 0.1, norm="frobenius")
    t = subgen_t(0.05, 2.0 * 1.5, stated.epsilon, 0.1)
    assert max(s / 900, t / 4) == pytest.approx(1.0)
    sized = method.budget_for(0.5, 0.1, Spec(1, D, DV))
    told = sized.guarantee(Spec(1, D, DV))
    assert told is not None and told.holds and (told.delta, round(told.epsilon, 2)) == (0.1, 0.5)
    with pytest.raises(ValueError, match="differ by e"):
        parse("subgen_tensor(delta1=9.0,radius=99.0)").budget_for(0.5, 0.1, Spec(1, D, DV))


def test_errors_beyond_the_stated_epsilon_are_rarer_than_the_stated_failure() -> None:
    """One fixed stream and query, fresh randomness in each of 400 rows."""
    rows, n = 400, 72  # 8 of them wait
    k, v = clustered(n, spread=0.1, size=0.4, seed=7)
    q = 0.9 * torch.nn.functional.normalize(queries(1), dim=-1)
    text = "subgen_tensor(delta1=0.1,delta2=0.1,t=4,s=64,radius=1.0,largest=1.5,failure=0.5)"
    state = opened(text, rows=rows)
    state.append(k.expand(rows, -1, -1), v.expand(rows, -1, -1))
    part = state.attend(q.expand(rows, -1, -1).unsqueeze(1))[:, 0, 0]
    stated = state.guarantee()
    assert stated is not None and stated.holds and stated.epsilon < 1
    softmax = torch.softmax(products(*k.chunk(2, -1))[0] @ q[0, 0], 0)
    v1, v2 = v[0].chunk(2, -1)
    allowed = stated.epsilon * float(softmax.norm() * v1.norm() * v2.norm())
    error = (part - softmax @ products(*v.chunk(2, -1))[0]).norm(dim=1)
    failures = int((error > allowed).sum())
    assert failures <= stated.delta * rows - 4 * math.sqrt(rows * stated.delta * (1 - stated.delta))
    assert float(error.quantile(0.5)) > allowed / 100  # the bound is not so wide that any answer would pass


HOLDS = "subgen_tensor(delta1=0.05,delta2=0.05,t=16,s=900,radius=1.0,largest=2.0"


@pytest.mark.parametrize(
    ("text", "k_size", "q_size", "why"),
    [
        (f"{HOLDS},centres=3)", 0.6, 0.5, "cap on centres"),
        (f"{HOLDS})", 0.6, 3.0, r"a query of \|q\| \* scale = "),
        (f"{HOLDS})", 6.0, 0.5, "a key with an entry of "),
    ],
)
@pytest.mark.parametrize("n", [9, 32])
def test_the_guarantee_is_withdrawn_where_an_assumption_fails(
    text: str, k_size: float, q_size: float, why: str, n: int
) -> None:
    noise = torch.Generator().manual_seed(1)
    k = k_size * (2 * torch.rand(1, n, 2 * D, generator=noise, dtype=torch.float64) - 1)
    q = q_size * torch.nn.functional.normalize(queries(n), dim=-1).unsqueeze(1)
    state = opened(text)
    assert getattr(state.guarantee(), "holds", False)
    state.step(q, k, k[..., : 2 * DV].contiguous())
    stated = state.guarantee()
    assert stated is not None
    if n == 9 and "centres" in text:  # they wait still
        assert stated.holds
        return
    assert not stated.holds
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(stated.why)
    assert state.method.from_bytes(state.to_bytes()).guarantee() == stated


def test_a_guarantee_that_says_nothing_says_so() -> None:
    assert parse("subgen_tensor").guarantee(Spec(1, D, DV)) is None
    stated = parse("subgen_tensor(radius=5.0)").guarantee(Spec(1, D, DV))
    assert stated is not None and not stated.holds and "vacuous" in stated.why


# ---- streams and memory ---------------------------------------------------------------------------------------------


def test_any_cut_of_a_stream_keeps_the_same_state_and_gives_the_same_answers() -> None:
    (k, v), q = clustered(70, rows=2), queries(140, rows=2).view(2, 2, 70, D)
    whole, cut = (opened("subgen_tensor(delta1=0.4,delta2=0.6,t=2,s=5)", rows=2) for _ in range(2))
    torch.testing.assert_close(fed(cut, (q, k, v), 1, 30, 31, 69), whole.step(q, k, v), rtol=1e-10, atol=1e-12)
    assert cut.to_bytes() == whole.to_bytes()


def test_memory_does_not_grow_while_the_keys_cluster_and_does_where_they_do_not() -> None:
    k, v = clustered(640)
    for keys, grows in ((k, False), (20 * torch.rand_like(k), True)):
        state, sizes = opened("subgen_tensor(delta1=1.0,delta2=1.0,t=2,s=8)"), []
        for start in range(0, 640, 160):
            state.append(keys[:, start : start + 160], v[:, start : start + 160])
            sizes.append(state.nbytes)
        assert (sizes[-1] > 4 * sizes[0] / 2) == grows and (len(set(sizes)) == 1) != grows


@pytest.mark.slow
def test_the_figures_of_the_log() -> None:
    """Bytes and errors beside the exact caches; medians over eight queries. -s prints them."""
    noise, d = torch.Generator().manual_seed(0), 8
    centres = 0.5 * torch.randn(2, 12, d, generator=noise)
    q = torch.randn(1, 8, d, generator=noise)
    for n in (512, 1024, 2048, 4096):
        sides = [c[torch.randint(12, (n,), generator=noise)] for c in centres]
        k = torch.cat([side + 0.1 * torch.randn(n, d, generator=noise) / d**0.5 for side in sides], -1).unsqueeze(0)
        v = torch.randn(1, n, 2 * d, generator=noise) + 0.5
        told, whole = (parse(text).open(Spec(1, d, d)) for text in ("subgen_tensor(delta1=0.4,delta2=0.4)", "tensor"))
        for state in (told, whole):
            state.append(k, v)
        part, truth = told.read(q), whole.read(q)
        error = float(((part.mean - truth.mean).norm(dim=-1) / truth.mean.norm(dim=-1)).median())
        mass = float((part.log_mass - truth.log_mass).abs().median())
        print(f"n {n}: {told.nbytes} bytes against {whole.nbytes}; answer off by {error:.3f}, log mass by {mass:.4f}")
        assert told.nbytes < 54_000 and error < 0.4 and mass < 0.02


@pytest.mark.parametrize("budget", [22, 64, 300])
def test_a_budget_bounds_what_is_stored_whatever_comes(budget: int) -> None:
    state = opened(f"subgen_tensor(delta1=0.01,delta2=0.01)@{budget}", d=4, dv=4)
    before = state.nbytes
    noise = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 640, 8, generator=noise, dtype=torch.float64) for _ in range(2))
    state.append(k, v)
    assert state.nbytes == before and state.method.traits.constant_memory
    s, centres = state.method.sizes()  # type: ignore[attr-defined]
    assert state.clusters.tolist() == [[centres, centres]]
    assert s + centres * (1 + 4) / 2 + 16 <= budget + 0.5
    assert bool(torch.isfinite(state.read(torch.randn(1, 2, 4, generator=noise, dtype=torch.float64)).mean).all())


def test_values_of_zero_answer_zero_with_the_right_mass() -> None:
    (k, v), q = clustered(32), queries(2)
    v[..., DV:] = 0.0
    state = opened("subgen_tensor(delta1=1e-9,delta2=1e-9,t=1,s=4)")
    state.append(k, v)
    part = state.read(q)
    assert not part.mean.any()
    torch.testing.assert_close(part.log_mass, exact(q, k, v).log_mass)


# ---- the contract ---------------------------------------------------------------------------------------------------


def test_it_breaks_on_the_barrier_of_tensor_attention() -> None:
    """Keys that do not cluster and values that all count: less than the floor is kept, so less can be read."""
    told = play("subgen_tensor(t=1,s=16)", n=64, d=32, isolated=False)
    assert told.verdict == "breaks" and told.details["caches"] == 4
    assert told.row_success < 0.5 and told.certified_bits <= 8 * told.message_bytes
