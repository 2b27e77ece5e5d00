"""State-space and hybrid language models, pretrained on accelerator pods."""

__version__ = "0.1.0"
