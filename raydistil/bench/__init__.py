"""Benchmarks that stand behind the README's claims: one JSON object each, both sides in one run, interleaved."""
