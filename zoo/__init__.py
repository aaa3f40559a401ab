"""flaxzoo: an accelerator-first model zoo in JAX and Flax."""
