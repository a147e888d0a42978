"""Memory: every storage counted once, nothing left out, copies that share nothing."""

import pytest
import torch

from kvfloor.core.memory import SCALAR_BYTES, Memory
from kvfloor.core.spec import Spec


class Part(Memory):
    def __init__(self, **attributes: object) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)


def test_a_tensor_counts_its_storage() -> None:
    assert Part(x=torch.zeros(10, 3, dtype=torch.bfloat16)).nbytes == 60


def test_views_of_one_storage_count_once_and_whole() -> None:
    x = torch.zeros(100)
    assert Part(a=x[:10], b=x[50:].view(5, 10), c=Part(d=x)).nbytes == 400


def test_an_expanded_tensor_counts_what_it_stores() -> None:
    assert Part(x=torch.zeros(1).expand(1000)).nbytes == 4


def test_what_is_public_is_not_counted() -> None:
    assert Part(shared={"p": torch.zeros(100)}, spec=Spec(1, 1, 1), method=object()).nbytes == 0


def test_nested_parts_lists_and_dicts_are_walked() -> None:
    inside = [torch.zeros(2), {"k": torch.zeros(3)}]
    assert Part(a=Part(b=inside)).nbytes >= 20


def test_numbers_count_and_a_huge_integer_counts_its_digits() -> None:
    assert Part(n=1).nbytes == SCALAR_BYTES
    assert Part(n=1 << 8000).nbytes == 1001


@pytest.mark.parametrize("hidden", [object(), (i for i in range(3)), torch.zeros(2).numpy(), lambda: 0])
def test_what_cannot_be_sized_raises_and_is_named(hidden: object) -> None:
    with pytest.raises(TypeError, match=r"state\.part\.hidden"):
        _ = Part(part=Part(hidden=hidden)).nbytes


def test_a_sparse_tensor_cannot_be_sized() -> None:
    with pytest.raises(TypeError, match="dense"):
        _ = Part(x=torch.eye(3).to_sparse()).nbytes


@pytest.mark.parametrize("unsendable", [[1, 2], {"a": 1}, "text", object()])
def test_only_tensors_numbers_none_and_parts_are_sent(unsendable: object) -> None:
    with pytest.raises(TypeError, match="field"):
        Part(field=unsendable).export()


def test_adopting_an_export_gives_an_equal_part() -> None:
    sent = Part(x=torch.arange(3), n=5, inner=Part(y=torch.ones(2)), none=None)
    got = Part(x=torch.zeros(1), n=0, inner=Part(y=torch.zeros(2)), none=None)
    got.adopt(sent.export())
    assert torch.equal(got.x, torch.arange(3)) and got.n == 5 and torch.equal(got.inner.y, torch.ones(2))


def test_a_copy_shares_no_storage_but_what_is_public() -> None:
    public = {"p": torch.zeros(2)}
    part = Part(x=torch.zeros(2), inner=Part(y=torch.zeros(2)), shared=public)
    copy = part.copied()
    copy.x += 1
    copy.inner.y += 1
    assert bool((part.x == 0).all()) and bool((part.inner.y == 0).all())
    assert copy.shared is public


def test_selecting_rows_reaches_every_tensor_and_the_spec() -> None:
    part = Part(x=torch.arange(3), inner=Part(y=torch.arange(6).view(3, 2), spec=Spec(3, 1, 1)), n=7)
    part.select_rows(torch.tensor([2, 0, 2, 2]))
    assert part.x.tolist() == [2, 0, 2, 2]
    assert part.inner.y.tolist() == [[4, 5], [0, 1], [4, 5], [4, 5]]
    assert part.inner.spec.row_ids == (2, 0, 2, 2)


def test_moving_a_tensor_counts_old_and_new_in_the_peak() -> None:
    part = Part(x=torch.zeros(100), y=torch.zeros(10))
    part.move("x", torch.zeros(200))
    assert part.nbytes == 840
    assert part.peak_nbytes == 840 + 400
