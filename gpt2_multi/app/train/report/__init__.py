"""What a run says of itself: figures, a curve, a model card, a progress bar."""
