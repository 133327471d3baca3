from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from qlora_pipe.errors import ArtifactError
from qlora_pipe.known import CHAIN
from qlora_pipe.verify import verify_path

Build = Callable[..., Any]
FORMATS = ("compressed-tensors", "gptq", "gptq_v2")
K0, UP1 = "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"


def flip(tensor: Tensor) -> Tensor:
    """The lowest bit of one word."""
    tensor.view(-1)[tensor.numel() // 2] ^= 1
    return tensor


def double(tensor: Tensor) -> Tensor:
    """One number twice as large."""
    tensor.view(-1)[-1] *= 2
    return tensor


def test_every_format_holds_what_was_trained(run_builder: Build) -> None:
    run = run_builder(formats=FORMATS).build()
    assert len(list(verify_path(run))) == len(CHAIN)


@pytest.mark.parametrize(
    ("tensor", "change", "what"),
    [
        (f"compressed-tensors/model/{UP1}.weight_packed", flip, "codes"),
        (f"compressed-tensors/model/{K0}.weight_scale", double, "steps"),
        (f"gptq/model/{K0}.qweight", flip, "codes"),
        (f"gptq/model/{UP1}.scales", double, "steps"),
        (f"gptq/model/{K0}.qzeros", flip, "zero points"),
        (f"gptq_v2/model/{K0}.qzeros", flip, "zero points"),
        (f"gptq_v2/model/{UP1}.g_idx", lambda groups: groups.flip(0).contiguous(), "groups"),
        (f"gptq_v2/model/{UP1}.qweight", flip, "codes"),
    ],
)
def test_what_was_changed_on_the_way_is_named(
    run_builder: Build, tensor: str, change: Callable[[Tensor], Tensor], what: str
) -> None:
    folder, _, name = tensor.partition("/model/")
    # The builder calls a folder by what is before its first hyphen.
    run = run_builder(formats=FORMATS, tamper={tensor.replace("-tensors", "", 1): change}).build("export")
    named = f"export/{folder}: {what} of {name.rpartition('.')[0]} are not those of compact"
    with pytest.raises(ArtifactError, match=named):
        list(verify_path(run))
    # Only the run knows both.
    assert len(list(verify_path(run / "export"))) == 1


def test_codes_are_read_with_the_width_that_readers_are_told(run_builder: Build) -> None:
    def edit(body: dict[str, Any]) -> dict[str, Any]:
        told = body["quantization_config"]["config_groups"]
        assert [group["weights"]["num_bits"] for group in told.values()] == [3, 4, 8]
        told["group_0"]["weights"]["num_bits"] = 2
        return body

    run = run_builder(edits={"export/compressed-tensors/config.json": edit}).build("export")
    with pytest.raises(ArtifactError, match="64 codes of 2 bits do not take 6 words"):
        list(verify_path(run))
