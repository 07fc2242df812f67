"""All training methods, by the names that `--method` takes."""

from collections.abc import Mapping

from training.methods.medusa import Medusa
from training.methods.medusa2 import Medusa2
from training.methods.method import Method
from training.methods.mtp import MTP

METHODS: Mapping[str, type[Method]] = {method.name: method for method in (Medusa, Medusa2, MTP)}
