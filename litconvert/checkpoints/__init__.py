"""Any checkpoint as lazily read named tensors, and safetensors written."""
