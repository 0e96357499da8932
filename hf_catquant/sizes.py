"""How many bytes a model will take once it is quantized, from what is selected, before anything is."""

from __future__ import annotations

from torch import nn

from .formats import get_format, group_count
from .layers import layer_for
from .model import Selection, Site
from .packing import packed_width


def packed_bytes(site: Site) -> int:
    """Of one layer: codes, scales, offsets and a low-rank product; none where it shares another's."""
    layer = layer_for(site.module)
    if site.tied_to is not None or layer is None:
        return 0
    rows, columns = layer.matrix_shape(site.module)
    scheme, fmt = site.scheme, get_format(site.scheme.weights)
    scales = rows * group_count(columns, scheme.group_size) * (2 if fmt.affine else 1)
    return rows * packed_width(fmt, columns, scheme.group_size) + 2 * scales + 2 * scheme.low_rank * (rows + columns)


def float_bytes(site: Site) -> int:
    """Of its float weight."""
    weight = site.module.weight
    return weight.nbytes  # type: ignore[return-value]


def output_bytes(model: nn.Module, selection: Selection) -> int:
    """Of the whole quantized model, without corrections."""
    replaced = {id(p) for site in selection.sites for n, p in site.module.named_parameters() if not n.endswith("bias")}
    kept = sum(p.nbytes for p in model.parameters() if id(p) not in replaced)
    return kept + sum(b.nbytes for b in model.buffers()) + sum(map(packed_bytes, selection.sites))
