"""The one training engine: `cupel.training.engine`; what may be hung into it: `cupel.training.hook`."""
