"""States in blocks of bytes: the bytes are counted, a state moves in and out unchanged, and neighbours do not meet."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfloor.core import layout as layout_module
from kvfloor.core import pool as pool_module
from kvfloor.core.blocked import Blocked
from kvfloor.core.broken import BrokenState
from kvfloor.core.layout import ALIGNMENT, Layout
from kvfloor.core.pool import AT_ONCE, Pool, block_bytes, opened
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.core.watching import Watching
from kvfloor.methods.grammar import parse
from kvfloor.methods.registry import TABLE, kind
from tests.support import causal, seeded

CONSTANT = (
    "window@24",
    "sinks@24",
    "random@24",
    "h2o@24",
    "tova@24",
    "knorm@24",
    "keydiff@24",
    "expected@24",
    "ridge_leverage@24",
    "h2o(block=8)@24",
    "sinks+value_sum@24",
    "sinks+taylor@24",
    "sinks+less@24",
    "h2o+moments@24",
    "h2o|top_k(k=4)@24",
    "h2o|pages(pages=2)@24",
    "subgen_sketch@24",
    "balance@64",
    "window_sample@24",
    "h2o(block=8):k4v3@24",
    "window|pages(pages=2):k2v5(first=0)@24",
)
GROWING = ("quant", "snapkv@24", "k_center@24", "raas@24", "h2o(prefill=dense)@24", "exact", "exact|pages")
HEADS, G, D = 2, 2, 16
SPEC = Spec(HEADS, D, D, scale=D**-0.5)
Piece = tuple[Tensor, Tensor, Tensor]


class Engine:
    """Serve requests from one pool whose memory is poisoned first, beside a state of its own for each request."""

    def __init__(self, text: str, spec: Spec = SPEC, blocks: int = 6, tokens: int | None = None) -> None:
        self.method = parse(text)
        self.memory = torch.full((blocks, block_bytes(self.method, spec, G, tokens) + 48), 255, dtype=torch.uint8)
        self.pool = Pool(self.method, spec, G, self.memory, tokens)
        self.spec, self.tokens = spec, tokens
        self.alone: dict[int, State] = {}
        self.draw = seeded(0)

    def start(self, block: int) -> None:
        self.pool.clear(torch.tensor([block]))
        self.alone[block] = opened(self.method, self.spec, G, self.tokens)

    def piece(self, n: int, t: int) -> Piece:
        widths = ((G, t, self.spec.d), (t, self.spec.d), (t, self.spec.dv))
        q, k, v = (self.draw(n, self.spec.rows, *width, dtype=self.spec.dtype) for width in widths)
        return q, k, v

    def step(self, blocks: list[int], t: int, count: list[int] | None = None) -> float:
        """Step these requests in the pool and each by itself; return the largest difference of an answer."""
        q, k, v = self.piece(len(blocks), t)
        out = self.pool.step(torch.tensor(blocks), q, k, v, None if count is None else torch.tensor(count))
        worst = 0.0
        for i, block in enumerate(blocks):
            real = t if count is None else count[i]
            if real:
                one = self.alone[block].step(q[i, :, :, :real], k[i, :, :real], v[i, :, :real])
                worst = max(worst, float((out[i, :, :, :real] - one).abs().max()))
            assert not bool(out[i, :, :, real:].any())
        return worst

    def seal(self, blocks: list[int]) -> None:
        self.pool.seal(torch.tensor(blocks))
        for block in blocks:
            self.alone[block].seal()

    def same(self, block: int) -> bool:
        """Return True if the state in the block and the request's own state send equal messages."""
        return self.pool.take(torch.tensor([block])).to_bytes() == self.alone[block].to_bytes()


@pytest.mark.parametrize("text", CONSTANT)
def test_a_block_is_the_states_bytes_and_the_stated_padding(text: str) -> None:
    state = opened(parse(text), SPEC, G)
    layout = Layout.of(state)
    assert layout.nbytes == state.nbytes + layout.padding == block_bytes(parse(text), SPEC, G)
    assert 0 <= layout.padding < ALIGNMENT * len(layout.fields)
    taken = torch.zeros(layout.nbytes, dtype=torch.int64)
    for field in layout.fields:
        assert field.offset % ALIGNMENT == 0
        taken[field.offset : field.offset + field.nbytes] += 1
    assert int(taken.max()) == 1  # no two fields share a byte


@pytest.mark.parametrize("text", CONSTANT)
def test_the_memory_of_a_reserved_state_is_final(text: str) -> None:
    state, draw = opened(parse(text), SPEC, G), seeded(1)
    before = state.nbytes
    for t in (1, 100, 7, 1):
        state.step(draw(HEADS, G, t, D).float(), draw(HEADS, t, D).float(), draw(HEADS, t, D).float())
        assert state.nbytes == before
    state.seal()
    assert state.nbytes == before


@pytest.mark.parametrize("text", (*CONSTANT, "sinks|hip(k=32)@96"))
def test_requests_in_a_pool_are_what_each_is_alone(text: str) -> None:
    engine = Engine(text)
    for block in (5, 0, 3):
        engine.start(block)
    worst = [engine.step([block], t) for block, t in ((5, 70), (0, 3), (5, 31), (3, 33))]
    worst.append(engine.step([3, 0], 9, [9, 4]))
    engine.seal([5])
    for _ in range(40):
        worst.append(engine.step([5], 1))
        engine.seal([5, 0, 3])
        worst += [engine.step([0, 3, 5], 1), engine.step([3, 5], 1)]
    assert max(worst) < 2e-6
    assert all(engine.same(block) for block in (0, 3, 5))


@pytest.mark.parametrize("text", (*CONSTANT, "sinks(block=1)@24", "h2o(block=1)@24"))
def test_many_requests_are_copied_out_a_few_at_a_time(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "AT_ONCE", 2)
    engine, everyone = Engine(text, blocks=7), [6, 1, 3, 0, 4]
    for block in everyone:
        engine.start(block)
    worst = [engine.step(everyone, 40), engine.step([0], 3)]
    engine.seal(everyone[:3])
    for _ in range(30):
        worst.append(engine.step(everyone, 1))
    engine.seal(everyone)
    worst += [engine.step(everyone, 1) for _ in range(10)]
    assert max(worst) < 2e-6
    assert all(engine.same(block) for block in everyone)
    assert all(shell.nbytes < 0.1 * n * engine.pool.layout.nbytes for n, shell in engine.pool._shells.items() if n > 1)


TURNS = ["sinks@24", "h2o(block=8)@24", "h2o(block=8):k4v3@24", "exact"]


def in_turns(text: str) -> bool:
    """Return True if two requests of equal length, stepped token by token in turns, are what each is alone."""
    engine = Engine(text, tokens=60 if text == "exact" else None)
    for block in (0, 1):
        engine.start(block)
    worst = [engine.step([block], 5) for block in (0, 1)]
    for _ in range(40):
        worst += [engine.step([0], 1), engine.step([1], 1)]
    return max(worst) < 2e-6 and all(engine.same(block) for block in (0, 1))


@pytest.mark.parametrize("text", TURNS)
def test_requests_of_equal_length_in_turns(text: str) -> None:
    assert in_turns(text)


def test_positions_written_ahead_for_another_request_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: what was written ahead is known by its numbers alone, not by the tensor it was written in."""
    real = Slots.number_from

    def forgetful(slots: Slots, at: int, position: int) -> None:
        known = slots._known_numbers
        if known is not None:
            slots._known_numbers = (ref(slots.position), *known[1:])
        real(slots, at, position)

    monkeypatch.setattr(Slots, "number_from", forgetful)
    assert not in_turns("h2o(block=8):k4v3@24")


@pytest.mark.parametrize("text", ["sinks@24", "h2o@24", "sinks+value_sum@24"])
def test_narrow_numbers_and_a_softcap(text: str) -> None:
    for spec in (Spec(HEADS, D, D, dtype=torch.bfloat16), Spec(HEADS, D, 8, softcap=5.0), Spec(3, 6, 6, scale=0.3)):
        engine = Engine(text, spec)
        for block in (1, 4):
            engine.start(block)
        worst = [engine.step([1], 40), engine.step([4], 5)] + [engine.step([4, 1], 1) for _ in range(40)]
        assert max(worst) < (0.02 if spec.dtype == torch.bfloat16 else 2e-6)
        assert engine.pool.seen(torch.tensor([4, 1])).tolist() == [45, 80]


def test_memory_that_comes_later_than_the_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watching, "_reserve", lambda *_: None)
    engine = Engine("h2o@24")
    engine.start(0)
    with pytest.raises(ValueError, match="queries of h2o@24 has no place in its block"):
        engine.step([0], 3)
    with pytest.raises(BrokenState):
        engine.step([0], 3)


def test_exact_in_blocks_of_the_longest_request_is_attention() -> None:
    engine, draw = Engine("exact", tokens=50), seeded(2)
    engine.start(2)
    q, k, v = (draw(HEADS, *shape, D).float() for shape in ((G, 50), (50,), (50,)))
    at = torch.tensor([2])
    parts = [slice(0, 30), *(slice(i, i + 1) for i in range(30, 50))]
    out = torch.cat([engine.pool.step(at, q[None, :, :, p], k[None, :, p], v[None, :, p]) for p in parts], 3)
    assert float((out[0] - causal(q, k, v, SPEC.scale)).abs().max()) < 2e-6
    before = engine.memory.clone()
    with pytest.raises(ValueError, match="51 tokens; its block has room for 50"):
        engine.pool.step(at, *engine.piece(1, 1))
    assert torch.equal(engine.memory, before)


def test_exact_in_few_bits_in_blocks_of_the_longest_request() -> None:
    engine = Engine("exact:k4v3", tokens=100)
    for block in (1, 3):
        engine.start(block)
    worst = [engine.step([1], 40), engine.step([3], 31)] + [engine.step([3, 1], 1) for _ in range(40)]
    assert max(worst) < 2e-6 and engine.same(1) and engine.same(3)


@settings(max_examples=25, deadline=None)
@given(
    text=st.sampled_from(CONSTANT),
    plan=st.lists(st.tuples(st.sets(st.integers(0, 3), min_size=1), st.integers(1, 40)), min_size=1, max_size=25),
)
def test_any_schedule_leaves_every_other_block_alone(text: str, plan: list[tuple[set[int], int]]) -> None:
    engine = Engine(text, blocks=5)
    for block in range(4):
        engine.start(block)
    for who, t in plan:
        blocks, before = sorted(who, key=lambda block: -block), engine.memory.clone()
        assert engine.step(blocks, t if t < 12 else 1) < 2e-6
        others = [block for block in range(5) if block not in who]
        assert torch.equal(engine.memory[others], before[others])
        assert torch.equal(engine.memory[:, engine.pool.layout.nbytes :], before[:, engine.pool.layout.nbytes :])
    assert all(engine.same(block) for block in range(4))


def test_a_batch_serves_the_pools_of_all_layers_and_no_later_step() -> None:
    first, second = Engine("h2o@24"), Engine("h2o@24")
    for engine in (first, second):
        for block in (1, 2):
            engine.start(block)
        engine.step([1], 47)
        engine.step([2], 10)
    batch = first.pool.batch(torch.tensor([1, 2]))
    given_clocks = first.pool.batch(torch.tensor([1, 2]), torch.tensor([47, 10]))
    assert torch.equal(batch.held, given_clocks.held)
    assert batch.held.tolist() == first.pool.held(torch.tensor([1, 2]))[:, 0].tolist()
    piece = first.piece(2, 1)
    assert torch.equal(first.pool.step(batch, *piece), second.pool.step(batch, *piece))
    with pytest.raises(ValueError, match="make it anew for each step"):
        first.pool.step(batch, *piece)


def test_a_fork_goes_its_own_way() -> None:
    engine = Engine("h2o@24")
    engine.start(0)
    engine.step([0], 45)
    engine.pool.copy(torch.tensor([0]), torch.tensor([4]))
    engine.alone[4] = engine.alone[0].clone()
    engine.step([0], 30)
    engine.step([4, 0], 1)
    assert engine.same(0)
    assert engine.same(4)
    assert engine.alone[0].to_bytes() != engine.alone[4].to_bytes()


def test_a_state_moves_out_of_one_pool_into_another() -> None:
    one, other = Engine("expected@24"), Engine("expected@24")
    one.start(3)
    one.step([3], 50)
    other.pool.put(torch.tensor([1]), one.pool.take(torch.tensor([3])))
    other.alone[1] = one.alone[3]
    assert other.step([1], 1) < 2e-6
    assert other.same(1)
    with pytest.raises(ValueError, match="2 blocks hold"):
        other.pool.put(torch.tensor([1, 2]), one.pool.take(torch.tensor([3])))


@pytest.mark.parametrize("text", GROWING)
def test_memory_that_grows_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="grows with its tokens"):
        block_bytes(parse(text), SPEC, G)


def test_every_registered_method_has_a_block_or_is_refused() -> None:
    refused: set[str] = set()
    for name in TABLE:
        form = {"selector": "sinks|{}@64", "summary": "sinks+{}@64"}.get(kind(TABLE[name]), "{}@64")
        text = name if name in ("exact", "quant", "tiered", "compact") else form.format(name)
        try:
            assert block_bytes(parse(text), SPEC, G) > 0
        except ValueError as refusal:
            assert "grows with its tokens" in str(refusal), name
            refused.add(name)
    assert refused == {"exact", "quant", "tiered", "compact", "k_center", "snapkv", "raas"}


@pytest.mark.parametrize(
    ("ids", "told"),
    [([0, 0], "different indices"), ([6], "0..5"), ([-1], "0..5"), ([], "non-empty"), ([[0]], "1-d")],
)
def test_blocks_that_do_not_exist_are_refused(ids: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Engine("sinks@24").pool.clear(torch.tensor(ids, dtype=torch.int64))


def test_bad_tokens_change_no_byte() -> None:
    engine = Engine("sinks@24")
    engine.start(0)
    engine.step([0], 10)
    before = engine.memory.clone()
    q, k, v = engine.piece(1, 1)
    at = torch.tensor([0])
    for bad in ((q[:, :1], k, v), (q, k.double(), v), (q, k * torch.nan, v), (q[:, :, :1], k, v)):
        with pytest.raises(ValueError, match=r"must be|NaN"):
            engine.pool.step(at, *bad)
    for count in ([2], [-1], [1, 1]):
        with pytest.raises(ValueError, match="count"):
            engine.pool.step(at, q, k, v, torch.tensor(count))
    assert torch.equal(engine.memory, before)


def test_bad_entries_among_many_requests_change_no_byte_but_padding_may_have_them() -> None:
    engine = Engine("sinks@24", blocks=AT_ONCE + 2)
    everyone = list(range(AT_ONCE + 2))
    for request in everyone:
        engine.start(request)
    engine.step(everyone, 10)
    before, at = engine.memory.clone(), torch.tensor(everyone)
    q, k, v = engine.piece(len(everyone), 3)
    k[-1, 0, -1, 0] = torch.inf
    with pytest.raises(ValueError, match="k has NaN or infinite entries; no block was changed"):
        engine.pool.step(at, q, k, v)
    assert torch.equal(engine.memory, before)
    engine.pool.step(at, q, k, v, torch.tensor([3] * (AT_ONCE + 1) + [2]))
    assert engine.pool.seen(at).tolist() == [13] * (AT_ONCE + 1) + [12]


def test_memory_that_cannot_hold_the_blocks_is_refused() -> None:
    method = parse("sinks@24")
    size = block_bytes(method, SPEC, G)
    for memory in (torch.zeros(3, size - 1, dtype=torch.uint8), torch.zeros(3, size), torch.zeros(size)):
        with pytest.raises(ValueError, match=f"at least {size}"):
            Pool(method, SPEC, G, memory)
    with pytest.raises(ValueError, match="multiples of 8"):
        Pool(method, SPEC, G, torch.zeros(3, size + 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="different budgets"):
        block_bytes(parse("sinks@24:32"), SPEC, G)


@pytest.mark.parametrize("where", ["_close", "evict", "store"])
def test_a_call_that_breaks_off_leaves_its_blocks_refusing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("h2o@24")
    for block in (0, 1, 2):
        engine.start(block)
        engine.step([block], 31 + 32)
    owner = {"_close": Blocked, "evict": Slots, "store": Layout}[where]
    if where == "_close":
        owner = type(engine.alone[0])

    def fails(*_: object, **__: object) -> None:
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, fails)
        with pytest.raises(MemoryError):
            engine.pool.step(torch.tensor([0, 2]), *engine.piece(2, 1))
    for call in (
        lambda: engine.pool.step(torch.tensor([0]), *engine.piece(1, 1)),
        lambda: engine.pool.take(torch.tensor([2])),
        lambda: engine.pool.seal(torch.tensor([1, 2])),
    ):
        with pytest.raises(BrokenState, match="clear them"):
            call()
    assert engine.step([1], 1) < 2e-6
    assert engine.same(1)
    engine.start(2)
    assert engine.step([2, 1], 1) < 2e-6


@pytest.mark.parametrize(
    "mutate",
    [
        lambda patch: patch.setattr(Pool, "_close", lambda *_: None),
        lambda patch: patch.setattr(layout_module, "_DERIVED", ("capacity", "offset", "score")),
        lambda patch: patch.setattr(layout_module, "_DERIVED", ("capacity", "offset", "position")),
        lambda patch: patch.setattr(layout_module, "_DERIVED", ("capacity", "offset", "queries")),
        lambda patch: patch.setattr(layout_module, "_DERIVED", ("capacity", "offset", "asked")),
    ],
)
def test_a_pool_that_forgets_a_field_or_a_block_end_is_caught(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test_requests_in_a_pool_are_what_each_is_alone("h2o@24")
