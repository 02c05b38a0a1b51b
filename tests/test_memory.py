"""Out-of-memory handling: halved batches, released memory, other errors unchanged."""

import pytest
import torch

from rsft_hf.memory import halve_batch_size, is_out_of_memory, map_in_batches


def test_batches_are_halved_until_they_fit_and_every_row_is_computed_once():
    sizes, done = [], []

    def compute(rows: list[int]) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        done.extend(rows)
        return torch.tensor(rows, dtype=torch.float64)

    assert [float(value) for value in map_in_batches([1, 5, 3, 2, 4, 9], 6, compute)] == [0, 1, 2, 3, 4, 5]
    # 6 -> 3 -> 1: longest first, each row once.
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    assert done == [5, 1, 4, 2, 3, 0]


def test_a_row_that_does_not_fit_and_other_errors_are_raised_unchanged():
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        halve_batch_size(1, error)
    with pytest.raises(RuntimeError, match="shape"):
        map_in_batches([1, 1], 2, lambda rows: (_ for _ in ()).throw(RuntimeError("shape mismatch")))


def test_a_failed_batch_is_released():
    """A local of the failed frame is gone after halving, so that its memory can be used again."""
    kept = []

    class Tensor:
        def __del__(self) -> None:
            kept.append("released")

    def fail() -> None:
        tensor = Tensor()  # noqa: F841 - held by the frame alone
        raise torch.OutOfMemoryError("CUDA out of memory.")

    try:
        fail()
    except torch.OutOfMemoryError as error:
        halved, released = halve_batch_size(8, error), list(kept)
    assert (halved, released) == (4, ["released"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory."), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: BaseException, expected: bool):
    assert is_out_of_memory(error) is expected


def test_batches_are_sorted_and_halved_without_memory():
    """Rows of 6 to 1 tokens in room for 6, padding included: four rows do not fit, nor do two; then one by one."""
    lengths, seen = [3, 1, 6, 2, 5, 4], []

    def compute(batch):
        seen.append([lengths[row] for row in batch])
        if len(batch) * lengths[batch[0]] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return torch.tensor([10.0 * lengths[row] for row in batch])

    assert [float(value) for value in map_in_batches(lengths, 4, compute)] == [30.0, 10.0, 60.0, 20.0, 50.0, 40.0]
    assert seen == [[6, 5, 4, 3], [6, 5], [6], [5], [4], [3], [2], [1]]


def test_one_row_without_memory_and_other_errors_are_raised():
    def too_long(batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    def broken(batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(torch.OutOfMemoryError):
        map_in_batches([3, 3], 2, too_long)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        map_in_batches([3, 3], 2, broken)
