"""A web page to sample, complete and inpaint images, to rerank, and to look inside a model."""
