"""The logits that other people's libraries give for an exported folder.

This file is run as a script, `python -I consumer.py REQUEST`, in a process that does not import qlora_pipe: what it
loads is loaded as a stranger would. REQUEST is a JSON file: `reader`, `folder`, `base` (of an adapter), `ids` (token
numbers), `ours` (where qlora_pipe lies, if the folder needs it), and `out`, the safetensors file of the logits
[tokens, vocabulary] in fp32.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def load(request: dict[str, Any]) -> Any:
    """The model, in fp32 but for GPTQModel, whose one kernel for every width on a CPU computes in bfloat16."""
    if request["ours"]:
        sys.path.append(request["ours"])
        import qlora_pipe  # noqa: F401
    if request["reader"] == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        options = {"backend": BACKEND.GPTQ_TORCH, "dtype": torch.bfloat16, "device": "cpu"}
        return GPTQModel.load(request["folder"], **options).model
    from transformers import AutoModelForCausalLM

    if request["reader"] == "gguf":
        return AutoModelForCausalLM.from_pretrained(request["folder"], gguf_file="model.gguf", dtype=torch.float32)
    if request["reader"] == "bitsandbytes":
        model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32, device_map="cpu")
        adapter = Path(request["folder"]) / "adapter"
        if not adapter.is_dir():
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, adapter)
    if request["reader"] != "peft":
        return AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32)
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32)
    return PeftModel.from_pretrained(base, request["folder"])


def main(path: str) -> None:
    """Answer the request in `path`."""
    request = json.loads(Path(path).read_text())
    model = load(request).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([request["ids"]])).logits[0].float()
    save_file({"logits": logits.contiguous()}, request["out"])


if __name__ == "__main__":
    main(sys.argv[1])
