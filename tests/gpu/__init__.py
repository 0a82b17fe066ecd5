"""Tests on a GPU, which neither `make test` nor `make test-all` runs: `-m gpu` does, and `scripts/gpu_check.sh`."""
