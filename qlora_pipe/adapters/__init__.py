"""Operations on finished adapters: PEFT LoRA folders in, PEFT LoRA folders or figures out."""
