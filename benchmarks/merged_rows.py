"""What float16 loses of rows of a merged adapter that are far smaller than its largest ones.

    python benchmarks/merged_rows.py

Twenty products (seeds 0 to 19) of 1,024 by 1,024 and rank 8 for each span: B normal of standard deviation 0.02 times sizes
that go down by so many decades, A uniform within 1 / 32, as PEFT draws it. Told is the error of the worst row, relative to
that row: as ``balanced`` divides the sizes among the factors, and where both simply get the same largest value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_catquant.layers.float16_factors import balanced


def worst(out: Tensor, into: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    """The largest error of a row of the product of ``factors`` in float16."""
    wanted = out.double() @ into.double()
    found = factors[0].half().double() @ factors[1].half().double()
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


def main() -> None:
    """Print the table."""
    print("decades  balanced  same size")
    for decades in range(4, 9):
        errors = []
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            out = torch.randn(1024, 8, generator=generator) * 0.02 * torch.logspace(-decades, 0, 1024)[:, None]
            into = (torch.rand(8, 1024, generator=generator) * 2 - 1) / 32
            size = (into.abs().amax(1) / out.abs().amax(0)).sqrt()
            errors.append([worst(out, into, f) for f in (balanced(out, into), (out * size, into / size[:, None]))])
        found = torch.tensor(errors).amax(0).tolist()
        print(f"{decades:7d}  {found[0]:8.4f}  {found[1]:9.4f}")


if __name__ == "__main__":
    main()
