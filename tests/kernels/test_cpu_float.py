"""The compiled rotation and correction: every path against the reference, over sizes, tails, dtypes and threads."""

from __future__ import annotations

import pytest
import torch

from hf_catquant.kernels import cpu_float, native, reference

PATHS = native.available_paths()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.skipif(not PATHS, reason="the library was not built: there is no C compiler")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Every path."""
    monkeypatch.setattr(native, "path_number", native.PATHS[request.param])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotations(path, dtype, generator):
    for columns in (1, 3, 4, 6, 8, 16, 24, 32, 64, 96, 100, 128, 256, 512, 768, 1024, 2048, 4096, 8192):
        for count in (1, 5):
            x = torch.randn(2 * count, columns, generator=generator).to(dtype)[::2]  # rows apart
            for inverse in (False, True):
                found, expected = cpu_float.rotate(x, inverse), reference.rotate(x.float(), inverse)
                assert (found.dtype, found.shape) == (dtype, x.shape)
                room = torch.finfo(dtype).eps * float(expected.abs().max())
                torch.testing.assert_close(
                    found.float(), expected, rtol=0, atol=(8 if dtype == DTYPES[0] else 1) * room
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_corrections(path, dtype, generator):
    """The same cluster and then the same bits, where no two centroids are about as near."""
    sizes = ((768, 50, 16), (100, None, 5), (33, 7, 4), (5000, 50, 64), (9000, None, 7), (4, 1, 1), (300, 130, 9))
    for width, rank, clusters in sizes:
        centroids = torch.randn(clusters, rank or width, generator=generator) * (width**0.5 if rank else 1)
        basis = None if rank is None else torch.randn(width, rank, generator=generator)
        tables = (basis, centroids, *torch.randn(2, clusters, width, generator=generator))
        for count in (1, 3, 6, 41):
            y = torch.randn(count, width, generator=generator).to(dtype)
            z = y.double() if basis is None else y.double() @ basis.double()
            distance = torch.cdist(z, centroids.double()).square().sort(1).values
            sure = torch.ones(count, dtype=torch.bool)
            if clusters > 1:
                sure = distance[:, 1] - distance[:, 0] > 1e-5 * distance[:, -1]
            found, expected = cpu_float.cluster_affine(y, *tables), reference.cluster_affine(y, *tables)
            assert torch.equal(found[sure], expected[sure])
            assert int(sure.sum()) >= count - 1


def test_the_first_of_equal_centroids_and_what_is_no_number(path):
    centroids = torch.ones(5, 40)
    beta = torch.arange(5.0)[:, None].expand(5, 40).contiguous()
    y = torch.arange(240.0).view(6, 40) % 7  # sums without rounding: torch's own products of equal columns may differ
    y[3, 7], y[4] = float("nan"), float("inf")
    arguments = (y, None, centroids, torch.ones_like(beta), beta)
    torch.testing.assert_close(
        cpu_float.cluster_affine(*arguments), reference.cluster_affine(*arguments), equal_nan=True
    )


def test_results_do_not_depend_on_threads(path, generator):
    x, before = torch.randn(90, 3000, generator=generator), torch.get_num_threads()
    wide = torch.randn(3, 20000, generator=generator)
    tables = tuple(torch.randn(shape, generator=generator) for shape in ((20000, 20), (9, 20), (9, 20000), (9, 20000)))
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((cpu_float.rotate(x, False), cpu_float.cluster_affine(wide, *tables)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


def test_no_rows_and_float64_are_left_to_the_reference():
    assert cpu_float.rotate(torch.zeros(0, 8), False).shape == (0, 8)
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(cpu_float.rotate(x, False), reference.rotate(x, False))
    tables = (None, torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8))
    assert cpu_float.cluster_affine(torch.zeros(0, 8), *tables).shape == (0, 8)
