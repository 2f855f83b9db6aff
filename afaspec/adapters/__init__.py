"""LoRA and AFA-LoRA on PEFT's own layers: annealing, saving, starts along the gradient."""
