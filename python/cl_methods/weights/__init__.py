"""Files of weights: reading every form that people have, which activation they were trained with, and the names of public code."""

from cl_methods.weights.activation import Activation
from cl_methods.weights.files import WeightsError, WeightsFile, file_sha256, read_weights
from cl_methods.weights.origin import WeightsOrigin, fingerprint

__all__ = ["Activation", "WeightsError", "WeightsFile", "WeightsOrigin", "file_sha256", "fingerprint", "read_weights"]
