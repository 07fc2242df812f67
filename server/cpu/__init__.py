"""Makes a model fast on CPU: own kernels, packed linear layers, compiled decoder layers."""
