"""A student in the form in which others open it: a folder of diffusers, or ONNX."""
