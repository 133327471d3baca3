"""PEFT's LoRA on packed linear maps."""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from quant.embedding import TiedHead
from quant.exceptions import QuantError
from quant.linear import PackedLinear


class PackedLora(Linear):
    """PEFT's LoRA layer around a PackedLinear or TiedHead; its variants that read the base weight are not offered."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, PackedLinear | TiedHead)
        return module.shape.in_features, module.shape.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises QuantError: codes cannot take up an adapter."""
        raise QuantError("an adapter cannot be merged into a packed map; merge it into the dense model (export.merged)")


def packed_lora(config: Any) -> LoraConfig:
    """`config`, changed so that PEFT adapts packed linear maps too; PEFT does not save this, so ask again on loading.

    For `get_peft_model(model, packed_lora(LoraConfig(...)))` and for
    `PeftModel.from_pretrained(model, folder, config=packed_lora(PeftConfig.from_pretrained(folder)))`.
    """
    config._register_custom_module({PackedLinear: PackedLora, TiedHead: PackedLora})
    return config
