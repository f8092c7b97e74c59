"""A student as others open it: a folder for diffusers, or ONNX."""
