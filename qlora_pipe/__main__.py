"""`python -m qlora_pipe`, the form that torchrun starts."""

from qlora_pipe.cli import main

main()
