"""Where samples come from: folders, shards, Toybox and mixtures of them."""
