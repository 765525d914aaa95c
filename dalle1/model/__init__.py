"""Stage 2 of DALL·E: attention masks, attention and the transformer (paper §2.2, B.1)."""
