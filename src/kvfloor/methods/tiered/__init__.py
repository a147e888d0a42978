"""Keep every token twice, in 8-bit codes that are read and exactly, and fetch exact ones where the codes are unsure."""
