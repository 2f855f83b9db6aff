"""afaspec: adapt a speculative-decoding draft to your target and traffic at LoRA cost."""

__version__ = "0.1.0"
