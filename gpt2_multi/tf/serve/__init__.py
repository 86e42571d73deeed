"""From texts to texts in TensorFlow's graph: the tokenizer, and the SavedModel."""
