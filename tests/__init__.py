"""The test suite; `experiments` holds the training job's."""
