"""What Keras asks of a model that it trains: arguments, steps, dtypes, replicas, quantization."""
