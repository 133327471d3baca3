"""The only door to transformers, peft and accelerate."""
