"""Controlled experiments, one a method: baseline against baseline plus callback, on the same seeds."""
