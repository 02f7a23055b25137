"""The promises of sdxl_jax.data.order and grouping: the images of an epoch, by weight, bucket and batch size."""

import pickle
from collections import Counter

import numpy as np
import pytest

from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.grouping import Grouping, merge_small
from sdxl_jax.data.order import Order


def numbers(*bounds):
    return [np.arange(*pair, dtype=np.int32) for pair in bounds]


def images_of(order, step):
    size = order.buckets[order.bucket(step)].batch_size
    return [int(order.numbers[order.position(step, row)]) for row in range(size)]


def epoch_of(order, epoch):
    steps = range(order.steps_before(epoch), order.steps_before(epoch + 1))
    return Counter(image for step in steps for image in images_of(order, step))


def test_an_integer_weight_is_the_number_of_places_per_epoch():
    order = Order([numbers((0, 8), (8, 12))], (1.0, 3.0), [4], seed=5)
    assert order.epoch_steps == 5
    for epoch in range(3):
        assert epoch_of(order, epoch) == {image: 1 if image < 8 else 3 for image in range(12)}


def test_with_a_fractional_weight_images_take_turns_until_all_had_theirs():
    order = Order([numbers((0, 8), (8, 18))], (1.0, 0.4), [4], seed=5)
    epochs = [epoch_of(order, epoch) for epoch in range(5)]
    assert all(sum(epoch.values()) == 12 and all(epoch[image] == 1 for image in range(8)) for epoch in epochs)
    together = sum(epochs, Counter())
    assert {image: together[image] for image in range(8, 18)} == dict.fromkeys(range(8, 18), 2)  # 5 · 0.4
    assert len({frozenset(epoch) for epoch in epochs}) > 1


def test_a_small_weight_leaves_no_image_out_forever():
    order = Order([numbers((0, 20), (20, 23))], (1.0, 0.01), [1], seed=0)
    seen = sum((epoch_of(order, epoch) for epoch in range(3)), Counter())
    assert all(seen[image] == 1 for image in range(20, 23))  # at least one place per epoch


def test_a_small_bucket_collects_the_places_of_several_epochs_and_an_empty_one_has_no_batch():
    order = Order([numbers((0, 3)), numbers((0, 0)), numbers((3, 9))], (1.0,), [8, 8, 2], seed=1)
    small, empty, large = order.buckets
    assert (float(small.batches), small.remainder, small.small) == (3 / 8, 0, True)
    assert (empty.batches, empty.images) == (0, 0)
    assert (large.batches, large.remainder, large.small) == (3, 0, False)
    assert order.epoch_steps == 3 + 3 / 8
    lengths = [order.steps_before(epoch + 1) - order.steps_before(epoch) for epoch in range(12)]
    assert [epoch + 1 for epoch in range(12) if lengths[epoch] == 4] == [3, 6, 8, 11] and set(lengths) == {3, 4}
    epochs = [epoch_of(order, epoch) for epoch in range(8)]
    together = sum(epochs, Counter())
    assert together == dict.fromkeys(range(9), 8)  # exactly as often as the others
    assert {epoch[image] for epoch in epochs for image in range(3)} == {0, 2, 3}


def test_a_single_bucket_smaller_than_a_batch_is_an_order():
    order = Order([numbers((0, 3))], (1.0,), [8], seed=1)
    assert order.epoch_steps == 3 / 8
    seen = Counter(image for step in range(3) for image in images_of(order, step))
    assert seen == dict.fromkeys(range(3), 8)
    assert images_of(order, 10**12) == images_of(Order([numbers((0, 3))], (1.0,), [8], seed=1), 10**12)


def test_a_small_weight_in_a_small_bucket_shows_all_its_images_equally_often():
    order = Order([numbers((0, 10)), numbers((10, 20))], (0.1,), [8, 1], seed=0)
    assert order.buckets[0].places == 1
    steps = [step for step in range(order.steps_before(80)) if order.bucket(step) == 0]
    assert len(steps) == 10
    assert Counter(image for step in steps for image in images_of(order, step)) == dict.fromkeys(range(10), 8)
    assert all(len(set(images_of(order, step))) > 3 for step in steps)  # where a turn ends, the next one begins


def test_batch_sizes_differ_by_bucket():
    order = Order([numbers((0, 9)), numbers((9, 17))], (1.0,), [2, 4], seed=1)
    assert order.epoch_steps == 4 + 2
    sizes = Counter(len(images_of(order, step)) for step in range(6))
    assert sizes == {2: 4, 4: 2}
    assert order.buckets[0].remainder == 1


def test_replacements_for_a_damaged_image_are_all_images_of_its_bucket():
    order = Order([numbers((0, 4)), numbers((4, 9))], (1.0,), [2, 2], seed=3)
    for step in range(order.steps_before(2)):
        members = range(4) if order.bucket(step) == 0 else range(4, 9)
        instead = [int(order.numbers[order.position(step, 0, instead=count)]) for count in range(len(members))]
        assert sorted(instead) == list(members)


def test_any_step_is_reached_at_once_and_is_the_same_in_another_process():
    order = Order([numbers((0, 50)), numbers((50, 77))], (0.7,), [4, 4], seed=3)
    other = pickle.loads(pickle.dumps(order))
    for step in (0, 10**6, 10**12):
        assert images_of(order, step) == images_of(other, step) and order.bucket(step) == other.bucket(step)


def test_a_pickle_holds_no_image_numbers():
    order = Order([numbers((0, 1_000_000))], (1.0,), [4], seed=3)
    assert len(pickle.dumps(order)) < 10_000


def test_the_positions_of_buckets_are_consecutive():
    order = Order(
        [numbers((5, 8), (20, 22)), numbers((0, 0), (0, 0)), numbers((0, 5), (30, 31))], (1.0, 2.0), [2] * 3, 0
    )
    assert [order.run(bucket) for bucket in range(3)] == [range(0, 5), range(5, 5), range(5, 11)]
    assert order.numbers.tolist() == [5, 6, 7, 20, 21, 0, 1, 2, 3, 4, 30]


BUCKETS = [Bucket(32, 16), Bucket(24, 16), Bucket(16, 16), Bucket(16, 32)]


def grouping(*counts):
    ends = np.cumsum(counts)
    members = [[np.arange(end - count, end, dtype=np.int32)] for count, end in zip(counts, ends, strict=True)]
    empty = np.zeros(0, np.int32)
    return Grouping(members, *[empty] * 5, closest=0.0)


@pytest.mark.parametrize(
    ("counts", "merged", "moved"),
    [
        ((1, 9, 9, 9), [0, 10, 9, 9], {0: 1}),
        ((9, 0, 1, 9), [10, 0, 0, 9], {2: 0}),  # 1:1 is as far from 2:1 as from 1:2: the first of those with images
        ((9, 9, 9, 3), [9, 9, 12, 0], {3: 2}),
        ((2, 3, 9, 9), [0, 5, 9, 9], {0: 1}),
        ((1, 2, 9, 9), [0, 0, 12, 9], {0: 2, 1: 2}),  # images that were moved in are moved on
        ((1, 1, 1, 0), [0, 3, 0, 0], {0: 1, 2: 1}),
        ((0, 0, 2, 0), [0, 0, 2, 0], {}),  # only one is left: its images repeat within a batch
        ((9, 9, 9, 9), [9, 9, 9, 9], {}),
    ],
)
def test_small_buckets_merge_into_the_nearest_until_batches_are_full(counts, merged, moved):
    grouped, into = merge_small(grouping(*counts), BUCKETS, [4] * 4, [1.0])
    assert grouped.counts() == merged and into == moved
    weighted, _ = merge_small(grouping(*counts), BUCKETS, [40] * 4, [10.0])
    assert weighted.counts() == merged
    everything = np.concatenate([numbers for bucket in grouped.members for numbers in bucket])
    assert sorted(everything.tolist()) == list(range(sum(counts)))
