"""Averages of a run's weights over its steps: the hyperparameter `average`."""
