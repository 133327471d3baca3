import time

import psutil
import pytest
import torch

from qlora_pipe import meter
from qlora_pipe.meter import Meter

SIZE = 200 * 10**6


@pytest.mark.parametrize("sampled", [False, True])
def test_the_peak_sees_what_was_freed_inside(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if sampled:
        monkeypatch.setattr(meter, "_reset_high_water_mark", lambda: False)
    resident = psutil.Process().memory_info().rss
    with Meter() as measured:
        tensor = torch.ones(SIZE, dtype=torch.uint8)
        if sampled:
            # Longer than several samples.
            time.sleep(0.2)
        del tensor
    # The block is given back at once; 5 % for whatever else was returned on entry.
    assert 0.95 * SIZE < measured.peak_bytes - psutil.Process().memory_info().rss < 2 * SIZE
    assert measured.peak_bytes > resident


def test_what_was_freed_before_does_not_count() -> None:
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    del tensor
    with Meter() as measured:
        pass
    assert measured.peak_bytes - psutil.Process().memory_info().rss < SIZE / 4


def test_a_short_block_has_a_peak_without_the_kernels_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_reset_high_water_mark", lambda: False)
    with Meter() as measured:
        pass
    assert measured.peak_bytes > 10**6


@pytest.mark.parametrize("marked", [True, False])
def test_an_error_inside_passes_and_the_time_is_kept(marked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_reset_high_water_mark", lambda: marked)
    measured = Meter()
    with pytest.raises(ZeroDivisionError), measured:
        raise ZeroDivisionError
    assert measured.seconds > 0
    assert not measured._thread.is_alive()
