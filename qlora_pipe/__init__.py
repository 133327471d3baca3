"""A compiler for language-model weights under a memory budget.

Importing this package makes `AutoModelForCausalLM.from_pretrained` read packed folders; it imports nothing heavy.
"""

from qlora_pipe.hf.registration import register

__version__ = "0.1.0"

register()
