import pytest

from qlora_pipe.errors import ConfigError
from qlora_pipe.units import Budget, format_bytes, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0B", 0),
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("900MiB", 900 * 2**20),
        ("1.5KiB", 1536),
        ("0.29GB", 290_000_000),  # in floats 289999999.99...
        ("123456789.123456789GB", 123456789123456789),
        ("1" + "0" * 400 + "KB", 10**403),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "24", "GB", "-1GB", "1e3GB", "24GBit", "1.GB", "24 G B", "nan GB"])
def test_not_a_size(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 24GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2.75bits", Budget("bits", 2.75)),
        ("1 bit", Budget("bits", 1.0)),
        ("32bits", Budget("bits", 32.0)),
        ("2GB", Budget("bytes", 2 * 10**9)),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0bits", "between 0 and 32 bits per weight, found '0bits'"),
        ("32.5bits", "between 0 and 32"),
        ("9" * 400 + "bits", "between 0 and 32"),
        ("2.75", "a budget such as 2.75bits or 24GB, found '2.75'"),
        ("bits", "a budget such as"),
    ],
)
def test_not_a_budget(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_budget(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (2_500_000, "2.50 MB"),
        (10**9, "1.00 GB"),
        (-2e12, "-2.00 TB"),
    ],
)
def test_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text
