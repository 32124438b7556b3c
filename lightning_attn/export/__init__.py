"""Export of trained models: safetensors, torch.export programs and ONNX graphs."""
