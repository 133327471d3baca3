import pytest

from qlora_pipe.transfer import Losses, UnquantiseGap, choose_adapter, choose_scale, transfer_efficiency


@pytest.mark.parametrize(
    ("losses", "tau"),
    [
        (Losses(full=3.0, full_adapted=2.5, small=4.0, small_adapted=3.0), 0.5),
        (Losses(full=3.0, full_adapted=2.0, small=3.5, small_adapted=3.0), 2.0),
        (Losses(full=3.0, full_adapted=3.5, small=4.0, small_adapted=3.0), -0.5),
        (Losses(full=3.0, full_adapted=3.0, small=4.0, small_adapted=3.0), 0.0),
        (Losses(full=3.0, full_adapted=2.0, small=4.0, small_adapted=4.0), None),
        (Losses(full=3.0, full_adapted=2.0, small=4.0, small_adapted=5.0), None),
    ],
)
def test_transfer_efficiency(losses: Losses, tau: float | None) -> None:
    assert transfer_efficiency(losses) == tau


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ({0.0: 3.0, 0.5: 2.5, 1.0: 2.7}, 0.5),
        ({0.0: 3.0, 1.0: 3.0}, 0.0),
        ({1.0: 3.0, 0.0: 3.0}, 0.0),
        ({0.0: 3.0, 1.0: 3.1}, 0.0),
        ({0.0: 3.0, 1.0: 2.0, 0.5: 2.0}, 0.5),
        ({0.0: 3.0, -0.25: 2.0, 0.5: 2.0}, -0.25),
        ({0.0: 3.0}, 0.0),
    ],
)
def test_zero_unless_another_scale_is_strictly_better(losses: dict[float, float], scale: float) -> None:
    assert choose_scale(losses) == scale


@pytest.mark.parametrize(
    ("corrected", "chosen"),
    [
        ({0.0: 3.0, 0.5: 2.4, 1.0: 2.7}, ("emloc", 0.5)),
        ({0.0: 3.0, 0.5: 2.5, 1.0: 2.7}, ("none", 1.0)),
        ({0.0: 3.0}, ("none", 1.0)),
    ],
)
def test_another_adapter_must_be_strictly_better(corrected: dict[float, float], chosen: tuple[str, float]) -> None:
    assert choose_adapter({"none": {0.0: 3.0, 1.0: 2.5}, "emloc": corrected}) == chosen


def test_the_gap_of_unquantising() -> None:
    found = UnquantiseGap(quantised=2.0, unquantised=2.25, without_adapter=3.0).report()
    assert found == {
        "quantised": 2.0,
        "unquantised": 2.25,
        "without_adapter": 3.0,
        "gap": 0.25,
        "gain": 1.0,
        "share": 0.25,
    }


@pytest.mark.parametrize("without_adapter", [2.0, 1.5])
def test_no_share_of_a_gain_that_is_none(without_adapter: float) -> None:
    found = UnquantiseGap(2.0, 2.5, without_adapter).report()
    assert found["share"] is None
    assert found["gain"] == without_adapter - 2.0
