"""How many bytes a model will take once it is quantized, from what is selected, before anything is."""

from __future__ import annotations

from torch import nn

from .correction import CatConfig
from .formats import get_format, group_count
from .layers import layer_for
from .model import Selection, Site
from .packing import packed_width


def packed_bytes(site: Site) -> int:
    """Of one layer: codes, scales, offsets, a low-rank product and a calibrated range; none where it shares another's."""
    layer = layer_for(site.module)
    if site.tied_to is not None or layer is None:
        return 0
    rows, columns = layer.matrix_shape(site.module)
    scheme, fmt = site.scheme, get_format(site.scheme.weights)
    scales = rows * group_count(columns, scheme.group_size) * (2 if fmt.affine else 1)
    ranges = 0
    if scheme.activations is not None and layer.static_activations:
        ranges = 4 * (2 if get_format(scheme.activations).affine else 1)
    product = 2 * scheme.low_rank * (rows + columns)
    return rows * packed_width(fmt, columns, scheme.group_size) + 2 * scales + product + ranges


def float_bytes(site: Site) -> int:
    """Of its float weight."""
    weight = site.module.weight
    return weight.nbytes  # type: ignore[return-value]


def output_bytes(model: nn.Module, selection: Selection) -> int:
    """Of the whole quantized model, without corrections."""
    own = [p for site in selection.sites for name, p in site.module.named_parameters() if not name.endswith("bias")]
    replaced = {parameter.data_ptr() for parameter in own}
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}  # ties once
    return sum(size for key, size in kept.items() if key not in replaced) + sum(map(packed_bytes, selection.sites))


def correction_bytes(config: CatConfig, width: int, share: int) -> int:
    """That a correction of ``width`` features takes at most; ``share`` bounds it where the number of clusters is chosen."""
    one = 4 * (3 * width + 1)  # gamma, beta and a basis of one column, whatever the share
    if config.num_clusters in ("auto", 1):
        return max(share, one) if config.num_clusters == "auto" else one
    rank = width if config.projection is None else min(config.projection, width)
    basis = rank * width if rank < width else 0
    return 4 * (basis + int(config.num_clusters) * (2 * width + rank))
