"""How good a prior's embeddings are, without decoding them to images.

N pairs, D width of CLIP embeddings. Embeddings are unit vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def prior_metrics(sampled: Tensor, images: Tensor, captions: Tensor) -> Iterator[tuple[str, float]]:
    """Compare the embeddings that a prior sampled for N captions with those of their images.

    Args:
        sampled: ẑ_i [N, D].
        images: z_i of each caption's own image, [N, D].
        captions: z_t [N, D].

    Yields: mean cosines; `own_image` is 1 for a perfect reconstruction, and `caption` should be as
        high as `data_caption`, that of the data. `first` is the share of pairs whose own image is
        the nearest to ẑ_i among all N, and `rank` its mean rank, 1 at best.
    """
    similar = sampled @ images.T
    own = similar.diagonal()
    ranks = 1 + (similar > own[:, None]).sum(1)
    yield "own_image", float(own.mean())
    yield "caption", float((sampled * captions).sum(1).mean())
    yield "data_caption", float((images * captions).sum(1).mean())
    yield "other_caption", float((sampled * captions.roll(1, 0)).sum(1).mean())
    yield "first", float((ranks == 1).float().mean())
    yield "rank", float(ranks.float().mean())
