"""Models that came before transformers, on the same tokens: n-grams and an LSTM."""
