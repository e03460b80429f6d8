"""Crops depend on the seed and their number alone; packed windows tile the split, once an epoch."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cratescope.errors import UserError
from cratescope.text.crops import Crops, shuffled
from cratescope.text.shards import TokenData, TokenSplit

SAMPLINGS = ("random", "packed")


def counting(n_tokens: int) -> TokenSplit:
    """A split whose tokens say where they are, in two shards."""
    return TokenSplit("train", tuple(np.split(np.arange(n_tokens, dtype=np.uint32), [n_tokens // 3])))


@given(st.integers(1, 700), st.integers(-3, 3), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_shuffling_permutes(n, seed, epoch):
    assert sorted(shuffled(place, n, (seed, epoch)) for place in range(n)) == list(range(n))


def test_shuffling_has_no_order_left_in_it():
    """Chi-squared of (place, what stands there) on a grid of 8 x 8, and of what stands first under many seeds."""
    n = 4096
    values = np.array([shuffled(place, n, (0, 0)) for place in range(n)])
    grid = np.histogram2d(np.arange(n), values, bins=8)[0]
    assert ((grid - n / 64) ** 2 / (n / 64)).sum() < 100  # 49 degrees of freedom: a chance of 2e-5
    steps = np.histogram(np.diff(values) % n, bins=16, range=(0, n))[0]
    assert ((steps - n / 16) ** 2 / (n / 16)).sum() < 50
    first = np.bincount([shuffled(0, 5, (seed, 0)) for seed in range(1000)], minlength=5)
    assert ((first - 200) ** 2 / 200).sum() < 30


@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_an_epoch_of_packed_windows_reads_every_window_once(n_tokens, context, seed):
    if n_tokens < context:
        return
    windows = n_tokens // context
    crops = Crops("packed", counting(n_tokens), context, seed, length=3 * windows)
    for epoch in range(3):
        starts = [int(crops[epoch * windows + place]["input_ids"][0]) for place in range(windows)]
        assert sorted(starts) == list(range(0, windows * context, context))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(Crops("packed", counting(400), 4, seed, 200).start(epoch * 100 + place) for place in range(100))
        for seed in range(3)
        for epoch in range(2)
    }
    assert len(orders) == 6


@given(st.sampled_from(SAMPLINGS), st.integers(8, 200), st.integers(1, 8), st.integers(0, 2**32), st.integers(0, 10**7))
@settings(deadline=None, max_examples=60)
def test_a_crop_depends_on_the_seed_and_its_number_alone(sampling, n_tokens, context, seed, index):
    one = Crops(sampling, counting(n_tokens), context, seed, index + 1)[index]
    other = Crops(sampling, counting(n_tokens), context, seed, index + 1000)[index]
    start = int(one["input_ids"][0])
    assert np.array_equal(one["input_ids"], np.arange(start, start + context)) and one["input_ids"].dtype == np.int64
    assert np.array_equal(one["labels"], one["input_ids"]) and np.array_equal(one["input_ids"], other["input_ids"])


def test_random_crops_start_anywhere():
    crops = Crops("random", counting(20), 16, seed=0, length=200)
    assert {crops.start(index) for index in range(200)} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_split_shorter_than_a_crop_is_refused_and_a_crop_past_the_end_is_no_item(sampling):
    with pytest.raises(UserError, match="the train split has 7 tokens, fewer than one crop of 8"):
        Crops(sampling, counting(7), 8, 0, 1)
    crops = Crops(sampling, counting(8), 8, 0, 3)
    assert len(crops) == 3 == len(list(crops))
    with pytest.raises(IndexError):
        crops[3]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_worker_process_is_sent_names_of_files_and_reads_the_same(sampling, data_folder):
    crops = Crops(sampling, TokenData.open(data_folder).split("train"), 16, 0, 24)
    packed = pickle.dumps(crops)
    assert len(packed) < 1000
    assert all(map(np.array_equal, (c["input_ids"] for c in crops), (c["input_ids"] for c in pickle.loads(packed))))
