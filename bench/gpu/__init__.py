"""What our kernels and our engine do on a GPU, beside what the GPU can do, and beside torch and transformers there.

Weights are random and are made on the device, in the shapes of models that people run.
"""
