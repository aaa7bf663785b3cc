"""passthrough: one model, bit for bit or scaled."""

import numpy as np
import pytest

from mergekit_cl import MergeError, merge


def test_the_model_comes_back_bit_for_bit() -> None:
    model = np.array([1e-45, -0.0, 3.4e38, -7], np.float32)
    assert merge([model], "passthrough").tobytes() == model.tobytes()


def test_scaled() -> None:
    assert merge([np.float32([1, -2, 0.5])], "passthrough", scale=-0.5).tolist() == [-0.5, 1, -0.25]
    assert merge([np.float32([1, -2])], "passthrough", scale=0).tolist() == [0, 0]


def test_more_than_one_model_is_refused() -> None:
    with pytest.raises(MergeError, match="passthrough merges 1 model, but got 2"):
        merge([np.float32([1])] * 2, "passthrough")


def test_a_scale_for_each_model_is_refused() -> None:
    with pytest.raises(MergeError, match="must be a number"):
        merge([np.float32([1])], "passthrough", scale=[2.0])
