"""The data of a training run: texts become token ids once, and batches follow from the step."""
