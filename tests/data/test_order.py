"""Which pictures each step sees: all of them, each as often as asked, in one bucket at a time, however divided."""

from collections import Counter

import pytest

from trajectory_consistency.tcd.distill.order import BatchOrder, Group
from trajectory_consistency.trainer.data.buckets import Size

A, B = Size(64, 64), Size(64, 128)


def epoch(order: BatchOrder, number: int) -> list[tuple[int, int]]:
    """All rows of an epoch, in order."""
    start = sum(order.steps(each) for each in range(number))
    steps = (order.rows(step) for step in range(start, start + order.steps(number)))
    return [(group, picture) for rows in steps for group, picture in rows.tolist()]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_an_epoch_shows_every_picture_as_often_as_asked_but_for_what_fills_last_batches(size: int) -> None:
    order = BatchOrder((Group(A, 7, 1.0), Group(B, 5, 3.0), Group(A, 2, 2.0)), size, 0)
    wanted = Counter({(0, k): 1 for k in range(7)} | {(1, k): 3 for k in range(5)} | {(2, k): 2 for k in range(2)})
    for number in range(3):
        seen = Counter(epoch(order, number))
        assert seen >= wanted and seen.keys() == wanted.keys()
        filling = -(-11 // size) * size - 11 + -(-15 // size) * size - 15
        assert sum((seen - wanted).values()) == filling


def test_a_step_has_one_bucket() -> None:
    order = BatchOrder((Group(A, 7, 1.0), Group(B, 5, 1.0), Group(A, 3, 1.0)), 4, 0)
    for step in range(60):
        assert order.rows(step).shape == (4, 2)
        assert len({group == 1 for group, _ in order.rows(step).tolist()}) == 1


def test_of_a_fraction_every_picture_has_its_turn_before_any_has_its_second() -> None:
    order = BatchOrder((Group(A, 10, 0.3),), 1, 0)
    assert [order.steps(each) for each in range(4)] == [3, 3, 3, 3]
    ten = sorted(picture for number in range(10) for _, picture in epoch(order, number))
    assert ten == sorted([*range(10)] * 3)
    rare = BatchOrder((Group(A, 1, 0.25), Group(B, 3, 1.0)), 1, 0)
    assert Counter(group for number in range(8) for group, _ in epoch(rare, number)) == {0: 2, 1: 24}


def test_epochs_are_shuffled_each_in_its_own_way_and_by_the_seed() -> None:
    first, second = (epoch(BatchOrder((Group(A, 50, 1.0),), 1, 0), number) for number in (0, 1))
    other = epoch(BatchOrder((Group(A, 50, 1.0),), 1, 1), 0)
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second and first != other and first != sorted(first)


def test_each_pass_over_the_pictures_has_an_order_of_its_own() -> None:
    order = BatchOrder((Group(A, 20, 0.5),), 1, 0)
    first_halves = {frozenset(picture for _, picture in epoch(order, number)) for number in (0, 2, 4, 6)}
    assert len(first_halves) == 4


def test_a_last_batch_is_filled_with_other_pictures_in_turn() -> None:
    order = BatchOrder((Group(A, 5, 1.0),), 8, 0)
    assert all(sorted(Counter(epoch(order, number)).values()) == [1, 1, 2, 2, 2] for number in range(3))


def test_buckets_take_turns() -> None:
    order = BatchOrder((Group(A, 40, 1.0), Group(B, 40, 1.0)), 2, 0)
    turns = [int(order.rows(step)[0, 0]) for step in range(40)]
    assert turns != sorted(turns) and turns != sorted(turns, reverse=True)


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    groups = (Group(A, 7, 1.5), Group(B, 5, 1.0))
    forward = BatchOrder(groups, 3, 0)
    rows = [forward.rows(step).tolist() for step in range(40)]
    assert [BatchOrder(groups, 3, 0).rows(step).tolist() for step in reversed(range(40))] == rows[::-1]
