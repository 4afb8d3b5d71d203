"""A DeepSpeed that is not as we know it is noticed before it trains on wrongly."""

import pytest

from dalle_ds.training.gradient_path import GradientPath, Share, Unscaling
from dalle_ds.training.gradient_scales import NoScaling
from dalle_ds.training.lower_stages import ScaledUpdate
from dalle_ds.training.seam import check_overrides, check_received
from dalle_ds.training.stage3 import MixedStage3
from dalle_kernels.compression import NoCompression


@pytest.mark.parametrize("ours", [MixedStage3, ScaledUpdate])
def test_the_names_that_we_override_are_there_and_one_that_is_gone_is_named(ours):
    check_overrides(ours)
    moved = type("Moved", (ours.__mro__[1],), {"partition_gradients_elsewhere": lambda self: None})
    with pytest.raises(RuntimeError, match=r"has no DeepSpeedZeroOptimizer\w*.partition_gradients_elsewhere, as"):
        check_overrides(moved)


def test_a_gradient_that_was_not_handed_over_is_named():
    check_received({"a": 2, "b": 2})
    check_received({})
    for counts in ({"a": 0, "b": 0}, {"a": 2, "b": 0}):
        with pytest.raises(RuntimeError, match="did not hand over the gradient of"):
            check_received(counts)
    with pytest.raises(RuntimeError, match="gradient of b"):
        check_received({"a": 2, "b": 1})


def test_an_update_without_gradients_is_none():
    shares = {"layers.0.mlp.up.weight": Share(0, (4, 4))}
    path = GradientPath(shares, Unscaling(NoScaling(), "cpu"), NoCompression(), "cpu", between=None, inside=None)
    with pytest.raises(RuntimeError, match=r"did not hand over the gradient of layers.0.mlp.up.weight"):
        path.finish()
