"""Comparison with runs of the authors' PyTorch trainer, which is built on verl."""
