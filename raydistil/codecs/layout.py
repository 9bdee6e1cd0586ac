"""How soft labels lie in a buffer, as far as those must know who handle one without torch."""

HEADER_BYTES = 16  # four int32: kind, N places, C classes, and K kept or R draws
LOGITS, TOPK, SAMPLED = 1, 2, 3  # kinds
WIDE = 1 << 16  # with more classes than that, ids are int32 and not uint16
MANY = 255  # with more draws than that, counts are uint16 and not uint8
