"""Everything that touches other people's formats: diffusers, text encoders, LoRA files, ONNX."""
