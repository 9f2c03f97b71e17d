"""megaresid: pretraining to compare residual connections and attention at the same cost."""

__version__ = "0.1.0"
