"""What an archive may be: forecaster networks in batched form, the ONNX runner, request codecs."""
