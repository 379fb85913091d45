"""Which training examples carry the information behind a prediction, in nats."""
__version__ = "0.1.0"
