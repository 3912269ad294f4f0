"""Our own batches are grain's, whoever draws them and from wherever they begin."""

import dataclasses

import numpy as np
import pytest
from toy_stage import ToySource, ToyStage

from longlive_jax.training.data import Batches, Rows, grain_batches, in_parallel

SOURCE = ToySource(seed=3, width=2, length=60)


def drawn(batches, count):
    try:
        return [next(batches)["x"] for _ in range(count)]
    finally:
        batches.close()


@pytest.fixture(scope="module")
def by_grain():
    batches = grain_batches(SOURCE, ToyStage.collate, 2, 3)
    return [next(batches)["x"] for _ in range(10)]


@pytest.mark.parametrize(("position", "workers"), [(0, 0), (4, 0), (3, 1)])
def test_batches_are_grains(by_grain, position, workers):
    found = drawn(Batches(SOURCE, ToyStage.collate, 2, 3, position=position, workers=workers), 10 - position)
    np.testing.assert_array_equal(found, by_grain[position:])
    assert found[0].shape == (2, 3, 2)


def test_an_end():
    batches = Batches(SOURCE, ToyStage.collate, 2, 3, position=9)
    assert len(list(batches)) == 1
    assert list(Batches(SOURCE, ToyStage.collate, 2, 3, position=10)) == []


@dataclasses.dataclass(frozen=True)
class Broken:
    length: int = 60

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        raise ValueError(f"record {index} is broken")


def test_a_broken_record_is_told():
    with pytest.raises(ValueError, match="record 0 is broken"):
        next(Batches(Broken(), ToyStage.collate, 1, 2))


def test_rows_of_the_processes_are_the_batch():
    """Two processes with two of four devices each: a batch of eight streams is [2, 4], and each has two columns."""
    whole = drawn(Batches(SOURCE, ToyStage.collate, 4, 3), 5)
    for mine in ([0, 1], [2, 3], [1]):
        rows = Rows(SOURCE, streams=4, size=3, mine=mine)
        part = drawn(Batches(rows, ToyStage.collate, len(mine), 3), 5)
        np.testing.assert_array_equal(part, [batch[mine] for batch in whole])


def test_in_parallel_is_map():
    assert list(in_parallel(abs, [-1, 2, -3], 0)) == list(in_parallel(abs, [-1, 2, -3], 1)) == [1, 2, 3]
